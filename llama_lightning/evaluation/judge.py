"""What a judge is: text in, text out; and how it is set.

It knows no prompt, no file and no server. One file each: prometheus.py, ollama.py, openai.py,
exact.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol
from urllib.parse import urlsplit

from llama_lightning.errors import UsageError
from llama_lightning.evaluation.prompts import JudgePrompt
from llama_lightning.records import Response

BUSY = (429, 503)  # of HTTP's statuses


class Sampling(NamedTuple):
    """How the words of a reply are drawn; None leaves a value to the server."""

    temperature: float = 0.0
    top_p: float | None = None
    repetition_penalty: float | None = None


# Prometheus' as in the package's own batch_completions_with_retries.
DEFAULT_SAMPLING = {"prometheus": Sampling(temperature=1.0, top_p=0.9, repetition_penalty=1.03)}
DEFAULT_MODEL = {"prometheus": "prometheus-eval/prometheus-7b-v2.0", "ollama": "llama3.1"}


@dataclass(frozen=True)
class JudgeConfig:
    """Who grades the responses, and how.

    Args:
        backend: `prometheus` is a Prometheus model, on this machine or behind base_url; `ollama`;
            `openai` is any server with /v1/chat/completions; `exact` compares with the reference
            and needs no model. With `none`, predict grades nothing, and the verb judge takes
            `prometheus`.
        model: the judge model: its name on the server; for prometheus without base_url a folder or
            a hub name. By default llama3.1 on ollama, prometheus-eval/prometheus-7b-v2.0 for
            prometheus.
        base_url: the server; for ollama by default OLLAMA_HOST, or http://127.0.0.1:11434; for
            prometheus none.
        api_key_env: name of the environment variable that holds the server's key, if it wants one.
        output: folder of the verdicts and the report; by default that of the responses.
        use_reference: show the reference answers to the judge; `auto` does if every row has one.
        temperature: of the judge's reply; 0 takes the likeliest token. By default 0, for prometheus
            1.
        top_p: sample among the fewest likeliest tokens that hold this probability. By default 0.9
            for prometheus, else the server's.
        repetition_penalty: above 1 makes tokens that have been seen less likely. By default 1.03
            for prometheus, else the server's.
        max_new_tokens: longest reply, in tokens; one that is cut is asked for again with twice.
        seed: of the judge's reply.
        concurrency: responses that are graded at the same time; on this machine one batch.
        dtype: of a judge model on this machine: two bytes a weight, four, or half a byte (nf4).
        read_timeout_s: seconds to wait for a server's reply; the first may have to load the model.
        limit: grade only the first so many responses, or pairs of two runs; null grades all.
        max_excluded_fraction: with a larger part of the responses left without a grade, or of the
            pairs without a choice, the run fails, once the report is written.
    """

    backend: Literal["none", "prometheus", "ollama", "openai", "exact"] = "none"
    model: str | None = None
    base_url: str | None = None
    api_key_env: str | None = None
    output: str | None = None
    use_reference: Literal["auto", "always", "never"] = "auto"
    temperature: float | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int = 1024
    seed: int = 0
    concurrency: int = 1
    dtype: Literal["bfloat16", "float32", "nf4"] = "bfloat16"
    read_timeout_s: float = 300.0
    limit: int | None = None
    max_excluded_fraction: float = 0.1

    def __post_init__(self) -> None:
        """Refuse values that cannot work.

        Raises:
            UsageError: a value out of range, or two that contradict each other.
        """
        if self.temperature is not None and not 0 <= self.temperature < float("inf"):
            raise UsageError(f"judge.temperature is {self.temperature}; use 0 or more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UsageError(f"judge.top_p is {self.top_p}; use a value above 0 and up to 1")
        if self.repetition_penalty is not None and not self.repetition_penalty > 0:
            raise UsageError(
                f"judge.repetition_penalty is {self.repetition_penalty}; use 1 (none) or more"
            )
        if not self.read_timeout_s > 0:
            raise UsageError(f"judge.read_timeout_s is {self.read_timeout_s}; use more than 0")
        if not 0 <= self.max_excluded_fraction <= 1:
            raise UsageError(
                f"judge.max_excluded_fraction is {self.max_excluded_fraction}; use 0 to 1"
            )
        for name in ("max_new_tokens", "concurrency", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"judge.{name} is {value}; use 1 or more")
        if self.base_url and not self.base_url.startswith(("http://", "https://")):
            raise UsageError(
                f"judge.base_url is {self.base_url}; begin with http://, e.g. http://127.0.0.1:8000"
            )
        try:
            _ = urlsplit(self.base_url or "").port  # which it reads only now
        except ValueError as error:
            raise UsageError(
                f"judge.base_url is {self.base_url} ({error}); write it as http://127.0.0.1:8000"
            ) from error
        if self.backend == "exact" and self.use_reference == "never":
            raise UsageError(
                "judge.use_reference is never, and judge.backend exact compares with the "
                "reference; use another backend"
            )
        if self.backend == "openai" and not self.base_url:
            raise UsageError(
                "judge.base_url: not given; name the server of judge.backend openai, "
                "e.g. http://127.0.0.1:8000"
            )
        if self.backend == "openai" and not self.model:
            raise UsageError(
                f"judge.model: not given; name the model on {self.base_url} that is to grade"
            )

    @property
    def model_name(self) -> str:
        """The judge model, the backend's own if none was chosen."""
        return self.model or DEFAULT_MODEL.get(self.backend, "")

    @property
    def words(self) -> Literal["own", "prometheus"]:
        """Whose prompts it is asked with: a Prometheus knows those that it was trained on."""
        return "prometheus" if self.backend == "prometheus" else "own"

    @property
    def sampling(self) -> Sampling:
        """The backend's own values, but for those that were chosen."""
        chosen = {name: getattr(self, name) for name in Sampling._fields}
        chosen = {name: value for name, value in chosen.items() if value is not None}
        return DEFAULT_SAMPLING.get(self.backend, Sampling())._replace(**chosen)


