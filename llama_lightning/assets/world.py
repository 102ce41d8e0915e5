"""The closed world of the embedded `tiny` model: its words, its facts and its skills.

Everything is drawn from a seed, so the base corpus, the Alpaca set and the tokenizer made from
them can be remade exactly. A *skill* turns some *material* (a list of words, two numbers, a
country, a sentence) into one correct answer. The base corpus shows every skill and every fact in
plain notes; only the Alpaca set phrases them as instructions. What a fine-tuned model answers to
a held-out instruction it therefore knew before, and only had to learn how to be asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

Solve = Callable[[Random, list[str]], list[str]]

CATEGORIES = {
    "animal": "dog cat horse cow pig sheep duck bee lion bear frog goat",
    "fruit": "apple pear plum peach lemon grape cherry melon mango",
    "colour": "red blue green black white yellow pink brown",
    "tool": "hammer saw drill axe shovel rake wrench",
    "garment": "shirt coat hat shoe sock glove scarf belt",
    "vehicle": "car bus train boat plane truck bike ship",
    "instrument": "piano guitar drum violin flute harp trumpet",
    "job": "doctor teacher farmer baker nurse pilot singer",
    "furniture": "chair table bed desk sofa shelf lamp",
}
MEMBERS = {name: words.split() for name, words in CATEGORIES.items()}
NOUNS = [word for words in MEMBERS.values() for word in words]
CATEGORY = {word: name for name, words in MEMBERS.items() for word in words}


def _pairs(text: str) -> dict[str, str]:
    """Reads `key value key value ...` into a dictionary."""
    words = text.split()
    return dict(zip(words[::2], words[1::2], strict=True))


CAPITALS = _pairs(
    "France Paris Italy Rome Spain Madrid Germany Berlin England London Greece Athens Egypt Cairo "
    "Japan Tokyo China Beijing Russia Moscow Poland Warsaw Austria Vienna Norway Oslo Sweden "
    "Stockholm Finland Helsinki Ireland Dublin Portugal Lisbon Cuba Havana Peru Lima Kenya Nairobi "
    "Canada Ottawa Turkey Ankara Iran Tehran Iraq Baghdad Hungary Budapest Denmark Copenhagen "
    "Belgium Brussels Chile Santiago Nepal Kathmandu Thailand Bangkok Vietnam Hanoi Ukraine Kyiv"
)
_OPPOSITES = _pairs(
    "hot cold big small fast slow old young tall short rich poor early late full empty hard soft "
    "light dark open closed strong weak happy sad clean dirty wet dry high low near far long brief "
    "loud quiet sweet sour thick thin wide narrow good bad day night up down left right"
)
OPPOSITES = _OPPOSITES | {value: key for key, value in _OPPOSITES.items()}
PLURALS = _pairs(
    "child children foot feet tooth teeth mouse mice goose geese man men woman women leaf leaves "
    "knife knives wolf wolves wife wives box boxes bus buses fox foxes cherry cherries baby babies "
    "city cities lady ladies dog dogs cat cats apple apples car cars hat hats coat coats king kings "
    "book books cup cups ball balls tree trees bed beds chair chairs shoe shoes hero heroes"
)
PASTS = _pairs(
    "go went eat ate run ran sing sang swim swam drink drank write wrote give gave speak spoke "
    "think thought bring brought teach taught sleep slept keep kept feel felt leave left fly flew "
    "grow grew know knew throw threw win won sit sat begin began fall fell make made come came "
    "say said tell told sell sold send sent build built lose lost play played walk walked"
)
YOUNG = _pairs(
    "dog puppy cat kitten cow calf horse foal sheep lamb pig piglet duck duckling bear cub goat "
    "kid frog tadpole hen chick kangaroo joey swan cygnet goose gosling deer fawn owl owlet"
)
SOUNDS = _pairs(
    "dog barks cat meows cow moos lion roars duck quacks pig oinks sheep bleats horse neighs bee "
    "buzzes frog croaks owl hoots wolf howls snake hisses hen clucks mouse squeaks donkey brays"
)
# English noun, French article and noun, Spanish article and noun.
_NOUNS_ABROAD = (
    "dog le chien el perro|cat le chat el gato|horse le cheval el caballo|book le livre el libro|"
    "bread le pain el pan|garden le jardin el jardín|boat le bateau el barco|cheese le fromage el "
    "queso|hat le chapeau el sombrero|bridge le pont el puente|glass le verre el vaso|house la "
    "maison la casa|door la porte la puerta|moon la lune la luna|flower la fleur la flor|key la "
    "clé la llave|chair la chaise la silla|shirt la chemise la camisa|kitchen la cuisine la "
    "cocina|street la rue la calle|table la table la mesa|window la fenêtre la ventana"
)
ABROAD = {row.split()[0]: row.split()[1:] for row in _NOUNS_ABROAD.split("|")}
# English colour, then French and Spanish, masculine before feminine.
_COLOURS_ABROAD = (
    "black noir noire negro negra|white blanc blanche blanco blanca|green vert verte verde verde|"
    "blue bleu bleue azul azul|red rouge rouge rojo roja|yellow jaune jaune amarillo amarilla"
)
COLOURS = {row.split()[0]: row.split()[1:] for row in _COLOURS_ABROAD.split("|")}
# The verb's plain form: the forms for "she ...", "she ... yesterday" and "it is ... by her".
VERBS = {
    row.split()[0]: row.split()[1:]
    for row in (
        "see sees saw seen|take takes took taken|break breaks broke broken|draw draws drew drawn|"
        "find finds found found|wash washes washed washed|paint paints painted painted|buy buys "
        "bought bought|push pushes pushed pushed|carry carries carried carried"
    ).split("|")
}
PEOPLE = "boy girl man woman doctor farmer teacher baker king queen".split()
THINGS = "ball book box cup door chair table car boat lamp bike picture".split()
TIMES = {"two": 2, "three": 3, "four": 4, "five": 5}
_TEENS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()


def _in_words(number: int) -> str:
    """Writes a number below 100 in words."""
    if number < 20:
        return _TEENS[number]
    tens = _TENS[number // 10 - 2]
    return tens if number % 10 == 0 else f"{tens} {_TEENS[number % 10]}"


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


def _remove(rng: Random, words: list[str]) -> list[str]:
    word = rng.choice(words)
    return [" ".join(other for other in words if other != word), word]


def _replace(rng: Random, words: list[str]) -> list[str]:
    old, new = rng.choice(words), rng.choice([noun for noun in NOUNS if noun not in words])
    return [" ".join(new if word == old else word for word in words), old, new]


def _repeat(rng: Random, words: list[str]) -> list[str]:
    times = rng.choice(list(TIMES))
    return [" ".join(words * TIMES[times]), times]


def _abroad(language: int) -> Solve:
    """Translates `colour noun`; both languages put the colour last, agreeing with the noun."""

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
        solve: returns the answer and then up to two arguments, `{a}` and `{b}` in the texts.
        plain: its names in the base corpus, separated by bars.
        asks: its Alpaca wordings; one with `{x}` holds the material, another is followed by it.
        effort: how many times as often as an easy skill the base corpus shows it.
    """

    name: str
    kind: str
    solve: Solve
    plain: str
    asks: str
    effort: int = 1


