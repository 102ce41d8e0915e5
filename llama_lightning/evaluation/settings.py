"""All that decides a verdict besides the response: where it is equal, grades compare.

It knows no server and no file.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from llama_lightning.evaluation.judge import Judge, JudgeConfig, Request
from llama_lightning.evaluation.prompts import JudgePrompt, build_prompt
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

    def request(
        self,
        prompt: JudgePrompt,
        response: Response,
        schema: Mapping[str, Any],
        other: Response | None = None,
    ) -> Request:
        """Ask with a prompt on a response, or on two."""
        return Request(
            prompt=prompt,
            response=response,
            temperature=self.temperature,
            seed=self.seed,
            max_new_tokens=self.max_new_tokens,
            schema=schema,
            other=other,
        )

    def key(self, response: Response) -> str:
        """Name the verdict on a response under these settings."""
        prompt = build_prompt(response, with_reference=self.with_reference)
        return self.key_of(prompt, response.sample)

    def key_of(self, prompt: JudgePrompt, *more: object) -> str:
        """Name the verdict that a prompt asks for, told apart by more where prompts are equal."""
        parameters = (self.temperature, self.seed, self.max_new_tokens)
        return hash_of([self.judge, *prompt, *parameters, *more])


def settings_of(
    config: JudgeConfig, judge: Judge, *, with_reference: bool, prompt: str
) -> Settings:
    """Take from a configuration what decides verdicts.

    Args:
        config: the judge's.
        judge: behind its preflight, which completes its name.
        with_reference: whether references are shown.
        prompt: the version of the words.
    """
    return Settings(
        judge=judge.name,
        with_reference=with_reference,
        temperature=config.temperature,
        seed=config.seed,
        max_new_tokens=config.max_new_tokens,
        prompt=prompt,
    )
