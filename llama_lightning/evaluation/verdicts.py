"""verdicts.jsonl: a row the moment it is known, safe on disk, found again by its key.

A row is final unless the judge could not be reached for it. Nothing is ever rewritten; of rows with
one key the last holds. A file beside it says under which settings all of them were made.
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llama_lightning.errors import JudgeError, UsageError
from llama_lightning.records import Verdict

VERDICTS = "verdicts.jsonl"
BACKEND_ERROR = "backend_error"


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _parse(path: Path, lines: list[bytes]) -> Iterator[Verdict]:
    for number, line in enumerate(lines, 1):
        try:
            yield Verdict(**json.loads(line))
        except (ValueError, TypeError) as error:
            raise JudgeError(
                f"{path}, line {number}: not a verdict; move the file away to grade anew"
            ) from error


def _whole_lines(path: Path) -> list[bytes]:
    """Split at the line ends; what is behind the last one was being written when it was killed."""
    try:
        return path.read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise JudgeError(
            f"{path}: {error.strerror}; `judge` writes it, anew if it is moved away"
        ) from error


def read_verdicts(path: Path) -> dict[str, Verdict]:
    """Read the verdicts by their keys.

    Raises:
        JudgeError: no such file, or a row that is not a verdict.
    """
    return {row.key: row for row in _parse(path, _whole_lines(path))}


def settings_path(path: Path) -> Path:
    """Name the file that says how the verdicts in another were made."""
    return path.with_suffix(".settings.json")


def check_settings(path: Path, settings: Mapping[str, Any], cure: str) -> None:
    """Refuse to mix verdicts that were made differently.

    Args:
        path: the verdicts, if there are any yet.
        settings: what decides a verdict besides the texts, and where these are.
        cure: what to do.

    Raises:
        UsageError: names the first setting that differs.
        JudgeError: the file cannot be read, or a row is not a verdict.
    """
    lines = _whole_lines(path) if path.is_file() else []
    if not lines:
        return
    try:
        before = json.loads(settings_path(path).read_text(encoding="utf-8"))
        before = {name: before[name] for name in settings}
    except (OSError, ValueError, KeyError, TypeError):
        # Lost, or of a version that had none: the judge stands in each row.
        before = {**settings, "judge": next(_parse(path, lines[:1])).judge}
    for name, value in settings.items():
        if before[name] != value:
            raise UsageError(
                f"{path} holds verdicts of other settings: {name} was {before[name]} and is "
                f"{value}; {cure}"
            )


class VerdictFile:
    """The verdicts of one judge under one set of settings.

    Args:
        path: the file; made with its folder if it is not there.
        settings: as in `check_settings`.
        cure: likewise.

    Raises:
        UsageError: the file holds verdicts of other settings, or cannot be written.
        JudgeError: a row that is not a verdict.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], cure: str) -> None:
        self.path = path
        check_settings(path, settings, cure)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(settings_path(path), json.dumps(settings, indent=2) + "\n")
            self._file = path.open("a+b")
        except OSError as error:
            raise UsageError(f"{path} cannot be written ({error.strerror}); {cure}") from error
        self._file.seek(0)
        *lines, half = self._file.read().split(b"\n")
        if half:  # the process was killed inside a write
            self._file.truncate(self._file.tell() - len(half))
        self._rows = {row.key: row for row in _parse(path, lines)}

    def final(self, key: str) -> Verdict | None:
        """Find the verdict that need not be asked for again."""
        row = self._rows.get(key)
        return None if row is None or row.status == BACKEND_ERROR else row

    def __contains__(self, key: str) -> bool:
        """Whether there is a row, final or not."""
        return key in self._rows

    def __getitem__(self, key: str) -> Verdict:
        return self._rows[key]

    def append(self, verdict: Verdict) -> None:
        """Write a verdict; when this returns, it is on the disk."""
        fields = verdict._asdict()
        if not verdict.first:
            del fields["first"]
        line = json.dumps(fields, ensure_ascii=False) + "\n"
        # A judge may write half a surrogate pair; its escape is JSON too.
        self._file.write(line.encode(errors="backslashreplace"))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._rows[verdict.key] = verdict

    def stale(self, keys: set[str]) -> int:
        """Count the rows that none of these keys asks for."""
        return len(self._rows.keys() - keys)

    def __enter__(self) -> "VerdictFile":
        return self

    def __exit__(self, *args: object) -> None:
        self._file.close()
