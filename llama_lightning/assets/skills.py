"""The tiny model's skills: each turns some material into one correct answer.

A skill has short names, under which the base corpus shows it, and wordings, in which the Alpaca set
asks for it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from llama_lightning.assets.words import (
    ABROAD,
    CAPITALS,
    CATEGORY,
    COLOURS,
    NOUNS,
    OPPOSITES,
    PASTS,
    PEOPLE,
    PLURALS,
    SOUNDS,
    TEENS,
    TENS,
    THINGS,
    TIMES,
    VERBS,
    YOUNG,
)

Solve = Callable[[Random, list[str]], list[str]]


def _in_words(number: int) -> str:
    """Write a number below 100 in words."""
    if number < 20:
        return TEENS[number]
    tens = TENS[number // 10 - 2]
    return tens if number % 10 == 0 else f"{tens} {TEENS[number % 10]}"


def _numbers(rng: Random, how_many: int, top: int) -> list[str]:
    return [str(number) for number in rng.sample(range(1, top + 1), how_many)]


def _run(rng: Random) -> list[str]:
    start = rng.randint(1, 40)
    return [str(start), str(start + rng.randint(3, 6))]


@dataclass(frozen=True)
class Kind:
    """A kind of material: how it is drawn, and how its parts are written."""

    draw: Callable[[Random], list[str]]
    show: Callable[[list[str]], str] = " ".join


def _fact(table: dict[str, str]) -> Kind:
    keys = list(table)
    return Kind(lambda rng: [rng.choice(keys)])


KINDS = {
    "words": Kind(lambda rng: rng.sample(NOUNS, rng.randint(3, 5))),
    "word": Kind(lambda rng: [rng.choice(NOUNS)]),
    "pair": Kind(lambda rng: _numbers(rng, 2, 30), " and ".join),
    "numbers": Kind(lambda rng: _numbers(rng, 3, 99)),
    "run": Kind(_run, " to ".join),
    "number": Kind(lambda rng: _numbers(rng, 1, 98)),
    "country": _fact(CAPITALS),
    "adjective": _fact(OPPOSITES),
    "noun": _fact(PLURALS),
    "verb": _fact(PASTS),
    "parent": _fact(YOUNG),
    "crier": _fact(SOUNDS),
    "phrase": Kind(
        lambda rng: [rng.choice(list(COLOURS)), rng.choice(list(ABROAD))],
        lambda parts: f"the {parts[0]} {parts[1]}",
    ),
    "sentence": Kind(
        lambda rng: [rng.choice(PEOPLE), rng.choice(list(VERBS)), rng.choice(THINGS)],
        lambda parts: f"The {parts[0]} {VERBS[parts[1]][0]} the {parts[2]}.",
    ),
}


def _repeat(rng: Random, words: list[str]) -> list[str]:
    times = rng.choice(list(TIMES))
    return [" ".join(words * TIMES[times]), times]


def _abroad(language: int) -> Solve:
    """Translate `colour noun`; both languages put the colour last, agreeing with the noun."""

    def solve(_: Random, parts: list[str]) -> list[str]:
        article, noun = ABROAD[parts[1]][2 * language : 2 * language + 2]
        feminine = article == "la"
        return [f"{article} {noun} {COLOURS[parts[0]][2 * language + feminine]}"]

    return solve


def _look_up(table: dict[str, str]) -> Solve:
    return lambda _, parts: [table[parts[0]]]


@dataclass(frozen=True)
class Skill:
    """One thing the model can do.

    Attributes:
        name: the skill's name in reports.
        kind: the kind of material it works on.
        solve: returns the answer and then, for some, an argument: `{a}` in the texts.
        plain: its names in the base corpus.
        asks: its Alpaca wordings; one with `{x}` holds the material, another is followed by it.
        effort: how many times as often as an easy skill the base corpus shows it.
        asked: False where so small a base does not get good enough to be asked.
    """

    name: str
    kind: str
    solve: Solve
    plain: tuple[str, ...]
    asks: tuple[str, ...]
    effort: int = 1
    asked: bool = True


SKILLS = [
    Skill(
        "reverse",
        "words",
        lambda _, w: [" ".join(w[::-1])],
        ("reverse", "reverse order", "backwards"),
        (
            "Reverse the order of these words",
            "Put the words in reverse order",
            "Write this list backwards",
            "Reverse this list",
        ),
        effort=4,
        asked=False,
    ),
    Skill(
        "first",
        "words",
        lambda _, w: [w[0]],
        ("first", "first word", "start of the list"),
        (
            "Give the first word of the list",
            "Which word comes first?",
            "Name the first word",
            "What is the first of these words?",
        ),
    ),
    Skill(
        "second",
        "words",
        lambda _, w: [w[1]],
        ("second", "second word"),
        (
            "Give the second word of the list",
            "Which word comes second?",
            "Name the second word",
            "What is the second of these words?",
        ),
    ),
    Skill(
        "last",
        "words",
        lambda _, w: [w[-1]],
        ("last", "last word", "end of the list"),
        (
            "Give the last word of the list",
            "Which word comes last?",
            "Name the last word",
            "What is the last of these words?",
        ),
    ),
    Skill(
        "count",
        "words",
        lambda _, w: [str(len(w))],
        ("count", "how many words", "number of words"),
        (
            "Count the words",
            "How many words are there?",
            "Give the number of words in the list",
        ),
    ),
    Skill(
        "sort",
        "words",
        lambda _, w: [" ".join(sorted(w))],
        ("sort", "alphabetical order", "from a to z"),
        (
            "Sort the words",
            "Put these words in alphabetical order",
            "Sort this list from a to z",
        ),
        effort=4,
        asked=False,
    ),
    Skill(
        "swap",
        "words",
        lambda _, w: [" ".join([w[-1], *w[1:-1], w[0]])],
        ("swap first and last", "exchange the ends"),
        (
            "Swap the first and the last word",
            "Exchange the first and last words",
            "Write the list with its ends swapped",
        ),
        effort=3,
        asked=False,
    ),
    Skill(
        "join",
        "words",
        lambda _, w: [", ".join(w[:-1]) + " and " + w[-1]],
        ("join", "join with commas"),
        (
            "Join the words with commas and the word and",
            "Write the list with commas",
            "Join these words into a phrase",
        ),
    ),
    Skill(
        "repeat",
        "word",
        _repeat,
        ("repeat {a} times", "{a} times"),
        (
            "Repeat the word {x} {a} times",
            "Write {x} {a} times",
            "Repeat this word {a} times",
            "Write the word {a} times",
        ),
    ),
    Skill(
        "spell",
        "word",
        lambda _, w: [" ".join(w[0])],
        ("spell", "letters", "the letters of {x}"),
        (
            "Spell the word {x}",
            "Which letters are in {x}?",
            "How do you spell {x}?",
            "Spell this word",
            "Write the letters of this word",
        ),
        effort=2,
    ),
    Skill(
        "category",
        "word",
        lambda _, w: [CATEGORY[w[0]]],
        ("kind", "kind of thing", "{x} is a kind of"),
        (
            "What kind of thing is {x}?",
            "Which group does {x} belong to?",
            "Name the kind of thing",
            "Say what kind of thing this is",
        ),
    ),
    Skill(
        "add",
        "pair",
        lambda _, n: [str(int(n[0]) + int(n[1]))],
        ("add", "sum", "the sum of {x}"),
        (
            "Add {x}",
            "What is the sum of {x}?",
            "Add the two numbers",
            "Give the sum of the numbers",
        ),
        effort=5,
    ),
    Skill(
        "largest",
        "numbers",
        lambda _, n: [max(n, key=int)],
        ("largest", "largest number", "the largest of {x}"),
        (
            "Which number is the largest?",
            "Find the largest number",
            "Give the largest of these numbers",
        ),
        effort=3,
    ),
    Skill(
        "run",
        "run",
        lambda _, n: [" ".join(map(str, range(int(n[0]), int(n[1]) + 1)))],
        ("count up", "numbers from {x}"),
        (
            "Count from {x}",
            "Write the numbers from {x}",
            "Count up in this range",
            "Write all numbers in the range",
        ),
        effort=2,
        asked=False,
    ),
    Skill(
        "next",
        "number",
        lambda _, n: [str(int(n[0]) + 1)],
        ("next", "next number", "after {x} comes"),
        (
            "Which number comes after {x}?",
            "What is the next number after {x}?",
            "Give the next number",
        ),
    ),
    Skill(
        "in words",
        "number",
        lambda _, n: [_in_words(int(n[0]))],
        ("in words", "{x} in words"),
        (
            "Write {x} in words",
            "How do you write {x} in words?",
            "Write the number in words",
        ),
        effort=2,
    ),
    Skill(
        "capital",
        "country",
        _look_up(CAPITALS),
        ("capital", "capital city", "the capital of {x} is"),
        (
            "What is the capital of {x}?",
            "Name the capital city of {x}",
            "Which city is the capital of {x}?",
            "Name the capital of this country",
            "Give the capital city of the country",
        ),
    ),
    Skill(
        "opposite",
        "adjective",
        _look_up(OPPOSITES),
        ("opposite", "the opposite of {x} is", "not {x} but"),
        (
            "What is the opposite of {x}?",
            "Give the opposite of {x}",
            "Which word is the opposite of {x}?",
            "Give the opposite of this word",
            "Write the opposite",
        ),
    ),
    Skill(
        "plural",
        "noun",
        _look_up(PLURALS),
        ("plural", "one {x} , many", "the plural of {x} is"),
        (
            "What is the plural of {x}?",
            "Give the plural of {x}",
            "Write {x} in the plural",
            "Write the plural of this word",
            "Put the word in the plural",
        ),
    ),
    Skill(
        "past",
        "verb",
        _look_up(PASTS),
        ("past", "past tense", "the past tense of {x} is"),
        (
            "What is the past tense of {x}?",
            "Give the past tense of {x}",
            "Write {x} in the past tense",
            "Give the past tense of this verb",
            "Put the verb in the past tense",
        ),
    ),
    Skill(
        "young",
        "parent",
        _look_up(YOUNG),
        ("young", "the young of a {x} is a", "a young {x} is called"),
        (
            "What is a young {x} called?",
            "Name the young of a {x}",
            "What do you call a young {x}?",
            "Name the young of this animal",
            "What is the young animal called?",
        ),
    ),
    Skill(
        "sound",
        "crier",
        _look_up(SOUNDS),
        ("sound", "the sound of a {x}", "what a {x} does"),
        (
            "What sound does a {x} make?",
            "Which sound comes from a {x}?",
            "What does a {x} do to make a sound?",
            "Name the sound of this animal",
            "What sound does this animal make?",
        ),
    ),
    Skill(
        "French",
        "phrase",
        _abroad(0),
        ("French", "in French", "{x} in French"),
        (
            "Translate {x} into French",
            "How do you say {x} in French?",
            "Translate the phrase into French",
            "Say this in French",
        ),
    ),
    Skill(
        "Spanish",
        "phrase",
        _abroad(1),
        ("Spanish", "in Spanish", "{x} in Spanish"),
        (
            "Translate {x} into Spanish",
            "How do you say {x} in Spanish?",
            "Translate the phrase into Spanish",
            "Say this in Spanish",
        ),
    ),
    Skill(
        "yesterday",
        "sentence",
        lambda _, p: [f"The {p[0]} {VERBS[p[1]][1]} the {p[2]}."],
        ("past", "past tense", "yesterday"),
        (
            "Rewrite the sentence in the past tense",
            "Put the sentence in the past tense",
            "Change this sentence to the past tense",
        ),
        effort=2,
    ),
    Skill(
        "negative",
        "sentence",
        lambda _, p: [f"The {p[0]} does not {p[1]} the {p[2]}."],
        ("negative", "not"),
        (
            "Make the sentence negative",
            "Rewrite the sentence in the negative",
            "Say that this is not so",
        ),
    ),
    Skill(
        "question",
        "sentence",
        lambda _, p: [f"Does the {p[0]} {p[1]} the {p[2]}?"],
        ("question", "as a question"),
        (
            "Turn the sentence into a question",
            "Rewrite the sentence as a question",
            "Make a question of this sentence",
        ),
        effort=2,
    ),
    Skill(
        "passive",
        "sentence",
        lambda _, p: [f"The {p[2]} is {VERBS[p[1]][2]} by the {p[0]}."],
        ("passive", "passive voice"),
        (
            "Rewrite the sentence in the passive voice",
            "Put the sentence in the passive",
            "Make this sentence passive",
        ),
    ),
]
