"""What a Prometheus judge is asked, in the words it was trained on.

They are those of the package prometheus-eval, imported only here.
Source: prometheus_eval/prompts.py and judge.py, version 0.1.20; Prometheus 2, arXiv 2405.01535.
"""

from importlib.util import find_spec

from llama_lightning.errors import JudgeError
from llama_lightning.evaluation.prompts import JudgePrompt, neutralise
from llama_lightning.evaluation.rubric import CRITERION, LEVELS
from llama_lightning.records import Response


def require(package: str) -> None:
    """Find out that a package of the extra is missing, without importing it.

    Raises:
        JudgeError: names the extra.
    """
    if find_spec(package) is None:
        raise JudgeError(
            f"judge.backend prometheus needs the package {package.replace('_', '-')}; "
            "pip install -e '.[judge]'"
        )


def _rubric(template: str) -> str:
    levels = {f"score{level}_description": text for level, text in LEVELS.items()}
    return template.format(criteria=CRITERION, **levels)


def _task(response: Response) -> dict[str, str]:
    """Quote what a response answers."""
    given = "\n\n".join(filter(None, (response.instruction, response.input)))
    return {"instruction": neutralise(given), "reference_answer": neutralise(response.reference)}


def build_prometheus_prompt(response: Response, *, with_reference: bool) -> JudgePrompt:
    """Ask for the grade of one response.

    Raises:
        JudgeError: prometheus-eval is not installed.
    """
    require("prometheus_eval")
    from prometheus_eval import prompts

    template = prompts.ABSOLUTE_PROMPT if with_reference else prompts.ABSOLUTE_PROMPT_WO_REF
    user = template.format(
        **_task(response),
        response=neutralise(response.response),
        rubric=_rubric(prompts.SCORE_RUBRIC_TEMPLATE),
    )
    return JudgePrompt(prompts.ABS_SYSTEM_PROMPT, user)


def build_prometheus_pair_prompt(
    one: Response, other: Response, *, with_reference: bool
) -> JudgePrompt:
    """Ask which of two responses to one prompt is better; the first is A to the judge.

    Raises:
        JudgeError: prometheus-eval is not installed.
    """
    require("prometheus_eval")
    from prometheus_eval import prompts

    template = prompts.RELATIVE_PROMPT if with_reference else prompts.RELATIVE_PROMPT_WO_REF
    user = template.format(
        **_task(one),
        response_A=neutralise(one.response),
        response_B=neutralise(other.response),
        rubric=_rubric(prompts.SCORE_RUBRIC_TEMPLATE),
    )
    return JudgePrompt(prompts.REL_SYSTEM_PROMPT, user)
