"""A Prometheus judge: behind a server, or on this machine in a process of its own.

The process is started for the first reply and ended with the grading, which frees all memory it
took. Both sides write lines of JSON; what it does with them is in local_judge.py.
"""

import contextlib
import hashlib
import itertools
import json
import queue
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from llama_lightning.errors import JudgeError
from llama_lightning.evaluation.judge import (
    Judge,
    JudgeConfig,
    Reply,
    Request,
    RequestFailed,
    TooLong,
)
from llama_lightning.evaluation.openai import OpenAIJudge
from llama_lightning.evaluation.prometheus_prompts import require
from llama_lightning.evaluation.prompts import JudgePrompt
from llama_lightning.hub import resolve_base

TAIL_BYTES = 65_536
REFUSED, FAILED, TOO_LONG = "refused", "failed", "too_long"


def make_prometheus(config: JudgeConfig) -> Judge:
    """Build the judge, here or behind judge.base_url.

    Raises:
        JudgeError: the package with its prompts is not installed.
    """
    require("prometheus_eval")
    return OpenAIJudge(config) if config.base_url else LocalPrometheus(config)


def instruct_text(prompt: JudgePrompt) -> str:
    """Write a prompt as Mistral-Instruct reads it; the beginning token comes before."""
    return f"[INST] {prompt.merged} [/INST]"


def _digest(folder: Path, weights: list[Path]) -> str:
    """Tell one judge's weights from another's by their shape, sizes and last bytes."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in weights:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            file.seek(max(0, size - TAIL_BYTES))
            digest.update(file.read())
    return digest.hexdigest()[:12]


def _message(number: int, request: Request) -> dict[str, Any]:
    text, response = instruct_text(request.prompt), request.response
    row = hashlib.sha256(json.dumps([response.id, response.sample, text]).encode()).digest()
    return {
        "number": number,
        "row": int.from_bytes(row[:6], "big"),  # its source of randomness
        "text": text,
        "temperature": request.temperature,
        "top_p": 1.0 if request.top_p is None else request.top_p,
        "repetition_penalty": request.repetition_penalty or 1.0,
        "seed": request.seed,
        "max_new_tokens": request.max_new_tokens,
    }


def _parsed(line: str) -> dict[str, Any]:
    """Read a message; {} is none: what a library printed at its import, or half a last line."""
    try:
        message = json.loads(line)
    except ValueError:
        return {}
    known = ("number", "said", REFUSED, FAILED)
    return message if isinstance(message, dict) and any(name in message for name in known) else {}


def _how_it_ended(code: int) -> str:
    if code >= 0:
        return f"its process ended with exit code {code}"
    killer = signal.Signals(-code).name
    hint = ", perhaps by the system for want of memory" if killer == "SIGKILL" else ""
    return f"its process was ended by {killer}{hint}"


class LocalPrometheus:
    """A model in a process of its own on this machine."""

    def __init__(self, config: JudgeConfig) -> None:
        self._model, self._dtype, self._batch_size = (
            config.model_name,
            config.dtype,
            config.concurrency,
        )
        self._folder, self._version = Path(self._model), ""
        self._lock = threading.Lock()  # of all below
        self._process: subprocess.Popen[str] | None = None
        self._end: dict[str, str] = {}  # the last message, once there can be no other
        self._numbers = itertools.count()
        self._waiting: dict[int, queue.SimpleQueue[dict[str, Any]]] = {}

    @property
    def name(self) -> str:
        """Name, type and digest: other weights under the same name are another judge."""
        model = Path(self._model).name if self._folder == Path(self._model) else self._model
        return " ".join(filter(None, ("prometheus", model, self._dtype, self._version)))

    def preflight(self) -> None:
        """Find the model's files; they are not read before the first reply.

        Raises:
            UserError: a package or a file is missing, or the hub does not give it.
        """
        require("tokenizers")
        self._folder = resolve_base(self._model, "judge.model")
        weights = sorted(self._folder.glob("*.safetensors"))
        there = {path.name for path in self._folder.iterdir()}
        missing = [name for name in ("config.json", "tokenizer.json") if name not in there]
        missing += [] if weights else ["*.safetensors"]
        if missing:
            raise JudgeError(f"judge.model: {self._folder} has no {' and no '.join(missing)}")
        self._version = _digest(self._folder, weights)

    def reply(self, request: Request) -> Reply:
        """Have one reply generated. See the protocol for what is raised."""
        message = self._send(request).get()
        if REFUSED in message:
            raise JudgeError(message[REFUSED])
        if FAILED in message:
            raise RequestFailed(message[FAILED], again=False, server=True)
        if TOO_LONG in message:
            raise TooLong(message[TOO_LONG])
        return Reply(message["text"], truncated=message["truncated"])

    def close(self) -> None:
        """End the process."""
        with self._lock:
            process = self._process
        if process is not None:
            process.kill()
            process.wait()

    def _send(self, request: Request) -> "queue.SimpleQueue[dict[str, Any]]":
        answer: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        with self._lock:
            if self._process is None:
                self._process = self._start()
            if self._end:
                answer.put(self._end)
                return answer
            number = next(self._numbers)
            self._waiting[number] = answer
            assert self._process.stdin is not None
            # Of a process that has just ended `_listen` hears, and answers for it.
            with contextlib.suppress(OSError):
                print(json.dumps(_message(number, request)), file=self._process.stdin, flush=True)
        return answer

    def _start(self) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "llama_lightning.evaluation.local_judge"),
                *(str(self._folder), self._dtype, str(self._batch_size)),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,  # a Ctrl-C is ours to hear; it ends with its input
        )
        threading.Thread(target=self._listen, args=(process,), daemon=True).start()
        return process

    def _listen(self, process: "subprocess.Popen[str]") -> None:
        end: dict[str, str] = {}
        assert process.stdout is not None
        try:
            with process.stdout:
                for line in process.stdout:
                    message = _parsed(line)
                    if "number" in message:
                        with self._lock:
                            answer = self._waiting.pop(message["number"])
                        answer.put(message)
                    elif "said" in message:
                        print(f"judge: {self.name} {message['said']}", flush=True)
                    elif message:
                        end = message
        finally:  # nobody may wait for a process that is not heard any more
            code = process.wait()
            with self._lock:
                self._end = end or {FAILED: _how_it_ended(code)}
                for answer in self._waiting.values():
                    answer.put(self._end)
                self._waiting.clear()
