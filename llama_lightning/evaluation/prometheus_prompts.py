"""What a Prometheus judge is asked, in the words it was trained on.

They are those of the package prometheus-eval, imported only here. The system text goes before the
user's, as the chat template of Mistral-Instruct has no place for it.
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


def build_prometheus_prompt(response: Response, *, with_reference: bool) -> JudgePrompt:
    """Ask for the grade of one response.

    Raises:
        JudgeError: prometheus-eval is not installed.
    """
    require("prometheus_eval")
    from prometheus_eval import prompts

    template = prompts.ABSOLUTE_PROMPT if with_reference else prompts.ABSOLUTE_PROMPT_WO_REF
    levels = {f"score{level}_description": text for level, text in LEVELS.items()}
    quoted = {
        "instruction": "\n\n".join(filter(None, (response.instruction, response.input))),
        "response": response.response,
        "reference_answer": response.reference,
    }
    user = template.format(
        rubric=prompts.SCORE_RUBRIC_TEMPLATE.format(criteria=CRITERION, **levels),
        **{name: neutralise(text) for name, text in quoted.items()},
    )
    return JudgePrompt(system="", user=f"{prompts.ABS_SYSTEM_PROMPT}\n{user}")


def instruct_text(prompt: JudgePrompt) -> str:
    """Write a prompt as Mistral-Instruct reads it; the beginning token comes before."""
    return f"[INST] {prompt.user} [/INST]"
