"""Asking a judge: again where that may help, several at a time, and each verdict kept at once.

It knows no rubric and no report. A judge that cannot be reached gives no verdict: the request is
repeated, and then the run stops with everything kept.
"""

import contextlib
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from llama_lightning.errors import JudgeError
from llama_lightning.evaluation.judge import (
    Judge,
    Reply,
    Request,
    RequestFailed,
    TimedOut,
    TooLong,
)
from llama_lightning.evaluation.parse import GRADED, Parsed
from llama_lightning.evaluation.verdicts import BACKEND_ERROR, VerdictFile
from llama_lightning.progress import Bar
from llama_lightning.records import Verdict

RETRY_DELAYS_S = (1.0, 2.0, 4.0)
BUSY_DELAYS_S = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)  # limits of hosted servers are by the minute
TRUNCATED, EMPTY_RESPONSE, TOO_LONG = "truncated", "empty_response", "too_long"
PARSE_RETRIES = 2
RETRY_TEMPERATURE = 0.7  # at 0 another seed gives the same words
MAX_ERRORS_IN_A_ROW = 3
REPLIES_TO_WIDEN = 20


class Question(NamedTuple):
    """What one verdict takes."""

    key: str  # of the verdict
    request: Request
    parse: Callable[[str], Parsed]
    first: str = ""  # of two responses: whose is shown first, A or B

    @property
    def is_empty(self) -> bool:
        """A response without a word is no question."""
        shown = (self.request.response, self.request.other)
        return any(response is not None and not response.response.strip() for response in shown)


