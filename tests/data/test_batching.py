"""Which records form a step, and which slot of which rank each falls into."""

import copy
import itertools
import pickle
import random
from collections import Counter
from multiprocessing.reduction import ForkingPickler

import pytest
import torch

from llama_lightning.data.batching import (
    Batches,
    EvalSampler,
    MicroBatch,
    StepSampler,
    collate,
    collate_prompts,
    deal,
)
from llama_lightning.records import IGNORE_INDEX, Batch, Example

# deal


def test_deal_written_out():
    assert deal([5, 3, 2, 2], 2) == [[0, 3], [1, 2]]
    assert deal([1, 1, 1], 1) == [[0, 1, 2]]
    assert deal([4, 4], 3) == [[0], [1], []]
    assert deal([], 2) == [[], []]


def test_deal_balances_and_loses_nothing():
    rng = random.Random(0)
    worst = 0.0
    for _ in range(2000):
        # Long tails, as in real answers; zeros too, though no example is empty.
        lengths = [int(rng.lognormvariate(4, 1.2)) for _ in range(rng.randint(0, 64))]
        slots = rng.randint(1, 20)
        dealt = deal(lengths, slots)
        assert sorted(itertools.chain(*dealt)) == list(range(len(lengths)))
        assert all(records == sorted(records) for records in dealt)
        loads = [sum(lengths[i] for i in records) for records in dealt]
        spread, longest = max(loads) - min(loads), max(lengths, default=0)
        worst = max(worst, spread / max(1, longest))
        assert spread <= longest, (lengths, slots)
    print(f"largest difference of two slots: {worst:.3f} of the longest record")
    assert worst > 0.5  # or the bound above was never near


def test_equal_lengths_fill_every_slot_before_any_twice():
    assert sorted(map(len, deal([0] * 7, 5))) == [1, 1, 1, 2, 2]


# StepSampler


def samplers(lengths: list[int], *, world_size: int, **kwargs) -> list[StepSampler]:
    settings = {"batch_size": 8, "accumulate": 2, "seed": 0} | kwargs
    targets = [3 * n + 1 for n in range(len(lengths))]
    return [
        StepSampler(lengths, targets, rank=rank, world_size=world_size, **settings)
        for rank in range(world_size)
    ]


def random_lengths(count: int) -> list[int]:
    rng = random.Random(count)
    return [int(rng.lognormvariate(4, 1)) + 1 for _ in range(count)]


SHAPES = [
    pytest.param(count, batch_size, accumulate, world_size, id="-".join(map(str, shape)))
    for shape in itertools.product((1, 7, 8, 9, 103), (1, 8, 16), (1, 2, 8), (1, 2, 3))
    for count, batch_size, accumulate, world_size in [shape]
]


