"""Tokenised rows on disk: made once for a content, then mapped into memory.

The name of a file is a hash of all that decides its content. It holds the tokens of all rows, end
to end (a token that is not learnt as its complement, -1 - token), then one entry a row, then their
numbers and a checksum. No tokens are kept in memory, so that a set may be larger than that.
"""

import errno
import hashlib
import struct
import time
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from secrets import token_hex
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from llama_lightning.data.examples import Encoded
from llama_lightning.data.rows import Row
from llama_lightning.errors import DataError
from llama_lightning.records import IGNORE_INDEX, Example

VERSION = 1  # of the format and of how rows become tokens; part of every file's name
ENTRY = np.dtype([("end", "<i8"), ("prompt", "<u8"), ("targets", "<i4"), ("fate", "u1")])
DAY_S = 24 * 60 * 60
FOOTER = struct.Struct("<qq32s")  # number of tokens, number of rows, SHA-256 of what is before

Ints = npt.NDArray[np.int64]


def hash_file(path: Path, size: int | None = None) -> bytes:
    """Hash a file, or its first bytes, by SHA-256."""
    hashed, left = hashlib.sha256(), path.stat().st_size if size is None else size
    with path.open("rb") as file:
        while left > 0 and (data := file.read(min(left, 1 << 20))):
            hashed.update(data)
            left -= len(data)
    return hashed.digest()


def prompt_hash(row: Row) -> int:
    """Tell one question from another."""
    instruction, input_text = row.prompt_key
    text = f"{len(instruction)} {instruction}{input_text}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


class TokenFile:
    """A mapped file. `rows` has an entry for each row of the data file, also for those left out."""

    def __init__(self, path: Path) -> None:
        """Map a file.

        Raises:
            OSError: it cannot be read, or is not what was once written.
        """
        whole = path.stat().st_size - FOOTER.size
        if whole < 0:
            raise OSError(errno.EIO, "cut off")
        with path.open("rb") as file:
            file.seek(whole)
            num_tokens, num_rows, checksum = FOOTER.unpack(file.read())
        if (
            whole != 4 * num_tokens + ENTRY.itemsize * num_rows
            or hash_file(path, whole) != checksum
        ):
            raise OSError(errno.EIO, "damaged")
        content = np.asarray(np.memmap(path, np.uint8, "r"))
        self.tokens: npt.NDArray[np.int32] = content[: 4 * num_tokens].view("<i4")
        self.rows: npt.NDArray[Any] = content[4 * num_tokens : whole].view(ENTRY)

    @staticmethod
    def write(path: Path, encoded: Iterable[tuple[Row, Encoded]]) -> None:
        """Write a file beside its place and rename it, so that it is there whole or not at all."""
        # Processes of other machines, which may have our process id, write to the same folder.
        beside = path.with_name(f"{path.name}.{token_hex(8)}")
        entries, end, checksum = bytearray(), 0, hashlib.sha256()
        try:
            with beside.open("wb") as file:
                for row, (tokens, learnt, fate) in encoded:
                    pairs = zip(tokens, learnt, strict=True)
                    stored = array("i", [t if learns else ~t for t, learns in pairs]).tobytes()
                    checksum.update(stored)
                    file.write(stored)
                    end += len(tokens)
                    entry = (end, prompt_hash(row), sum(learnt[1:]), fate)
                    entries += np.array(entry, ENTRY).tobytes()
                checksum.update(entries)
                file.write(entries)
                num_rows = len(entries) // ENTRY.itemsize
                file.write(FOOTER.pack(end, num_rows, checksum.digest()))
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)


def _clear(folder: Path) -> None:
    """Remove what killed writers left behind: a living one writes all the time."""
    for left in folder.glob("*.tokens.*"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > DAY_S:
                left.unlink()


def token_file(folder: Path, content: object, encoded: Iterator[tuple[Row, Encoded]]) -> TokenFile:
    """Map the file for a content, which is made first unless it is there and whole.

    Args:
        folder: where such files are kept.
        content: all that decides what is in it; its repr is hashed.
        encoded: makes it.

    Raises:
        DataError: it cannot be written.
    """
    name = hashlib.sha256(repr((VERSION, content)).encode()).hexdigest()[:32]
    path = folder / f"{name}.tokens"
    _clear(folder)
    try:
        return TokenFile(path)
    except OSError:
        pass
    try:
        folder.mkdir(parents=True, exist_ok=True)
        TokenFile.write(path, encoded)
        return TokenFile(path)
    except OSError as error:
        cure = "make room there" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "mend that"
        raise DataError(
            f"{path}: tokenised data cannot be written ({error.strerror}); {cure}, or set "
            "data.cache_dir to another folder"
        ) from error


class Examples(Sequence[Example]):
    """Training examples that are made of mapped tokens when they are asked for.

    Attributes:
        lengths: tokens of each.
        num_targets: target tokens of each.
        fates: what became of each row, of those left out too.
    """

    def __init__(self, files: Sequence[TokenFile], row_ids: Sequence[int] | Ints) -> None:
        """Choose rows.

        Args:
            files: where they are; the rows of a file are numbered on from those before it.
            row_ids: their numbers; one may come several times.
        """
        self._tokens = [file.tokens for file in files]
        self._first = np.cumsum([0, *(len(file.rows) for file in files)])[:-1].tolist()
        rows = np.concatenate([np.empty(0, ENTRY), *(file.rows for file in files)])
        row_ids = np.asarray(row_ids, np.int64)
        # A row begins where the row before it ends, in the same file.
        starts = np.append(0, rows["end"][:-1])
        starts[self._first] = 0
        starts, ends = starts[row_ids], rows["end"][row_ids]
        self.fates: Ints = rows["fate"][row_ids]
        kept = ends > starts
        self._row_ids, self._starts, self._ends = row_ids[kept], starts[kept], ends[kept]
        self.lengths: Ints = self._ends - self._starts - 1
        self.num_targets: Ints = rows["targets"][row_ids][kept]

    def __len__(self) -> int:
        return len(self._row_ids)

    def _stored(self, i: int) -> tuple[int, npt.NDArray[np.int32]]:
        row_id = int(self._row_ids[i])
        tokens = self._tokens[bisect_right(self._first, row_id) - 1]
        return row_id, tokens[self._starts[i] : self._ends[i]]

    @overload
    def __getitem__(self, i: int) -> Example: ...

    @overload
    def __getitem__(self, i: slice) -> list[Example]: ...

    def __getitem__(self, i: int | slice) -> Example | list[Example]:
        if isinstance(i, slice):
            return [self[j] for j in range(len(self))[i]]
        row_id, stored = self._stored(i)
        tokens = np.where(stored < 0, ~stored, stored)[:-1]
        labels = np.where(stored < 0, IGNORE_INDEX, stored)[1:]
        return Example(row_id, tokens.tolist(), labels.tolist())

    def tokens(self) -> Iterator[tuple[int, Ints]]:
        """Yield the row number and the tokens of each, without lists."""
        for i in range(len(self)):
            row_id, stored = self._stored(i)
            yield row_id, np.where(stored < 0, ~stored, stored)[:-1].astype(np.int64)
