"""Two servers that others wrote, with a judge whose grades are known, on 127.0.0.1."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import pytest

from llama_lightning.cli import main
from tests.judge_model import GRADES, feedback, responses, write_gguf, write_judge

START_S = 90


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A judge's folder, a GGUF file in it."""
    folder = tmp_path_factory.mktemp("trained") / "judge"
    write_gguf(write_judge(folder), folder)
    return folder


@contextmanager
def served(command: list[str], log: Path, **environment: str) -> Iterator[str]:
    """Run a server's command until the end of a `with`; its --port comes last."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *command, "--host", "127.0.0.1", "--port", str(port)],
            stdout=output,
            stderr=output,
            env={**os.environ, **environment},
        )
    try:
        start = time.monotonic()
        while True:
            assert process.poll() is None, log.read_text()[-2000:]
            assert time.monotonic() - start < START_S, log.read_text()[-2000:]
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        print(f"{command[0]} is up after {time.monotonic() - start:.1f} s")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def grade(backend: str, url: str, model: str, target: Path, **more: float) -> None:
    """Have every response graded and hold the verdicts to what the judge was trained to say."""
    target.mkdir()
    path = target / "responses.jsonl"
    path.write_text("".join(json.dumps(row._asdict()) + "\n" for row in responses()))
    keys = {"backend": backend, "base_url": url, "model": model, "max_new_tokens": 24, **more}
    arguments = [f"--judge.{key}={value}" for key, value in keys.items()]
    assert main(["judge", f"--responses.path={path}", *arguments]) == 0
    verdicts = [json.loads(line) for line in (target / "verdicts.jsonl").open("rb")]
    as_trained = [
        (v["score"], v["text"].strip()) == (GRADES[word], feedback(word))
        for v, word in zip(verdicts, GRADES, strict=True)
    ]
    print(f"{backend}: {sum(as_trained)} of {len(as_trained)} graded as trained")
    assert all(as_trained)


@pytest.mark.slow
@pytest.mark.skipif(
    version("transformers").startswith("4."), reason="transformers serve of 4 is another program"
)
def test_transformers_serve(folder: Path, tmp_path: Path) -> None:
    command = ["transformers.cli.transformers", "serve", str(folder), "--device", "cpu"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    with served(command, tmp_path / "log", **offline) as url:
        for backend in ("openai", "prometheus"):
            # It takes no penalty, which prometheus would ask for.
            grade(backend, url, str(folder), tmp_path / backend, repetition_penalty=1)


@pytest.mark.llama_cpp
@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("llama_cpp", "sse_starlette")),
    reason="llama-cpp-python[server] is not installed",
)
def test_llama_cpp_server(folder: Path, tmp_path: Path) -> None:
    command = ["llama_cpp.server", "--model", str(folder / "model-f32.gguf")]
    command += ["--model_alias", "judge", "--n_ctx", "2048", "--n_threads", "1"]
    with served(command, tmp_path / "log") as url:
        for backend in ("openai", "prometheus"):
            grade(backend, url, "judge", tmp_path / backend)
