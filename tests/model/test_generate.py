"""Generation is transformers' in greedy mode, and no row's text depends on its neighbours."""

import itertools
import weakref
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from llama_lightning.model.config import RopeScaling
from llama_lightning.model.generate import generate
from llama_lightning.model.kv_cache import KVCache
from llama_lightning.model.llama import Backbone, Llama
from llama_lightning.model.sampling import GenerationConfig, next_tokens, row_generator
from llama_lightning.records import Generation, PromptBatch
from tests.model.oracle import (
    SMALL,
    huggingface_twin,
    max_difference,
    small_config,
    small_llama,
)

LENGTHS = [1, 2, 3, 5, 8, 13, 21, 34, 55, 7, 7, 29, 40, 17, 4, 61]
NEW = 64
NO_STOP = -1


def _model_and_prompts() -> tuple[Llama, list[list[int]]]:
    # Of the first seeds, this one's greedy texts have the widest margins over the runner-up; where
    # two logits tie, rounding would choose and the batch's shape decides how sums are rounded.
    torch.manual_seed(6)
    model = small_llama()
    return model, [torch.randint(SMALL.vocab_size, (n,)).tolist() for n in LENGTHS]


def _batch(
    prompts: Sequence[Sequence[int]],
    stop_ids: Sequence[Sequence[int]] | None = None,
    row_ids: Sequence[int] | None = None,
) -> PromptBatch:
    lengths = torch.tensor([len(p) for p in prompts])
    return PromptBatch(
        torch.tensor([token for p in prompts for token in p]),
        F.pad(lengths.cumsum(0), (1, 0)),
        torch.tensor(range(len(prompts)) if row_ids is None else row_ids),
        torch.tensor(stop_ids if stop_ids is not None else [[NO_STOP]] * len(prompts)),
    )


def _by_row(model: Llama, batch: PromptBatch, config: GenerationConfig) -> dict[int, Generation]:
    answers = list(generate(model, batch, config))
    assert len(answers) == len(batch.row_ids)
    return {answer.row_id: answer for answer in answers}


def _texts(model: Llama, batch: PromptBatch, config: GenerationConfig) -> list[list[int]]:
    answers = _by_row(model, batch, config)
    return [answers[int(row)].tokens for row in batch.row_ids]