class Gate:
    """How many requests may be on their way: half as many when the server is busy, slowly more.

    Args:
        width: how many at the beginning, and at most.
    """

    def __init__(self, width: int) -> None:
        self.width = self._most = width
        self._inside = self._replies = 0
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def passing(self) -> Iterator[int]:
        """Wait for a place; gives the width at which it was free."""
        with self._changed:
            self._changed.wait_for(lambda: self._inside < self.width)
            self._inside += 1
            width = self.width
        try:
            yield width
        finally:
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    def narrow(self, seen: int) -> None:
        """Halve, and only once for all the requests that went out at one width."""
        with self._changed:
            if self.width == seen:
                self.width, self._replies = max(1, seen // 2), 0

    def widen(self) -> None:
        """Count a reply; many in a row make room for one request more."""
        with self._changed:
            self._replies += 1
            if self._replies >= REPLIES_TO_WIDEN and self.width < self._most:
                self.width, self._replies = self.width + 1, 0
                self._changed.notify_all()


def _ask(judge: Judge, request: Request, gate: Gate) -> Reply:
    """Ask until there is an answer, or no hope for one."""
    failures = 0
    while True:
        try:
            with gate.passing() as width:
                reply = judge.reply(request)
        except RequestFailed as error:
            delays = BUSY_DELAYS_S if error.busy else RETRY_DELAYS_S
            if error.busy:
                gate.narrow(width)
            if not error.again or failures >= len(delays):
                raise
        else:
            gate.widen()
            return reply
        time.sleep(delays[failures] * random.uniform(0.7, 1.3))
        failures += 1


def _ask_for_all(judge: Judge, request: Request, gate: Gate) -> Reply:
    """Ask, and once more with room for twice the reply if it was cut."""
    reply = _ask(judge, request, gate)
    if not reply.truncated:
        return reply
    try:
        return _ask(judge, request._replace(max_new_tokens=2 * request.max_new_tokens), gate)
    except TooLong:
        return reply


def _grade(judge: Judge, question: Question, gate: Gate) -> tuple[Parsed, str]:
    """Ask until a reply can be read; the last reply comes along."""
    request = question.request
    reply = _ask_for_all(judge, request, gate)
    for attempt in range(PARSE_RETRIES + 1):
        if attempt:
            warmer = max(request.temperature, RETRY_TEMPERATURE)
            again = request._replace(seed=request.seed + attempt, temperature=warmer)
            reply = _ask_for_all(judge, again, gate)
        if reply.truncated:  # its last number may be half a number
            parsed = Parsed(TRUNCATED, reason="the reply was cut; raise judge.max_new_tokens")
            break
        parsed = question.parse(reply.text)
        if parsed.status == GRADED:
            break
    return parsed, reply.text


def _verdict(judge: Judge, question: Question, gate: Gate) -> Verdict:
    """Reach a verdict, whatever comes of it.

    Raises:
        RequestFailed: the server itself is at fault.
        JudgeError: no request can succeed.
    """
    text = ""
    try:
        if question.is_empty:
            parsed = Parsed(EMPTY_RESPONSE, reason="nothing to grade")
        else:
            parsed, text = _grade(judge, question, gate)
    except TooLong as error:
        parsed = Parsed(TOO_LONG, reason=str(error))
    except RequestFailed as error:
        if error.server:
            raise
        cure = "; raise judge.read_timeout_s" if isinstance(error, TimedOut) else ""
        parsed = Parsed(BACKEND_ERROR, reason=f"{error}{cure}")
    return Verdict(
        key=question.key,
        judge=judge.name,
        id=question.request.response.id,
        sample=question.request.response.sample,
        status=parsed.status,
        score=parsed.score,
        reason=parsed.reason,
        text=text,
        first=question.first,
    )


def _verdicts(
    judge: Judge, questions: Sequence[Question], file: VerdictFile, concurrency: int
) -> Iterator[Verdict]:
    """Ask several at a time and yield verdicts as they come.

    A thread writes its verdict before it asks again: a killed run loses what was on its way, no
    more. The threads are daemons, so that Ctrl-C need not wait for a slow judge.
    """
    todo: queue.SimpleQueue[Question] = queue.SimpleQueue()
    done: queue.SimpleQueue[Verdict | Exception] = queue.SimpleQueue()
    for question in questions:
        todo.put(question)
    gate, writing, stopped = Gate(concurrency), threading.Lock(), threading.Event()

    def work() -> None:
        while True:
            try:
                verdict = _verdict(judge, todo.get_nowait(), gate)
                with writing:
                    if stopped.is_set():
                        return
                    file.append(verdict)
                done.put(verdict)
            except queue.Empty:
                return
            except Exception as error:  # raised again by the thread that waits
                done.put(error)
                return

    for _ in range(min(concurrency, len(questions))):
        threading.Thread(target=work, daemon=True).start()
    try:
        for _ in questions:
            result = done.get()
            if isinstance(result, Exception):
                raise result
            yield result
    finally:
        with writing:
            stopped.set()


def ask_all(
    judge: Judge, questions: Sequence[Question], file: VerdictFile, concurrency: int
) -> None:
    """Append a verdict on each question that has none yet; of equal questions one is asked.

    What failed in an earlier run comes last and does not count as a failing judge: a few responses
    on which a server always fails must not keep the rest from being graded.

    Raises:
        JudgeError: the judge cannot be reached any more; says how to go on.
    """
    unique = {question.key: question for question in questions}
    todo = [question for key, question in unique.items() if file.final(key) is None]
    failed_before = {question.key for question in todo if question.key in file}
    todo.sort(key=lambda question: question.key in failed_before)
    if len(todo) < len(unique):
        print(f"{len(unique) - len(todo)} of {len(unique)} verdicts are in {file.path} already")
    if stale := file.stale(set(unique)):
        print(f"{stale} verdicts in {file.path} are on other texts: not counted")
    if not todo:
        return
    how = f"the verdicts so far are in {file.path}; the same command goes on from there"
    errors, bar = 0, Bar("judge", len(todo))
    try:
        for count, verdict in enumerate(_verdicts(judge, todo, file, concurrency), 1):
            if verdict.status != BACKEND_ERROR:
                errors = 0
            elif verdict.key not in failed_before:
                errors += 1
            if errors == MAX_ERRORS_IN_A_ROW:
                raise JudgeError(
                    f"{judge.name} failed for {errors} responses in a row ({verdict.reason}); {how}"
                )
            bar.update(count)
    except RequestFailed as error:
        raise JudgeError(f"{judge.name} does not answer any more: {error}; {how}") from error
    finally:
        bar.stop()
