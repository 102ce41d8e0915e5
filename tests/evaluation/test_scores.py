"""Exact match and ROUGE-L: what counts, and what does not."""

import pytest

from llama_lightning.evaluation.scores import TextScores, exact_match, rouge_l
from llama_lightning.records import Response


def _response(response: str, reference: str) -> Response:
    return Response(0, "", "", reference, response, 1, "stop")


@pytest.mark.parametrize(
    ("response", "reference", "expected"),
    [
        ("the cat sat on the mat", "the cat sat on the mat", 1.0),
        ("The cat, sat; on the MAT!", "the cat sat on the mat", 1.0),  # case and marks aside
        ("the mat", "the cat sat on the mat", 2 * 1.0 * (2 / 6) / (1.0 + 2 / 6)),
        ("mat the on sat cat the", "the cat sat on the mat", 3 / 6),  # the sat the: order counts
        ("", "the cat", 0.0),
        ("dog", "the cat", 0.0),
    ],
)
def test_rouge_l_by_hand(response: str, reference: str, expected: float) -> None:
    assert rouge_l(response, reference) == pytest.approx(expected)


def test_exact_match_is_strict_inside() -> None:
    assert exact_match(" Paris\n", "Paris")
    assert not exact_match("paris", "Paris")
    assert not exact_match("Paris.", "Paris")


def test_means_are_over_responses_with_a_reference() -> None:
    scores = TextScores()
    for response, reference in [("a b", "a b"), ("a", "a b"), ("anything", "")]:
        scores.add(_response(response, reference))
    metrics = scores.metrics("predict")
    assert metrics["predict/exact_match"] == 0.5
    assert metrics["predict/rouge_l"] == pytest.approx((1 + 2 / 3) / 2)
    assert str(scores) == "exact match 50.0% (1 of 2), ROUGE-L 0.833"
    assert TextScores().metrics("predict") == {}
