"""How far the judge is: a bar for a person, a line now and then for a log file."""

import re
import time
from pathlib import Path
from typing import Any

import pytest

from llama_lightning import progress
from llama_lightning.evaluation.grading import grade_file
from llama_lightning.evaluation.judge import JudgeConfig
from tests.evaluation.test_judge import record, write
from tests.fake_ollama import FakeOllama, Words


def grade(tmp_path: Path) -> None:
    def slow(body: dict[str, Any]) -> Words:
        time.sleep(0.05)
        return Words("[RESULT] 4")

    path = write(tmp_path / "responses.jsonl", [record(i) for i in range(10)])
    with FakeOllama(slow) as server:
        grade_file(JudgeConfig(backend="ollama", base_url=server.url), path)


def test_a_bar_in_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes it for a terminal
    monkeypatch.setenv("TERM", "xterm")
    grade(tmp_path)
    drawn = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().out)
    shown = re.findall(r"judge.*? (\d+)/10 .*?left (\S+)", drawn)
    print(shown)
    assert shown[-1] == ("10", "0:00:00")
    assert len({done for done, _ in shown}) > 1


def test_lines_in_a_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.setattr(progress, "PLAIN_LINE_SECONDS", 0.12)
    grade(tmp_path)
    lines = re.findall(r"judge (\d+)/10  0:0\d left\n", capsys.readouterr().out)
    print(lines)
    assert 2 <= len(lines) <= 6
    assert lines[-1] == "10"
