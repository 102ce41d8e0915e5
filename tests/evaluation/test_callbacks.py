"""Responses reach their file as they finish, whoever computes them and however the run ends."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from llama_lightning.cli import main
from tests.verb_processes import forked, on_two_ranks, running, spawned

ROOT = Path(__file__).parents[2]
PROMPTS = [
    {"instruction": f"Repeat.\u2028 {i}", "input": "" if i % 3 else f"{i}", "output": f"{i}"}
    for i in range(23)
]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.json"
    path.write_text(json.dumps(PROMPTS))
    return path


def _arguments(prompts: Path, target: Path, *arguments: str) -> list[str]:
    return [
        "predict",
        f"--config={ROOT}/configs/tiny_lora.yaml",
        f"--data.predict_path={prompts}",
        f"--responses.path={target}",
        f"--trainer.default_root_dir={target.parent}",
        *arguments,
    ]


def _rows(path: Path) -> list[dict]:
    # Not splitlines(), which would cut at the U+2028 inside.
    return [json.loads(line) for line in path.read_text().split("\n") if line]


@pytest.fixture(scope="module")
def alone(prompts, tmp_path_factory):
    """The file of one process, all prompts in one batch."""
    target = tmp_path_factory.mktemp("alone") / "responses.jsonl"
    assert main(_arguments(prompts, target, "--data.eval_batch_size=23")) == 0
    return target


def test_rows_are_sorted_and_carry_their_record(alone):
    rows = _rows(alone)
    assert [row["id"] for row in rows] == list(range(23))
    for row, prompt in zip(rows, PROMPTS, strict=True):
        assert (row["instruction"], row["input"]) == (prompt["instruction"], prompt["input"])
        assert row["reference"] == prompt["output"]
        assert row["finish_reason"] in ("stop", "length")
        assert row["num_tokens"] <= 32


@pytest.mark.slow
def test_two_ranks_write_the_file_of_one(prompts, alone, tmp_path):
    # 23 prompts, 5 a batch, 2 ranks: the last batch is short and one rank has a batch less.
    target = tmp_path / "responses.jsonl"
    keys = ("--trainer.strategy=ddp", "--data.eval_batch_size=5")
    output = on_two_ranks(_arguments(prompts, target, *keys))
    assert target.read_bytes() == alone.read_bytes()
    assert not list(tmp_path.glob("*.rank*")), "a rank's own file was left over"
    assert output.count("exact match") == 1


@pytest.mark.slow
def test_a_rank_without_a_prompt_does_not_hold_the_other_up(prompts, tmp_path):
    target, few = tmp_path / "responses.jsonl", tmp_path / "few.json"
    few.write_text(json.dumps(PROMPTS[:3]))
    keys = ("--trainer.strategy=ddp", "--data.eval_batch_size=8")
    on_two_ranks(_arguments(few, target, *keys), timeout=120)
    assert [row["id"] for row in _rows(target)] == [0, 1, 2]


def test_answers_of_an_earlier_run_are_kept(prompts, tmp_path):
    target = tmp_path / "responses.jsonl"
    target.write_text('{"id": 0, "response": "precious"}\n')
    assert main(_arguments(prompts, target)) == 0
    assert len(_rows(target)) == 23
    assert "precious" in (tmp_path / "responses.jsonl.previous").read_text()


def test_files_that_cannot_take_responses(prompts, tmp_path, capfd):
    folder = tmp_path / "folder"
    folder.mkdir()
    said = {}
    for target in (folder, Path("/dev/full")):
        code = main([*_arguments(prompts, target), f"--trainer.default_root_dir={tmp_path}"])
        error = capfd.readouterr().err
        assert "Traceback" not in error
        said[target] = (code, error.splitlines()[-1])
        print(said[target])
    assert said[folder][0] == 2
    assert "is a folder; name a file in it" in said[folder][1]
    assert folder.is_dir()
    assert said[Path("/dev/full")][0] == 3
    assert "No space left on device; make room" in said[Path("/dev/full")][1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signum", "code", "context"),
    [(signal.SIGTERM, 143, spawned), (signal.SIGINT, 130, forked), (signal.SIGKILL, -9, forked)],
)
def test_a_stopped_predict_keeps_its_rows(tmp_path, signum, code, context):
    target = tmp_path / "responses.jsonl"
    many = tmp_path / "prompts.json"
    many.write_text(json.dumps(PROMPTS * 40))
    log = tmp_path / "log.txt"
    with running(_arguments(many, target, "--data.eval_batch_size=1"), log, context()) as process:
        while not target.exists() or target.read_bytes().count(b"\n") < 3:
            assert process.is_alive(), log.read_text()
            time.sleep(0.01)
        os.kill(process.pid, signum)
        process.join(timeout=20)
        assert process.exitcode == code, log.read_text()
    rows = _rows(target)
    print(f"{signal.Signals(signum).name}: exit code {code}, {len(rows)} rows kept")
    assert 3 <= len(rows) < 920
    assert [row["id"] for row in rows] == list(range(len(rows)))
