"""A judge behind any server with /v1/chat/completions.

vLLM, llama.cpp's server, transformers serve and hosted models speak it.
Source: the OpenAI API reference, of which only what all of them take is used; and a penalty.
"""

import os

from llama_lightning.errors import JudgeError, UsageError
from llama_lightning.evaluation.context import looks_cut, says_too_long
from llama_lightning.evaluation.http_json import ReadLimit, Refused, call_json
from llama_lightning.evaluation.judge import JudgeConfig, Reply, Request, RequestFailed, TooLong

PREFLIGHT_S = 4.0
# No part of the API, and refused by some; in the words of vLLM, and of llama.cpp.
PENALTY = ("repetition_penalty", "repeat_penalty")


class OpenAIJudge:
    """A model on an OpenAI-compatible server."""

    def __init__(self, config: JudgeConfig) -> None:
        self._backend = config.backend  # openai, or prometheus behind a server
        url = (config.base_url or "").rstrip("/")
        self._url = url if url.endswith("/v1") else f"{url}/v1"
        self._model = config.model_name
        self._limit = ReadLimit(config.read_timeout_s)
        self._key_env = config.api_key_env
        self._headers = {}
        if self._key_env:
            if not os.environ.get(self._key_env):
                raise UsageError(
                    f"judge.api_key_env: the environment variable {self._key_env} is not set; "
                    f"export {self._key_env}=..."
                )
            self._headers = {"Authorization": f"Bearer {os.environ[self._key_env]}"}

    @property
    def name(self) -> str:
        """The model, wherever it runs: a restarted server may have another port."""
        return f"{self._backend} {self._model}"

    def _refusal(self, error: Refused) -> JudgeError:
        if error.status in (401, 403):
            cure = (
                f"check {self._key_env}"
                if self._key_env
                else ("name the environment variable that holds it in judge.api_key_env")
            )
            return JudgeError(f"judge.base_url: {self._url} wants another key ({error}); {cure}")
        return JudgeError(f"{self._url} has no model {self._model} ({error}); set judge.model")

    def preflight(self) -> None:
        """Ask which models there are.

        Raises:
            JudgeError: no server, a refused key, or other models than ours.
        """
        try:
            answer = call_json(f"{self._url}/models", timeout_s=PREFLIGHT_S, headers=self._headers)
            names = [model["id"] for model in answer["data"]]
        except RequestFailed as error:
            if not error.status:
                raise JudgeError(
                    f"judge.base_url: no server at {self._url}, {error}; start it, or set "
                    "judge.base_url to where it runs"
                ) from error
            return  # some servers do not list their models; the first reply will tell
        except Refused as error:
            if error.status in (401, 403):
                raise self._refusal(error) from error
            return
        except (KeyError, TypeError):
            return
        if names and self._model not in names:
            raise JudgeError(
                f"judge.model: {self._model} is not on {self._url}; "
                f"there are {', '.join(sorted(names)[:10])}"
            )

    def reply(self, request: Request) -> Reply:
        """Chat once. See the protocol for what is raised."""
        parts = request.prompt._asdict()
        if self._backend == "prometheus":
            parts = {"user": request.prompt.merged}
        body: dict[str, object] = {
            "model": self._model,
            "messages": [{"role": role, "content": text} for role, text in parts.items()],
            "max_tokens": request.max_new_tokens,
            "temperature": request.temperature,
            "seed": request.seed,
        }
        if request.top_p is not None:
            body["top_p"] = request.top_p
        if request.repetition_penalty not in (None, 1.0):
            body |= dict.fromkeys(PENALTY, request.repetition_penalty)
        try:
            with self._limit.waiting() as seconds:
                answer = call_json(
                    f"{self._url}/chat/completions", body, timeout_s=seconds, headers=self._headers
                )
        except Refused as error:
            if error.status in (401, 403, 404):
                raise self._refusal(error) from error
            if says_too_long(error.message):
                raise TooLong(error.message) from error
            if PENALTY[0] in body and any(name in error.message for name in PENALTY):
                raise JudgeError(
                    f"{self._url} takes no repetition penalty ({error}); set "
                    "judge.repetition_penalty 1, which is none"
                ) from error
            raise RequestFailed(str(error), again=False) from error
        try:
            (choice, *_) = answer["choices"]
            text = choice["message"]["content"] or ""
            # Some servers count nothing, and say 0.
            read = (answer.get("usage") or {}).get("prompt_tokens") or None
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise RequestFailed("the answer has no message") from error
        words = sum(len(part.split()) for part in request.prompt)
        if looks_cut(read, words):
            raise TooLong(f"the server read {read} tokens of a prompt of {words} words: it was cut")
        return Reply(text, truncated=choice.get("finish_reason") == "length")

    def close(self) -> None:
        """Nothing is held."""
