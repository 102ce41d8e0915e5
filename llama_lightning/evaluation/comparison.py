"""Figures of a comparison: by how much B is above A, how sure that is, what would settle it.

It knows differences, one a prompt, and not where they come from.
"""

import math
from collections.abc import Sequence
from statistics import NormalDist, mean, stdev
from typing import NamedTuple

import numpy as np

from llama_lightning.evaluation.report import bootstrap_interval

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
    if abs(difference) < 1e-9:  # a sum of fractions that is 0 but for rounding
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