SKILLS = [
    Skill(
        "reverse",
        "words",
        lambda _, w: [" ".join(w[::-1])],
        "reverse|reverse order|backwards",
        "Reverse the order of these words|Put the words in reverse order|Write this list backwards|Reverse this list",
        4,
    ),
    Skill(
        "first",
        "words",
        lambda _, w: [w[0]],
        "first|first word|start of the list",
        "Give the first word of the list|Which word comes first?|Name the first word|What is the first of these words?",
    ),
    Skill(
        "second",
        "words",
        lambda _, w: [w[1]],
        "second|second word",
        "Give the second word of the list|Which word comes second?|Name the second word|What is the second of these words?",
    ),
    Skill(
        "last",
        "words",
        lambda _, w: [w[-1]],
        "last|last word|end of the list",
        "Give the last word of the list|Which word comes last?|Name the last word|What is the last of these words?",
    ),
    Skill(
        "count",
        "words",
        lambda _, w: [str(len(w))],
        "count|how many words|number of words",
        "Count the words|How many words are there?|Give the number of words in the list",
    ),
    Skill(
        "sort",
        "words",
        lambda _, w: [" ".join(sorted(w))],
        "sort|alphabetical order|from a to z",
        "Sort the words|Put these words in alphabetical order|Sort this list from a to z",
        5,
    ),
    Skill(
        "remove",
        "words",
        _remove,
        "remove {a}|without {a}|leave out {a}",
        "Remove the word {a} from the list|Leave out {a}|Write the list without {a}",
        3,
    ),
    Skill(
        "replace",
        "words",
        _replace,
        "replace {a} with {b}|change {a} to {b}",
        "Replace {a} with {b}|Change the word {a} to {b}|Write {b} instead of {a}",
        4,
    ),
    Skill(
        "swap",
        "words",
        lambda _, w: [" ".join([w[-1], *w[1:-1], w[0]])],
        "swap first and last|exchange the ends",
        "Swap the first and the last word|Exchange the first and last words|Write the list with its ends swapped",
        3,
    ),
    Skill(
        "join",
        "words",
        lambda _, w: [", ".join(w[:-1]) + " and " + w[-1]],
        "join|join with commas",
        "Join the words with commas and the word and|Write the list with commas|Join these words into a phrase",
    ),
    Skill(
        "repeat",
        "word",
        _repeat,
        "repeat {a} times|{a} times",
        "Repeat the word {x} {a} times|Write {x} {a} times|Repeat this word {a} times|Write the word {a} times",
    ),
    Skill(
        "spell",
        "word",
        lambda _, w: [" ".join(w[0])],
        "spell|letters|the letters of {x}",
        "Spell the word {x}|Which letters are in {x}?|How do you spell {x}?|Spell this word|Write the letters of this word",
        2,
    ),
    Skill(
        "category",
        "word",
        lambda _, w: [CATEGORY[w[0]]],
        "kind|kind of thing|{x} is a kind of",
        "What kind of thing is {x}?|Which group does {x} belong to?|Name the kind of thing|Say what kind of thing this is",
    ),
    Skill(
        "add",
        "pair",
        lambda _, n: [str(int(n[0]) + int(n[1]))],
        "add|sum|the sum of {x}",
        "Add {x}|What is the sum of {x}?|Add the two numbers|Give the sum of the numbers",
        5,
    ),
    Skill(
        "largest",
        "numbers",
        lambda _, n: [max(n, key=int)],
        "largest|largest number|the largest of {x}",
        "Which number is the largest?|Find the largest number|Give the largest of these numbers",
        3,
    ),
    Skill(
        "run",
        "run",
        lambda _, n: [" ".join(map(str, range(int(n[0]), int(n[1]) + 1)))],
        "count up|numbers from {x}",
        "Count from {x}|Write the numbers from {x}|Count up in this range|Write all numbers in the range",
        2,
    ),
    Skill(
        "next",
        "number",
        lambda _, n: [str(int(n[0]) + 1)],
        "next|next number|after {x} comes",
        "Which number comes after {x}?|What is the next number after {x}?|Give the next number",
    ),
    Skill(
        "in words",
        "number",
        lambda _, n: [_in_words(int(n[0]))],
        "in words|{x} in words",
        "Write {x} in words|How do you write {x} in words?|Write the number in words",
        2,
    ),
    Skill(
        "capital",
        "country",
        _look_up(CAPITALS),
        "capital|capital city|the capital of {x} is",
        "What is the capital of {x}?|Name the capital city of {x}|Which city is the capital of {x}?|Name the capital of this country|Give the capital city of the country",
    ),
    Skill(
        "opposite",
        "adjective",
        _look_up(OPPOSITES),
        "opposite|the opposite of {x} is|not {x} but",
        "What is the opposite of {x}?|Give the opposite of {x}|Which word is the opposite of {x}?|Give the opposite of this word|Write the opposite",
    ),
    Skill(
        "plural",
        "noun",
        _look_up(PLURALS),
        "plural|one {x} , many|the plural of {x} is",
        "What is the plural of {x}?|Give the plural of {x}|Write {x} in the plural|Write the plural of this word|Put the word in the plural",
    ),
    Skill(
        "past",
        "verb",
        _look_up(PASTS),
        "past|past tense|the past tense of {x} is",
        "What is the past tense of {x}?|Give the past tense of {x}|Write {x} in the past tense|Give the past tense of this verb|Put the verb in the past tense",
    ),
    Skill(
        "young",
        "parent",
        _look_up(YOUNG),
        "young|the young of a {x} is a|a young {x} is called",
        "What is a young {x} called?|Name the young of a {x}|What do you call a young {x}?|Name the young of this animal|What is the young animal called?",
    ),
    Skill(
        "sound",
        "crier",
        _look_up(SOUNDS),
        "sound|the sound of a {x}|what a {x} does",
        "What sound does a {x} make?|Which sound comes from a {x}?|What does a {x} do to make a sound?|Name the sound of this animal|What sound does this animal make?",
    ),
    Skill(
        "French",
        "phrase",
        _abroad(0),
        "French|in French|{x} in French",
        "Translate {x} into French|How do you say {x} in French?|Translate the phrase into French|Say this in French",
    ),
    Skill(
        "Spanish",
        "phrase",
        _abroad(1),
        "Spanish|in Spanish|{x} in Spanish",
        "Translate {x} into Spanish|How do you say {x} in Spanish?|Translate the phrase into Spanish|Say this in Spanish",
    ),
    Skill(
        "yesterday",
        "sentence",
        lambda _, p: [f"The {p[0]} {VERBS[p[1]][1]} the {p[2]}."],
        "past|past tense|yesterday",
        "Rewrite the sentence in the past tense|Put the sentence in the past tense|Change this sentence to the past tense",
        2,
    ),
    Skill(
        "negative",
        "sentence",
        lambda _, p: [f"The {p[0]} does not {p[1]} the {p[2]}."],
        "negative|not",
        "Make the sentence negative|Rewrite the sentence in the negative|Say that this is not so",
    ),
    Skill(
        "question",
        "sentence",
        lambda _, p: [f"Does the {p[0]} {p[1]} the {p[2]}?"],
        "question|as a question",
        "Turn the sentence into a question|Rewrite the sentence as a question|Make a question of this sentence",
        2,
    ),
    Skill(
        "passive",
        "sentence",
        lambda _, p: [f"The {p[2]} is {VERBS[p[1]][2]} by the {p[0]}."],
        "passive|passive voice",
        "Rewrite the sentence in the passive voice|Put the sentence in the passive|Make this sentence passive",
    ),
]


