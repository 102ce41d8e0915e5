"""All that decides a verdict besides the response: where it is equal, grades compare.

It knows no server and no file.
"""

import hashlib
import json
from typing import NamedTuple

from llama_lightning.evaluation.prompts import build_prompt
from llama_lightning.records import Response

_PROBE = Response(0, "instruction", "input", "reference", "response", 0, "")


def hash_of(values: list[object]) -> str:
    """Name a list of values."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def prompt_version() -> str:
    """Name the words of the prompt and the rubric: others have another name."""
    return hash_of([*build_prompt(_PROBE, with_reference=True)])[:12]


class Settings(NamedTuple):
    """How a run was judged."""

    judge: str  # its full name
    with_reference: bool
    temperature: float
    seed: int
    max_new_tokens: int
    prompt: str  # see `prompt_version`

    def key(self, response: Response) -> str:
        """Name the verdict on a response under these settings."""
        prompt = build_prompt(response, with_reference=self.with_reference)
        parameters = (self.temperature, self.seed, self.max_new_tokens)
        return hash_of([self.judge, *prompt, *parameters, response.sample])
