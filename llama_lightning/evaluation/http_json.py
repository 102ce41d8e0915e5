"""JSON over HTTP, with the standard library: one request, one answer, one kind of error.

It knows no API. Redirects are not followed, for they would carry the key to another host.
"""

import contextlib
import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from llama_lightning.evaluation.judge import BUSY, RequestFailed, TimedOut

LOADING_S = 300.0
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Refused(Exception):
    """The server answered, and the answer is no (an HTTP status from 300 to 499)."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"HTTP {status}: {message}")
        self.status, self.message = status, message


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        """Leave a redirect as the error it then is."""


def call_json(
    url: str,
    body: Mapping[str, Any] | None = None,
    *,
    timeout_s: float,
    headers: Mapping[str, str] | None = None,
) -> Any:
    """GET, or POST a body, and parse the answer.

    Raises:
        Refused: HTTP status 3xx or 4xx, but for 429.
        RequestFailed: no answer, a cut one, or one that says that the server is in trouble.
    """
    request = urllib.request.Request(url, headers=dict(headers or {}))
    if body is not None:
        request.data = json.dumps(body).encode()
        request.add_header("Content-Type", "application/json")
    handlers: list[urllib.request.BaseHandler] = [_NoRedirect()]
    if urlsplit(url).hostname in LOOPBACK:
        handlers.append(urllib.request.ProxyHandler({}))
    try:
        with urllib.request.build_opener(*handlers).open(request, timeout=timeout_s) as answer:
            return json.loads(answer.read())
    except urllib.error.HTTPError as error:
        message = _message(error)
        if error.code < 500 and error.code != 429:
            raise Refused(error.code, message) from error
        raise RequestFailed(
            f"HTTP {error.code}: {message}", status=error.code, server=error.code in BUSY
        ) from error
    except TimeoutError as error:
        raise TimedOut(f"no answer within {timeout_s:g} s") from error
    except urllib.error.URLError as error:
        if isinstance(error.reason, TimeoutError):
            raise TimedOut(f"no answer within {timeout_s:g} s") from error
        raise RequestFailed(f"no connection ({error.reason})", server=True) from error
    except (OSError, http.client.HTTPException) as error:
        raise RequestFailed(f"the connection broke ({type(error).__name__})") from error
    except ValueError as error:
        raise RequestFailed("the answer is not JSON") from error


class ReadLimit:
    """How long to wait for a reply: longer for the first, as the server may load the model.

    Args:
        seconds: for all but the first.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds, self._first = seconds, True

    @contextlib.contextmanager
    def waiting(self) -> Iterator[float]:
        """Give the seconds for a request; once one has ended, in whatever way, the model is there.

        A server that hangs must not have the longer time again and again.
        """
        try:
            yield self._seconds + (LOADING_S if self._first else 0.0)
        finally:
            self._first = False


def _message(error: urllib.error.HTTPError) -> str:
    """Find the words in an error's body: {"error": "..."} or {"error": {"message": "..."}}."""
    try:
        text = error.read().decode(errors="replace")
    except (OSError, http.client.HTTPException):
        return error.reason
    try:
        said = json.loads(text)["error"]
    except (ValueError, KeyError, TypeError):
        return " ".join(text.split())[:200] or error.reason
    return str(said.get("message", said) if isinstance(said, dict) else said)
