"""Every source of weights and of data, and every target, through fit, predict and export."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pyarrow
import pyarrow.parquet
import pytest
import torch
import transformers

from llama_lightning import LlamaModule
from llama_lightning.assets import TINY
from llama_lightning.cli import main
from llama_lightning.model.lora import LLAMA_LINEARS
from llama_lightning.weights.huggingface import save_huggingface
from tests.model.oracle import max_difference, small_config, small_llama
from tests.small import write_byte_tokenizer
from tests.weights.meta_reference import cut, random_weights, write_meta

BOUND = 1e-4
QUESTIONS = [f"What is {i}?" for i in range(16)]
RECORDS: list[dict[str, Any]] = [
    {"instruction": question, "input": "in words", "output": f"It is {i}."}
    for i, question in enumerate(QUESTIONS)
]


# --- bases ---


def _hf(folder: Path, **how: Any) -> None:
    torch.manual_seed(0)
    save_huggingface(small_llama(small_config(vocab_size=1472), std=0.1), folder, **how)
    shutil.copy(TINY / "tokenizer.json", folder)


def _sharded(folder: Path) -> None:
    _hf(folder, max_shard_bytes=500_000)
    assert (folder / "model.safetensors.index.json").is_file()


def _meta(folder: Path, num_files: int = 1) -> None:
    torch.manual_seed(0)
    write_meta(folder, cut(random_weights(head="equal"), num_files))
    write_byte_tokenizer(folder)


def _meta_cut(folder: Path) -> None:
    _meta(folder, num_files=2)


def _adapted(folder: Path) -> None:
    """A base, and in it an adapter that PEFT has made."""
    _hf(folder)
    model = transformers.LlamaForCausalLM.from_pretrained(folder)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=list(LLAMA_LINEARS)
    )
    peft.get_peft_model(model, config).save_pretrained(folder / "adapter")


BASES = {
    "hf": _hf,
    "hf shards": _sharded,
    "meta": _meta,
    "meta, 2 files": _meta_cut,
    "peft adapter": _adapted,
}


# --- data ---


def _json(folder: Path) -> list[str]:
    (folder / "records.json").write_text(json.dumps(RECORDS))
    return [f"--data.path={folder / 'records.json'}"]


def _lines(path: Path, rows: list[Any]) -> list[str]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [f"--data.path={path}"]


def _jsonl(folder: Path) -> list[str]:
    return _lines(folder / "records.jsonl", RECORDS)


def _csv(folder: Path) -> list[str]:
    path = folder / "records.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["question", "input", "answer"])
        writer.writerows(row.values() for row in RECORDS)
    return [f"--data.path={path}", "--data.columns={instruction: question, output: answer}"]


def _parquet(folder: Path) -> list[str]:
    path = folder / "records.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), path)
    return [f"--data.path={path}"]


def _messages(folder: Path) -> list[str]:
    chats = [
        {
            "messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": "In words?"},
                {"role": "user", "content": "Yes."},
                {"role": "assistant", "content": "Good."},
            ]
        }
        for question in QUESTIONS
    ]
    return [*_lines(folder / "chats.jsonl", chats), "--data.template=llama3"]


def _conversations(folder: Path) -> list[str]:
    chats = [
        {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": "Well."}]}
        for q in QUESTIONS
    ]
    return _lines(folder / "chats.jsonl", chats)


def _mix(folder: Path) -> list[str]:
    _json(folder)
    path = folder / "more.jsonl"
    _lines(path, [{**row, "instruction": row["instruction"] + " Now."} for row in RECORDS])
    return [f"--data.path={{{folder / 'records.json'}: 1, {path}: 0.5}}"]


# Each base and each kind of data at least once, each target with LoRA and, but for adapters, in
# full. A byte tokenizer has no merges, which llama.cpp asks for.
CASES = [
    ("hf", _json, "gguf", 4),
    ("hf shards", _csv, "hf", 4),
    ("meta", _parquet, "peft", 4),
    ("meta, 2 files", _jsonl, "hf", 0),
    ("peft adapter", _messages, "peft", 0),
    ("hf", _conversations, "gguf", 0),
    ("hf shards", _mix, "peft", 4),
]


def test_each_source_and_target_is_there() -> None:
    assert {case[0] for case in CASES} == set(BASES)
    assert {case[2] for case in CASES} == {"peft", "hf", "gguf"}


@pytest.mark.parametrize(
    ("base", "data", "target", "rank"),
    CASES,
    ids=[f"{base}, {data.__name__[1:]} to {target}" for base, data, target, _ in CASES],
)
def test_fit_predict_export(base: str, data: Any, target: str, rank: int, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    BASES[base](folder)
    keys = {
        "model.base_model": folder,
        "model.base_dtype": "float32",
        "model.lora.rank": rank,
        "model.generation.max_new_tokens": 4,
        "data.batch_size": 4,
        "data.val_fraction": 0.2,
        "data.test_fraction": 0.2,
        "trainer.max_steps": 1,
        "trainer.accelerator": "cpu",
        "trainer.default_root_dir": tmp_path,
        "trainer.enable_progress_bar": False,
        "export.format": "none",
    }
    common = [*(f"--{key}={value}" for key, value in keys.items()), *data(tmp_path)]
    if base == "peft adapter":
        common.append(f"--model.adapter={folder / 'adapter'}")
    assert main(["fit", *common]) == 0
    run = tmp_path / "lightning_logs" / "version_0"
    checkpoint = run / "checkpoints" / "last.ckpt"

    responses = tmp_path / "responses.jsonl"
    trained = [f"--config={run / 'config.yaml'}", f"--ckpt_path={checkpoint}"]
    assert main(["predict", *trained, f"--responses.path={responses}"]) == 0
    rows = [json.loads(line) for line in responses.read_text().split("\n") if line]
    assert len(rows) >= 3
    assert all(row["instruction"] and row["reference"] for row in rows)

    out = tmp_path / "out"
    assert main(["export", *trained, f"--format={target}", f"--output={out}"]) == 0
    module = LlamaModule.load_from_checkpoint(checkpoint).eval()
    assert module.model is not None
    tokens = torch.randint(256, (2, 32))
    with torch.no_grad():
        ours = module.model(tokens)
        if target == "gguf":
            (file,) = out.glob("*.gguf")
            assert file.stat().st_size > 1_000_000  # tests/weights/test_gguf.py reads it
            return
        if target == "hf":
            theirs = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        else:
            if base.startswith("meta"):  # which only Meta's code and ours read: as a base for PEFT
                assert main(["export", *common, "--format=hf", f"--output={tmp_path / 'hf'}"]) == 0
            there = tmp_path / "hf" if base.startswith("meta") else folder
            model = transformers.AutoModelForCausalLM.from_pretrained(there, dtype=torch.float32)
            theirs = peft.PeftModel.from_pretrained(model, out)
        difference = max_difference(ours, theirs.eval()(tokens).logits)
    print(f"{base}, {data.__name__[1:]}, rank {rank} to {target}: logits {difference:.1e}")
    assert difference <= BOUND
