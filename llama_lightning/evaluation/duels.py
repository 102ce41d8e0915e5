"""What a judge says of two responses in both orders, and how far the order decided.

Judges favour a place: a win counts only where both orders agree, else the pair is a tie.
"""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from llama_lightning.evaluation.parse import GRADED
from llama_lightning.records import Verdict

SAME = Verdict("", "", 0, 0, GRADED, 0, "the same words", "")  # no judge is asked


class Duel(NamedTuple):
    """What a judge says of two responses to one prompt."""

    a_first: Verdict
    b_first: Verdict

    @property
    def scores(self) -> tuple[int | None, int | None]:
        """-1, 0 or 1 in each order: B's response is worse, as good, better."""
        return self.a_first.score, self.b_first.score

    @property
    def score(self) -> int | None:
        """What counts: a win only where both orders agree; None without a choice in both."""
        one, other = self.scores
        if one is None or other is None:
            return None
        return one if one == other else 0

    @property
    def asked(self) -> bool:
        """Whether a judge chose in both orders."""
        return self is not SAME_WORDS and self.score is not None

    @property
    def agrees(self) -> bool:
        """Whether the order of the two made no difference."""
        return self.asked and self.a_first.score == self.b_first.score

    @property
    def status(self) -> str:
        """Say why there is no choice; empty where there is one."""
        return next((v.status for v in self if v.score is None), "")


SAME_WORDS = Duel(SAME, SAME)


class Orders(NamedTuple):
    """How far the order of the two decided."""

    judge: str  # its full name; empty where nobody was asked
    pairs: int
    asked: int  # of them with a choice in both orders
    agreed: int
    excluded: Counter[str]  # pairs without a choice in both orders, by status

    @property
    def reasons(self) -> str:
        """Write which pairs are left without a choice, by status."""
        return ", ".join(f"{count} {status}" for status, count in self.excluded.items())

    def __str__(self) -> str:
        share = f" ({self.agreed / self.asked:.0%})" if self.asked else ""
        reasons = f", {self.reasons}" if self.excluded else ""
        return f"both orders agree on {self.agreed} of {self.asked} pairs{share}{reasons}"


def count_orders(duels: Sequence[Duel]) -> Orders:
    """Count how often the order of the two made no difference."""
    return Orders(
        judge=next((duel.a_first.judge for duel in duels if duel is not SAME_WORDS), ""),
        pairs=len(duels),
        asked=sum(duel.asked for duel in duels),
        agreed=sum(duel.agrees for duel in duels),
        excluded=Counter(duel.status for duel in duels if duel.status),
    )
