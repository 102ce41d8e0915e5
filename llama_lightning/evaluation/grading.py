"""The grading loop: responses to verdicts, one by one, and on from where a stopped run was.

A judge that cannot be reached gives no verdict: the request is repeated, and then the run stops
with everything kept.
"""

import os
import queue
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from llama_lightning.errors import JudgeError, UsageError
from llama_lightning.evaluation.judge import (
    Judge,
    JudgeConfig,
    Reply,
    Request,
    RequestFailed,
    TooLong,
)
from llama_lightning.evaluation.page import report_page
from llama_lightning.evaluation.parse import GRADED, Parsed, parse_score
from llama_lightning.evaluation.report import (
    REPORT,
    SUMMARY,
    Graded,
    Summary,
    summarise,
    write_whole,
)
from llama_lightning.evaluation.responses import read_responses
from llama_lightning.evaluation.settings import Settings, prompt_version
from llama_lightning.evaluation.verdicts import BACKEND_ERROR, VERDICTS, VerdictFile
from llama_lightning.records import Response, Verdict

RETRY_DELAYS_S = (1.0, 2.0, 4.0)
TRUNCATED, EMPTY_RESPONSE, TOO_LONG = "truncated", "empty_response", "too_long"
PARSE_RETRIES = 2
RETRY_TEMPERATURE = 0.7  # at 0 another seed gives the same words
MAX_ERRORS_IN_A_ROW = 3
PROGRESS_S = 15.0


def make_judge(config: JudgeConfig) -> Judge:
    """Build the judge of a configuration."""
    if config.backend == "prometheus":
        from llama_lightning.evaluation.prometheus import make_prometheus

        return make_prometheus(config)
    if config.backend == "ollama":
        from llama_lightning.evaluation.ollama import OllamaJudge

        return OllamaJudge(config)
    if config.backend == "openai":
        from llama_lightning.evaluation.openai import OpenAIJudge

        return OpenAIJudge(config)
    if config.backend == "exact":
        from llama_lightning.evaluation.exact import ExactJudge  # torchmetrics: a second

        return ExactJudge()
    raise UsageError("judge.backend: not given; use prometheus, ollama, openai or exact")


def shows_reference(config: JudgeConfig, responses: list[Response]) -> bool:
    """Choose once for all responses: means with and without a reference do not compare.

    Raises:
        UsageError: references are wanted and some are missing.
    """
    missing = [response.id for response in responses if not response.reference.strip()]
    wanted = config.use_reference == "always" or config.backend == "exact"
    if missing and wanted:
        raise UsageError(
            f"responses.path: {len(missing)} of {len(responses)} rows have no reference (the first "
            f"has id {missing[0]}); judge.backend {config.backend} with judge.use_reference "
            f"{config.use_reference} needs one in each"
        )
    return not missing and config.use_reference != "never"


class _Item(NamedTuple):
    key: str
    request: Request


def _item(settings: Settings, response: Response) -> _Item:
    request = Request(
        settings.build_prompt(response),
        response,
        settings.temperature,
        settings.seed,
        settings.max_new_tokens,
        settings.top_p,
        settings.repetition_penalty,
    )
    return _Item(settings.key(response), request)


def _ask(judge: Judge, request: Request) -> Reply:
    """Ask until there is an answer, or no hope for one."""
    for delay in RETRY_DELAYS_S:
        try:
            return judge.reply(request)
        except RequestFailed as error:
            if not error.again:
                raise
        time.sleep(delay * random.uniform(0.8, 1.2))
    return judge.reply(request)


def _ask_for_all(judge: Judge, request: Request) -> Reply:
    """Ask, and once more with room for twice the reply if it was cut."""
    reply = _ask(judge, request)
    if not reply.truncated:
        return reply
    try:
        return _ask(judge, request._replace(max_new_tokens=2 * request.max_new_tokens))
    except TooLong:
        return reply


def _grade(judge: Judge, request: Request) -> tuple[Parsed, str]:
    """Ask until a reply can be read; the last reply comes along."""
    reply = _ask_for_all(judge, request)
    for attempt in range(PARSE_RETRIES + 1):
        if attempt:
            warmer = max(request.temperature, RETRY_TEMPERATURE)
            again = request._replace(seed=request.seed + attempt, temperature=warmer)
            reply = _ask_for_all(judge, again)
        if reply.truncated:  # its last number may be half a number
            parsed = Parsed(TRUNCATED, reason="the reply was cut; raise judge.max_new_tokens")
            break
        parsed = parse_score(reply.text)
        if parsed.status == GRADED:
            break
    return parsed, reply.text


