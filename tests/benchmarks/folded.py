"""The data module for random networks, which may be narrower than the tokenizer and never end.

Token numbers are folded into the network's vocabulary, and answers have lengths that are given.
"""

from collections.abc import Callable, Sequence

import torch

from llama_lightning.data.alpaca import AlpacaDataModule
from llama_lightning.data.rows import Row
from llama_lightning.data.token_file import Examples
from llama_lightning.records import Example, PromptBatch

NO_STOP = -1


class FoldedExamples:
    """Examples for a shape that is narrower than the tokenizer."""

    def __init__(self, examples: Examples, vocab_size: int) -> None:
        self.examples, self.vocab_size = examples, vocab_size
        self.lengths, self.num_targets = examples.lengths, examples.num_targets

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, i: int) -> Example:
        example = self.examples[i]
        return example._replace(
            tokens=[t % self.vocab_size for t in example.tokens],
            labels=[t % self.vocab_size if t >= 0 else t for t in example.labels],
        )


class FoldedData(AlpacaDataModule):
    """Alpaca-format records for such a shape."""

    vocab_size: int

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit":
            self.train_examples = FoldedExamples(self.train_examples, self.vocab_size)


class FixedLengths(FoldedData):
    """Prompts whose answers have a given length each."""

    num_new: Callable[[Row], int]

    def prompts(self, rows: Sequence[Row]) -> PromptBatch:
        batch = super().prompts(rows)
        return batch._replace(
            tokens=batch.tokens % self.vocab_size,
            stop_ids=torch.full((len(rows), 1), NO_STOP),
            max_new_tokens=torch.tensor([self.num_new(row) for row in rows], dtype=torch.int64),
        )
