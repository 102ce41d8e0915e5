"""The exact step: which records form an optimizer step, and which slot each falls into.

A step is `batch_size` records whatever the hardware. They are dealt to `slots` = accumulation x
world size micro-batches of nearly equal token count. Every rank emits the same number of
micro-batches for every step; a slot without records is an empty Batch. Each Batch carries the
number of target tokens of the whole step, so that sums of losses add up to one mean over the step,
however it was split. Lightning alone averages averages (pytorch-lightning#20350).
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch.utils.data import Dataset, Sampler

from llama_lightning.data.prefixes import find_prefixes
from llama_lightning.records import Batch, Example, PromptBatch


class MicroBatch(NamedTuple):
    """What one slot of one step holds."""

    indices: list[int]  # into the examples; may be empty
    num_step_targets: int


def deal(lengths: Sequence[int], slots: int) -> list[list[int]]:
    """Deal records to slots of nearly equal token count: longest first, to the emptiest slot.

    Records of one slot keep their order. `deal([5, 3, 2, 2], 2)` is `[[0, 3], [1, 2]]`.
    """
    loads = [0] * slots
    dealt: list[list[int]] = [[] for _ in range(slots)]
    for record in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        slot = min(range(slots), key=lambda s: (loads[s], len(dealt[s]), s))
        loads[slot] += lengths[record]
        dealt[slot].append(record)
    return [sorted(records) for records in dealt]


class StepSampler(Sampler[MicroBatch]):
    """One rank's micro-batches of an epoch. The order is a function of (seed, epoch) alone.

    Args:
        lengths: tokens of each example.
        num_targets: target tokens of each example.
        batch_size: records an optimizer step, over all ranks.
        accumulate: micro-batches a step on each rank.
        rank: this process.
        world_size: number of processes.
        seed: of the order.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        num_targets: Sequence[int],
        *,
        batch_size: int,
        accumulate: int,
        rank: int,
        world_size: int,
        seed: int,
    ) -> None:
        self.lengths, self.num_targets = lengths, num_targets
        self.batch_size, self.accumulate = batch_size, accumulate
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self.epoch = 0
        self._skip = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order; Lightning calls this at the start of every epoch."""
        self.epoch = epoch

    def skip_once(self, micro_batches: int) -> None:
        """Leave out the first micro-batches of the next iteration, which a resumed run has done."""
        self._skip = micro_batches

    def __len__(self) -> int:
        steps = -(-len(self.lengths) // self.batch_size)
        return steps * self.accumulate

    def steps(self) -> Iterator[list[int]]:
        """Yield the record indices of each step of this epoch; the last may be smaller."""
        # The CPU's generator reads the low 32 bits of a seed only, so both numbers must reach
        # those.
        mixed = (self.seed * 1_000_003 + self.epoch) % 2**32
        generator = torch.Generator().manual_seed(mixed)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        for start in range(0, len(order), self.batch_size):
            yield order[start : start + self.batch_size]

    def __iter__(self) -> Iterator[MicroBatch]:
        skip, self._skip = self._skip, 0
        for number, step in enumerate(self.steps()):
            if (number + 1) * self.accumulate <= skip:
                continue
            total = sum(self.num_targets[i] for i in step)
            slots = deal([self.lengths[i] for i in step], self.accumulate * self.world_size)
            for turn in range(self.accumulate):
                if number * self.accumulate + turn < skip:
                    continue
                # Slot `turn * world_size + rank`: the ranks work on neighbouring slots at a time.
                slot = slots[turn * self.world_size + self.rank]
                yield MicroBatch([step[i] for i in slot], total)


def _boundaries(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    lengths = torch.tensor([0, *map(len, rows)], dtype=torch.int64)
    return lengths.cumsum(0)


def collate(examples: Sequence[Example], num_step_targets: int) -> Batch:
    """Lay examples end to end."""
    return Batch(
        tokens=torch.tensor([t for e in examples for t in e.tokens], dtype=torch.int64),
        labels=torch.tensor([t for e in examples for t in e.labels], dtype=torch.int64),
        positions=torch.tensor(
            [t for e in examples for t in range(len(e.tokens))], dtype=torch.int64
        ),
        boundaries=_boundaries([e.tokens for e in examples]),
        num_step_targets=torch.tensor(num_step_targets, dtype=torch.int64),
        row_ids=torch.tensor([e.row_id for e in examples], dtype=torch.int64),
        prefixes=find_prefixes([e.tokens for e in examples]),
    )


def collate_prompts(
    prompts: Sequence[Sequence[int]], row_ids: Sequence[int], stop_ids: Sequence[int]
) -> PromptBatch:
    """Lay prompts end to end; every row ends at the same stop tokens."""
    return PromptBatch(
        tokens=torch.tensor([t for p in prompts for t in p], dtype=torch.int64),
        boundaries=_boundaries(prompts),
        row_ids=torch.tensor(row_ids, dtype=torch.int64),
        stop_ids=torch.tensor(stop_ids, dtype=torch.int64).expand(len(prompts), -1),
    )


def turns(count: int, size: int, rank: int, world_size: int) -> list[range]:
    """Share `count` records out over the ranks in their order, `size` at a time.

    Every rank has the same number of turns (the last may be empty), so that collective operations
    meet. `turns(5, 2, 1, 2)` is `[range(2, 4), range(5, 5)]`.
    """
    number = -(-count // (size * world_size))
    starts = (size * (turn * world_size + rank) for turn in range(number))
    return [range(count)[start : start + size] for start in starts]


class EvalSampler(Sampler[MicroBatch]):
    """One rank's share of examples in file order, each once, `batch_size` at a time.

    `num_step_targets` is the micro-batch's own: evaluation has no steps.
    """

    def __init__(
        self, num_targets: Sequence[int], *, batch_size: int, rank: int, world_size: int
    ) -> None:
        self.num_targets = num_targets
        self.turns = turns(len(num_targets), batch_size, rank, world_size)

    def __len__(self) -> int:
        return len(self.turns)

    def __iter__(self) -> Iterator[MicroBatch]:
        for turn in self.turns:
            yield MicroBatch(list(turn), sum(self.num_targets[i] for i in turn))


class Batches(Dataset[Batch]):
    """Examples, indexed by a whole micro-batch: the sampler decides, the worker lays end to end."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = examples

    def __getitem__(self, micro_batch: MicroBatch) -> Batch:
        examples = [self.examples[i] for i in micro_batch.indices]
        return collate(examples, micro_batch.num_step_targets)
