"""Two judges' servers on 127.0.0.1: one speaks Ollama's API, one OpenAI's.

Real HTTP, with the shapes and the errors of the real servers. A `brain` plays the model: it sees a
chat's request and returns words, or a Fault.
"""

import json
import os
import re
import socket
import struct
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple


class Words(NamedTuple):
    """A reply of the model."""

    text: str
    cut: bool = False  # at the longest reply


class Fault(NamedTuple):
    """Something else than a reply."""

    status: int = 0  # an HTTP status; 0 cuts the connection
    message: str = ""
    delay_s: float = 0.0


Brain = Callable[[dict[str, Any]], "Words | Fault"]


def four(body: dict[str, Any]) -> Words:
    """A judge who likes everything."""
    return Words("Clear and right.\n[RESULT] 4")


class FakeServer:
    """Serve until the end of a `with`.

    Attributes:
        url: where it is.
        chats: the bodies of all chat requests so far.
        paths: all requests so far.
    """

    models = ("llama3.1:latest", "mistral:7b")
    context_length = 131072

    def __init__(self, brain: Brain = four, *, key: str | None = None) -> None:
        self.brain, self.key = brain, key
        self.chats: list[dict[str, Any]] = []
        self.paths: list[str] = []
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                fake.paths.append(self.path)
                fake.get(self)

            def do_POST(self) -> None:
                fake.paths.append(self.path)
                length = int(self.headers["Content-Length"])
                fake.post(self, json.loads(self.rfile.read(length)))

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "FakeServer":
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *args: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def die(self) -> None:
        """Stop listening, as a killed server."""
        threading.Thread(target=self.__exit__, daemon=True).start()

    def send(self, handler: BaseHTTPRequestHandler, value: Any, status: int = 200) -> None:
        payload = json.dumps(value).encode()
        try:
            handler.send_response(status)
            handler.send_header("Content-Type", "application/json")
            handler.send_header("Content-Length", str(len(payload)))
            handler.end_headers()
            handler.wfile.write(payload)
        except ConnectionError:
            pass  # the client was killed or did not wait

    def think(self, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> Words | None:
        """Ask the brain; a fault goes out at once."""
        self.chats.append(body)
        said = self.brain(body)
        if isinstance(said, Words):
            return said
        time.sleep(said.delay_s)
        if said.status:
            self.send(handler, self.error(said.message), said.status)
        else:
            linger = struct.pack("ii", 1, 0)  # a reset instead of a clean end
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            handler.connection.close()
            handler.wfile = handler.rfile = open("/dev/null", "w+b")  # noqa: SIM115
        return None

    def error(self, message: str) -> dict[str, Any]:
        raise NotImplementedError

    def get(self, handler: BaseHTTPRequestHandler) -> None:
        raise NotImplementedError

    def post(self, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        raise NotImplementedError


def tokens_of(text: str) -> int:
    """Count a token a word or mark, as few as a tokenizer can do with."""
    return len(re.findall(r"\w+|[^\w\s]", text))


class FakeOllama(FakeServer):
    """Ollama: /api/tags, /api/show, /api/chat.

    Attributes:
        window: the tokens of a prompt that are read, the rest cut in silence; None: num_ctx.
        counts_cached: whether it counts the tokens that it found in its cache; older ones do not.
    """

    window: int | None = None
    counts_cached = True
    _cache: tuple[int, str] = (0, "")

    def _read(self, body: dict[str, Any]) -> int:
        num_ctx = body["options"]["num_ctx"]
        prompt = " ".join(message["content"] for message in body["messages"])
        loaded, before = self._cache
        cached = len(os.path.commonprefix([before, prompt])) if loaded == num_ctx else 0
        self._cache = (num_ctx, prompt)
        tokens = tokens_of(prompt if self.counts_cached else prompt[cached:])
        return min(tokens, self.window or num_ctx)

    def error(self, message: str) -> dict[str, Any]:
        return {"error": message}

    def get(self, handler: BaseHTTPRequestHandler) -> None:
        if handler.path != "/api/tags":
            self.send(handler, self.error("404 page not found"), 404)
            return
        models = [{"name": name, "digest": f"{i:064x}"} for i, name in enumerate(self.models)]
        self.send(handler, {"models": models})

    def post(self, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        name = body["model"] if ":" in body["model"] else f"{body['model']}:latest"
        if name not in self.models:
            self.send(handler, self.error(f"model '{body['model']}' not found"), 404)
        elif handler.path == "/api/show":
            self.send(handler, {"model_info": {"llama.context_length": self.context_length}})
        elif words := self.think(handler, body):
            answer = {
                "model": body["model"],
                "message": {"role": "assistant", "content": words.text},
                "done": True,
                "done_reason": "length" if words.cut else "stop",
                "prompt_eval_count": self._read(body),
                "eval_count": 40,
            }
            self.send(handler, answer)


class FakeOpenAI(FakeServer):
    """Any server with /v1: models and chat completions.

    Attributes:
        window: the tokens of a prompt that are read, the rest cut in silence; None: all.
        counts: whether it says how many; else 0.
    """

    models = ("judge", "other")
    window: int | None = None
    counts = True

    def error(self, message: str) -> dict[str, Any]:
        return {"error": {"message": message, "type": "invalid_request_error"}}

    def _allowed(self, handler: BaseHTTPRequestHandler) -> bool:
        allowed = self.key is None or handler.headers["Authorization"] == f"Bearer {self.key}"
        if not allowed:
            self.send(handler, self.error("Incorrect API key"), 401)
        return allowed

    def get(self, handler: BaseHTTPRequestHandler) -> None:
        if self._allowed(handler):
            listed = [{"id": name, "object": "model"} for name in self.models]
            self.send(handler, {"object": "list", "data": listed})

    def post(self, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        assert handler.path == "/v1/chat/completions"
        if self._allowed(handler) and (words := self.think(handler, body)):
            choice = {
                "index": 0,
                "message": {"role": "assistant", "content": words.text},
                "finish_reason": "length" if words.cut else "stop",
            }
            tokens = sum(tokens_of(message["content"]) for message in body["messages"])
            usage = {"prompt_tokens": min(tokens, self.window or tokens) if self.counts else 0}
            answer = {"object": "chat.completion", "choices": [choice], "usage": usage}
            self.send(handler, answer)
