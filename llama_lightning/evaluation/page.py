"""report.html and compare.html: one file each, which needs no server and no network.

Texts travel as JSON that cannot end its script element, and page.html shows them as text only.
"""

import html
import json
from collections import Counter
from collections.abc import Sequence
from importlib import resources
from string import Template
from typing import Any, NamedTuple

from llama_lightning.evaluation.charts import histogram, scatter
from llama_lightning.evaluation.duels import Duel
from llama_lightning.evaluation.report import Graded, Summary
from llama_lightning.records import Response


class Column(NamedTuple):
    """A column of the table."""

    key: str  # its name in the page's address
    label: str
    at: int  # where its value stands in a row
    filter: bool = False  # offers its values as a choice
    wide: bool = False  # left out on a narrow screen


class Panel(NamedTuple):
    """A text of the row that is open."""

    label: str
    at: int


def build_page(
    title: str,
    facts: Sequence[tuple[str, str]],
    charts: Sequence[str],
    columns: Sequence[Column],
    panels: Sequence[Sequence[Panel]],
    rows: Sequence[Sequence[Any]],
) -> str:
    """Fill page.html.

    Args:
        title: of the page.
        facts: names and values for its head.
        charts: SVG.
        columns: of the table.
        panels: what an open row shows, in lines.
        rows: values that columns and panels point into; the first names the row.
    """
    template = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    named = {
        "columns": [column._asdict() for column in columns],
        "panels": [[panel._asdict() for panel in line] for line in panels],
        "rows": rows,
    }
    # Inside a script element only `<` can do harm; the rest is for those who copy the text out.
    data = json.dumps(named, separators=(",", ":"))
    for mark in "<>&":
        data = data.replace(mark, f"\\u{ord(mark):04x}")
    pairs = (f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in facts)
    figures = (f"<figure>{chart}</figure>" for chart in charts)
    return Template(template).substitute(
        title=html.escape(title), facts="\n".join(pairs), charts="\n".join(figures), data=data
    )


def row_name(response: Response, *, several: bool) -> int | str:
    """Name a row: by its id, and by the sample where a prompt has several."""
    return f"{response.id}.{response.sample}" if several else response.id


def report_page(summary: Summary, graded: Sequence[Graded]) -> str:
    """Build report.html."""
    several = any(response.sample for response, _ in graded)
    rows = [
        [
            row_name(response, several=several),
            verdict.score,
            verdict.status,
            len(response.response),
            response.instruction,
            response.input,
            response.reference,
            response.response,
            verdict.text or verdict.reason,
        ]
        for response, verdict in graded
    ]
    columns = [
        Column("id", "id", 0),
        Column("score", "score", 1, filter=True),
        Column("status", "status", 2, filter=True, wide=True),
        Column("length", "length", 3),
        Column("instruction", "instruction", 4),
        Column("response", "response", 7, wide=True),
    ]
    panels = [
        [Panel("Instruction", 4), Panel("Input", 5)],
        [Panel("Reference", 6), Panel("Response", 7), Panel("Feedback", 8)],
    ]
    points = [(max(1, len(r.response)), v.score) for r, v in graded if v.score is not None]
    charts = [
        histogram(summary.histogram, "responses by score", link="score"),
        scatter(points, "score by length of the response in characters"),
    ]
    return build_page("Judge report", summary.facts, charts, columns, panels, rows)


class Pair(NamedTuple):
    """Two responses to one prompt."""

    a: Graded
    b: Graded
    duel: Duel | None = None  # what a judge of both says

    @property
    def difference(self) -> int | None:
        """By how much B's grade is above A's."""
        one, other = self.a.verdict.score, self.b.verdict.score
        return None if one is None or other is None else other - one

    @property
    def outcome(self) -> str:
        """Say how B fares in one word."""
        if self.difference is None:
            return "no grade"
        return "tie" if self.difference == 0 else "win" if self.difference > 0 else "loss"


def _choice(duel: Duel | None) -> str | None:
    """Say how B fares where a judge saw both."""
    if duel is None:
        return None
    return duel.status or ("loss", "tie", "win")[(duel.score or 0) + 1]


def _said(duel: Duel | None) -> tuple[str, str]:
    """List what a judge of both says, in each order."""
    if duel is None:
        return "", ""
    return duel.a_first.text or duel.a_first.reason, duel.b_first.text or duel.b_first.reason


def compare_page(facts: Sequence[tuple[str, str]], pairs: Sequence[Pair]) -> str:
    """Build compare.html."""
    several = any(pair.a.response.sample for pair in pairs)
    pairwise = any(pair.duel for pair in pairs)
    rows = [
        [
            row_name(pair.a.response, several=several),
            pair.a.verdict.score,
            pair.b.verdict.score,
            pair.difference,
            pair.outcome,
            pair.a.response.instruction,
            pair.a.response.input,
            pair.a.response.reference,
            pair.a.response.response,
            pair.b.response.response,
            pair.a.verdict.text or pair.a.verdict.reason,
            pair.b.verdict.text or pair.b.verdict.reason,
            _choice(pair.duel),
            *_said(pair.duel),
        ]
        for pair in pairs
    ]
    columns = [
        Column("id", "id", 0),
        Column("A", "A", 1, filter=True),
        Column("B", "B", 2, filter=True),
        Column("difference", "B - A", 3, filter=True),
        Column("outcome", "outcome", 4, filter=True, wide=True),
        *([Column("pairwise", "pairwise", 12, filter=True, wide=True)] if pairwise else []),
        Column("instruction", "instruction", 5),
        Column("response", "B's response", 9, wide=True),
    ]
    panels = [
        [Panel("Instruction", 5), Panel("Input", 6), Panel("Reference", 7)],
        [Panel("Response of A", 8), Panel("Response of B", 9)],
        [Panel("Feedback on A", 10), Panel("Feedback on B", 11)],
        [Panel("Of both, A's shown first", 13), Panel("Of both, B's shown first", 14)],
    ]
    counts = Counter(pair.difference for pair in pairs)
    differences = {value: counts[value] for value in range(-4, 5)}
    chart = histogram(differences, "responses by B - A", link="difference")
    return build_page("Two judged runs", facts, [chart], columns, panels, rows)
