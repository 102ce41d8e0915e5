"""Data files as one list of rows, each known by its number.

It joins reading, tokenising and the cache; it knows neither parts nor batches.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from llama_lightning.data.examples import Encoded, Turns, encode_row
from llama_lightning.data.files import check_file, reading
from llama_lightning.data.identity import name_mix
from llama_lightning.data.rows import Row, read_rows
from llama_lightning.data.sources import Source, check_distinct
from llama_lightning.data.splits import weigh
from llama_lightning.data.templates import Template
from llama_lightning.data.token_file import TokenFile, hash_file, token_file
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

    @property
    def read(self) -> Callable[..., Iterator[Row]]:
        """What yields the rows of a file; it holds no tokenizer, which is large."""
        return partial(read_rows, columns=self.columns, take_chats=self.template.takes_chats)

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
        given: the files as the user named them.
        digest: tells these files, and their weights, from others.
        prompts: a hash of each row's question.
    """

    def __init__(self, sources: Sequence[Source], encoding: Encoding) -> None:
        """Tokenise files, unless that has been done before.

        Raises:
            DataError: a file that is named twice, is not there or is broken.
        """
        check_distinct(sources)
        for source in sources:
            check_file(source.path)
        self.sources, self._read = sources, encoding.read
        self.given = ", ".join(source.given for source in sources)
        hashes = []
        for source in sources:
            with reading(source.path):
                hashes.append(hash_file(source.path))
        self.digest = name_mix([source.weight for source in sources], hashes)
        self.files = [
            encoding.tokenise(source.path, file_hash)
            for source, file_hash in zip(sources, hashes, strict=True)
        ]
        self.prompts = [prompt for file in self.files for prompt in file.rows["prompt"].tolist()]

    @property
    def row_ids(self) -> range:
        """The numbers of all rows."""
        return range(len(self.prompts))

    def _by_source(self) -> Iterator[tuple[Source, range]]:
        """Yield each file with the numbers of its rows."""
        end = 0
        for source, file in zip(self.sources, self.files, strict=True):
            start, end = end, end + len(file.rows)
            yield source, range(start, end)

    def weighed(self, row_ids: Sequence[int], *, seed: int) -> list[int]:
        """Repeat rows by the weights of their files.

        Raises:
            DataError: a weight that leaves none of a file's rows.
        """
        chosen: list[int] = []
        for source, numbers in self._by_source():
            own = [i for i in row_ids if i in numbers]
            weighed = weigh(own, source.weight, seed=seed)
            if own and not weighed:
                raise DataError(
                    f"{source.path}: the weight {source.weight} leaves none of its {len(own)} "
                    "training records; raise it in data.path, or leave the file out"
                )
            chosen += weighed
        return chosen

    def rows(self) -> Iterator[Row]:
        """Read all rows again, as text."""
        for source, numbers in self._by_source():
            yield from self._read(source.path, first_id=numbers.start)