class Request(NamedTuple):
    """One question to a judge."""

    prompt: JudgePrompt
    response: Response  # what the prompt is about
    temperature: float
    seed: int
    max_new_tokens: int
    top_p: float | None = None  # see Sampling
    repetition_penalty: float | None = None
    # Of the reply as JSON, for servers that can hold a model to it; None where the prompt says all.
    schema: Mapping[str, Any] | None = None
    other: Response | None = None  # the second one, where two are compared


class Reply(NamedTuple):
    """A judge's words."""

    text: str
    truncated: bool = False  # cut at max_new_tokens


class TooLong(Exception):
    """The prompt and the longest reply do not fit the judge's context."""


class RequestFailed(Exception):
    """A request came to nothing.

    Attributes:
        status: what HTTP said; 0 where nobody answered.
        again: another try may succeed.
        server: the whole server is at fault, not this request.
    """

    def __init__(
        self, message: str, *, status: int = 0, again: bool = True, server: bool = False
    ) -> None:
        super().__init__(message)
        self.status, self.again, self.server = status, again, server

    @property
    def busy(self) -> bool:
        """The server lives and has too much to do."""
        return self.status in BUSY


class TimedOut(RequestFailed):
    """No answer within the time allowed."""


class Judge(Protocol):
    """Whoever grades. `reply` is called from several threads."""

    @property
    def name(self) -> str:
        """The judge's full name; complete after `preflight`."""

    def preflight(self) -> None:
        """Find out within seconds that it cannot grade.

        Raises:
            JudgeError: says what is missing and how to get it.
        """

    def reply(self, request: Request) -> Reply:
        """Answer a prompt.

        Raises:
            RequestFailed: no answer.
            TooLong: no room for the prompt.
            JudgeError: no request can succeed.
        """

    def close(self) -> None:
        """Free what grading took; called once, whatever happened."""
