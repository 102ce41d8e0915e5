"""Responses from a file: our responses.jsonl, or a JSON list of records with their responses.

It knows who answered as little as who will grade.
"""

import json
from pathlib import Path
from typing import Any

from llama_lightning.errors import DataError
from llama_lightning.records import Response


def _rows(path: Path) -> list[Any]:
    if path.is_dir():
        raise DataError(
            f"responses.path: {path} is a folder; name the file in it, e.g. "
            f"{path / 'responses.jsonl'}"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise DataError(f"responses.path: {path}: no such file; `predict` writes one") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"responses.path: {path} cannot be read ({error})") from error
    if text.lstrip().startswith("["):
        try:
            return list(json.loads(text))
        except ValueError as error:
            raise DataError(f"responses.path: {path} is not JSON ({error})") from error
    rows = []
    # Not splitlines(), which would cut at the U+2028 inside a text.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise DataError(
                f"responses.path: {path}, line {number} is not JSON ({error}); a killed predict "
                "may have cut it: delete the line"
            ) from error
    return rows


def _named(row: dict[str, Any], number: int, where: str) -> tuple[int | str, int]:
    """Read by which id and sample a response is known."""
    name = row.get("id")
    name, sample = number if name is None else name, row.get("sample", 0)
    # True and 1.0 are equal to 1, and would be taken for it.
    if type(name) not in (int, str):
        raise DataError(f"{where}: id is {name!r}; use a whole number or a text")
    if type(sample) is not int:
        raise DataError(f"{where}: sample is {sample!r}; use a whole number")
    return name, sample


def read_responses(path: Path) -> list[Response]:
    """Read responses; `reference` may be called `output`, ids default to row numbers.

    Raises:
        DataError: no such file, not JSON, a row without instruction or response, an id and sample
            that two rows have, no rows.
    """
    responses = []
    numbers: dict[tuple[int | str, int], int] = {}
    for number, row in enumerate(_rows(path)):
        where = f"responses.path: {path}, row {number}"
        if not isinstance(row, dict):
            raise DataError(f"{where} is not a record")
        texts: dict[str, Any] = {
            "instruction": row.get("instruction"),
            "input": row.get("input") or "",
            "reference": row.get("reference") or row.get("output") or "",
            "response": row.get("response"),
        }
        for name, text in texts.items():
            if not isinstance(text, str):
                raise DataError(f"{where}: no text {name!r}")
        id_, sample = _named(row, number, where)
        before = numbers.setdefault((id_, sample), number)
        if before != number:
            raise DataError(
                f"{where} has the id {id_!r} and sample {sample} of row {before}; give each "
                "prompt an id of its own, and several responses to one prompt a sample: 0, 1 ..."
            )
        responses.append(
            Response(
                id=id_,
                num_tokens=row.get("num_tokens", 0),
                finish_reason=row.get("finish_reason", ""),
                sample=sample,
                **texts,
            )
        )
    if not responses:
        raise DataError(f"responses.path: {path} has no responses")
    return responses
