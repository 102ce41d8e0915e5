"""A raw record to a checked row: Alpaca's three strings, or a chat.

A chat is a list of turns, `messages` as OpenAI writes them (role, content) or `conversations` as
ShareGPT does (from, value). Whatever a record is, its row has a question and an answer.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from llama_lightning.data.files import kind, read_records
from llama_lightning.errors import DataError, UsageError

FIELDS = ("instruction", "input", "output", "messages", "conversations")

# Of each chat column: the keys of a turn, and its names of the roles.
CHATS = {
    "messages": (
        ("role", "content"),
        {"system": "system", "user": "user", "assistant": "assistant"},
    ),
    "conversations": (
        ("from", "value"),
        {
            "system": "system",
            "human": "user",
            "user": "user",
            "gpt": "assistant",
            "assistant": "assistant",
        },
    ),
}


class Turn(NamedTuple):
    """One turn of a chat."""

    role: str  # system (the first only), user or assistant
    content: str


@dataclass(frozen=True)
class Row:
    """One checked record. Of a chat, the output is the last turn of the assistant."""

    id: int  # zero-based row number in the file; across files, counted on from file to file
    instruction: str  # of a chat: its user turn; if there are more turns, all of them, as text
    input: str
    output: str
    # Of a chat, all turns before the answer, unless that is a single user turn: then the row is one
    # like any other.
    turns: tuple[Turn, ...] = ()

    @property
    def prompt_key(self) -> tuple[str, str]:
        """What makes two records the same question."""
        return self.instruction, self.input if has_input(self.input) else ""


def has_input(input_text: str) -> bool:
    """Tell whether a record has an input; Alpaca data writes "<no input>" for none."""
    return input_text.strip().lower() not in ("", "<no input>", "<noinput>")


def chat_row(row_id: int, turns: Sequence[Turn]) -> Row:
    """Make a row of a chat: its last turn is the answer, if it is the assistant's."""
    answered = turns[-1].role == "assistant"
    asked = tuple(turns[:-1] if answered else turns)
    output = turns[-1].content if answered else ""
    if len(asked) == 1:
        return Row(row_id, asked[0].content, "", output)
    transcript = "\n\n".join(f"{turn.role}: {turn.content}" for turn in asked)
    return Row(row_id, transcript, "", output, asked)


def _text(value: Any, where: str, what: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: {what} is {kind(value)} instead of a string")
    if not value.isascii() and re.search(r"[\ud800-\udfff]", value):
        raise DataError(f"{where}: {what} holds half a character")
    return value


def _turns(turns: Any, column: str, field: str, where: str, need_output: bool) -> list[Turn]:
    """Check a chat: perhaps a system turn, then user and assistant by turns, none of them empty."""
    (role_key, content_key), roles = CHATS[field]
    if not isinstance(turns, list):
        raise DataError(f"{where}: '{column}' is {kind(turns)} instead of a list of turns")
    checked: list[Turn] = []
    for i, turn in enumerate(turns):
        at = f"{where}, turn {i}"
        if not isinstance(turn, dict):
            raise DataError(f"{at}: {kind(turn)} instead of an object")
        for key in (role_key, content_key):
            if key not in turn:
                raise DataError(f"{at}: no '{key}'; it has {', '.join(map(repr, turn))}")
        name = _text(turn[role_key], at, f"'{role_key}'")
        if name not in roles:
            raise DataError(f"{at}: unknown role '{name}'; roles are {', '.join(roles)}")
        content = _text(turn[content_key], at, f"'{content_key}'")
        if not content.strip():
            raise DataError(f"{at}: the {roles[name]}'s turn is empty")
        before = checked[-1].role if checked else None
        expected = {None: ("system", "user"), "user": ("assistant",)}.get(before, ("user",))
        if roles[name] not in expected:
            after = f"after {before}" if before else "first"
            raise DataError(f"{at}: {roles[name]} comes {after}; {' or '.join(expected)} must")
        checked.append(Turn(roles[name], content))
    if not any(turn.role == "user" for turn in checked):
        raise DataError(f"{where}: '{column}' has no user turn")
    if need_output and checked[-1].role != "assistant":
        raise DataError(
            f"{where}: the chat has no assistant turn at its end to learn from; only "
            "data.predict_path takes such chats"
        )
    return checked


def _row(
    record: Any,
    row_id: int,
    where: str,
    columns: Mapping[str, str],
    need_output: bool,
    take_chats: bool,
) -> Row:
    if not isinstance(record, dict):
        raise DataError(f"{where}: {kind(record)} instead of an object")

    def need(field: str) -> None:
        column = columns.get(field, field)
        if column not in record:
            key = f" (data.columns: {field})" if field in columns else ""
            has = ", ".join(map(repr, record))
            raise DataError(f"{where}: no column '{column}'{key}; it has {has}")

    instruction = columns.get("instruction", "instruction")
    for field in CHATS:
        column = columns.get(field, field)
        # A Parquet file of records of both kinds has both columns, one of them null. An Alpaca
        # record may have a column of such a name beside its own.
        asked_for = field in columns or record.get(instruction) is None
        if asked_for and record.get(column) is not None:
            turns = _turns(record[column], column, field, where, need_output)
            row = chat_row(row_id, turns)
            if row.turns and not take_chats:
                raise DataError(
                    f"{where}: a chat with a system turn or several user turns fits no template "
                    "but llama3's; set data.template to llama3"
                )
            return row
        if field in columns and instruction not in record:
            need(field)
    need("instruction")
    if need_output:
        need("output")
    if "input" in columns:
        need("input")

    def text(field: str, *, may_be_null: bool = False) -> str:
        column = columns.get(field, field)
        value = record.get(column)
        return "" if value is None and may_be_null else _text(value, where, f"'{column}'")

    return Row(
        row_id,
        text("instruction"),
        text("input", may_be_null=True),
        text("output", may_be_null=not need_output),
    )


def check_columns(columns: Mapping[str, str]) -> None:
    """Refuse names for columns that no record has.

    Raises:
        UsageError: a field that is none of ours.
    """
    for field in columns:
        if field not in FIELDS:
            raise UsageError(
                f"data.columns: '{field}' is none of our columns, {', '.join(FIELDS)}; write "
                "OURS: YOURS"
            )


def read_rows(
    path: Path,
    *,
    columns: Mapping[str, str] | None = None,
    need_output: bool = True,
    take_chats: bool = True,
    first_id: int = 0,
) -> Iterator[Row]:
    """Yield the checked records of a file, in its order.

    Args:
        path: .json, .jsonl, .csv or .parquet.
        columns: field to the file's name for it, where that differs.
        need_output: False for prompts to answer, whose output may be missing.
        take_chats: False refuses chats of more than a question and its answer.
        first_id: id of the first row.

    Raises:
        DataError: a broken file, a wrong record (with its row number), or no record.
    """
    row = None
    for i, record in enumerate(read_records(path)):
        where = f"{path}, row {i}"
        row = _row(record, first_id + i, where, columns or {}, need_output, take_chats)
        yield row
    if row is None:
        raise DataError(f"{path}: no records in it")
