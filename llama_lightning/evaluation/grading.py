"""A file of responses to a judged run: what is asked, and what is left in the folder.

The same command goes on where a stopped one was; other settings need another folder.
"""

import os
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from llama_lightning.errors import JudgeError, UsageError
from llama_lightning.evaluation.asking import Question, ask_all
from llama_lightning.evaluation.judge import Judge, JudgeConfig
from llama_lightning.evaluation.page import report_page
from llama_lightning.evaluation.parse import SCORE_SCHEMA, parse_score
from llama_lightning.evaluation.report import REPORT, SUMMARY, Graded, Summary, summarise
from llama_lightning.evaluation.responses import read_responses
from llama_lightning.evaluation.self_preference import model_beside
from llama_lightning.evaluation.settings import Settings, settings_of
from llama_lightning.evaluation.verdicts import VERDICTS, VerdictFile, check_settings, write_whole
from llama_lightning.records import Response

PAGE = "report.html"
CURE = "set judge.output to another folder"


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


def shows_reference(config: JudgeConfig, responses: Sequence[Response]) -> bool:
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


def _folder(config: JudgeConfig, path: Path) -> Path:
    return Path(config.output) if config.output else path.parent


def _all_settings(settings: Settings, folder: Path, path: Path) -> dict[str, object]:
    """List what all verdicts in a folder must share: the settings, and whose responses they are."""
    return {**settings._asdict(), "responses": os.path.relpath(path, folder)}


def open_judge(
    config: JudgeConfig, responses: Sequence[Response], path: Path
) -> tuple[Judge, Settings]:
    """Make the judge, and find out all that can be wrong before the first response is there.

    Args:
        config: the judge.
        responses: what is to be graded; their own texts may still be missing.
        path: the file that they are in, or will be.

    Raises:
        UserError: something is missing, or the folder holds verdicts of other settings.
    """
    with_reference = shows_reference(config, responses)
    judge = make_judge(config)
    judge.preflight()
    settings = settings_of(config, judge, with_reference=with_reference)
    folder = _folder(config, path)
    check_settings(folder / VERDICTS, _all_settings(settings, folder, path), CURE)
    return judge, settings


def _question(settings: Settings, response: Response) -> Question:
    prompt = settings.prompt_on(response)
    request = settings.request(prompt, response, SCORE_SCHEMA)
    return Question(settings.key_of(prompt, response.sample), request, parse_score)


def grade_file(config: JudgeConfig, path: Path, graded_model: str = "") -> Summary:
    """Grade a file of responses and leave verdicts.jsonl, summary.json and the report.

    Args:
        config: the judge.
        path: the responses.
        graded_model: whose they are; by default as what predict left beside them says.

    Raises:
        UserError: something is missing, or the judge is not there any more.
    """
    responses = read_responses(path)[: config.limit]
    judge, settings = open_judge(config, responses, path)
    with_some = sum(bool(response.reference.strip()) for response in responses)
    if with_some and not settings.with_reference and config.use_reference == "auto":
        print(f"{len(responses) - with_some} of {len(responses)} have no reference: none is shown")
    folder = _folder(config, path)
    questions = [_question(settings, response) for response in responses]
    shared = _all_settings(settings, folder, path)
    with closing(judge), VerdictFile(folder / VERDICTS, shared, CURE) as file:
        ask_all(judge, questions, file, config.concurrency)
        graded = [Graded(q.request.response, file[q.key]) for q in questions]
    summary = summarise(graded, settings, graded_model or model_beside(path))
    write_whole(folder / SUMMARY, summary.json(os.path.relpath(path, folder)))
    write_whole(folder / REPORT, summary.markdown())
    write_whole(folder / PAGE, report_page(summary, graded))
    if summary.kinship:
        print(
            f"warning: {summary.kinship} ({judge.name}, {summary.graded_model}); judges favour "
            "their kin"
        )
    print(f"{judge.name}: {summary}")
    print(f"verdicts in {file.path}, a page of them in {folder / PAGE}")
    return summary


def check_excluded(config: JudgeConfig, summary: Summary) -> None:
    """Fail where a mean would say little: too many responses have no grade.

    Raises:
        JudgeError: says how many, and why.
    """
    missing = summary.total - summary.graded
    if summary.graded and missing <= config.max_excluded_fraction * summary.total:
        return
    if not summary.graded:
        raise JudgeError(f"no response was graded: {summary.reasons} (see {REPORT})")
    raise JudgeError(
        f"{missing} of {summary.total} responses have no grade ({summary.reasons}), more than "
        f"judge.max_excluded_fraction {config.max_excluded_fraction:g} allows; {REPORT} is written"
    )
