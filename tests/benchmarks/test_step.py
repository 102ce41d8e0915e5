"""The measurements run and print one line with the keys that the tables are made of."""

import json
import sys
from pathlib import Path

import pytest
import torch

from llama_lightning.model import llama, loss
from llama_lightning.training.llama_module import LlamaModule
from tests.benchmarks import step
from tests.small import write_byte_tokenizer

EVERY_KEY = {"checkpointing": "selective", "targets": "all", "no-prefix-sharing": ""}


WITHOUT = {"without": "frozen weights"}
THROUGHOUT = {"without": "rows in multiples", "throughout": "", "dtype": "bf16", "threads": "2"}


@pytest.mark.parametrize(
    "others",
    [{}, EVERY_KEY, {"mode": "full"}, WITHOUT, THROUGHOUT],
    ids=["lora", "keys", "full", "without", "throughout"],
)
def test_a_step_is_measured(
    others: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_byte_tokenizer(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    flags = {
        "shape": "tiny",
        "tokenizer": tmp_path / "tokenizer.model",
        "generated": 40,
        "batch": 8,
        "accumulate": 2,
        "steps": 2,
        "dtype": "fp32",
        "threads": 1,
    }
    flags |= others
    arguments = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
    monkeypatch.setattr(sys, "argv", ["step", *filter(None, arguments)])
    before = LlamaModule.training_step, LlamaModule.on_after_backward
    for module in (llama, loss):  # what a lever puts there for good is taken back behind the test
        monkeypatch.setattr(module, "fills_up_rows", lambda weight: True)
    step.main()
    assert llama.fills_up_rows(torch.empty(1)) == ("throughout" not in others)
    assert (LlamaModule.training_step, LlamaModule.on_after_backward) == before
    result = json.loads(capsys.readouterr().out.strip().split("\n")[-1])
    print(result)
    alternates = "without" in others and "throughout" not in others
    steps, warmup = (8, 0) if alternates else (2, 1)
    assert len(result["losses"]) == steps + warmup
    assert len(result["step_s"]) == len(result["step_cpu_s"]) == steps
    assert result["tokens"] > result["supervised"] > 0
    assert result["tok_s"] == pytest.approx(result["tokens"] / sum(result["step_s"]), rel=0.05)
    assert 0 < result["wait"] < 1
    assert result["first_step_at_s"] > 0
    assert result["peak_rss_gib"] > 0
    assert result["mode"] == others.get("mode", "lora")
    assert result["targets"] == others.get("targets", "attn")
    assert result["checkpointing"] == others.get("checkpointing", "none")
    assert result["prefixes"] == ("no-prefix-sharing" not in others)
    assert 0 < result["rows_real"] <= 1
    assert result["tok_s_cpu"] > 0
    assert result["mfu"] > 0
    assert ("gain" in result) == ("gain_cpu" in result) == alternates


def test_a_lever_that_is_not_named_cannot_be_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["step", "--throughout"])
    with pytest.raises(SystemExit):
        step.main()
    assert "--without" in capsys.readouterr().err