def test_greedy_tokens_equal_transformers() -> None:
    model, prompts = _model_and_prompts()
    longest = max(LENGTHS)
    padded = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    out = huggingface_twin(model).generate(
        padded,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=NEW,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    reference = out.sequences[:, longest:].tolist()
    # Equal tokens say something of equal logits only where no two tokens tie for the first place.
    best_two = torch.stack(out.logits).topk(2).values
    margin = (best_two[..., 0] - best_two[..., 1]).min().item()
    answers = _by_row(model, _batch(prompts), GenerationConfig(max_new_tokens=NEW))
    ours = [answers[row].tokens for row in range(len(prompts))]
    same = (torch.tensor(ours) == torch.tensor(reference)).sum().item()
    kinds = len({token for row in ours for token in row})
    print(
        f"{same} of {len(prompts) * NEW} greedy tokens equal, {kinds} different ones; "
        f"closest runner-up {margin:.1e} behind"
    )
    assert margin > 1e-3
    assert kinds > 50
    assert ours == reference
    assert {answer.finish_reason for answer in answers.values()} == {"length"}


def test_a_batch_equals_its_rows_one_by_one() -> None:
    model, prompts = _model_and_prompts()
    config = GenerationConfig(max_new_tokens=NEW)
    together = _texts(model, _batch(prompts), config)
    apart = [_texts(model, _batch([prompt]), config)[0] for prompt in prompts]
    print(f"{sum(a == b for a, b in zip(together, apart, strict=True))} of {len(apart)} rows equal")
    assert together == apart


Stopping = tuple[Llama, list[list[int]], list[list[int]], list[list[int]]]


@pytest.fixture
def stopping() -> Stopping:
    """A model, prompts, what it answers without a stop, and stop tokens of each row's own."""
    model, prompts = _model_and_prompts()
    free = _texts(model, _batch(prompts), GenerationConfig(max_new_tokens=NEW))
    # Row r stops at the token it would say at step 4 r or where that came first; the first row at
    # once, the last not at all. The second number is a token no row ever says.
    never = next(t for t in range(SMALL.vocab_size) if all(t not in row for row in free))
    stops = [[never, text[4 * row]] for row, text in enumerate(free)]
    stops[-1] = [NO_STOP, never]
    return model, prompts, free, stops


def test_each_row_has_its_own_stop_tokens(stopping: Stopping) -> None:
    model, prompts, free, stops = stopping
    answers = _by_row(model, _batch(prompts, stops), GenerationConfig(max_new_tokens=NEW))
    for row, text in enumerate(free):
        ends = [i for i, token in enumerate(text) if token in stops[row]]
        expected = text[: ends[0]] if ends else text
        assert answers[row].tokens == expected
        assert answers[row].finish_reason == ("stop" if ends else "length")
    lengths = [len(answers[row].tokens) for row in range(len(free))]
    passed_over = sum(
        other[-1] in answers[row].tokens for row in range(len(free)) for other in stops[:-1]
    )
    print(f"lengths {lengths}; {passed_over} times a row said another row's stop token")
    assert lengths[0] == 0
    assert lengths[-1] == NEW
    assert len(set(lengths)) > 8
    assert passed_over > 0


def test_finished_rows_leave_the_batch(stopping: Stopping, monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts, _, stops = stopping
    sizes: list[int] = []
    forward = Backbone.forward

    def spy(self: Backbone, tokens: Tensor, **rest: object) -> Tensor:
        if tokens.ndim == 2:  # prompts are flat
            sizes.append(len(tokens))
        return forward(self, tokens, **rest)

    monkeypatch.setattr(Backbone, "forward", spy)
    answers = list(generate(model, _batch(prompts, stops), GenerationConfig(max_new_tokens=NEW)))
    said = [len(answer.tokens) for answer in answers]
    assert said == sorted(said)  # each comes as soon as it is finished
    # After step s, the rows that have said s + 1 tokens and are not finished go through the
    # network.
    expected = [sum(n > step for n in said) for step in range(NEW - 1)]
    print(f"rows in the network: {sizes[0]} at first, {sizes[-1]} at last, {sum(sizes)} in all")
    assert sizes == expected
    assert sizes[-1] == 1


def test_an_answer_comes_before_the_others_are_finished(stopping: Stopping) -> None:
    model, prompts, _, stops = stopping
    calls: list[int] = []
    model.model.register_forward_hook(lambda _, args, out: calls.append(args[0].ndim))
    answers = generate(model, _batch(prompts, stops), GenerationConfig(max_new_tokens=NEW))
    assert next(answers).row_id == 0
    assert set(calls) == {1}  # prompts, which are flat, have been read, and no token was decoded


def test_the_cut_is_at_max_new_tokens() -> None:
    model, prompts = _model_and_prompts()
    free = _texts(model, _batch(prompts), GenerationConfig(max_new_tokens=3))
    assert {len(text) for text in free} == {3}
    # A stop token in the very last place is still a stop, not a cut.
    stops = [[row[2]] for row in free]
    answers = _by_row(model, _batch(prompts, stops), GenerationConfig(max_new_tokens=3))
    assert {answer.finish_reason for answer in answers.values()} == {"stop"}


def test_cached_logits_equal_uncached() -> None:
    model = small_llama()
    lengths, num_steps = torch.tensor([3, 9, 1]), 12
    tokens = torch.randint(SMALL.vocab_size, (3, int(lengths.max()) + num_steps))
    cache = KVCache.allocate(
        model.config, 3, tokens.shape[1], dtype=torch.float32, device=torch.device("cpu")
    )
    with torch.no_grad():
        full = model(tokens)
        prefill = model(tokens[:, : int(lengths.max())], cache=cache)
        cache.advance(lengths)
        rows = torch.arange(3)
        differences = [
            max_difference(prefill[row, :n], full[row, :n]) for row, n in enumerate(lengths)
        ]
        for step in range(num_steps):
            one = model(tokens[rows, lengths + step][:, None], cache=cache).squeeze(1)
            cache.advance(torch.ones(3, dtype=torch.int64))
            differences.append(max_difference(one, full[rows, lengths + step]))
    print(f"max |cached - uncached| {max(differences):.1e} (bound 1e-04)")
    assert cache.lengths_B.tolist() == (lengths + num_steps).tolist()
    assert max(differences) <= 1e-4


def test_prompts_end_to_end_equal_uncached() -> None:
    model = small_llama().double()
    parts = [[3, 9, 1], [4, 1, 2]]  # tokens of each row, and again
    tokens = torch.randint(SMALL.vocab_size, (3, 12))
    cache = KVCache.allocate(model.config, 3, 12, dtype=torch.float64, device=torch.device("cpu"))
    differences = []
    with torch.no_grad():
        full = model.model(tokens)
        for lengths in parts:
            starts = cache.lengths_B.tolist()
            places = [
                (row, start + step)
                for row, (start, length) in enumerate(zip(starts, lengths, strict=True))
                for step in range(length)
            ]
            rows, steps = torch.tensor(places).T
            boundaries = torch.tensor([0, *itertools.accumulate(lengths)])
            # Twice, as keys and values that are not counted are written again.
            for wanted in (None, boundaries[1:] - 1):
                found = model.model(
                    tokens[rows, steps], boundaries=boundaries, wanted=wanted, cache=cache
                )
                expected = full[rows, steps] if wanted is None else full[rows, steps][wanted]
                differences.append(max_difference(found, expected))
            cache.advance(torch.tensor(lengths))
    print(f"max |end to end - uncached| {max(differences):.1e} (bound 1e-12)")
    assert cache.lengths_B.tolist() == [7, 10, 3]
    assert max(differences) <= 1e-12


def test_kept_rows_go_on_as_before() -> None:
    model = small_llama()
    tokens = torch.randint(SMALL.vocab_size, (3, 6))
    cache = KVCache.allocate(model.config, 3, 6, dtype=torch.float32, device=torch.device("cpu"))
    with torch.no_grad():
        full = model(tokens)
        model(tokens[:, :5], cache=cache)
        cache.advance(torch.tensor([5, 5, 5]))
        kept = torch.tensor([2, 0])
        cache.copy_rows(kept, torch.tensor([0, 1]), 5)
        last = model(tokens[kept, 5:], cache=cache.view(0, 2, 6)).squeeze(1)
    difference = max_difference(last, full[kept, 5])
    print(f"max |difference| after dropping a row {difference:.1e}")
    assert cache.lengths_B.tolist() == [5, 5, 5]
    assert difference <= 1e-4


def test_an_overflowing_cache_raises() -> None:
    model = small_llama()
    cache = KVCache.allocate(model.config, 2, 4, dtype=torch.float32, device=torch.device("cpu"))
    with torch.no_grad():
        model(torch.zeros(2, 4, dtype=torch.int64), cache=cache)
        cache.advance(torch.tensor([3, 4]))  # only the second row is full
        with pytest.raises(IndexError):
            model(torch.zeros(2, 1, dtype=torch.int64), cache=cache)


def test_the_cache_has_the_type_it_was_asked_for() -> None:
    model = small_llama().bfloat16()
    prompts = _batch([[1, 2, 3], [4]])
    answers = _by_row(model, prompts, GenerationConfig(max_new_tokens=4))
    assert {len(answer.tokens) for answer in answers.values()} == {4}
    cache = KVCache.allocate(model.config, 1, 4, dtype=torch.bfloat16, device=torch.device("cpu"))
    assert {k.dtype for k in cache.keys + cache.values} == {torch.bfloat16}


def test_sampling_is_fixed_by_its_seed() -> None:
    model, prompts = _model_and_prompts()

    def sample(temperature: float, seed: int) -> list[list[int]]:
        config = GenerationConfig(max_new_tokens=8, temperature=temperature, seed=seed)
        return _texts(model, _batch(prompts), config)

    one = sample(1.0, 5)
    assert sample(1.0, 5) == one
    assert sample(1.0, 6) != one
    assert sample(0.0, 5) == sample(0.0, 6)
    assert sample(1e-3, 5) == sample(0.0, 5)  # ever colder is ever greedier
    assert sample(1.0, 5) != sample(0.0, 5)


def test_sampling_leaves_the_global_generator_alone() -> None:
    model, state = small_llama(), torch.get_rng_state()
    _texts(model, _batch([[1, 2]]), GenerationConfig(max_new_tokens=4, temperature=1.0))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_rows_sample_does_not_depend_on_its_batch() -> None:
    # In float64: the draw is the same in any batch, but the network rounds differently in each
    # shape of batch, and in fp32 one draw in some ten thousand is near enough to be moved by that.
    model, prompts = _model_and_prompts()
    model.double()
    config = GenerationConfig(max_new_tokens=16, temperature=0.8, seed=3)
    row_ids = [100 + row for row in range(len(prompts))]
    together = _texts(model, _batch(prompts, row_ids=row_ids), config)
    backwards = _texts(model, _batch(prompts[::-1], row_ids=row_ids[::-1]), config)[::-1]
    alone = [
        _texts(model, _batch([prompt], row_ids=[row]), config)[0]
        for prompt, row in zip(prompts, row_ids, strict=True)
    ]
    assert together == backwards == alone
    same = _texts(model, _batch([prompts[5]] * 3, row_ids=[1, 2, 3]), config)
    assert len({tuple(text) for text in same}) == 3  # the row's number, not its place or prompt


LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5, 0.5, float("-inf"), -2.0])
NUM_DRAWS = 20_000
SAMPLING = GenerationConfig(temperature=1.0)
# The chance that a right sampler exceeds it is below 1e-6 (6 degrees of freedom).
CHI_SQUARE_BOUND = 38.3


