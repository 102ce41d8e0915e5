"""A run killed at any moment and resumed ends with the weights of the run that was not.

Real `fit` processes are killed with SIGKILL; nothing is simulated. They are forked from a server
that has imported everything, so that a run costs a second and not eight.
"""

import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from llama_lightning.cli import main
from tests.small import write_byte_tokenizer, write_small_llama

STEPS_AN_EPOCH = 13  # 102 records left in training, 8 a step: the last step is partial
EPOCHS = 3


def _fit(arguments: list[str], log: str) -> None:
    """Run `fit` in this process; the process exists for nothing else."""
    with Path(log).open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    os._exit(main(["fit", *arguments]))


@pytest.fixture(scope="module")
def processes():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["llama_lightning.cli", "lightning.pytorch.cli", "llama_lightning.data.alpaca"]
        + ["llama_lightning.training.trainer", "bitsandbytes", "torch.utils.tensorboard"]
    )
    return context


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A base model and 118 records of unequal length."""
    folder = tmp_path_factory.mktemp("resume")
    write_small_llama(folder / "base", vocab_size=512)
    write_byte_tokenizer(folder / "base")
    rng = random.Random(0)
    records = [
        {
            "instruction": f"question {i}",
            "input": "",
            "output": "".join(rng.choices("abcdef", k=rng.randint(1, 40))),
        }
        for i in range(118)
    ]
    (folder / "data.json").write_text(json.dumps(records))
    return folder


def _arguments(workplace: Path, run: Path, every: int) -> list[str]:
    # Dropout in the network and in LoRA, accumulation, a validation inside the epoch, a partial
    # last step: each has its own way to make a resumed run differ. Rank 64 makes matrices of more
    # than 4096 elements, below which bitsandbytes keeps 32-bit state.
    pairs = {
        "model.base_model": workplace / "base",
        "model.base_dtype": "float32",
        "model.dropout": 0.1,
        "model.lora.rank": 64,
        "model.lora.dropout": 0.1,
        "model.optimizer.name": "adamw8bit",
        "model.optimizer.lr": 0.003,
        "model.optimizer.init_lr": 0.0,
        "model.optimizer.warmup": 0.2,
        "model.optimizer.eta_min": 0.0003,
        "data.path": workplace / "data.json",
        "data.batch_size": 8,
        "data.val_fraction": 0.07,
        "data.test_fraction": 0.07,
        "trainer.max_epochs": EPOCHS,
        "trainer.accumulate_grad_batches": 2,
        "trainer.gradient_clip_val": 1.0,
        "trainer.val_check_interval": 10,
        "trainer.accelerator": "cpu",
        "trainer.default_root_dir": run,
        "checkpoint.dirpath": run,
        "checkpoint.every_n_train_steps": every,
    }
    return [f"--{key}={value}" for key, value in pairs.items()]


def _weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return torch.load(checkpoint, weights_only=True)["state_dict"]


def _run(
    processes, arguments: list[str], run: Path, kill_after: float | None = None
) -> float | None:
    """Start fit; kill it so many seconds after its first checkpoint.

    Return the seconds from the first checkpoint to the end, or None if it was killed.
    """
    process = processes.Process(target=_fit, args=(arguments, str(run / "log.txt")))
    process.start()
    while not (run / "last.ckpt").exists() and process.is_alive():
        time.sleep(0.002)
    start = time.monotonic()
    process.join(kill_after)
    if process.is_alive():
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        return None
    assert process.exitcode == 0, (run / "log.txt").read_text()
    return time.monotonic() - start


def _assert_bitwise_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different, f"{len(different)} of {len(one)} tensors differ, e.g. {different[0]}"


@pytest.fixture(scope="module")
def uninterrupted(processes, workplace, tmp_path_factory):
    """Final weights of a run that nobody killed, and its seconds behind the first checkpoint."""
    run = tmp_path_factory.mktemp("uninterrupted")
    seconds = _run(processes, _arguments(workplace, run, 1), run)
    checkpoint = torch.load(run / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == STEPS_AN_EPOCH * EPOCHS
    states = checkpoint["optimizer_states"][0]["state"].values()
    # bitsandbytes keeps its quantised moments in a dictionary of its own.
    moments = [s.get("__bnb_optimizer_quant_state__", s)["state1"].dtype for s in states]
    assert torch.uint8 in moments, f"no 8-bit state in this test: {set(moments)}"
    return _weights(run / "last.ckpt"), seconds


def test_killed_at_random_moments(processes, workplace, uninterrupted, tmp_path):
    expected, seconds = uninterrupted
    rng = random.Random(time.time_ns())
    trials, kills = 6, 0
    killed_at = []
    for trial in range(trials):
        run = tmp_path / str(trial)
        run.mkdir()
        arguments = _arguments(workplace, run, 1)
        if _run(processes, arguments, run, kill_after=rng.uniform(0, seconds)) is None:
            kills += 1
            step = torch.load(run / "last.ckpt", weights_only=True)["global_step"]
            killed_at.append(step)
            resume = tmp_path / f"{trial}-resume.ckpt"
            shutil.copy(run / "last.ckpt", resume)
            _run(processes, [*arguments, f"--ckpt_path={resume}"], run)
        _assert_bitwise_equal(_weights(run / "last.ckpt"), expected)
    print(f"{trials} of {trials} runs bitwise equal, {kills} of them killed, at steps {killed_at}")
    assert kills >= trials // 2, "too few runs were alive to be killed; the trial says little"


@pytest.mark.parametrize("step", [STEPS_AN_EPOCH, STEPS_AN_EPOCH + 4])
def test_resume_at_an_epochs_end_and_inside(processes, workplace, uninterrupted, tmp_path, step):
    expected, _ = uninterrupted
    arguments = _arguments(workplace, tmp_path, step)
    # Killed when its first checkpoint appears: without validations, which write one too, and which
    # must not change what is trained, that is the one of this step.
    _run(processes, [*arguments, "--trainer.limit_val_batches=0"], tmp_path, kill_after=0)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"]
    assert saved == step
    resume = tmp_path / "resume.ckpt"
    shutil.copy(tmp_path / "last.ckpt", resume)
    _run(processes, [*arguments, f"--ckpt_path={resume}"], tmp_path)
    print(f"resumed from step {saved} ({saved / STEPS_AN_EPOCH:g} epochs): bitwise equal")
    _assert_bitwise_equal(_weights(tmp_path / "last.ckpt"), expected)
