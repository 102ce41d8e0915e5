"""From verdicts to figures: the mean grade, how sure it is, and what it leaves out.

A mean without its exclusions hides that a judge may fail where responses are worst.
"""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llama_lightning.records import Verdict

RESAMPLES = 10_000


def bootstrap_interval(histogram: Sequence[int], seed: int = 0) -> tuple[float, float]:
    """Compute the 95 % percentile bootstrap interval of a mean grade.

    Drawing n grades with replacement is drawing how often each of the five comes.

    Args:
        histogram: how many grades of 1, 2, 3, 4, 5 there are.
        seed: of the resampling.
    """
    counts = np.asarray(histogram)
    total = counts.sum()
    draws = np.random.default_rng(seed).multinomial(total, counts / total, size=RESAMPLES)
    low, high = np.percentile(draws @ np.arange(1, 6) / total, [2.5, 97.5])
    return float(low), float(high)


class Summary(NamedTuple):
    """What summary.json holds."""

    judge: str
    with_reference: bool
    total: int
    graded: int
    excluded: dict[str, int]  # by status
    mean: float | None
    interval_95: tuple[float, float] | None
    histogram: dict[int, int]
    mean_if_excluded_were_1: float
    mean_if_excluded_were_5: float

    def metrics(self) -> dict[str, float]:
        """Name the figures for a logger."""
        metrics = {"judge/graded": float(self.graded)}
        if self.mean is not None:
            metrics["judge/mean"] = self.mean
        return metrics

    def write(self, path: Path) -> None:
        """Write the file whole or not at all."""
        values: dict[str, Any] = self._asdict()
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        temporary.replace(path)

    def __str__(self) -> str:
        reasons = ", ".join(f"{count} {status}" for status, count in self.excluded.items())
        counted = f"n={self.graded} of {self.total}" + (f" ({reasons})" if reasons else "")
        if self.mean is None or self.interval_95 is None:
            return f"no grade, {counted}"
        low, high = self.interval_95
        return f"{self.mean:.2f} [{low:.2f}, {high:.2f}], {counted}"


def summarise(verdicts: Sequence[Verdict], *, with_reference: bool) -> Summary:
    """Add up the verdicts, one a response."""
    scores = [verdict.score for verdict in verdicts if verdict.score is not None]
    histogram = {level: scores.count(level) for level in range(1, 6)}
    excluded = Counter(verdict.status for verdict in verdicts if verdict.score is None)
    missing, total = len(verdicts) - len(scores), len(verdicts)
    return Summary(
        judge=verdicts[0].judge,
        with_reference=with_reference,
        total=total,
        graded=len(scores),
        excluded=dict(excluded.most_common()),
        mean=sum(scores) / len(scores) if scores else None,
        interval_95=bootstrap_interval(list(histogram.values())) if scores else None,
        histogram=histogram,
        mean_if_excluded_were_1=(sum(scores) + missing) / total,
        mean_if_excluded_were_5=(sum(scores) + 5 * missing) / total,
    )