def _chi_square(tokens: Tensor, temperature: float) -> float:
    possible = LOGITS.isfinite()
    counts = torch.bincount(tokens, minlength=len(LOGITS)).double()
    assert counts[~possible].sum() == 0
    expected = (LOGITS.double() / temperature).softmax(-1) * NUM_DRAWS
    return ((counts - expected)[possible].square() / expected[possible]).sum().item()


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
@pytest.mark.parametrize("kind", ["first draw of each row", "one row's draws"])
def test_samples_are_distributed_as_the_softmax(kind: str, temperature: float) -> None:
    generators = [row_generator(11, row) for row in range(NUM_DRAWS)]
    if kind == "one row's draws":
        generators = [row_generator(11, 0)] * NUM_DRAWS
    tokens = next_tokens(
        LOGITS.expand(NUM_DRAWS, -1), GenerationConfig(temperature=temperature), generators
    )
    chi_square = _chi_square(tokens, temperature)
    wrong = _chi_square(tokens, temperature * 1.1)
    print(
        f"{kind}, temperature {temperature}: chi-square {chi_square:.1f} "
        f"(bound {CHI_SQUARE_BOUND}); against a temperature 10% higher {wrong:.1f}"
    )
    assert chi_square < CHI_SQUARE_BOUND < wrong


