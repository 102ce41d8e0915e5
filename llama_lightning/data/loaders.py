"""The loaders of one process: which records it is given, by the step or by the batch.

They know how records are shared out over the processes, and nothing of where they come from.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader, Sampler

from llama_lightning.data.batching import Batches, EvalSampler, MicroBatch, StepSampler, turns
from llama_lightning.data.rows import Row
from llama_lightning.data.token_file import Examples
from llama_lightning.errors import UsageError
from llama_lightning.records import Batch, PromptBatch


@dataclass(frozen=True)
class Loaders:
    """How much one process does at a time, and its loaders.

    Attributes:
        batch_size: records an optimizer step, over all ranks and accumulated micro-batches.
        given_eval_batch_size: records a batch in evaluation; None for a micro-batch's.
        accumulate: micro-batches a step, on each rank.
        rank: this process.
        world_size: number of processes.
        num_workers: processes that prepare batches for this one.
        seed: of the order of training records.
    """

    batch_size: int
    given_eval_batch_size: int | None
    accumulate: int
    rank: int
    world_size: int
    num_workers: int
    seed: int

    @property
    def eval_batch_size(self) -> int:
        """Records a batch in validation, test and predict."""
        slots = self.accumulate * self.world_size
        return self.given_eval_batch_size or -(-self.batch_size // slots)

    def check_step(self) -> None:
        """Refuse steps that have no record for each micro-batch.

        Raises:
            UsageError: the batch size is too small.
        """
        if self.batch_size < self.accumulate * self.world_size:
            raise UsageError(
                f"data.batch_size {self.batch_size} is smaller than "
                f"trainer.accumulate_grad_batches {self.accumulate} x {self.world_size} devices; "
                "lower the accumulation or raise the batch size"
            )

    def _loader(self, examples: Examples, sampler: Sampler[MicroBatch]) -> DataLoader[Batch]:
        return DataLoader(
            Batches(examples),
            sampler=sampler,
            batch_size=None,  # the sampler's item is a whole micro-batch
            num_workers=self.num_workers,
            persistent_workers=False,
            pin_memory=torch.cuda.is_available(),
            # iter() draws a seed; from the global generator, a resumed run would draw it at another
            # moment and every dropout mask after it would differ.
            generator=torch.Generator(),
        )

    def train(self, examples: Examples, *, done: int) -> DataLoader[Batch]:
        """Load the micro-batches of the exact step, behind the first `done` of the first epoch."""
        sampler = StepSampler(
            examples.lengths.tolist(),
            examples.num_targets.tolist(),
            batch_size=self.batch_size,
            accumulate=self.accumulate,
            rank=self.rank,
            world_size=self.world_size,
            seed=self.seed,
        )
        sampler.skip_once(done)
        return self._loader(examples, sampler)

    def evaluation(self, examples: Examples) -> DataLoader[Batch]:
        """Load examples in their order, with their labels."""
        sampler = EvalSampler(
            examples.num_targets.tolist(),
            batch_size=self.eval_batch_size,
            rank=self.rank,
            world_size=self.world_size,
        )
        return self._loader(examples, sampler)

    def prompts(
        self, rows: Sequence[Row], tokenise: Callable[[Sequence[Row]], PromptBatch]
    ) -> DataLoader[PromptBatch]:
        """Load prompts to answer, in their order."""
        shares = turns(len(rows), self.eval_batch_size, self.rank, self.world_size)
        batches = [tokenise([rows[i] for i in share]) for share in shares]
        return DataLoader(batches, batch_size=None)  # type: ignore[arg-type] # a list is a dataset
