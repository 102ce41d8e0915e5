"""The figures under a mean: an interval that holds what it says, and what was left out."""

import json

import numpy as np
import pytest

from llama_lightning.evaluation import report
from llama_lightning.evaluation.report import (
    Graded,
    bootstrap_interval,
    rank_correlation,
    summarise,
)
from llama_lightning.evaluation.settings import Settings
from llama_lightning.records import Response, Verdict

SETTINGS = Settings("judge", True, 0.0, 0, 1024, "words")


def graded(score: int | None, status: str = "graded", text: str = "four") -> Graded:
    verdict = Verdict("", "judge", 0, 0, status, score, "", "")
    return Graded(Response(0, "q", "", "", text, 0, "stop"), verdict)


@pytest.mark.parametrize("size", [100, 400])
def test_the_interval_covers_the_true_mean(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(report, "RESAMPLES", 1000)  # a tenth, 2,000 times
    # Grades as the original's judge gave them: mean 3.4, spread 1.15.
    chances = np.array([0.07, 0.14, 0.26, 0.38, 0.15])
    mean = chances @ np.arange(1, 6)
    sets = np.random.default_rng(0).multinomial(size, chances, size=2000)
    intervals = np.array([bootstrap_interval(counts, seed) for seed, counts in enumerate(sets)])
    covered = np.mean((intervals[:, 0] <= mean) & (mean <= intervals[:, 1]))
    print(f"95 % intervals of {size} grades: {covered:.1%} of 2,000 hold the true mean")
    assert 0.93 <= covered <= 0.97


def test_the_interval_is_that_of_drawing_grades() -> None:
    histogram = [3, 10, 20, 12, 5]
    grades = np.repeat(np.arange(1, 6), histogram)
    draws = np.random.default_rng(1).choice(grades, size=(20_000, len(grades))).mean(axis=1)
    expected = np.percentile(draws, [2.5, 97.5])
    assert bootstrap_interval(histogram) == pytest.approx(expected, abs=0.03)
    assert bootstrap_interval(histogram) == bootstrap_interval(histogram)


def test_summary() -> None:
    rows = [graded(s) for s in [5, 4, 4, 1]]
    rows += [graded(None, s) for s in ("truncated", "unparsed", "truncated")]
    summary = summarise(rows, SETTINGS)
    assert summary.mean == 3.5
    assert summary.histogram == {1: 1, 2: 0, 3: 0, 4: 2, 5: 1}
    assert summary.mean_if_excluded_were_1 == pytest.approx((14 + 3) / 7)
    assert summary.mean_if_excluded_were_5 == pytest.approx((14 + 15) / 7)
    low, high = summary.interval_95
    assert str(summary) == f"3.50 [{low:.2f}, {high:.2f}], n=4 of 7 (2 truncated, 1 unparsed)"
    assert summary.metrics() == {"judge/mean": 3.5, "judge/graded": 4}
    written = json.loads(summary.json("responses.jsonl"))
    assert written["excluded"] == {"truncated": 2, "unparsed": 1}
    assert (written["judge"], written["responses"]) == ("judge", "responses.jsonl")


def test_nothing_graded_has_no_mean() -> None:
    summary = summarise([graded(None, "unparsed")] * 2, SETTINGS)
    assert summary.mean is None
    assert summary.interval_95 is None
    assert summary.metrics() == {"judge/graded": 0}


def test_rank_correlation() -> None:
    assert rank_correlation([1, 2, 3], [10, 100, 1000]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3], [9, 5, 1]) == pytest.approx(-1)
    # By hand, with a tie: ranks 1, 2.5, 2.5, 4 and 1, 3, 2, 4.
    assert rank_correlation([1, 2, 2, 5], [1, 7, 3, 9]) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
    assert rank_correlation([1, 2], [3, 3]) is None
    assert rank_correlation([], []) is None


def test_report_for_a_terminal() -> None:
    rows = [graded(s, text="x" * s) for s in [1, 2, 2, 5]] + [graded(None, "truncated")]
    text = summarise(rows, SETTINGS).markdown()
    print(text)
    assert "| graded | 4 of 5 |" in text
    assert "| left out | 1 truncated |" in text
    assert "| mean if those were all 1, or 5 | 2.20, 3.00 |" in text
    assert "| score and length, Spearman | +1.00 |" in text
    assert f"| 2 | 2 | {'█' * 30} |" in text


def test_samples_of_a_prompt_are_no_independent_grades() -> None:
    # Three samples that all have their prompt's grade: as sure as ten grades, not as thirty.
    def of_ten_prompts(samples: int) -> list[Graded]:
        return [
            Graded(
                Response(i, "", "", "", "x", 1, "stop", sample),
                Verdict(f"{i}.{sample}", "exact", i, sample, "graded", 1 + i % 5, "", ""),
            )
            for i in range(10)
            for sample in range(samples)
        ]

    one, three = (summarise(of_ten_prompts(samples), SETTINGS) for samples in (1, 3))
    assert one.mean == three.mean == 3
    assert one.interval_95 == three.interval_95


def test_the_mean_is_that_of_the_interval() -> None:
    # Of one prompt all four samples have a grade, of the others one.
    scores: dict[int, list[int | None]] = {0: [1, 1, 1, 1]}
    scores |= {i: [5, None, None, None] for i in range(1, 4)}
    summary = summarise(
        [
            Graded(
                Response(i, "", "", "", "x", 1, "stop", sample),
                Verdict("", "exact", i, sample, "graded" if score else "unparsed", score, "", ""),
            )
            for i, samples in scores.items()
            for sample, score in enumerate(samples)
        ],
        SETTINGS,
    )
    print(summary)
    assert summary.mean == (1 + 5 + 5 + 5) / 4
    assert isinstance(summary.mean, float)
    assert summary.mean_if_excluded_were_1 == (1 + 2 + 2 + 2) / 4
    assert summary.mean_if_excluded_were_5 == 4
    assert summary.histogram == {1: 4, 2: 0, 3: 0, 4: 0, 5: 3}