# Shares of base records that are a card, and that follow other notes.
CARDS, CONTEXTS = 0.1, 0.12
EFFORTS = [skill.effort for skill in SKILLS]


def _fill(text: str, shown: str, solved: list[str]) -> str:
    a, b = [*solved[1:], "", ""][:2]
    return text.format(x=shown, a=a, b=b)


def _note(rng: Random, skill: Skill, parts: list[str], shown: str) -> tuple[str, str]:
    """Writes one plain note: the text before the answer, and the answer."""
    solved = skill.solve(rng, parts)
    name = rng.choice(skill.plain.split("|"))
    text = _fill(name, shown, solved)
    if shown and "{x}" not in name:
        text = rng.choice(
            [
                f"{text}: {shown}",
                f"{shown}\n{text}",
                f"{text} ( {shown} )",
                f"{shown} | {text}",
                f"Q: {text} {shown}",
                f"{text} {shown}",
            ]
        )
    return text + rng.choice(["\n", "\n", "\n", ": ", " -> ", " = ", "\nA: "]), solved[0]


def _drawn_note(rng: Random, skill: Skill) -> tuple[str, str]:
    kind = KINDS[skill.kind]
    parts = kind.draw(rng)
    return _note(rng, skill, parts, kind.show(parts))


def _card(rng: Random, kind: str) -> tuple[str, str]:
    """Names one material, and then notes all that is known about it."""
    parts = KINDS[kind].draw(rng)
    lines = []
    for skill in SKILLS:
        if skill.kind == kind:
            solved = skill.solve(rng, parts)
            name = rng.choice(skill.plain.split("|"))
            lines.append(_fill(name, "it", solved) + rng.choice([":\n", ": "]) + solved[0])
    rng.shuffle(lines)
    return KINDS[kind].show(parts) + "\n", "\n".join(lines)


