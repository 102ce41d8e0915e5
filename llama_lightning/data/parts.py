"""The parts of a corpus: records to train on, to choose checkpoints by, and to answer.

It knows neither batches nor who asks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from llama_lightning.data.corpus import Corpus
from llama_lightning.data.examples import Dropped
from llama_lightning.data.rows import Row
from llama_lightning.data.splits import split
from llama_lightning.data.token_file import Examples
from llama_lightning.errors import DataError


@dataclass(frozen=True)
class Part:
    """Some rows of a corpus."""

    name: Literal["train", "val", "test"]
    corpus: Corpus
    row_ids: Sequence[int]

    def __len__(self) -> int:
        return len(self.row_ids)

    def prompts(self) -> set[int]:
        """Collect the hashes of the questions."""
        return {self.corpus.prompts[i] for i in self.row_ids}

    def _check_not_empty(self) -> None:
        if not self:
            file = "" if self.name == "train" else f", or name a file with data.{self.name}_path"
            raise DataError(
                f"{self.corpus.given}: the {self.name} part is empty; change data.val_fraction and "
                f"data.test_fraction{file}"
            )

    def rows(self) -> list[Row]:
        """Read the rows, as text.

        Raises:
            DataError: there are none.
        """
        self._check_not_empty()
        wanted = set(self.row_ids)
        return [row for row in self.corpus.rows() if row.id in wanted]

    def examples(self) -> Examples:
        """Find the rows' tokens.

        Raises:
            DataError: there are no rows, or nothing to learn in any of them.
        """
        self._check_not_empty()
        examples = Examples(self.corpus.files, self.row_ids)
        if not examples:
            raise DataError(
                f"{self.corpus.given}: nothing to learn in all {len(self)} {self.name} records: "
                f"{Dropped.of(examples.fates.tolist())}"
            )
        return examples

    def summary(self, examples: Examples) -> str:
        """Say how much its examples are, and what was left out."""
        tokens, targets = int(examples.lengths.sum()), int(examples.num_targets.sum())
        dropped = str(Dropped.of(examples.fates.tolist()))
        return (
            f"{len(examples):,} {self.name} records, {tokens:,} tokens, "
            f"{targets / tokens:.0%} of them learnt{'; ' * bool(dropped)}{dropped}"
        )


class Parts(NamedTuple):
    """The three parts of a run."""

    train: Part
    val: Part
    test: Part
    num_left_out: int  # training records whose prompts are in the other two


def divide(
    corpus: Corpus,
    *,
    val: Corpus | None,
    test: Corpus | None,
    val_fraction: float,
    test_fraction: float,
    seed: int,
) -> Parts:
    """Split a corpus, and weigh what is trained on; no prompt of another part stays in training.

    Args:
        corpus: the training data.
        val: validation data of its own, instead of a part of `corpus`.
        test: the same for test data.
        val_fraction: size of the validation part.
        test_fraction: size of the test part.
        seed: of the split and of the choice that a fractional weight makes.

    Raises:
        DataError: a weight that leaves none of a file's rows.
    """
    train_ids, val_ids, test_ids = split(
        corpus.prompts, val_fraction=val_fraction, test_fraction=test_fraction, seed=seed
    )
    val_part = Part("val", val, val.row_ids) if val else Part("val", corpus, val_ids)
    test_part = Part("test", test, test.row_ids) if test else Part("test", corpus, test_ids)
    held_out = val_part.prompts() | test_part.prompts()
    kept = [i for i in train_ids if corpus.prompts[i] not in held_out]
    train_part = Part("train", corpus, corpus.weighed(kept, seed=seed))
    return Parts(train_part, val_part, test_part, len(train_ids) - len(kept))
