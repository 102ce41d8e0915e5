"""verdicts.jsonl: a row the moment it is known, safe on disk, found again by its key.

A row is final unless the judge could not be reached for it. Nothing is ever rewritten; of rows with
one key the last holds.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path

from llama_lightning.errors import JudgeError, UsageError
from llama_lightning.records import Verdict

VERDICTS = "verdicts.jsonl"
BACKEND_ERROR = "backend_error"


def _parse(path: Path, lines: list[bytes]) -> Iterator[Verdict]:
    for number, line in enumerate(lines, 1):
        try:
            yield Verdict(**json.loads(line))
        except (ValueError, TypeError) as error:
            raise JudgeError(
                f"{path}, line {number}: not a verdict; move the file away to grade anew"
            ) from error


def read_verdicts(path: Path) -> dict[str, Verdict]:
    """Read the verdicts by their keys.

    Raises:
        JudgeError: no such file, or a row that is not a verdict.
    """
    try:
        *lines, _ = path.read_bytes().split(b"\n")
    except OSError as error:
        raise JudgeError(f"{path}: {error.strerror}; `judge` writes it") from error
    return {row.key: row for row in _parse(path, lines)}


class VerdictFile:
    """The verdicts of one judge.

    Args:
        path: the file; made with its folder if it is not there.
        judge: the judge's full name.

    Raises:
        UsageError: the file holds another judge's verdicts, or cannot be written.
        JudgeError: a row that is not a verdict.
    """

    def __init__(self, path: Path, judge: str) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b")
        except OSError as error:
            raise UsageError(f"judge.output: {path} cannot be written ({error})") from error
        self._file.seek(0)
        *lines, half = self._file.read().split(b"\n")
        if half:  # the process was killed inside a write
            self._file.truncate(self._file.tell() - len(half))
        self._rows: dict[str, Verdict] = {}
        for row in _parse(path, lines):
            if row.judge != judge:
                raise UsageError(
                    f"{path} holds verdicts of {row.judge}, and the judge is {judge}; set "
                    "judge.output to another folder"
                )
            self._rows[row.key] = row

    def final(self, key: str) -> Verdict | None:
        """Find the verdict that need not be asked for again."""
        row = self._rows.get(key)
        return None if row is None or row.status == BACKEND_ERROR else row

    def __getitem__(self, key: str) -> Verdict:
        return self._rows[key]

    def append(self, verdict: Verdict) -> None:
        """Write a verdict; when this returns, it is on the disk."""
        line = json.dumps(verdict._asdict(), ensure_ascii=False) + "\n"
        # A judge may write half a surrogate pair; its escape is JSON too.
        self._file.write(line.encode(errors="backslashreplace"))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._rows[verdict.key] = verdict

    def stale(self, keys: set[str]) -> int:
        """Count the rows that none of these keys asks for."""
        return len(self._rows.keys() - keys)

    def close(self) -> None:
        """Close the file."""
        self._file.close()