def base_records(seed: int, count: int) -> Iterator[dict[str, str]]:
    """Yields the base corpus: plain notes, never in the Alpaca template.

    Most records are one note; some follow a few other notes, so that the model sees all the
    positions an Alpaca prompt will need; and some note everything about one material.

    Args:
        seed: draws the same records every time.
        count: the number of records.
    """
    rng = Random(seed)
    for _ in range(count):
        form, skill = rng.random(), rng.choices(SKILLS, EFFORTS)[0]
        text = ""
        if form < CARDS:
            text, answer = _card(rng, skill.kind)
        else:
            length = rng.randint(10, 80) if form < CARDS + CONTEXTS else 0
            while len(text.split()) < length:
                text += "".join(_drawn_note(rng, rng.choices(SKILLS, EFFORTS)[0])) + rng.choice(
                    ["\n", "\n\n"]
                )
            before, answer = _drawn_note(rng, skill)
            text += before
        yield {"instruction": text, "input": "", "output": answer}


def _ask(rng: Random, skill: Skill, parts: list[str]) -> dict[str, str]:
    """Phrases a skill as an Alpaca record, with the material as the input or inside."""
    solved, shown = skill.solve(rng, parts), KINDS[skill.kind].show(parts)
    asks = skill.asks.split("|")
    holding = [ask for ask in asks if "{x}" in ask]
    inline = rng.random() < 0.5
    ask = rng.choice(holding if inline and holding else [a for a in asks if a not in holding])
    text = _fill(ask, shown, solved)
    if inline and not holding:
        text = f"{text} {shown}" if text.endswith("?") else f"{text}: {shown}"
    elif not text.endswith("?"):
        text += "."
    return {"instruction": text, "input": "" if inline else shown, "output": solved[0]}


