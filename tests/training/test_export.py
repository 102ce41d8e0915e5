"""Exports in the programs they are for, and what a user can do wrong on the way there."""

import json
import os
import re
import resource
import shutil
import subprocess
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger

from llama_lightning import AlpacaDataModule, LlamaModule, LoRAConfig, Trainer
from llama_lightning.assets import TINY
from llama_lightning.cli import main
from llama_lightning.errors import UsageError, WeightsError
from llama_lightning.training import export
from llama_lightning.training.export import ExportAtEnd
from llama_lightning.weights.huggingface import save_huggingface
from llama_lightning.weights.new_folder import ORIGIN, check_target, new_folder
from tests.model.oracle import max_difference, small_config, small_llama

USAGE, DATA = 2, 3
LORA = ["--model.lora.rank=4", "--model.optimizer.lr=0.01"]


def _write_base(folder: Path) -> Path:
    torch.manual_seed(0)
    save_huggingface(small_llama(small_config(vocab_size=1472), std=0.1), folder)
    shutil.copy(TINY / "tokenizer.json", folder)
    return folder


def _fit(base: Path, run: Path, *arguments: str, steps: int = 3) -> Path:
    """A few steps through the command line; returns the run's folder."""
    records = [{"instruction": f"Say {i}.", "input": "", "output": f"{i}"} for i in range(40)]
    run.mkdir(parents=True, exist_ok=True)
    (run / "data.json").write_text(json.dumps(records))
    keys = {
        "model.base_model": base,
        "model.base_dtype": "float32",
        "data.path": run / "data.json",
        "data.batch_size": 8,
        "data.val_fraction": 0.2,
        "trainer.max_steps": steps,
        "trainer.val_check_interval": 1,
        "trainer.accelerator": "cpu",
        "trainer.default_root_dir": run,
        "trainer.enable_progress_bar": False,
    }
    assert main(["fit", *(f"--{key}={value}" for key, value in keys.items()), *arguments]) == 0
    return run / "lightning_logs" / "version_0"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return _write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def run(base, tmp_path_factory) -> Path:
    """A LoRA run, with its adapter exported at its end."""
    return _fit(base, tmp_path_factory.mktemp("run"), *LORA)


def _export(run: Path, *arguments: str) -> int:
    checkpoint = run / "checkpoints" / "last.ckpt"
    config = run / "config.yaml"
    return main(["export", f"--config={config}", f"--ckpt_path={checkpoint}", *arguments])


def _trained(run: Path) -> LlamaModule:
    return LlamaModule.load_from_checkpoint(run / "checkpoints" / "last.ckpt").eval()


@torch.no_grad()
def _difference(module: LlamaModule, theirs: Any) -> float:
    tokens = torch.randint(1400, (2, 64))
    assert module.model is not None
    return max_difference(module.model(tokens), theirs(tokens, use_cache=False).logits)


def _transformers(folder: Path) -> Any:
    twin, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return twin.eval()


def test_a_lora_run_leaves_its_adapter(run, base):
    folder = run / "export"
    adapted = peft.PeftModel.from_pretrained(_transformers(base), folder).eval()
    module = _trained(run)
    difference = _difference(module, adapted)
    moved = _difference(module, _transformers(base))
    print(f"PEFT: max |logit difference| {difference:.1e}; to the base {moved:.1e}")
    assert difference <= 1e-4
    assert moved > 1e-2
    card = (folder / "README.md").read_text()
    assert re.search(r"\| val/loss, as last logged \| \d\.\d{4} \|", card)
    assert "| optimizer steps | 3 |" in card
    assert "| `model.lora.rank` | 4 |" in card
    assert f"| `model.base_model` | {base} |" in card
    assert "| `data.template` | alpaca |" in card


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_the_hf_folder_in_transformers(dtype, run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export, "TOLERANCE", 1e-5)
    output = tmp_path / "new" / "hf"
    assert _export(run, "--format=hf", f"--output={output}", f"--dtype={dtype}") == 0
    said = capsys.readouterr().out
    line = re.search(
        r"validation loss (\S+) as trained, (\S+) merged in (\w+) \(difference (\S+?)(: MORE.*)?\)",
        said,
    )
    assert line is not None, said
    logits = _difference(_trained(run), _transformers(output))
    with capsys.disabled():
        print(f"{line[0]}; max |logit difference| {logits:.1e}")
    assert line[3] == ("float32" if dtype == "auto" else "bfloat16")
    assert line[5] == (None if dtype == "auto" else ": MORE THAN 1e-05")
    card = (output / "README.md").read_text()
    assert f"| validation loss as trained | {line[1]} |" in card
    assert f"| validation loss merged, in {line[3]} | {line[2]} |" in card
    if dtype == "auto":
        assert logits <= 1e-4
    tokenizer = transformers.AutoTokenizer.from_pretrained(output)
    assert tokenizer.chat_template
    config = json.loads((output / "config.json").read_text())
    assert config["bos_token_id"] == tokenizer.bos_token_id
    assert tokenizer.eos_token_id in config["eos_token_id"]
    assert not [path.name for path in output.parent.iterdir() if path != output]
    assert {path.stat().st_mode & 0o777 for path in output.iterdir()} == {0o644}


