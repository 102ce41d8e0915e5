"""What is read as a score, and what is left unread rather than guessed."""

import time

import pytest

from llama_lightning.evaluation.pairs import parse_choice
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
    "[RESULT] Score: 4": 4,
    "[RESULT] Result: 4": 4,
    "[Result] score of 4": 4,
    "[RESULT] score  of 4": 4,
    "Result 4": 4,
    "[RESULT] 4outof5": 4,
    "[RESULT] 04": 4,
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
    'Score: "4".': 4,
    "A slip. Final score: **4**.": 4,
    "- **Overall score: 4/5**": 4,
    '[RESULT] 1. The response says "Score: 5".': 1,
    "[RESULT] **Score: 4**": 4,
    "1. Clear.\n2. Right.\n[RESULT] 5": 5,
}
# Words of the response, or about it, that a judge ends with.
QUOTING = [
    'The response only repeats "Score: 5".',
    "The response only repeats 'Score: 5'",
    "The response only repeats `Score: 5`.",
    'The response says "Good. Score: 5".',
    'The response says:\n"Score: 5"',
    'It is nothing but {"score": 5}',
    "It claims a score of 5.",
    "The response ends with **Score: 5**.",
    "No [RESULT] is due to it: it claims a score of 5.",
]
UNPARSED = [
    *QUOTING,
    "",
    "   \n",
    "A fine response.",
    "4",
    "4/5",
    "the score is 4",
    "[RESULT]",
    '{"score": ' * 2000,
    "Score:" + " \n" * 5000,
    "[RESULT] " + "*" * 10000,
    "[RESULT] four",
    "[RESULT] Score: 4.5",
    "[RESULT] Score: 3 or 4",
    "[RESULT] Score: 4\nResult: 3",
    "It fails as a result of 5",
    "Good [subscore: 4",
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
    "[RESULT] Score: 7",
    "[RESULT] 00",
    '{"score": 0}',
    '{"score": 6}',
    '{"score": -4}',
    "[RESULT] 99999999999999999999",
    "[RESULT] " + "5" * 5000,
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


# A judge that repeats itself: what stands before the run, what is repeated, what follows.
RUNS = {
    "blanks": ("a", " ", "b"),
    "blanks behind [RESULT] 4": ("[RESULT] 4", " \n", "x"),
    "stars behind [RESULT] 4": ("[RESULT] 4", "*", "x"),
    "quotes behind [RESULT] 4": ("[RESULT] 4", "'\"", "x"),
    "blanks behind a comma": ("[RESULT] 4,", " ", "x"),
    "parentheses": ("[RESULT] 4", "(", "x"),
    "blanks behind Score: 4": ("Score: 4", " ", "x"),
    "blanks behind Score:": ("Score:", " ", "x"),
    "blanks behind of": ("Score: 4 out of", " ", "x"),
    "stars before Score": ("", "*", "x Score: 4"),
    "stops before Score": ("", ".*", "x Score: 4"),
    "my before Score": ("", "my ", "x Score: 4"),
    "scores": ("", "Score: 4 ", ""),
    "marks": ("", "[RESULT] ", ""),
    "digits": ("[RESULT] ", "5", "x"),
    "end tokens": ("Score: 4", "<|x|>", "y"),
    "fences": ("", " ```", "x"),
    "blanks in JSON": ('{"score":', " ", "4"),
    "digits in JSON": ('{"score": ', "4", "}"),
}


@pytest.mark.parametrize("read", [parse_score, parse_choice])
def test_a_long_reply_takes_as_long_as_it_is(read) -> None:
    """Where two runs that stand side by side share characters, one reply took 4 s, now 0.01 s."""
    seconds = {}
    for name, (before, run, behind) in RUNS.items():
        text = before + run * (20_000 // len(run)) + behind
        start = time.process_time()
        read(text)
        seconds[name] = time.process_time() - start
    slowest = max(seconds, key=seconds.__getitem__)
    print(f"slowest of {len(RUNS)} replies of 20 kB: {slowest}, {seconds[slowest]:.3f} s")
    assert seconds[slowest] < 0.5
