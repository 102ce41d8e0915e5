"""All that decides a verdict besides the response: where it is equal, grades compare.

It knows no server and no file.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from llama_lightning.evaluation.judge import Judge, JudgeConfig, Request
from llama_lightning.evaluation.pairs import build_pair_prompt
from llama_lightning.evaluation.prometheus_prompts import (
    build_prometheus_pair_prompt,
    build_prometheus_prompt,
)
from llama_lightning.evaluation.prompts import JudgePrompt, build_prompt
from llama_lightning.records import Response

# By JudgeConfig.words: on one response, and on two.
PROMPTS = {"own": build_prompt, "prometheus": build_prometheus_prompt}
PAIR_PROMPTS = {"own": build_pair_prompt, "prometheus": build_prometheus_pair_prompt}
_PROBE = Response(0, "instruction", "input", "reference", "response", 0, "")


def _hash(values: list[object]) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


class Settings(NamedTuple):
    """How a run was judged."""

    judge: str  # its full name
    with_reference: bool
    temperature: float
    seed: int
    max_new_tokens: int
    prompt: str  # names the words of the prompt and the rubric: others have another name
    words: str = "own"  # whose they are, see JudgeConfig
    top_p: float | None = None
    repetition_penalty: float | None = None

    def prompt_on(self, response: Response) -> JudgePrompt:
        """Ask for the grade of one response.

        Raises:
            JudgeError: the words are those of a package that is not installed.
        """
        return PROMPTS[self.words](response, with_reference=self.with_reference)

    def pair_prompt_on(self, one: Response, other: Response) -> JudgePrompt:
        """Ask which of two responses is better; the first is A to the judge.

        Raises:
            JudgeError: see `prompt_on`.
        """
        return PAIR_PROMPTS[self.words](one, other, with_reference=self.with_reference)

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
            top_p=self.top_p,
            repetition_penalty=self.repetition_penalty,
            # A Prometheus was trained to end with [RESULT], as its prompt says.
            schema=schema if self.words == "own" else None,
            other=other,
        )

    def key(self, response: Response) -> str:
        """Name the verdict on a response under these settings."""
        return self.key_of(self.prompt_on(response), response.sample)

    def key_of(self, prompt: JudgePrompt, *more: object) -> str:
        """Name the verdict that a prompt asks for, told apart by more where prompts are equal."""
        parameters: list[object] = [self.temperature, self.seed, self.max_new_tokens]
        drawn = (self.top_p, self.repetition_penalty)
        if drawn != (None, None):  # else they are the server's, and no part of the name
            parameters += drawn
        return _hash([self.judge, *prompt, *parameters, *more])


def settings_of(
    config: JudgeConfig, judge: Judge, *, with_reference: bool, pairwise: bool = False
) -> Settings:
    """Take from a configuration what decides verdicts.

    Args:
        config: the judge's.
        judge: behind its preflight, which completes its name.
        with_reference: whether references are shown.
        pairwise: whether two responses are compared, or one is graded.

    Raises:
        JudgeError: the words are those of a package that is not installed.
    """
    if pairwise:
        probe = PAIR_PROMPTS[config.words](_PROBE, _PROBE, with_reference=True)
    else:
        probe = PROMPTS[config.words](_PROBE, with_reference=True)
    return Settings(
        judge=judge.name,
        with_reference=with_reference,
        seed=config.seed,
        max_new_tokens=config.max_new_tokens,
        prompt=_hash([*probe])[:12],
        words=config.words,
        **config.sampling._asdict(),
    )
