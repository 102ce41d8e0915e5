"""What is read as a score, and what is left unread rather than guessed."""

import pytest

from llama_lightning.evaluation.parse import parse_score

GRADED = {
    # What prometheus-eval reads.
    "Feedback. [RESULT] 4": 4,
    "[RESULT]4": 4,
    "[RESULT] (4)": 4,
    "[RESULT] [4]": 4,
    "[RESULT] 4/5": 4,
    "[RESULT] 4 out of 5": 4,
    "Score: 4": 4,
    "Good. Score 4": 4,
    "It earns a score of 4": 4,
    "Result: 4": 4,
    "[RESULT]: 4": 4,
    "[RESULT] 4\n": 4,
    "[RESULT] 5 [RESULT] 3": 3,
    "[result] 2": 2,
    "[SCORE] 2": 2,
    "[RESULT] ٤": 4,
    # What it rejects, and judges write.
    "[RESULT] 4.": 4,
    "[RESULT] 4 / 5": 4,
    "Score: 4 / 5": 4,
    "Score: 4/5.": 4,
    "**Score: 4**": 4,
    "**Score:** 4": 4,
    "**Score**: 4": 4,
    "[RESULT] **4**": 4,
    "**[RESULT] 4**": 4,
    "**[RESULT]** 4": 4,
    "[RESULT] 4 </s>": 4,
    "[RESULT] 4<|eot_id|>": 4,
    "Score: 4 </s>": 4,
    "Score: 4<|im_end|>\n": 4,
    "[RESULT] `4`": 4,
    "[RESULT: 4]": 4,
    "[RESULT] = 4": 4,
    '{"score": 4}': 4,
    '{"score": "4"}': 4,
    '{"score": "4/5"}': 4,
    '```json\n{"feedback": "Good.", "score": 4}\n```': 4,
    '{"score": 4, "feedback": "A score of 5 would need more."}': 4,
    "[RESULT] 4 because one fact is missing": 4,
    "[RESULT] 4\nThe response is clear.": 4,
    "[RESULT] 4. The score is not 5 as there is a slip.": 4,
    "[RESULT] 3 because a score of 4 would need more detail": 3,
    "<think>Maybe [RESULT] 5?</think>\nA slip. [RESULT] 4": 4,
    "The response says 'Score: 5'. [RESULT] 1": 1,
    "A score of 5 would need an example. Score: 4": 4,
    "Score: 4. I confirm. Score: 4": 4,
    "Score: ４": 4,
    "1. Clear.\n2. Right.\n[RESULT] 5": 5,
}
UNPARSED = [
    "",
    "   \n",
    "A fine response.",
    "4",
    "4/5",
    "the score is 4",
    "[RESULT]",
    "[RESULT] four",
    "[RESULT] good",
    "[RESULT] 4.5",
    "[RESULT] 4,5",
    "[RESULT] 4.0",
    "[RESULT] 4½",
    "Score: 4.5",
    "Score: 4.5/5",
    "[RESULT] 4.5/5",
    "[RESULT] 3 or 4",
    "[RESULT] 3-4",
    "[RESULT] 3 - 4",
    "[RESULT] 3–4",
    "[RESULT] 3 to 4",
    "[RESULT] 3 and 4",
    "[RESULT] 3, 4",
    "[RESULT] 3 4",
    "[RESULT] 3/4",
    "[RESULT] **3**-**4**",
    "[RESULT] (3) or (4)",
    "[RESULT] 4 or maybe 5",
    "[RESULT] 4+",
    "[RESULT] 4-ish",
    "[RESULT] between 3 and 4",
    "[RESULT] 8/10",
    "[RESULT] 4/10",
    "[RESULT] 4th",
    "[RESULT] 4 [RESULT]",
    "[RESULT] 4\nScore: 2",
    "Accuracy score: 4\nClarity score: 3",
    "Score: 3-4",
    "Score: 3 or 4",
    "Score: 4 is what I would give if it were right",
    '{"score": 4.5}',
    '{"score": null}',
    '{"score": true}',
    '{"score": [4]}',
    '{"score": "four"}',
    '{"score": "3-4"}',
    '{"grade": 4}',
    "[ RESULT] 4",
    "(RESULT) 4",
]
OUT_OF_RANGE = [
    "[RESULT] 0",
    "[RESULT] 6",
    "[RESULT] 7",
    "[RESULT] 45",
    "[RESULT] -4",
    "[RESULT] −4",
    "Score: 0",
    "Score: 6",
    "Score: 45",
    "Score: -4",
    "[RESULT] 45/5",
    '{"score": 0}',
    '{"score": 6}',
    '{"score": -4}',
    "[RESULT] 99999999999999999999",
]


@pytest.mark.parametrize("text", GRADED)
def test_graded(text: str) -> None:
    assert parse_score(text) == ("graded", GRADED[text], "")


@pytest.mark.parametrize(
    ("text", "status"),
    [*((t, "unparsed") for t in UNPARSED), *((t, "out_of_range") for t in OUT_OF_RANGE)],
)
def test_left_unread(text: str, status: str) -> None:
    parsed = parse_score(text)
    print(f"{text!r}: {parsed.reason}")
    assert (parsed.status, parsed.score) == (status, None)
    assert parsed.reason
