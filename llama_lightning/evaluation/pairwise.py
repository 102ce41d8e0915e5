"""Pairs of responses to verdicts: each pair is shown in both orders, for judges favour a place.

A win counts only where both orders agree; else the pair is a tie. pairwise.jsonl is appended and
gone on with as verdicts.jsonl is.
"""

import os
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

from llama_lightning.evaluation.asking import Question, ask_all
from llama_lightning.evaluation.duels import SAME_WORDS, Duel
from llama_lightning.evaluation.grading import make_judge, shows_reference
from llama_lightning.evaluation.judge import JudgeConfig
from llama_lightning.evaluation.pairs import CHOICE_SCHEMA, parse_choice
from llama_lightning.evaluation.parse import Parsed
from llama_lightning.evaluation.settings import settings_of
from llama_lightning.evaluation.verdicts import VerdictFile
from llama_lightning.records import Response

PAIRWISE = "pairwise.jsonl"
CURE = "name another folder by --output"


def _swapped(text: str) -> Parsed:
    """Read a choice between B's response, shown first, and A's."""
    parsed = parse_choice(text)
    return parsed if parsed.score is None else parsed._replace(score=-parsed.score)


def judge_pairs(
    config: JudgeConfig, pairs: Sequence[tuple[Response, Response]], folder: Path, runs: list[Path]
) -> list[Duel]:
    """Have a judge choose between the two responses of each pair.

    Args:
        config: the judge.
        pairs: responses of A and of B to the same prompts.
        folder: where pairwise.jsonl is.
        runs: the folders of A and B.

    Raises:
        UserError: something is missing, or the judge is not there any more.
    """
    with_reference = shows_reference(config, [one for one, _ in pairs])
    judge = make_judge(config)
    judge.preflight()
    settings = settings_of(config, judge, with_reference=with_reference, pairwise=True)
    names = [os.path.relpath(run, folder) for run in runs]

    def question(
        one: Response, other: Response, first: str, parse: Callable[[str], Parsed]
    ) -> Question:
        prompt = settings.pair_prompt_on(one, other)
        request = settings.request(prompt, one, CHOICE_SCHEMA, other)
        return Question(settings.key_of(prompt, one.sample, first), request, parse, first)

    questions = [
        (question(a, b, "A", parse_choice), question(b, a, "B", _swapped))
        if a.response.strip() != b.response.strip()
        else None
        for a, b in pairs
    ]
    asked = [q for both in questions if both is not None for q in both]
    shared = {**settings._asdict(), "runs": names}
    with closing(judge), VerdictFile(folder / PAIRWISE, shared, CURE) as file:
        ask_all(judge, asked, file, config.concurrency)
        return [
            SAME_WORDS if both is None else Duel(file[both[0].key], file[both[1].key])
            for both in questions
        ]
