"""From a judge's words to a score, or to the reason why there is none.

A score is read, never guessed: nothing is rounded, clamped or chosen between. The forms are those
of prometheus-eval's parser and the ones that judges write besides.
"""

import json
import re
from typing import Any, NamedTuple

# For servers that can hold a model to a form; the feedback comes first, as the score shall follow.
SCORE_SCHEMA = {
    "type": "object",
    "properties": {
        "feedback": {"type": "string"},
        "score": {"type": "integer", "enum": [1, 2, 3, 4, 5]},
    },
    "required": ["feedback", "score"],
}
GRADED, UNPARSED, OUT_OF_RANGE = "graded", "unparsed", "out_of_range"


class Parsed(NamedTuple):
    """The score, or why there is none."""

    status: str
    score: int | None = None
    reason: str = ""


# A judge may repeat a character until its limit. Two runs that stand side by side here share no
# character, so that a reply takes a time linear in its length.
_DECORATION = r"[\s:=*_`\"'(\[]*"
_NUMBER = (
    r"(?P<number>[-−]?\d+(?:[.,]\d+)?)"
    r"(?:\s*(?:/|out\s*of)\s*(?P<scale>\d+(?:\.\d+)?)|(?![^\W_]))"
)
_RESULT = re.compile(r"\[(?:RESULT|SCORE)\b[*_`]*\]?", re.IGNORECASE)
_AFTER_RESULT = re.compile(_DECORATION + _NUMBER, re.IGNORECASE)
# Words that mark a score too, but only as the last words: a feedback may speak of scores.
_MARK = r"(?<![^\W_])(?:score(?:\s+of)?|result)"
_WORDS = re.compile(
    _MARK
    + r"(?:[*_`]*[ \t]?(?P<colon>[:=]))?[\s*_(\[]*(?P<quote>[`\"']?)"
    + _NUMBER
    + "(?P=quote)",
    re.IGNORECASE,
)
# As prometheus-eval reads them at the end of any sentence, which a quotation is not: it is closed.
_PLAIN = re.compile(
    _MARK + r":?[\s(\[]*\d+(?:/\s*5|\s*out\s*of\s*5|[)\]])?\s*",
    re.IGNORECASE,
)
# What may stand before them in their line where they are a sentence of their own.
_ALONE = re.compile(
    r"(?:.*[.!?\]])?[\s*_#(\[-]*(?:(?:(?:my|the|final|overall|total)\s+)+[*_]*)?", re.IGNORECASE
)
# A second number, or the word that announces it: a range or a choice.
_MORE = re.compile(
    r"[\s*_`)\]\"']*(?:(?:(?:[-–—~/,;&|(\[]|and\b)[\s*_`(\[\"']*)?\d|(?:or|to)\b|\+)|-[^\W\d]",
    re.IGNORECASE,
)
_CLOSE = r"(?:</?s>|<\|[^|<>]*\|>|<end_of_turn>|[\s*_.!)\]}%s])*"
END = re.compile(_CLOSE % "`\"'")
_UNQUOTED_END = re.compile(_CLOSE % "")


def _read(match: re.Match[str], rest: str) -> Parsed:
    """Judge one number by itself and by what follows it."""
    number, scale = match["number"], match["scale"]
    if "." in number or "," in number:
        return Parsed(UNPARSED, reason=f"{number} is not a whole number")
    if scale not in (None, "5"):
        return Parsed(UNPARSED, reason=f"{number} out of {scale}, not of 5")
    if _MORE.match(rest):
        return Parsed(UNPARSED, reason=f"more than one score: {number}{rest[:12].rstrip()}")
    digits = number.lstrip("0")
    # The length first: Python refuses to convert thousands of digits.
    if len(digits) != 1 or not 1 <= int(digits) <= 5:
        return Parsed(OUT_OF_RANGE, reason=f"{number[:12]} is not from 1 to 5")
    return Parsed(GRADED, int(digits))


def bare_json(text: str) -> dict[str, Any] | None:
    """Read a reply that is one JSON object, fenced or not."""
    bare = re.sub(r"^```\w*\s*", "", text.strip()).removesuffix("```").rstrip()
    if not bare.startswith("{"):
        return None
    try:
        values = json.loads(bare)
    except (ValueError, RecursionError):
        return None
    return dict(values)


def _from_json(text: str) -> Parsed | None:
    """Read {"score": 4}."""
    values = bare_json(text)
    if values is None or "score" not in values:
        return None
    match = re.fullmatch(_NUMBER, str(values["score"]))
    if match is None or isinstance(values["score"], bool):
        return Parsed(UNPARSED, reason=f"the score is {values['score']!r}")
    return _read(match, "")


def _from_words(text: str) -> Parsed | None:
    """Read `Score: 4` at the end of a text, but not out of a quotation."""
    found = list(_WORDS.finditer(text))
    if not found:
        return None
    last = found[-1]
    stated = {m["number"] for m in found if m["colon"]} | {last["number"]}
    rest = text[last.end() :]
    line = text[: last.start()].rpartition("\n")[2]
    alone = _ALONE.fullmatch(line) and _UNQUOTED_END.fullmatch(rest)
    if not (alone or _PLAIN.fullmatch(text, last.start()) or _MORE.match(rest)):
        return None
    if len(stated) > 1:
        return Parsed(UNPARSED, reason=f"several scores: {', '.join(sorted(stated))}")
    return _read(last, rest)


def parse_score(text: str) -> Parsed:
    """Read the score out of a judge's reply.

    The last [RESULT] decides; without one, or without a number behind it, a JSON object with a
    score, or `Score: n` as the last words. [RESULT] and last words that contradict each other
    decide nothing.
    """
    if (parsed := _from_json(text)) is not None:
        return parsed
    said = _from_words(text)
    marks = list(_RESULT.finditer(text))
    if not marks:
        return said or Parsed(UNPARSED, reason="no [RESULT] and no score at the end")
    match = _AFTER_RESULT.match(text, marks[-1].end())
    if match is None:
        return said or Parsed(UNPARSED, reason="no number behind the last [RESULT]")
    parsed = _read(match, text[match.end() :])
    if said is not None and parsed.status == GRADED and said.score != parsed.score:
        return Parsed(UNPARSED, reason="[RESULT] and the last words give two scores")
    return parsed
