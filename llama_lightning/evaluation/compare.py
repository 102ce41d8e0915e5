"""Two judged runs of the same prompts: which is better, by how much, and is that settled.

The grades of one prompt go together: the interval is that of their difference, prompt by prompt.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import NormalDist, mean, stdev
from typing import NamedTuple

import numpy as np

from llama_lightning.errors import JudgeError, UsageError
from llama_lightning.evaluation.judged import JudgedRun, open_run
from llama_lightning.evaluation.page import Pair, compare_page
from llama_lightning.evaluation.report import Graded, bootstrap_interval, write_whole

PAGE = "compare.html"
LEVEL, POWER = 0.05, 0.8
FEWEST_PAIRS = 20  # with fewer a bootstrap interval is too narrow


def needed_pairs(difference: float, spread: float) -> int:
    """Count the prompts that show a difference at the 5 % level in 4 runs of 5.

    Args:
        difference: of the means; not 0.
        spread: standard deviation of the differences, prompt by prompt.
    """
    normal = NormalDist()
    deviations = normal.inv_cdf(1 - LEVEL / 2) + normal.inv_cdf(POWER)
    return math.ceil((deviations * spread / difference) ** 2)


class Comparison(NamedTuple):
    """How B's grades differ from A's."""

    difference: float
    interval_95: tuple[float, float]
    pairs: int  # prompts with a grade in both
    wins: int  # of B
    ties: int
    losses: int
    missing: int  # prompts of both that lack a grade
    only_a: int  # prompts
    only_b: int
    more: int | None  # prompts that would settle it; 0: it is settled; None: nothing to settle

    @property
    def verdict(self) -> str:
        """Say whether the difference is settled."""
        if self.more is None:
            return "not settled, the means are equal" if self.wins else "no difference"
        if self.more:
            return f"not settled, about {self.more:,} more prompts would settle it"
        return "settled"

    @property
    def interval(self) -> str:
        """Write the difference as +0.18 [+0.02, +0.34]."""
        low, high = self.interval_95
        return f"{self.difference:+.2f} [{low:+.2f}, {high:+.2f}]"

    @property
    def counts(self) -> str:
        """Write how often each is better."""
        return f"{self.wins} wins {self.ties} ties {self.losses} losses"

    @property
    def left_out(self) -> str:
        """Write which prompts do not count, if any."""
        reasons = {
            "without a grade in both": self.missing,
            "only in A": self.only_a,
            "only in B": self.only_b,
        }
        return ", ".join(f"{count} {reason}" for reason, count in reasons.items() if count)

    def __str__(self) -> str:
        left_out = f" ({self.left_out})" if self.left_out else ""
        pairs = f"n={self.pairs} pairs{left_out}"
        return f"B - A: {self.interval}, {pairs}, {self.counts}: {self.verdict}"


def compare_differences(
    differences: Sequence[float], *, missing: int = 0, only_a: int = 0, only_b: int = 0
) -> Comparison:
    """Compare by what B's grade of each prompt is above A's.

    Args:
        differences: at least one.
        missing: prompts of both that lack a grade.
        only_a: prompts that only A has.
        only_b: prompts that only B has.
    """
    values, counts = np.unique(np.round(differences, 9), return_counts=True)
    low, high = bootstrap_interval(counts.tolist(), values=values.tolist())
    difference, pairs = mean(differences), len(differences)
    if difference == 0:
        more = None
    elif pairs >= FEWEST_PAIRS and (low > 0 or high < 0):
        more = 0
    else:
        spread = stdev(differences) if pairs > 1 else 0.0
        more = max(needed_pairs(difference, spread), FEWEST_PAIRS) - pairs
    return Comparison(
        difference=difference,
        interval_95=(low, high),
        pairs=pairs,
        wins=int(counts[values > 0].sum()),
        ties=int(counts[values == 0].sum()),
        losses=int(counts[values < 0].sum()),
        missing=missing,
        only_a=only_a,
        only_b=only_b,
        more=more,
    )


def _check_settings(a: JudgedRun, b: JudgedRun) -> None:
    for field in a.settings._fields:
        one, other = getattr(a.settings, field), getattr(b.settings, field)
        if one != other:
            raise UsageError(
                f"A and B were judged differently: {field} is {one} in {a.folder} and {other} in "
                f"{b.folder}; judge both in the same way"
            )


def _pairs(a: JudgedRun, b: JudgedRun, rows_a: list[Graded], rows_b: list[Graded]) -> list[Pair]:
    """Put together what answers the same prompt.

    Raises:
        JudgeError: nothing does, or one id stands for two prompts.
    """
    index = {(graded.response.id, graded.response.sample): graded for graded in rows_a}
    pairs = [
        Pair(index[key], graded)
        for graded in rows_b
        if (key := (graded.response.id, graded.response.sample)) in index
    ]
    if not pairs:
        raise JudgeError(
            f"{a.folder} and {b.folder} have no id in common; compare answers to the same prompts"
        )
    fields = ["instruction", "input"] + ["reference"] * a.settings.with_reference
    for pair in pairs:
        for field in fields:
            if getattr(pair.a.response, field) != getattr(pair.b.response, field):
                raise JudgeError(
                    f"id {pair.a.response.id} has another {field} in {a.folder} than in "
                    f"{b.folder}; compare answers to the same prompts"
                )
    return pairs


def _differences(pairs: list[Pair]) -> list[float]:
    """Compute a difference a prompt: the samples of one prompt are no prompts of their own."""
    by_prompt: dict[int, list[int]] = {}
    for pair in pairs:
        if pair.difference is not None:
            by_prompt.setdefault(pair.a.response.id, []).append(pair.difference)
    return [mean(differences) for differences in by_prompt.values()]


def compare(a: Path, b: Path, output: Path | None = None) -> Comparison:
    """Compare two judged runs and write compare.html.

    Args:
        a: a folder with a judged run, or the verdicts.jsonl in it.
        b: another.
        output: folder of compare.html; by default that of B.

    Raises:
        UserError: they cannot be compared.
    """
    run_a, run_b = open_run(a), open_run(b)
    _check_settings(run_a, run_b)
    rows_a, rows_b = run_a.graded(), run_b.graded()
    pairs = _pairs(run_a, run_b, rows_a, rows_b)
    differences = _differences(pairs)
    if not differences:
        raise JudgeError(f"no prompt has a grade both in {run_a.folder} and in {run_b.folder}")
    ids_a, ids_b = ({graded.response.id for graded in rows} for rows in (rows_a, rows_b))
    common = {pair.a.response.id for pair in pairs}
    comparison = compare_differences(
        differences,
        missing=len(common) - len(differences),
        only_a=len(ids_a - common),
        only_b=len(ids_b - common),
    )
    facts = [
        ("A", str(run_a.folder)),
        ("B", str(run_b.folder)),
        ("judge", run_a.settings.judge),
        ("B - A, 95 % interval", comparison.interval),
        ("prompts", f"{comparison.pairs}: {comparison.counts} of B"),
        ("verdict", comparison.verdict),
    ]
    if comparison.left_out:
        facts.insert(-1, ("left out", comparison.left_out))
    folder = output or run_b.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / PAGE, compare_page(facts, pairs))
    except OSError as error:
        raise UsageError(f"--output {folder} cannot be written ({error.strerror})") from error
    print(f"{comparison}\nboth responses to each prompt: {folder / PAGE}")
    return comparison
