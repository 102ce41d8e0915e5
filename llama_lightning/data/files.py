"""One data file to raw records, one after the other: .json, .jsonl, .csv, .parquet.

It knows how a format is read and how it breaks, and nothing of what a record should hold. All but
.json are streamed, so that a file may be larger than the memory.
Source: RFC 8259 (JSON), RFC 4180 (CSV), arrow.apache.org/docs/python/parquet.html.
"""

import csv
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llama_lightning.errors import DataError

BLANK = re.compile(r"[ \t\n\r]*")


def kind(value: Any) -> str:
    """Name the kind of a JSON value, for a message."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return "null" if value is None else names.get(type(value), "a number")


def _not_json(path: Path, error: json.JSONDecodeError, lines_before: int = 0) -> DataError:
    return DataError(
        f"{path}, line {lines_before + error.lineno}, column {error.colno}: not JSON ({error.msg})"
    )


def _json(path: Path) -> Iterator[Any]:
    """Read a list, record by record: the text is in memory, the records are not."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: byte {error.start} is not UTF-8; convert the file to UTF-8"
        ) from error
    decode = json.JSONDecoder().raw_decode

    def blanks(at: int) -> int:
        return BLANK.match(text, at).end()  # type: ignore[union-attr] # it matches nothing too

    try:
        at = blanks(0)
        if text[at : at + 1] != "[":
            raise DataError(f"{path}: a list of records is needed, not {kind(json.loads(text))}")
        at = blanks(at + 1)
        if text[at : at + 1] == "]":
            at += 1
        else:
            while True:
                record, at = decode(text, at)
                yield record
                at = blanks(at)
                if text[at : at + 1] == "]":
                    at += 1
                    break
                if text[at : at + 1] != ",":
                    raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
                at = blanks(at + 1)
        if blanks(at) < len(text):
            raise json.JSONDecodeError("Extra data", text, blanks(at))
    except json.JSONDecodeError as error:
        raise _not_json(path, error) from error


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
    yield from FORMATS[path.suffix](path)
