"""Each format of data, and their mix, goes through fit and predict on the command line."""

import csv
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import yaml

from llama_lightning.assets import TINY_TRAIN
from llama_lightning.cli import main

RECORDS = json.loads(TINY_TRAIN.read_text(encoding="utf-8"))[:24]


def chat(*records: dict[str, str]) -> list[tuple[str, str]]:
    turns = []
    for record in records:
        question = f"{record['instruction']}\n{record['input']}".strip()
        turns += [("user", question), ("assistant", record["output"])]
    return turns


def write_sources(folder: Path) -> list[str]:
    """Write six records, or three chats of two, in each format."""
    parts = [RECORDS[i : i + 6] for i in range(0, 24, 6)]
    (folder / "a.json").write_text(json.dumps(parts[0]))
    with (folder / "b.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, RECORDS[0].keys())
        writer.writeheader()
        writer.writerows(parts[1])
    messages = [
        {"messages": [{"role": role, "content": text} for role, text in chat(*parts[2][i : i + 2])]}
        for i in range(0, 6, 2)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(messages), folder / "c.parquet")
    names = {"user": "human", "assistant": "gpt"}
    lines = [
        {"conversations": [{"from": names[role], "value": text} for role, text in turns]}
        for turns in (chat(*parts[3][i : i + 2]) for i in range(0, 6, 2))
    ]
    (folder / "d.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return ["a.json", "b.csv", "c.parquet", "d.jsonl"]


def test_every_source_is_trained_on_and_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sources = write_sources(tmp_path)
    config = {
        "model": {
            "base_model": "tiny",
            "base_dtype": "float32",
            "lora": {"rank": 2},
            "generation": {"max_new_tokens": 2},
        },
        "data": {
            "path": {source: 1 + i / 3 for i, source in enumerate(sources)},
            "template": "llama3",
            "batch_size": 4,
            "val_fraction": 0.0,
            "test_fraction": 0.0,
        },
        "trainer": {"max_steps": 4, "accelerator": "cpu"},
    }
    Path("run.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config=run.yaml"]) == 0
    checkpoint = "lightning_logs/version_0/checkpoints/last.ckpt"
    for source in sources:
        given = ["--config=run.yaml", f"--ckpt_path={checkpoint}", f"--data.predict_path={source}"]
        assert main(["predict", *given, "--responses.path=responses.jsonl"]) == 0
        rows = [json.loads(line) for line in Path("responses.jsonl").read_text().splitlines()]
        references = [row["reference"] for row in rows]
        first = 6 * sources.index(source)
        every = 1 if source in ("a.json", "b.csv") else 2  # a chat is answered at its end
        expected = [record["output"] for record in RECORDS[first : first + 6]][every - 1 :: every]
        print(f"{source}: {len(rows)} answers, the first question {rows[0]['instruction']!r}")
        assert references == expected
        assert [row["id"] for row in rows] == list(range(len(expected)))
