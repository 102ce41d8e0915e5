"""The closed world of the embedded `tiny` model: its words, its facts and its skills.

Everything is drawn from a seed, so the base corpus, the Alpaca set and the tokenizer made from
them can be remade exactly. A *skill* turns some *material* (a list of words, two numbers, a
country, a sentence) into one correct answer. The base corpus shows every skill and every fact in
plain notes; only the Alpaca set phrases them as instructions. What a fine-tuned model answers to
a held-out instruction it therefore knew before, and only had to learn how to be asked.
"""

from collections.abc import Iterator
from random import Random

from llama_lightning.assets.skills import KINDS, SKILLS, Skill

# Shares of base records that are a card, and that follow other notes.
CARDS, IN_CONTEXT = 0.3, 0.15
EFFORTS = [skill.effort for skill in SKILLS]


def _fill(text: str, shown: str, solved: list[str]) -> str:
    return text.format(x=shown, a=solved[-1])


def _note(rng: Random, skill: Skill, parts: list[str], shown: str) -> tuple[str, str]:
    """Write one plain note: the text before the answer, and the answer."""
    solved = skill.solve(rng, parts)
    name = rng.choice(skill.plain)
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


def _drawn_note(rng: Random) -> tuple[str, str]:
    skill = rng.choices(SKILLS, EFFORTS)[0]
    kind = KINDS[skill.kind]
    parts = kind.draw(rng)
    return _note(rng, skill, parts, kind.show(parts))


def _card(rng: Random) -> tuple[str, str]:
    """Name one material, then note several things about it."""
    kind = rng.choices(SKILLS, EFFORTS)[0].kind
    parts = KINDS[kind].draw(rng)
    able = [skill for skill in SKILLS if skill.kind == kind]
    lines = []
    for skill in rng.sample(able, min(len(able), 6)):
        solved = skill.solve(rng, parts)
        name = _fill(rng.choice(skill.plain), "it", solved)
        lines.append(name + rng.choice([":\n", ": "]) + solved[0])
    return KINDS[kind].show(parts) + "\n", "\n".join(lines)


def base_records(seed: int, count: int, *, running_on: bool = False) -> Iterator[dict[str, str]]:
    """Yield the base corpus: plain notes, never in the Alpaca template.

    Half of the records are one note. Some follow a few other notes, so that the model sees all the
    positions an Alpaca prompt will need. The rest are cards, several notes on one material: without
    them the model hardly learns to copy words.

    Args:
        seed: draws the same records every time.
        count: the number of records.
        running_on: put two more notes behind each answer. A base model that has read such text does
            not stop after an answer, as no base model does; stopping is for fine-tuning to teach.
    """
    rng = Random(seed)
    for _ in range(count):
        form = rng.random()
        if form < CARDS:
            text, answer = _card(rng)
        else:
            length = rng.randint(10, 80) if form < CARDS + IN_CONTEXT else 0
            text = ""
            while len(text.split()) < length:
                text += "".join(_drawn_note(rng)) + rng.choice(["\n", "\n\n"])
            before, answer = _drawn_note(rng)
            text += before
        if running_on:
            answer += "\n" + "\n".join("".join(_drawn_note(rng)) for _ in range(2))
        yield {"instruction": text, "input": "", "output": answer}


def _ask(rng: Random, skill: Skill, parts: list[str]) -> dict[str, str]:
    """Phrase a skill as an Alpaca record, with the material as the input or inside."""
    solved, shown = skill.solve(rng, parts), KINDS[skill.kind].show(parts)
    asks = skill.asks
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
    seed: int, train: int = 5000, heldout: int = 350, *, asked_only: bool = True
) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Draw the Alpaca set, so that no material of a held-out record is in the training part.

    A fact of the held-out part is in no training question, though the base corpus states it.

    Args:
        seed: draws the same records every time.
        train: the number of training records drawn.
        heldout: the number of held-out records drawn, an equal share for every skill.
        asked_only: leave out the records of skills that are not asked, after the drawing.

    Returns:
        The training records and the held-out records.
    """
    rng = Random(seed)
    kept: dict[str, set[frozenset[str]]] = {kind: set() for kind in KINDS}
    seen: set[tuple[str, str]] = set()

    def fresh(skill: Skill, parts: list[str]) -> list[tuple[Skill, dict[str, str]]]:
        record = _ask(rng, skill, parts)
        key = (record["instruction"], record["input"])
        if key in seen:
            return []
        seen.add(key)
        return [(skill, record)]

    last: list[tuple[Skill, dict[str, str]]] = []
    for skill in SKILLS:
        share, mine = heldout // len(SKILLS), kept[skill.kind]
        materials: list[list[str]] = []
        # A fact has few keys: hold out a handful and ask each in several wordings.
        few = len({tuple(KINDS[skill.kind].draw(rng)) for _ in range(2000)}) < 200
        for _ in range(max(3, share // 2) if few else share):
            materials.append(KINDS[skill.kind].draw(rng))
            mine.add(frozenset(materials[-1]))
        found: list[tuple[Skill, dict[str, str]]] = []
        while len(found) < share:
            found += fresh(skill, rng.choice(materials))
        last += found
    first: list[tuple[Skill, dict[str, str]]] = []
    while len(first) < train:
        skill = rng.choice(SKILLS)
        parts = KINDS[skill.kind].draw(rng)
        if frozenset(parts) not in kept[skill.kind]:
            first += fresh(skill, parts)
    first, last = ([(s, r) for s, r in p if s.asked or not asked_only] for p in (first, last))
    return [record for _, record in first], [record for _, record in last]
