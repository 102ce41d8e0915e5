"""model.compile in a fit: the same losses, the same files, and answers from a checkpoint of it."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from llama_lightning.data.alpaca import AlpacaDataModule
from llama_lightning.errors import UsageError
from llama_lightning.model.compilation import compiled
from llama_lightning.model.lora import LoRAConfig
from llama_lightning.model.sampling import GenerationConfig
from llama_lightning.training.llama_module import LlamaModule
from llama_lightning.training.trainer import Trainer
from tests.small import write_byte_tokenizer, write_small_llama


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    # The graphs are captured and run as they are; tests/model/test_compilation.py has the compiler.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    compiled.cache_clear()
    counters.clear()
    write_small_llama(tmp_path, vocab_size=512)
    write_byte_tokenizer(tmp_path)
    records = [{"instruction": f"Say {i}.", "output": "ab" * (i + 1)} for i in range(8)]
    (tmp_path / "data.json").write_text(json.dumps(records))
    return tmp_path


def _module(folder: Path, **arguments: Any) -> LlamaModule:
    torch.manual_seed(0)
    return LlamaModule(
        str(folder),
        base_dtype="float32",
        lora=LoRAConfig(rank=4),
        generation=GenerationConfig(max_new_tokens=4),
        **arguments,
    )


def _data(folder: Path) -> AlpacaDataModule:
    return AlpacaDataModule(
        str(folder / "data.json"),
        predict_path=str(folder / "data.json"),
        val_fraction=0.25,
        test_fraction=0.0,
        base_folder=str(folder),
        batch_size=2,
    )


def _trainer(folder: Path, epochs: int) -> Trainer:
    return Trainer(
        accelerator="cpu",
        precision="32-true",
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=str(folder),
    )


def _fit(folder: Path, name: str, epochs: int, resume: str | None = None, **arguments: Any) -> Any:
    """Train, and return what stands in the checkpoint at the end."""
    trainer, path = _trainer(folder, epochs), folder / name
    module, old = _module(folder, **arguments), folder / resume if resume else None
    trainer.fit(module, _data(folder), ckpt_path=old, weights_only=False)
    trainer.save_checkpoint(path)
    return torch.load(path, weights_only=False)


@pytest.mark.slow
def test_a_compiled_run_is_the_same_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = _fit(folder, "plain.ckpt", 2)["state_dict"]
    assert not counters["stats"]
    _fit(folder, "half.ckpt", 1, compile=True, gradient_checkpointing="selective")
    whole = _fit(folder, "whole.ckpt", 2, resume="half.ckpt", compile=True)
    graphs = counters["stats"]["unique_graphs"]
    ours = whole["state_dict"]
    assert list(ours) == list(plain)
    worst = max((ours[name] - plain[name]).abs().max().item() for name in plain)
    print(f"{graphs} graphs for 2 fits with validation; worst weight {worst:.1e} (bound 1e-5)")
    assert 0 < graphs <= 9
    assert worst <= 1e-5
    assert whole["llama_lightning"]["arguments"]["compile"] is True

    monkeypatch.setenv("CXX", "no-such-compiler")  # answering needs none
    answers = []
    for name in ("plain.ckpt", "whole.ckpt"):
        module = LlamaModule.load_from_checkpoint(folder / name)
        answers.append(_trainer(folder, 1).predict(module, _data(folder)))
    assert module.compile_blocks
    assert answers[0] == answers[1]
    assert counters["stats"]["unique_graphs"] == graphs


def test_without_a_compiler_a_fit_ends_before_it_begins(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UsageError, match="model.compile needs .* no no-such-compiler on this"):
        _trainer(folder, 1).fit(_module(folder, compile=True), _data(folder))


@pytest.mark.slow  # some 20 s until torch asks for the compiler
def test_a_compiler_that_does_not_work_is_said_in_one_line(tmp_path: Path) -> None:
    keys = {"config": "configs/tiny_lora.yaml", "model.compile": "true", "trainer.max_steps": 1}
    keys |= {"trainer.default_root_dir": tmp_path}
    done = subprocess.run(
        [sys.executable, "-m", "llama_lightning", "fit", *(f"--{k}={v}" for k, v in keys.items())],
        env=os.environ | {"CXX": "false", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
    )
    print(done.stderr[-600:])
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: model.compile: torch cannot compile here (")
    assert "set it to false" in last