def test_all_the_way_round(base, tmp_path, capsys):
    # A full run leaves a Hugging Face folder; LoRA on it; its adapter fits that folder.
    full = _fit(base, tmp_path / "full", "--model.optimizer.lr=0.001")
    exported = full / "export"
    assert _difference(_trained(full), _transformers(exported)) <= 1e-4
    assert "| val/loss, as last logged |" in (exported / "README.md").read_text()
    lora = _fit(exported, tmp_path / "lora", *LORA, "--export.format=none")
    assert not (lora / "export").exists()
    assert _export(lora, "--output", str(tmp_path / "adapter")) == 0
    adapted = peft.PeftModel.from_pretrained(_transformers(exported), tmp_path / "adapter").eval()
    difference = _difference(_trained(lora), adapted)
    print(f"fit, hf, fit, peft: max |logit difference| {difference:.1e}")
    assert difference <= 1e-4
    assert "validation loss" in (tmp_path / "adapter" / "README.md").read_text()


def test_fit_refuses_before_it_trains(base, tmp_path, capfd):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    keys = [f"--model.base_model={base}", "--trainer.max_steps=1", "--trainer.accelerator=cpu"]
    keys += [
        "--data.path=tiny",
        f"--trainer.default_root_dir={tmp_path}",
        f"--export.output={tmp_path / 'mine'}",
    ]
    assert main(["fit", *keys]) == USAGE
    error = capfd.readouterr().err.splitlines()[-1]
    print(error)
    assert "mine: not empty (thesis.tex)" in error


