"""From rows to tokens: template, tokenise, cut, mask.

It says of each row what became of it, and nothing of where rows come from or examples go.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import Literal, NamedTuple

from llama_lightning.data.rows import Row
from llama_lightning.data.templates import Piece, Template
from llama_lightning.data.tokenizer import Tokenizer
from llama_lightning.errors import UsageError
from llama_lightning.records import IGNORE_INDEX, Example

Turns = Literal["all", "last"]


class Fate(IntEnum):
    """What became of a row."""

    WHOLE = 0
    CUT = 1
    EMPTY_OUTPUT = 2  # left out
    TOO_LONG = 3  # left out: no room for a single answer token


class Encoded(NamedTuple):
    """A row as tokens, from the beginning token to the end token; none if it is left out."""

    tokens: list[int]
    learnt: list[bool]
    fate: Fate

    def example(self, row_id: int) -> Example:
        """Shift: each token is the label of the one before it."""
        pairs = zip(self.tokens[1:], self.learnt[1:], strict=True)
        labels = [token if learnt else IGNORE_INDEX for token, learnt in pairs]
        return Example(row_id, self.tokens[:-1], labels)


@dataclass
class Dropped:
    """How many records were left out or cut, to be said aloud."""

    empty_output: int = 0
    too_long: int = 0
    cut: int = 0  # trained on, without its end

    @classmethod
    def of(cls, fates: Iterable[int]) -> "Dropped":
        """Count the rows that are not whole."""
        counts = [0] * len(Fate)
        for fate in fates:
            counts[fate] += 1
        return cls(*(counts[Fate[field.name.upper()]] for field in fields(cls)))

    def __str__(self) -> str:
        parts = {
            "left out, empty output": self.empty_output,
            "left out, prompt longer than data.max_seq_len": self.too_long,
            "cut at data.max_seq_len (their end is not learnt)": self.cut,
        }
        return "; ".join(f"{count} {text}" for text, count in parts.items() if count)


def _tokens(piece: Piece, tokenizer: Tokenizer) -> list[int]:
    if not piece.special:
        return tokenizer.encode(piece.text)
    if piece.text not in tokenizer.special_ids:
        raise UsageError(
            f"data.template: the tokenizer has no {piece.text}, which the template needs; choose "
            "another data.template or a base model whose tokenizer has it"
        )
    return [tokenizer.special_ids[piece.text]]


def encode_prompt(row: Row, tokenizer: Tokenizer, template: Template) -> list[int]:
    """Tokenise what the model reads before it answers; the beginning token stands in front once."""
    return [t for piece in template.prompt(row) for t in _tokens(piece, tokenizer)]


def encode_row(
    row: Row,
    tokenizer: Tokenizer,
    template: Template,
    *,
    max_seq_len: int,
    train_on_prompt: bool = False,
    train_on_turns: Turns = "all",
) -> Encoded:
    """Tokenise a record, and say which of its tokens are learnt.

    With prompt [B, p] and answer [a, b] + end E, [B, p, a, b, E], of which a, b and E are learnt.
    A record that does not fit keeps its beginning and gets no false end token.

    Args:
        row: the record.
        tokenizer: text to tokens.
        template: record to text.
        max_seq_len: longest whole sequence, B and E counted, in tokens.
        train_on_prompt: learn the prompt too.
        train_on_turns: of a chat, learn `all` turns of the assistant or the `last` one.
    """
    if not row.output.strip():
        return Encoded([], [], Fate.EMPTY_OUTPUT)
    tokens: list[int] = []
    learnt: list[bool] = []
    earlier = train_on_turns == "all"
    for pieces, learns in ((template.prompt(row), earlier), (template.answer(row), True)):
        for piece in pieces:
            new = _tokens(piece, tokenizer)
            tokens += new
            learnt += [piece.learnt and learns] * len(new)
    if not any(learnt[:max_seq_len]):
        return Encoded([], [], Fate.TOO_LONG)
    if train_on_prompt:
        learnt = [True] * len(tokens)
    fate = Fate.CUT if len(tokens) > max_seq_len else Fate.WHOLE
    return Encoded(tokens[:max_seq_len], learnt[:max_seq_len], fate)
