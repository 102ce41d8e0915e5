"""All that decides a verdict besides the response: where it is equal, grades compare.

It knows no server and no file.
"""

import hashlib
import json
from typing import NamedTuple

from llama_lightning.evaluation.prometheus_prompts import build_prometheus_prompt
from llama_lightning.evaluation.prompts import JudgePrompt, build_prompt
from llama_lightning.records import Response

_PROBE = Response(0, "instruction", "input", "reference", "response", 0, "")


def _hash(values: list[object]) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


BUILDERS = {"own": build_prompt, "prometheus": build_prometheus_prompt}


def prompt_version(words: str) -> str:
    """Name the words of the prompt and the rubric: others have another name.

    Args:
        words: a key of BUILDERS.
    """
    return _hash([*BUILDERS[words](_PROBE, with_reference=True)])[:12]


class Settings(NamedTuple):
    """How a run was judged."""

    judge: str  # its full name
    with_reference: bool
    temperature: float
    seed: int
    max_new_tokens: int
    prompt: str  # see `prompt_version`
    words: str = "own"  # whose prompt: a key of BUILDERS
    top_p: float | None = None
    repetition_penalty: float | None = None

    def build_prompt(self, response: Response) -> JudgePrompt:
        """Ask for the grade of one response.

        Raises:
            JudgeError: the words are those of a package that is not installed.
        """
        return BUILDERS[self.words](response, with_reference=self.with_reference)

    def key(self, response: Response) -> str:
        """Name the verdict on a response under these settings."""
        parameters = (self.temperature, self.seed, self.max_new_tokens)
        drawn = (self.top_p, self.repetition_penalty)
        prompt = self.build_prompt(response)
        return _hash([self.judge, *prompt, *parameters, *drawn, response.sample])