@pytest.mark.parametrize("logger", [False, DummyLogger(), TensorBoardLogger(".", "", "")])
def test_no_export_into_a_folder_that_runs_share(logger, tmp_path, base, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    trainer = Trainer(accelerator="cpu", logger=logger, enable_checkpointing=False)
    module = LlamaModule(str(base))
    with caplog.at_level("INFO"):
        unasked = ExportAtEnd()
        unasked.setup(trainer, module, "fit")
    assert unasked.what is None
    assert "no folder of its own; set export.output" in caplog.text
    with pytest.raises(UsageError, match=r"no folder of its own; set export\.output"):
        ExportAtEnd("hf").setup(trainer, module, "fit")
    asked = ExportAtEnd("hf", output="out")
    asked.setup(trainer, module, "fit")
    assert asked.what is not None
    assert asked.what.output == Path("out")
    assert not list(tmp_path.iterdir())


def test_export_by_python(tmp_path, base):
    data = AlpacaDataModule(tokenizer=str(base), val_fraction=0.0)
    module = LlamaModule(str(base), lora=LoRAConfig(rank=2), base_dtype="float32")
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.export(module, data, format="hf", output=str(tmp_path / "hf"))
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "| validation loss as trained | not measured, there is no validation part |" in card
    assert _difference(module, _transformers(tmp_path / "hf")) == 0.0


# --- what a user may do wrong ---


def _error(capfd: pytest.CaptureFixture[str]) -> str:
    lines = capfd.readouterr().err.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert "Traceback" not in "\n".join(lines)
    assert len(errors) == 1, lines
    print(errors[0])
    return errors[0]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--format=onnx"], USAGE, "export.format: expected one of 'auto'"),
        (["--format=hf", "--dtype=q8_0"], USAGE, "dtype q8_0 is for format gguf"),
        (["--dtype=float16"], USAGE, "an adapter keeps the type"),
        (["--fromat=hf"], USAGE, "unknown key fromat in the command line"),
        (["--trainer.devices=2"], USAGE, "set trainer.devices to 1"),
        (["--model.base_model=nowhere"], DATA, "nowhere is not a folder here"),
        (["--model.base_model=tiny"], DATA, "tiny is not the base of this checkpoint"),
        (["--model.lora.rank=0"], DATA, "model.lora.rank is 0, the checkpoint has 4"),
        (["--ckpt_path=nix.ckpt"], DATA, "nix.ckpt: no such file"),
        (["--output=full"], USAGE, "full: not empty (thesis.tex); name another folder"),
        (["--output=full", "--overwrite"], USAGE, "thesis.tex in it is not of an export"),
        (["--output=."], USAGE, "the working directory; name a folder in it"),
        (["--output=full/thesis.tex"], USAGE, "thesis.tex: a file"),
    ],
)
def test_refused(arguments, code, said, run, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    Path("full").mkdir()
    Path("full/thesis.tex").touch()
    assert _export(run, "--output=out", *arguments) == code
    assert said in _error(capfd)
    assert [str(path) for path in Path().rglob("*")] == ["full", "full/thesis.tex"]


def test_output_is_needed_and_is_not_the_base(run, base, capfd):
    assert _export(run) == USAGE
    assert "output: not given" in _error(capfd)
    before = sorted(base.iterdir())
    assert _export(run, "--format=hf", f"--output={base}", "--overwrite=true") == USAGE
    assert "the base model itself" in _error(capfd)
    assert sorted(base.iterdir()) == before


def test_no_adapter_in_a_full_run(base, tmp_path, capfd):
    full = _fit(base, tmp_path / "full", "--export.format=gguf", steps=1)
    assert {path.name for path in (full / "export").iterdir()} == {"model-f32.gguf", "Modelfile"}
    assert _export(full, "--format=peft", f"--output={tmp_path / 'out'}") == USAGE
    assert "format peft: there is no adapter" in _error(capfd)
    config, out = full / "config.yaml", tmp_path / "out"
    arguments = ["--model.lora.rank=4", "--format=peft", f"--output={out}"]
    assert main(["export", f"--config={config}", *arguments]) == USAGE
    assert "without ckpt_path there is no adapter" in _error(capfd)
    assert not out.exists()


def test_an_earlier_export_is_replaced_when_asked(run, tmp_path, capfd):
    output = tmp_path / "out"
    assert _export(run, "--format=hf", f"--output={output}") == 0
    (tmp_path / ".out.new").mkdir()  # left by an export that was killed
    assert _export(run, f"--output={output}") == USAGE
    assert "not empty (README.md)" in _error(capfd)
    assert _export(run, f"--output={output}", "--overwrite") == 0
    names = sorted(path.name for path in output.iterdir())
    assert names == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"alpaca_data.json": "[]"}, "alpaca_data.json in it is not of an export"),
        ({"config.json": "{}", "README.md": "---\ntags: [llama]\n---"}, "neither README.md nor"),
        ({"model-f16.gguf": "", "Modelfile": "FROM ./model-f16.gguf"}, "neither README.md nor"),
        ({"README.md": ORIGIN["README.md"], "config.json/a": ""}, "config.json in it is not"),
        ({"README.md": f"---\n{ORIGIN['README.md']}\n---", "config.json": "{}"}, None),
        ({"Modelfile": f"{ORIGIN['Modelfile']}\nFROM ./a", "model-f16.gguf": ""}, None),
    ],
)
def test_only_an_export_of_ours_is_replaced(files, said, tmp_path):
    for name, text in files.items():
        path = tmp_path / "out" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    if said is None:
        check_target(tmp_path / "out", overwrite=True)
    else:
        with pytest.raises(UsageError, match=said):
            check_target(tmp_path / "out", overwrite=True)


def test_the_earlier_export_survives_a_kill_between_the_renames(tmp_path):
    output, before = tmp_path / "out", tmp_path / ".out.old"
    before.mkdir()
    (before / "README.md").write_text(ORIGIN["README.md"])
    with pytest.raises(UsageError, match="not empty"), new_folder(output, overwrite=False):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def fail_between_the_renames() -> None:
        with new_folder(output, overwrite=True):
            output.replace(before)
            raise OSError

    with pytest.raises(WeightsError):
        fail_between_the_renames()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with new_folder(output, overwrite=True) as folder:
        (folder / "new").touch()
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["out", "out/new"]


def _python_export(base: Path, output: Path, format: str) -> None:
    data = AlpacaDataModule(tokenizer=str(base), val_fraction=0.0)
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.export(LlamaModule(str(base)), data, format=format, output=str(output))


@pytest.mark.parametrize("format", ["hf", "gguf"])
def test_a_file_too_large_leaves_nothing(format, base, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, hard))
    try:
        with pytest.raises(WeightsError, match="cannot be written") as caught:
            _python_export(base, tmp_path / "out", format)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    print(caught.value)
    assert re.search("File too large|no room", str(caught.value))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", ["hf", "gguf"])
def test_a_full_disk_leaves_nothing(format, base, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small file system can be mounted by root only")
    try:
        with pytest.raises(WeightsError, match="No space left|no room") as caught:
            _python_export(base, disk / "out", format)
        print(caught.value)
        assert not list(disk.iterdir())
    finally:
        subprocess.run(["umount", str(disk)], check=True)
