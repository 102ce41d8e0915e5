"""Ours and transformers do the same work, and print one line of it each."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.benchmarks import generate
from tests.small import write_byte_tokenizer

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("peer", [generate.OURS, generate.HF])
def test_generation_is_measured(
    peer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_byte_tokenizer(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    records = [{"instruction": "word " * n, "output": "x" * n} for n in (3, 9, 5, 4)]
    (tmp_path / "some.json").write_text(json.dumps(records))

    def measured(*flags: str) -> dict:
        paths = ["--records", tmp_path / "some.json", "--tokenizer", tmp_path / "tokenizer.model"]
        call = ["--peer", peer, "--shape", "tiny", "--dtype", "float32", "--threads", "1"]
        arguments = [*call, *map(str, paths), "--batch", "2", "--repeats", "1", *flags]
        monkeypatch.setattr(sys, "argv", ["generate", *arguments])
        generate.main()
        return json.loads(capsys.readouterr().out.strip().split("\n")[-1])

    even = measured("--new", "8", "--rows", "3")
    uneven = measured("--new", "reference")
    print(even, uneven)
    assert even["new_tokens"] == 3 * 8
    assert even["decode_step_ms"] > 0
    assert 0 < even["bandwidth"] < 1
    assert even["new_tok_s"] == pytest.approx(24 / even["call_s"][0], rel=0.1)
    assert uneven["new_tokens"] == 3 + 9 + 5 + 4 + 4  # a byte is a token, and each has its end
    assert "decode_step_ms" not in uneven
    assert uneven["rows"] == 4


def test_an_environment_without_lightning_can_answer_as_the_other_peer() -> None:
    code = "import sys; sys.modules['lightning'] = None; import tests.benchmarks.generate"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
