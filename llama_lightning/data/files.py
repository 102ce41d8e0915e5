"""One data file to raw records, one after the other: .json, .jsonl, .csv, .parquet.

It knows how a format is read and how it breaks, and nothing of what a record should hold. A file is
streamed, so that it may be larger than the memory.
Source: RFC 8259 (JSON), RFC 4180 (CSV), arrow.apache.org/docs/python/parquet.html.
"""

import csv
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from llama_lightning.errors import DataError

DECODER = json.JSONDecoder()
BLANK = re.compile(r"[ \t\n\r]*")


def kind(value: Any) -> str:
    """Name the kind of a JSON value, for a message."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return "null" if value is None else names.get(type(value), "a number")


def _not_json(path: Path, error: json.JSONDecodeError, lines_before: int = 0) -> DataError:
    return DataError(
        f"{path}, line {lines_before + error.lineno}, column {error.colno}: not JSON ({error.msg})"
    )


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Say of a data file that it cannot be read.

    Raises:
        DataError: the system refuses to.
    """
    try:
        yield
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); mend that") from error


class _JsonText:
    """The text of a .json file, of which only what has not been parsed yet is in memory."""

    def __init__(self, file: TextIO) -> None:
        self.file = file
        self.text, self.at, self.before = "", 0, 0  # `before`: characters left behind

    def _read_on(self) -> bool:
        # As much again as there is: a long value is parsed anew each time.
        more = self.file.read(max(1 << 20, len(self.text) - self.at))
        if more:
            self.text, self.before, self.at = self.text[self.at :] + more, self.before + self.at, 0
        return bool(more)

    def next_character(self) -> str:
        """Pass blanks and show the character behind them; at the end there is none."""
        while True:
            self.at = BLANK.match(self.text, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.text) or not self._read_on():
                return self.text[self.at : self.at + 1]

    def take_value(self) -> Any:
        """Parse a value and pass it."""
        while True:
            try:
                value, self.at = DECODER.raw_decode(self.text, self.at)
                return value
            except json.JSONDecodeError:  # unless it only goes on in what has not been read
                if not self._read_on():
                    raise


def _json(path: Path) -> Iterator[Any]:
    """Read a list, record by record."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        text = _JsonText(file)
        try:
            first = text.next_character()
            if not first:
                return
            if first != "[":
                # The whole file may be one object or string: it is not parsed to be refused.
                found = {"{": kind({}), '"': kind("")}.get(first) or kind(text.take_value())
                raise DataError(f"{path}: a list of records is needed, not {found}")
            text.at += 1
            more = text.next_character() != "]"
            while more:
                yield text.take_value()
                more = text.next_character() == ","
                if more:
                    text.at += 1
                    text.next_character()
                elif text.next_character() != "]":
                    raise json.JSONDecodeError("Expecting ',' delimiter", text.text, text.at)
            text.at += 1
            if text.next_character():
                raise json.JSONDecodeError("Extra data", text.text, text.at)
        except json.JSONDecodeError as error:
            # With its line ends, as it was read; what is behind the error may be no UTF-8.
            whole = path.read_bytes().decode("utf-8-sig", errors="replace")
            raise _not_json(
                path, json.JSONDecodeError(error.msg, whole, text.before + error.pos)
            ) from error
        except UnicodeDecodeError:
            try:
                path.read_bytes().decode()
            except UnicodeDecodeError as error:  # with the place in the file
                raise DataError(
                    f"{path}: byte {error.start} is not UTF-8; convert the file to UTF-8"
                ) from error


def _lines(path: Path) -> Iterator[str]:
    """Read lines at their line feed alone: text may hold U+2028, at which str is cut as well."""
    with path.open("rb") as file:
        for i, line in enumerate(file):
            yield line.decode("utf-8-sig" if i == 0 else "utf-8")


def _not_utf8(path: Path, row: int, error: UnicodeDecodeError) -> DataError:
    return DataError(
        f"{path}, row {row}: byte {error.start} of its line is not UTF-8; convert the file to UTF-8"
    )


def _jsonl(path: Path) -> Iterator[Any]:
    row = line_number = 0
    try:
        for line_number, line in enumerate(_lines(path)):  # noqa: B007 - used in the message
            if line.strip():
                yield json.loads(line.removesuffix("\n"))
                row += 1
    except UnicodeDecodeError as error:
        raise _not_utf8(path, row, error) from error
    except json.JSONDecodeError as error:
        raise _not_json(path, error, lines_before=line_number) from error


def _csv(path: Path) -> Iterator[Any]:
    """Read a table whose first line names the columns."""
    csv.field_size_limit(2**31 - 1)  # its default refuses a field of 128 KiB
    row = 0
    reader = csv.reader(_lines(path), strict=True)
    try:
        header = next(reader, [])
        for fields in reader:
            if not fields:  # an empty line
                continue
            if len(fields) != len(header):
                raise DataError(
                    f"{path}, row {row}: {len(fields)} fields, but the first line names "
                    f"{len(header)} columns"
                )
            yield dict(zip(header, fields, strict=True))
            row += 1
    except UnicodeDecodeError as error:
        raise _not_utf8(path, row, error) from error
    except csv.Error as error:
        raise DataError(f"{path}, row {row}: not CSV ({error})") from error


def _parquet(path: Path) -> Iterator[Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"{path}: .parquet needs pip install -e '.[parquet]'") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not Parquet ({' '.join(str(error).split())})") from error


FORMATS: dict[str, Callable[[Path], Iterator[Any]]] = {
    ".json": _json,
    ".jsonl": _jsonl,
    ".csv": _csv,
    ".parquet": _parquet,
}


def check_file(path: Path) -> None:
    """Refuse a path that is no data file, by its name.

    Raises:
        DataError: no such file, or an unknown format.
    """
    names = f"{', '.join(list(FORMATS)[:-1])} or {list(FORMATS)[-1]}"
    if path.is_dir():
        raise DataError(f"{path}: a folder; give a {names} file in it")
    if not path.is_file():
        raise DataError(f"{path}: no such data file (paths are relative to the working directory)")
    if path.suffix not in FORMATS:
        raise DataError(f"{path}: unknown format {path.suffix!r}; use {names}")


def read_records(path: Path) -> Iterator[Any]:
    """Yield the records of a data file; those of .csv and .parquet are dictionaries.

    Raises:
        DataError: no such file, an unknown format, or a broken file (with the place).
    """
    check_file(path)
    with reading(path):
        yield from FORMATS[path.suffix](path)