def _verdict(judge: Judge, item: _Item) -> Verdict:
    """Grade one response, whatever comes of it.

    Raises:
        RequestFailed: the server itself is at fault.
        JudgeError: no request can succeed.
    """
    response, text = item.request.response, ""
    try:
        if response.response.strip():
            parsed, text = _grade(judge, item.request)
        else:
            parsed = Parsed(EMPTY_RESPONSE, reason="nothing to grade")
    except TooLong as error:
        parsed = Parsed(TOO_LONG, reason=str(error))
    except RequestFailed as error:
        if error.server:
            raise
        parsed = Parsed(BACKEND_ERROR, reason=str(error))
    return Verdict(
        key=item.key,
        judge=judge.name,
        id=response.id,
        sample=response.sample,
        status=parsed.status,
        score=parsed.score,
        reason=parsed.reason,
        text=text,
    )


def _verdicts(judge: Judge, items: list[_Item], concurrency: int) -> Iterator[Verdict]:
    """Grade several at a time and yield verdicts as they come.

    The threads are daemons, so that Ctrl-C need not wait for a slow judge.
    """
    todo: queue.SimpleQueue[_Item] = queue.SimpleQueue()
    done: queue.SimpleQueue[Verdict | Exception] = queue.SimpleQueue()
    for item in items:
        todo.put(item)
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            try:
                done.put(_verdict(judge, todo.get_nowait()))
            except queue.Empty:
                return
            except Exception as error:  # raised again by the thread that waits
                done.put(error)
                return

    for _ in range(min(concurrency, len(items))):
        threading.Thread(target=work, daemon=True).start()
    try:
        for _ in items:
            result = done.get()
            if isinstance(result, Exception):
                raise result
            yield result
    finally:
        stop.set()


def _append_all(file: VerdictFile, judge: Judge, items: list[_Item], concurrency: int) -> None:
    """Grade and write; stop where the server has died.

    Raises:
        JudgeError: the judge cannot be reached any more; says how to go on.
    """
    errors, printed = 0, time.monotonic()
    how = f"the verdicts so far are in {file.path}; the same command goes on from there"
    try:
        for count, verdict in enumerate(_verdicts(judge, items, concurrency), 1):
            file.append(verdict)
            errors = errors + 1 if verdict.status == BACKEND_ERROR else 0
            if errors == MAX_ERRORS_IN_A_ROW:
                raise JudgeError(
                    f"{judge.name} failed for {errors} responses in a row ({verdict.reason}); {how}"
                )
            if time.monotonic() - printed > PROGRESS_S:
                printed = time.monotonic()
                print(f"judge {count}/{len(items)}", flush=True)
    except RequestFailed as error:
        raise JudgeError(f"{judge.name} does not answer any more: {error}; {how}") from error


def grade_file(config: JudgeConfig, path: Path) -> Summary:
    """Grade a file of responses and leave verdicts.jsonl, summary.json and the report.

    Args:
        config: the judge.
        path: the responses.

    Raises:
        UserError: something is missing, or nothing could be graded.
    """
    responses = read_responses(path)[: config.limit]
    with_reference = shows_reference(config, responses)
    judge = make_judge(config)
    judge.preflight()
    folder = Path(config.output) if config.output else path.parent
    file = VerdictFile(folder / VERDICTS, judge.name)
    words = "prometheus" if config.backend == "prometheus" else "own"
    settings = Settings(
        judge=judge.name,
        with_reference=with_reference,
        seed=config.seed,
        max_new_tokens=config.max_new_tokens,
        prompt=prompt_version(words),
        words=words,
        **config.sampling._asdict(),
    )
    try:
        items = [_item(settings, response) for response in responses]
        unique = {item.key: item for item in items}
        todo = [item for key, item in unique.items() if file.final(key) is None]
        if len(todo) < len(unique):
            print(f"{len(unique) - len(todo)} of {len(unique)} verdicts are in {file.path} already")
        if stale := file.stale(set(unique)):
            print(f"{stale} verdicts in {file.path} are of other prompts or settings: not counted")
        _append_all(file, judge, todo, config.concurrency)
        graded = [Graded(item.request.response, file[item.key]) for item in items]
    finally:
        file.close()
        judge.close()
    summary = summarise(graded, settings)
    write_whole(folder / SUMMARY, summary.json(os.path.relpath(path, folder)))
    write_whole(folder / REPORT, summary.markdown())
    page = folder / "report.html"
    write_whole(page, report_page(summary, graded))
    print(f"{judge.name}: {summary}\nverdicts in {file.path}, a page of them in {page}")
    if not summary.graded:
        first = graded[0].verdict
        raise JudgeError(
            f"no response was graded; the first is {first.status}: {first.reason} (see {file.path})"
        )
    return summary
