"""From a data file to training examples: read, check, template, tokenise, mask, shift.

A record is a dictionary of three strings: instruction, input (may be missing) and output.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_lightning.data.templates import PromptTemplate, has_input
from llama_lightning.data.tokenizer import Tokenizer
from llama_lightning.errors import DataError
from llama_lightning.records import IGNORE_INDEX, Example


@dataclass(frozen=True)
class Row:
    """One checked record of a data file."""

    id: int  # zero-based row number in the file
    instruction: str
    input: str
    output: str

    @property
    def prompt_key(self) -> tuple[str, str]:
        """What makes two records the same question."""
        return self.instruction, self.input if has_input(self.input) else ""


def _parse(path: Path) -> list[Any]:
    """Parse a .json list or .jsonl lines; errors name line and column."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: byte {error.start} is not UTF-8; convert the file to UTF-8"
        ) from error
    lines_before = 0
    try:
        if path.suffix == ".json":
            records = json.loads(text)
            if not isinstance(records, list):
                raise DataError(f"{path}: a list of records is needed, not {_kind(records)}")
            return records
        records = []
        # Not splitlines(): it would also cut at U+2028, which JSON strings may contain.
        for lines_before, line in enumerate(text.split("\n")):  # noqa: B007 - used in the message
            if line.strip():
                records.append(json.loads(line))
        return records
    except json.JSONDecodeError as error:
        line_number = lines_before + error.lineno
        raise DataError(
            f"{path}, line {line_number}, column {error.colno}: not JSON ({error.msg})"
        ) from error


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return "null" if value is None else names.get(type(value), "a number")


def read_rows(path: Path, *, need_output: bool = True) -> list[Row]:
    """Read and check a .json or .jsonl file of Alpaca records.

    Args:
        path: the file.
        need_output: False for prompts to answer, whose output may be missing.

    Raises:
        DataError: no such file, not JSON, a wrong record (with its row number), or no record.
    """
    if path.is_dir():
        raise DataError(f"{path}: a folder; give a .json or .jsonl file in it")
    if not path.is_file():
        raise DataError(f"{path}: no such data file (paths are relative to the working directory)")
    if path.suffix not in (".json", ".jsonl"):
        raise DataError(f"{path}: unknown format {path.suffix!r}; use .json or .jsonl")
    rows = []
    for i, record in enumerate(_parse(path)):
        if not isinstance(record, dict):
            raise DataError(f"{path}, row {i}: {_kind(record)} instead of an object")
        for key in ("instruction", "output") if need_output else ("instruction",):
            if key not in record:
                raise DataError(
                    f"{path}, row {i}: no column '{key}'; it has {', '.join(map(repr, record))}"
                )
        fields = []
        for key in ("instruction", "input", "output"):
            value = record.get(key)
            fields.append("" if value is None else value)
            if not isinstance(fields[-1], str):
                raise DataError(f"{path}, row {i}: '{key}' is {_kind(value)} instead of a string")
            if not fields[-1].isascii() and re.search(r"[\ud800-\udfff]", fields[-1]):
                raise DataError(f"{path}, row {i}: '{key}' holds half a character")
        rows.append(Row(i, *fields))
    if not rows:
        raise DataError(f"{path}: no records in it")
    return rows


@dataclass
class Dropped:
    """How many records were left out or cut, to be said aloud."""

    empty_output: int = 0
    too_long: int = 0  # no room for a single answer token
    cut: int = 0  # trained on, without its end

    def __str__(self) -> str:
        parts = {
            "left out, empty output": self.empty_output,
            "left out, prompt longer than data.max_seq_len": self.too_long,
            "cut at data.max_seq_len (their end is not learnt)": self.cut,
        }
        return "; ".join(f"{count} {text}" for text, count in parts.items() if count)


def encode_prompt(row: Row, tokenizer: Tokenizer, template: PromptTemplate) -> list[int]:
    """Tokenise what the model reads before it answers; the beginning token stands in front once."""
    return [tokenizer.bos_id, *tokenizer.encode(template.format(row.instruction, row.input))]


def encode_example(
    row: Row,
    tokenizer: Tokenizer,
    template: PromptTemplate,
    *,
    max_seq_len: int,
    train_on_prompt: bool,
    dropped: Dropped,
) -> Example | None:
    """Tokenise a record, mask its prompt from the loss, and shift the labels.

    With prompt [B, p] and answer [a, b] + end E:

        tokens  B  p  a  b
        labels  -  a  b  E      ("-" is IGNORE_INDEX)

    A record that does not fit keeps its beginning and gets no false end token.

    Args:
        row: the record.
        tokenizer: text to tokens.
        template: record to prompt.
        max_seq_len: longest whole sequence, B and E counted, in tokens.
        train_on_prompt: put loss on the prompt too.
        dropped: counts what is left out.

    Returns:
        The example, or None when nothing of it can be learnt.
    """
    if not row.output.strip():
        dropped.empty_output += 1
        return None
    prompt = encode_prompt(row, tokenizer, template)
    if len(prompt) >= max_seq_len:
        dropped.too_long += 1
        return None
    whole = [*prompt, *tokenizer.encode(row.output), tokenizer.eos_id]
    dropped.cut += len(whole) > max_seq_len
    whole = whole[:max_seq_len]
    labels = whole[1:]
    if not train_on_prompt:
        masked = len(prompt) - 1
        labels = [IGNORE_INDEX] * masked + labels[masked:]
    return Example(row.id, whole[:-1], labels)


def encode_examples(
    rows: Iterable[Row],
    tokenizer: Tokenizer,
    template: PromptTemplate,
    *,
    max_seq_len: int,
    train_on_prompt: bool,
) -> tuple[list[Example], Dropped]:
    """Encode many records and count what was left out or cut."""
    dropped = Dropped()
    encoded = (
        encode_example(
            row,
            tokenizer,
            template,
            max_seq_len=max_seq_len,
            train_on_prompt=train_on_prompt,
            dropped=dropped,
        )
        for row in rows
    )
    return [example for example in encoded if example is not None], dropped