@pytest.mark.parametrize(("count", "batch_size", "accumulate", "world_size"), SHAPES)
def test_an_epoch(count, batch_size, accumulate, world_size):
    """Every record once, in steps of batch_size, the same number of turns on every rank."""
    lengths = random_lengths(count)
    ranks = samplers(lengths, batch_size=batch_size, accumulate=accumulate, world_size=world_size)
    emitted = [list(sampler) for sampler in ranks]
    steps = -(-count // batch_size)
    assert [len(sampler) for sampler in ranks] == [steps * accumulate] * world_size
    assert [len(turns) for turns in emitted] == [steps * accumulate] * world_size
    seen = Counter(i for turns in emitted for turn in turns for i in turn.indices)
    assert seen == Counter(range(count))
    for number in range(steps):
        window = slice(number * accumulate, (number + 1) * accumulate)
        slots = [turn for turns in emitted for turn in turns[window]]
        records = [i for slot in slots for i in slot.indices]
        last = count - batch_size * (steps - 1)
        assert len(records) == (last if number == steps - 1 else batch_size)
        assert {slot.num_step_targets for slot in slots} == {sum(3 * i + 1 for i in records)}
        loads = [sum(lengths[i] for i in slot.indices) for slot in slots]
        assert max(loads) - min(loads) <= max(lengths[i] for i in records)
        # No slot is left empty while another holds two.
        sizes = [len(slot.indices) for slot in slots]
        assert (0 in sizes) == (len(records) < len(slots))
        if 0 in sizes:
            assert max(sizes) == 1


def test_a_partial_last_step_written_out():
    # 3 records over 2 ranks x 4 turns: one a slot, the rest empty, on both ranks alike in number.
    (first, second) = (
        list(s) for s in samplers([5, 9, 7], batch_size=8, accumulate=4, world_size=2)
    )
    assert [len(turns) for turns in (first, second)] == [4, 4]
    # Longest first: slot 0 is rank 0's first turn, slot 1 rank 1's first, slot 2 rank 0's second.
    assert [turn.indices for turn in first] == [[1], [0], [], []]
    assert [turn.indices for turn in second] == [[2], [], [], []]
    assert {turn.num_step_targets for turn in (*first, *second)} == {1 + 4 + 7}


def step_sets(sampler: StepSampler) -> list[list[int]]:
    return [sorted(step) for step in sampler.steps()]


def test_the_hardware_does_not_change_the_steps():
    lengths = random_lengths(103)
    reference = step_sets(samplers(lengths, world_size=1, accumulate=1)[0])
    for accumulate, world_size in itertools.product((1, 2, 8), (1, 2, 4)):
        ranks = samplers(lengths, world_size=world_size, accumulate=accumulate)
        emitted = [list(sampler) for sampler in ranks]
        for number, expected in enumerate(reference):
            window = slice(number * accumulate, (number + 1) * accumulate)
            step = [i for turns in emitted for turn in turns[window] for i in turn.indices]
            assert sorted(step) == expected


def test_the_order_is_a_function_of_seed_and_epoch_alone():
    lengths = random_lengths(40)

    def epoch(seed: int, number: int) -> list[MicroBatch]:
        (sampler,) = samplers(lengths, world_size=1, seed=seed)
        sampler.set_epoch(number)
        return list(sampler)

    (sampler,) = samplers(lengths, world_size=1)
    torch.manual_seed(1)
    first = list(sampler)
    torch.manual_seed(2)
    assert list(sampler) == first  # the global generator has no say, nor has history
    sampler.set_epoch(3)
    third = list(sampler)
    sampler.set_epoch(0)
    assert list(sampler) == first
    assert epoch(0, 0) == first
    assert epoch(0, 3) == third
    orders = {str(epoch(seed, number)) for seed in range(5) for number in range(5)}
    print(f"different orders of 5 seeds x 5 epochs: {len(orders)}")
    assert len(orders) == 25


def test_an_iteration_leaves_the_global_generator_alone():
    (sampler,) = samplers(random_lengths(40), world_size=1)
    before = torch.get_rng_state()
    list(sampler)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_a_resumed_epoch_is_the_rest_of_it_once(accumulate):
    for sampler in samplers(random_lengths(29), world_size=2, accumulate=accumulate):
        sampler.set_epoch(2)
        whole = list(sampler)
        # Lightning counts micro-batches; a checkpoint can fall inside a step's window.
        for done in range(len(whole) + 1):
            sampler.skip_once(done)
            assert list(sampler) == whole[done:]
            assert list(sampler) == whole
            assert len(sampler) == len(whole)


# EvalSampler


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 3, 8, 50])
@pytest.mark.parametrize("count", [1, 2, 8, 13, 17])
def test_evaluation_sees_each_example_once_in_order(count, batch_size, world_size):
    targets = [n + 1 for n in range(count)]
    ranks = [
        EvalSampler(targets, batch_size=batch_size, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    emitted = [list(sampler) for sampler in ranks]
    assert [len(sampler) for sampler in ranks] == [len(turns) for turns in emitted]
    assert len({len(turns) for turns in emitted}) == 1
    in_order = [turn for turns in zip(*emitted, strict=True) for turn in turns]
    assert [i for turn in in_order for i in turn.indices] == list(range(count))
    assert all(len(turn.indices) <= batch_size for turn in in_order)
    for turn in in_order:
        assert turn.num_step_targets == sum(targets[i] for i in turn.indices)


# Arrays


def assert_arrays(batch, **expected) -> None:
    if "prefixes" in expected:
        distinct, representative = expected.pop("prefixes")
        assert_arrays(batch.prefixes, distinct=distinct, representative=representative)
        batch = {name: value for name, value in batch._asdict().items() if name != "prefixes"}
    else:
        batch = batch._asdict()
    for name, values in expected.items():
        actual = batch[name]
        if values is None:
            assert actual is None, name
            continue
        assert actual.dtype == torch.int64, name
        assert actual.tolist() == values, name
    assert set(expected) == set(batch)


def test_a_batch_written_out():
    examples = [
        Example(4, [256, 10, 11], [IGNORE_INDEX, 11, 257]),
        Example(9, [256], [12]),
        Example(2, [256, 13], [IGNORE_INDEX, 14]),
    ]
    expected = {
        "tokens": [256, 10, 11, 256, 256, 13],
        "labels": [-100, 11, 257, 12, -100, 14],
        "positions": [0, 1, 2, 0, 0, 1],
        "boundaries": [0, 3, 4, 6],
        "num_step_targets": 31,
        "row_ids": [4, 9, 2],
        "prefixes": ([0, 1, 2, 5], [0, 1, 2, 0, 0, 3]),
    }
    assert_arrays(collate(examples, 31), **expected)
    assert_arrays(Batches([examples[0], *examples])[MicroBatch([1, 2, 3], 31)], **expected)
    # As a worker hands it on.
    batch = pickle.loads(ForkingPickler.dumps(collate(examples, 31)))
    assert type(batch) is Batch
    assert_arrays(batch, **expected)
    batch.tokens[0] = 7  # in memory of its own
    elsewhere = batch._replace(tokens=batch.tokens.to("meta"))  # no numbers to hand on there
    assert copy.deepcopy(elsewhere).tokens.device.type == "meta"


def test_a_worker_hands_on_no_file():
    examples = [Example(4, [256, 10, 11], [IGNORE_INDEX, 11, 257])]
    pickled = bytes(ForkingPickler.dumps(collate(examples, 2)))
    as_torch_does = bytes(ForkingPickler.dumps(torch.tensor([256, 10, 11])))
    assert b"rebuild_storage" in as_torch_does
    assert b"rebuild_storage" not in pickled


def test_an_empty_batch_written_out():
    # What a slot without records holds: the step's target count all the same.
    assert_arrays(
        Batches([])[MicroBatch([], 31)],
        tokens=[],
        labels=[],
        positions=[],
        boundaries=[0],
        num_step_targets=31,
        row_ids=[],
        prefixes=([], []),
    )


def test_prompts_written_out():
    assert_arrays(
        collate_prompts([[256, 10], [256, 11, 12]], [8, 5], [257, 265]),
        tokens=[256, 10, 256, 11, 12],
        boundaries=[0, 2, 5],
        row_ids=[8, 5],
        stop_ids=[[257, 265], [257, 265]],
        max_new_tokens=None,
    )
