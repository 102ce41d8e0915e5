"""A judge behind Ollama's own API, /api/chat.

Its /v1 route would ignore the context length, and cut long prompts in silence.
Source: docs/api.md of the Ollama repository.
"""

import json
import os
import re
from collections import deque
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from llama_lightning.errors import JudgeError, UsageError
from llama_lightning.evaluation.context import looks_cut, says_too_long
from llama_lightning.evaluation.http_json import ReadLimit, Refused, call_json
from llama_lightning.evaluation.judge import JudgeConfig, Reply, Request, RequestFailed, TooLong

PREFLIGHT_S = 4.0
KEEP_ALIVE = "15m"  # Ollama's 5m may end between two slow replies
MIN_CONTEXT = 4096
# English has 4. Few make room enough for other scripts and digits too; many tell what cannot fit.
FEW_BYTES, MANY_BYTES = 2, 5  # a token
RECENT = 16
ABOUT_SCHEMA = re.compile("format|grammar|schema", re.IGNORECASE)


def default_base_url() -> str:
    """Read OLLAMA_HOST as Ollama's own client does.

    Raises:
        UsageError: it is no address.
    """
    host = os.environ.get("OLLAMA_HOST", "").strip() or "127.0.0.1"
    try:
        parts = urlsplit(host if "://" in host else f"http://{host}")
        port = parts.port or (11434 if "://" not in host else None)
    except ValueError as error:
        raise UsageError(f"OLLAMA_HOST is {host} ({error}); write it as 127.0.0.1:11434") from error
    name = "127.0.0.1" if parts.hostname in (None, "0.0.0.0") else parts.hostname
    return f"{parts.scheme}://{name}" + (f":{port}" if port else "")


def tokens_needed(request: Request, bytes_per_token: int) -> int:
    """Estimate how many tokens the prompt and the longest reply take."""
    size = sum(len(part.encode(errors="replace")) for part in request.prompt)
    return size // bytes_per_token + request.max_new_tokens