def alpaca_records(
    seed: int, train: int = 5000, heldout: int = 350
) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Draws the Alpaca set, so that no material of a held-out record is in the training part.

    A fact of the held-out part is in no training question, though the base corpus states it.

    Args:
        seed: draws the same records every time.
        train: the number of training records.
        heldout: the number of held-out records, an equal share for every skill.

    Returns:
        The training records and the held-out records.
    """
    rng = Random(seed)
    kept: dict[str, set[frozenset[str]]] = {kind: set() for kind in KINDS}
    seen: set[tuple[str, str]] = set()

    def fresh(skill: Skill, parts: list[str]) -> list[dict[str, str]]:
        record = _ask(rng, skill, parts)
        key = (record["instruction"], record["input"])
        if key in seen:
            return []
        seen.add(key)
        return [record]

    last: list[dict[str, str]] = []
    for skill in SKILLS:
        share, mine = heldout // len(SKILLS), kept[skill.kind]
        materials: list[list[str]] = []
        # A fact has few keys: hold out a handful and ask each in several wordings.
        few = len({tuple(KINDS[skill.kind].draw(rng)) for _ in range(2000)}) < 200
        for _ in range(max(3, share // 2) if few else share):
            materials.append(KINDS[skill.kind].draw(rng))
            mine.add(frozenset(materials[-1]))
        found: list[dict[str, str]] = []
        while len(found) < share:
            found += fresh(skill, rng.choice(materials))
        last += found
    first: list[dict[str, str]] = []
    while len(first) < train:
        skill = rng.choice(SKILLS)
        parts = KINDS[skill.kind].draw(rng)
        if frozenset(parts) not in kept[skill.kind]:
            first += fresh(skill, parts)
    return first, last
