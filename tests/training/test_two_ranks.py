"""The command line on two processes: it ends, writes once, and trains what one process trains."""

import re
from pathlib import Path

import pytest
import torch

from llama_lightning.cli import main
from tests.verb_processes import on_two_ranks

ROOT = Path(__file__).parents[2]


def arguments(folder: Path) -> list[str]:
    keys = ["--trainer.max_steps=6", "--trainer.val_check_interval=3", "--samples.every_n_steps=3"]
    keys += [f"--trainer.default_root_dir={folder}", "--checkpoint.every_n_train_steps=2"]
    keys += ["--export.format=hf", "--trainer.strategy=auto"]  # the export measures on all ranks
    return ["fit", f"--config={ROOT}/configs/tiny_lora.yaml", *keys]


@pytest.mark.slow
def test_predict_on_two_ranks_says_how_to_grade(tmp_path: Path) -> None:
    keys = [f"--trainer.default_root_dir={tmp_path}", "--trainer.limit_predict_batches=1"]
    keys += ["--judge.backend=exact", "--trainer.strategy=auto"]
    output = on_two_ranks(["predict", f"--config={ROOT}/configs/tiny_lora.yaml", *keys])
    (command,) = re.findall(r"next: python -m llama_lightning (judge .+)", output)
    print(command)
    assert main(command.split()) == 0
    assert len(list(tmp_path.rglob("report.html"))) == 1


@pytest.mark.slow
def test_two_ranks_train_what_one_trains(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folders = {ranks: tmp_path / str(ranks) for ranks in (1, 2)}
    assert main([*arguments(folders[1]), "--trainer.devices=1"]) == 0
    outputs = {1: capfd.readouterr().out, 2: on_two_ranks(arguments(folders[2]))}
    weights = {}
    for ranks, folder in folders.items():
        (checkpoint,) = folder.rglob("last.ckpt")
        weights[ranks] = torch.load(checkpoint, weights_only=True)["state_dict"]
        assert len(list(folder.rglob("config.yaml"))) == 1
        assert len(list(folder.rglob("best.ckpt"))) == 1
    assert outputs[2].count("trained weights:") == 1
    assert outputs[2].count("Memory on cpu") == 1
    losses = {}
    for ranks, output in outputs.items():
        (line,) = re.findall(r"validation loss (\S+) as trained, (\S+) merged", output)
        losses[ranks] = [float(loss) for loss in line]
        assert output.count("exported:") == 1
    print(f"validation loss before and after the export's merging, by ranks: {losses}")
    assert losses[2] == pytest.approx(losses[1], abs=1e-3)
    error = max(
        float((weights[2][name] - tensor).norm() / tensor.norm())
        for name, tensor in weights[1].items()
    )
    print(f"6 steps on 2 ranks against 1: {error:.1e} relative norm, the worst of all matrices")
    assert error < 1e-3  # fp32 sums in another order, through Adam's square roots
