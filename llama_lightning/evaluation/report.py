"""From verdicts to figures: the mean grade, how sure it is, and what it leaves out.

A mean without its exclusions hides that a judge may fail where responses are worst.
"""

import json
import math
from collections import Counter
from collections.abc import Sequence
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np

from llama_lightning.evaluation.self_preference import kinship
from llama_lightning.evaluation.settings import Settings
from llama_lightning.records import Response, Verdict

SUMMARY, REPORT = "summary.json", "report.md"
RESAMPLES = 10_000
LEVELS = range(1, 6)
BAR = 30  # characters


def bootstrap_interval(
    counts: Sequence[int], seed: int = 0, values: Sequence[float] = LEVELS
) -> tuple[float, float]:
    """Compute the 95 % percentile bootstrap interval of a mean.

    Drawing n values with replacement is drawing how often each of the different ones comes.

    Args:
        counts: how often each value is there.
        seed: of the resampling.
        values: the different values; by default the grades.
    """
    total = sum(counts)
    chances = np.asarray(counts) / total
    draws = np.random.default_rng(seed).multinomial(total, chances, size=RESAMPLES)
    low, high = np.percentile(draws @ np.asarray(values) / total, [2.5, 97.5])
    return float(low), float(high)


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Compute Spearman's correlation, equal values sharing their mean rank.

    None where one of them is constant.
    """
    if len(set(x)) < 2 or len(set(y)) < 2:
        return None
    ranks = []
    for values in (x, y):
        _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(counts) - (counts - 1) / 2)[place])
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


class Graded(NamedTuple):
    """A response and what the judge says of it."""

    response: Response
    verdict: Verdict


class Summary(NamedTuple):
    """What summary.json holds."""

    settings: Settings
    total: int
    graded: int
    excluded: dict[str, int]  # by status
    mean: float | None  # of the prompts' means, where prompts have several responses
    interval_95: tuple[float, float] | None
    histogram: dict[int, int]
    mean_if_excluded_were_1: float
    mean_if_excluded_were_5: float
    length_correlation: float | None  # Spearman, of score and characters of the response
    unique: int  # verdicts; equal responses to equal prompts share one
    graded_model: str  # empty where it is not known
    kinship: str  # a caution, where the judge is the graded model's kin

    def metrics(self) -> dict[str, float]:
        """Name the figures for a logger."""
        metrics = {"judge/graded": float(self.graded)}
        if self.mean is not None:
            metrics["judge/mean"] = self.mean
        return metrics

    @property
    def facts(self) -> list[tuple[str, str]]:
        """List what a report says, as names and values."""
        settings, excluded = self.settings, self.total - self.graded
        facts = [("judge", settings.judge)]
        if self.graded_model:
            facts += [("graded model", self.graded_model)]
        if self.kinship:
            facts += [("caution", f"{self.kinship}; judges favour their kin")]
        facts += [
            ("reference answers shown to it", "yes" if settings.with_reference else "no"),
            ("graded", f"{self.graded} of {self.total}"),
            ("mean, 95 % interval", self.interval),
        ]
        if self.unique < self.total:
            facts += [("different ones, each graded once", f"{self.unique}")]
        if excluded:
            if_one, if_five = self.mean_if_excluded_were_1, self.mean_if_excluded_were_5
            facts += [
                ("left out", self.reasons),
                ("mean if those were all 1, or 5", f"{if_one:.2f}, {if_five:.2f}"),
            ]
        if self.length_correlation is not None:
            facts += [("score and length, Spearman", f"{self.length_correlation:+.2f}")]
        return facts

    @property
    def interval(self) -> str:
        """Write the mean as 3.41 [3.30, 3.52]."""
        if self.mean is None or self.interval_95 is None:
            return "no grade"
        low, high = self.interval_95
        return f"{self.mean:.2f} [{low:.2f}, {high:.2f}]"

    @property
    def reasons(self) -> str:
        """Write what was left out, by status."""
        return ", ".join(f"{count} {status}" for status, count in self.excluded.items())

    def json(self, responses: str) -> str:
        """Write summary.json.

        Args:
            responses: where the responses are, seen from its folder.
        """
        values: dict[str, Any] = {**self.settings._asdict(), "responses": responses}
        values |= self._asdict()
        del values["settings"]
        return json.dumps(values, indent=2) + "\n"

    def markdown(self) -> str:
        """Write report.md: as readable in a terminal as on a forge."""
        lines = ["# Judge report", "", "| | |", "|---|---|"]
        lines += [f"| {name} | {value} |" for name, value in self.facts]
        lines += ["", "| score | responses | |", "|---|---|---|"]
        most = max(self.histogram.values()) or 1
        for level, count in self.histogram.items():
            lines.append(f"| {level} | {count} | {'█' * math.ceil(BAR * count / most)} |")
        if self.excluded:
            lines += ["", "| left out | responses |", "|---|---|"]
            lines += [f"| {status} | {count} |" for status, count in self.excluded.items()]
        lines += ["", "Every response with its feedback: [report.html](report.html)"]
        return "\n".join(lines) + "\n"

    def __str__(self) -> str:
        reasons = f" ({self.reasons})" if self.excluded else ""
        return f"{self.interval}, n={self.graded} of {self.total}{reasons}"


def _prompt_means(graded: Sequence[Graded], excluded: int | None = None) -> list[float]:
    """Compute a mean a prompt: samples of one prompt are no independent grades.

    Args:
        graded: the responses.
        excluded: what a response without a grade counts as; None leaves it out.
    """
    prompts: dict[int | str, list[int]] = {}
    for response, verdict in graded:
        score = excluded if verdict.score is None else verdict.score
        if score is not None:
            prompts.setdefault(response.id, []).append(score)
    return [fmean(scores) for scores in prompts.values()]


def summarise(graded: Sequence[Graded], settings: Settings, graded_model: str = "") -> Summary:
    """Add up the verdicts, one a response."""
    scored = [(len(r.response), v.score) for r, v in graded if v.score is not None]
    scores = [score for _, score in scored]
    # What is drawn again are prompts, so the mean is that of the prompts too.
    means = _prompt_means(graded)
    counts = Counter(means)
    histogram = {level: scores.count(level) for level in LEVELS}
    excluded = Counter(verdict.status for _, verdict in graded if verdict.score is None)
    return Summary(
        settings=settings,
        total=len(graded),
        graded=len(scores),
        excluded=dict(excluded.most_common()),
        mean=fmean(means) if means else None,
        interval_95=bootstrap_interval([*counts.values()], values=[*counts]) if counts else None,
        histogram=histogram,
        mean_if_excluded_were_1=fmean(_prompt_means(graded, 1)),
        mean_if_excluded_were_5=fmean(_prompt_means(graded, 5)),
        length_correlation=rank_correlation([length for length, _ in scored], scores),
        unique=len({verdict.key for _, verdict in graded}),
        graded_model=graded_model,
        kinship=kinship(settings.judge, graded_model),
    )