class OllamaJudge:
    """A model on an Ollama server."""

    def __init__(self, config: JudgeConfig) -> None:
        self._url = (config.base_url or default_base_url()).rstrip("/")
        self._model = config.model_name
        self._limit = ReadLimit(config.read_timeout_s)
        self._digest = ""
        self._longest = 0  # the model's context in tokens; 0 is unknown
        self._structured = True  # until the server refuses a schema, or a reply ignores it
        self._recent: deque[str] = deque(maxlen=RECENT)  # prompts that may be in its cache

    @property
    def name(self) -> str:
        """Name and digest: a tag that is pulled again is another judge."""
        return f"ollama {self._model}" + (f" {self._digest}" if self._digest else "")

    def preflight(self) -> None:
        """Ask for the model and its context length.

        Raises:
            JudgeError: no server, or no such model.
        """
        try:
            models = call_json(f"{self._url}/api/tags", timeout_s=PREFLIGHT_S)["models"]
        except RequestFailed as error:
            raise JudgeError(
                f"judge.base_url: no Ollama at {self._url}, {error}; start it with `ollama serve`, "
                "or set judge.base_url or OLLAMA_HOST to where it runs"
            ) from error
        except (Refused, KeyError, TypeError) as error:
            raise JudgeError(
                f"judge.base_url: {self._url} does not answer as Ollama does ({error})"
            ) from error
        digests = {model["name"]: model.get("digest", "") for model in models}
        full = self._model if ":" in self._model else f"{self._model}:latest"
        if full not in digests:
            there = ", ".join(sorted(digests)) or "none"
            raise JudgeError(
                f"judge.model: {self._model} is not on the Ollama at {self._url}; get it with "
                f"`ollama pull {self._model}` (installed: {there})"
            )
        self._digest = digests[full].removeprefix("sha256:")[:12]
        try:
            about = call_json(
                f"{self._url}/api/show", {"model": self._model}, timeout_s=PREFLIGHT_S
            )
        except (RequestFailed, Refused):
            return  # older servers; the context stays unknown
        for key, value in about.get("model_info", {}).items():
            if key.endswith(".context_length"):
                self._longest = int(value)

    def reply(self, request: Request) -> Reply:
        """Chat once, and look whether the whole prompt was read.

        Ollama cuts a prompt in silence. It says how many tokens it read, but of a prompt whose
        beginning is in its cache an older one counts only the rest.
        """
        # Powers of two, as Ollama loads the model again for each new value.
        bits = (tokens_needed(request, FEW_BYTES) - 1).bit_length()
        num_ctx = max(MIN_CONTEXT, 1 << bits)
        if self._longest:
            least = tokens_needed(request, MANY_BYTES)
            if least > self._longest:
                raise TooLong(f"needs about {least} tokens, and the model takes {self._longest}")
            num_ctx = min(num_ctx, self._longest)
        user = request.prompt.user
        recent = tuple(self._recent)  # other threads append
        cached = max((len(os.path.commonprefix([one, user])) for one in recent), default=0)
        uncached = len(user[cached:].split())
        self._recent.append(user)
        reply, read, written = self._chat(request, num_ctx)
        if not looks_cut(read, uncached, num_ctx, written):
            return reply
        # With another context the model is loaded anew and its cache is empty: now the count tells.
        more = min(2 * num_ctx, self._longest or 2 * num_ctx)
        more -= more == num_ctx
        reply, read, written = self._chat(request, more)
        words = sum(len(part.split()) for part in request.prompt)
        if looks_cut(read, words, more, written):
            raise TooLong(
                f"the server read {read} tokens of a prompt of {words} words and wrote {written}, "
                f"with room for {more}: it was cut"
            )
        return reply

    def _chat(self, request: Request, num_ctx: int) -> tuple[Reply, int | None, int]:
        """Chat once; how many tokens were read (if it is told) and written comes along."""
        schema = request.schema if self._structured else None
        options = {
            "num_ctx": num_ctx,
            "num_predict": request.max_new_tokens,
            "seed": request.seed,
            "temperature": request.temperature,
            "top_p": request.top_p,
            "repeat_penalty": request.repetition_penalty,
        }
        body = {
            "model": self._model,
            "messages": [
                {"role": "system", "content": request.prompt.system},
                {"role": "user", "content": request.prompt.user},
            ],
            "stream": False,
            "keep_alive": KEEP_ALIVE,
            "options": {name: value for name, value in options.items() if value is not None},
        }
        if schema is not None:
            body["format"] = schema
        try:
            with self._limit.waiting() as seconds:
                answer = call_json(f"{self._url}/api/chat", body, timeout_s=seconds)
            reply = _reply(answer)
        except Refused as error:
            if error.status == 404:
                raise JudgeError(
                    f"judge.model: {error.message}; get it with `ollama pull {self._model}`"
                ) from error
            if says_too_long(error.message):
                raise TooLong(error.message) from error
            if schema is None:
                raise RequestFailed(str(error), again=False) from error
        except RequestFailed as error:
            if schema is None or not ABOUT_SCHEMA.search(str(error)):
                raise
        else:
            obeyed = schema is None or _has_form(reply.text, schema)
            self._structured = self._structured and obeyed
            # Held to a form, some models write white space without end.
            if obeyed or not reply.truncated:
                return reply, answer.get("prompt_eval_count"), answer.get("eval_count") or 0
        self._structured = False
        return self._chat(request, num_ctx)

    def close(self) -> None:
        """Nothing is held."""


def _has_form(text: str, schema: Mapping[str, Any]) -> bool:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(values, dict) and all(name in values for name in schema["required"])


def _reply(answer: Any) -> Reply:
    """Read the words; an error may come under HTTP 200 too."""
    if not isinstance(answer, dict) or "error" in answer:
        raise RequestFailed(str(answer["error"] if isinstance(answer, dict) else answer))
    try:
        text, reason = answer["message"]["content"], answer.get("done_reason")
    except (KeyError, TypeError) as error:
        raise RequestFailed("the answer has no message") from error
    return Reply(text or "", truncated=reason == "length")