def test_the_smallest_draw_takes_the_first_possible_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "rand", lambda *size, **rest: torch.zeros(size, dtype=rest["dtype"]))
    logits = torch.tensor([[float("-inf"), float("-inf"), 0.0, 1.0]])
    assert next_tokens(logits, SAMPLING, [row_generator(0, 0)]).tolist() == [2]


def test_the_largest_draw_takes_the_last_possible_token(monkeypatch: pytest.MonkeyPatch) -> None:
    largest = 1 - 2**-53
    monkeypatch.setattr(
        torch, "rand", lambda *size, **rest: torch.full(size, largest, dtype=rest["dtype"])
    )
    logits = torch.cat([torch.randn(50, 997), torch.full((50, 1), float("-inf"))], dim=1)
    tokens = next_tokens(logits, SAMPLING, [row_generator(0, row) for row in range(50)])
    assert tokens.tolist() == [996] * 50


def test_greedy_takes_the_likeliest() -> None:
    assert next_tokens(LOGITS[None], GenerationConfig(), [row_generator(0, 0)]).tolist() == [0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -0.1}, r"generation.temperature is -0\.1"),
        ({"max_new_tokens": 0}, "generation.max_new_tokens is 0"),
        ({"temperature": float("nan")}, "generation.temperature is nan"),
        ({"top_k": -1}, "generation.top_k is -1"),
        ({"top_p": 1.1}, r"generation.top_p is 1\.1"),
        ({"top_p": 0.0}, r"generation.top_p is 0\.0"),
        ({"min_p": -0.5}, r"generation.min_p is -0\.5"),
        ({"repetition_penalty": 0.0}, r"generation.repetition_penalty is 0\.0"),
        ({"num_samples": 0}, "generation.num_samples is 0"),
        ({"num_samples": 2}, "generation.num_samples is 2 at temperature 0"),
    ],
)
def test_wrong_fields_are_refused(fields: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GenerationConfig(**fields)


def test_a_cache_of_long_rows_keeps_its_positions() -> None:
    # A prompt beyond the original context: the cache's own count, not the slot of the batch.
    config = small_config(
        num_hidden_layers=1, rope_scaling=RopeScaling(original_max_position_embeddings=32)
    )
    model = small_llama(config)
    tokens = torch.randint(SMALL.vocab_size, (1, 301))
    cache = KVCache.allocate(config, 1, 301, dtype=torch.float32, device=torch.device("cpu"))
    with torch.no_grad():
        model(tokens[:, :300], cache=cache)
        cache.advance(torch.tensor([300]))
        difference = max_difference(model(tokens[:, 300:], cache=cache)[0, 0], model(tokens)[0, -1])
    print(f"max |cached - uncached| at token 300 {difference:.1e} (bound 1e-04)")
    assert difference <= 1e-4


class _Alive(TorchDispatchMode):
    """Counts, at each pad, the tensors that are still there."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self.references = [weakref.ref(tensor) for tensor in tensors]
        self.counts: list[int] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "pad" in str(function):
            self.counts.append(sum(reference() is not None for reference in self.references))
        return function(*args, **(kwargs or {}))


def test_a_cache_grows_layer_by_layer_and_rarely() -> None:
    config = small_config(num_hidden_layers=3)
    cache = KVCache.allocate(config, 2, 3, dtype=torch.float32, device=torch.device("cpu"))
    for layer in range(3):
        cache.new_tokens(3).write(
            layer, *(torch.full((2, 3, 2, config.head_dim), layer + 1.0),) * 2
        )
    with _Alive(cache.keys + cache.values) as alive:
        cache.reserve(200)
    print(f"tensors of before at each copy: {alive.counts}")
    assert alive.counts == [6, 5, 4, 3, 2, 1]
    for layer, (keys, values) in enumerate(zip(cache.keys, cache.values, strict=True)):
        assert keys.shape[2] == values.shape[2] == 256
        assert keys[:, :, :3].eq(layer + 1).all()
        assert values[:, :, :3].eq(layer + 1).all()
    first = cache.keys[0]
    cache.reserve(256)
    assert cache.keys[0] is first
    cache.reserve(257)
    assert cache.keys[0].shape[2] == 512
