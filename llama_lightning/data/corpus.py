"""Data files as one list of rows, each known by its number, and parts of such a list.

It joins reading, tokenising and the cache; it knows neither splits nor batches.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llama_lightning.data.examples import Encoded, Turns, encode_row
from llama_lightning.data.files import check_file, reading
from llama_lightning.data.rows import Row, read_rows
from llama_lightning.data.splits import weigh
from llama_lightning.data.templates import Template
from llama_lightning.data.token_file import Examples, TokenFile, hash_file, token_file
from llama_lightning.data.tokenizer import Tokenizer
from llama_lightning.errors import DataError


def default_cache() -> Path:
    """Find the folder of tokenised data: llama_lightning in XDG_CACHE_HOME or ~/.cache."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "llama_lightning"


@dataclass(frozen=True)
class Encoding:
    """All that decides which tokens a data file becomes, and where they are kept."""

    tokenizer: Tokenizer
    template: Template
    max_seq_len: int
    train_on_prompt: bool
    train_on_turns: Turns
    columns: Mapping[str, str] | None
    cache_dir: Path

    def read(self, path: Path, *, need_output: bool = True, first_id: int = 0) -> Iterator[Row]:
        """Yield the rows of a file."""
        return read_rows(
            path,
            columns=self.columns,
            need_output=need_output,
            take_chats=self.template.takes_chats,
            first_id=first_id,
        )

    def _encoded(self, path: Path) -> Iterator[tuple[Row, Encoded]]:
        for row in self.read(path):
            yield (
                row,
                encode_row(
                    row,
                    self.tokenizer,
                    self.template,
                    max_seq_len=self.max_seq_len,
                    train_on_prompt=self.train_on_prompt,
                    train_on_turns=self.train_on_turns,
                ),
            )

    def tokenise(self, path: Path, file_hash: bytes) -> TokenFile:
        """Tokenise a file of the given hash, unless that has been done before."""
        content = (
            file_hash,
            path.suffix,
            sorted((self.columns or {}).items()),
            self.template,
            self.tokenizer.digest,
            self.max_seq_len,
            self.train_on_prompt,
            self.train_on_turns,
        )
        return token_file(self.cache_dir, content, self._encoded(path))


class Corpus:
    """Tokenised data files; the rows of a file are numbered on from those before it.

    Attributes:
        hashes: SHA-256 of each file.
        sizes: rows of each file.
        prompts: a hash of each row's question.
    """

    def __init__(self, paths: Sequence[Path], encoding: Encoding) -> None:
        for path in paths:
            check_file(path)
        self.paths, self.encoding = paths, encoding
        self.hashes: list[bytes] = []
        for path in paths:
            with reading(path):
                self.hashes.append(hash_file(path))
        self.files = [encoding.tokenise(*pair) for pair in zip(paths, self.hashes, strict=True)]
        self.sizes = [len(file.rows) for file in self.files]
        self.prompts = [prompt for file in self.files for prompt in file.rows["prompt"].tolist()]

    def weighed(self, row_ids: Sequence[int], weights: Sequence[float], *, seed: int) -> list[int]:
        """Repeat each file's rows by its weight.

        Raises:
            DataError: a weight that leaves none of a file's rows.
        """
        chosen: list[int] = []
        end = 0
        for path, size, weight in zip(self.paths, self.sizes, weights, strict=True):
            start, end = end, end + size
            own = [i for i in row_ids if start <= i < end]
            weighed = weigh(own, weight, seed=seed)
            if own and not weighed:
                raise DataError(
                    f"{path}: the weight {weight} leaves none of its {len(own)} training records; "
                    "raise it in data.path, or leave the file out"
                )
            chosen += weighed
        return chosen

    def rows(self) -> Iterator[Row]:
        """Read all rows again, as text."""
        first_id = 0
        for path, size in zip(self.paths, self.sizes, strict=True):
            yield from self.encoding.read(path, first_id=first_id)
            first_id += size


@dataclass(frozen=True)
class Part:
    """Some rows of a corpus."""

    corpus: Corpus
    row_ids: Sequence[int]

    @classmethod
    def of_file(cls, path: Path, encoding: Encoding) -> "Part":
        """Take all rows of a file."""
        corpus = Corpus([path], encoding)
        return cls(corpus, range(len(corpus.prompts)))

    def __len__(self) -> int:
        return len(self.row_ids)

    def prompts(self) -> set[int]:
        """Collect the hashes of the questions."""
        return {self.corpus.prompts[i] for i in self.row_ids}

    def rows(self) -> list[Row]:
        """Read the rows, as text."""
        wanted = set(self.row_ids)
        return [row for row in self.corpus.rows() if row.id in wanted]

    def examples(self) -> Examples:
        """Find the rows' tokens."""
        return Examples(self.corpus.files, self.row_ids)
