"""Rows are refilled and prefixes copied, and every text is what it is when all run at once."""

import itertools
import math
import random
from collections import Counter

import pytest
import torch
from torch import Tensor

from llama_lightning.model import continuous_batch
from llama_lightning.model.continuous_batch import ContinuousBatch
from llama_lightning.model.generate import generate
from llama_lightning.model.llama import Backbone, Llama
from llama_lightning.model.sampling import GenerationConfig
from llama_lightning.records import PromptBatch
from tests.model.oracle import SMALL, huggingface_twin, small_llama
from tests.model.test_generate import _batch, _model_and_prompts

Texts = dict[tuple[int, int], list[int]]


def _texts(
    model: Llama, batch: PromptBatch, config: GenerationConfig, batch_size: int | None = None
) -> Texts:
    answers = list(generate(model, batch, config, batch_size=batch_size))
    assert len(answers) == len(batch.row_ids) * config.num_samples
    return {(answer.row_id, answer.sample): answer.tokens for answer in answers}


def _templated(count: int) -> list[list[int]]:
    """Prompts as a template makes them: two long beginnings, a few tokens of their own."""
    one = torch.randint(SMALL.vocab_size, (30,)).tolist()
    two = one[:9] + torch.randint(SMALL.vocab_size, (25,)).tolist()
    own = [torch.randint(SMALL.vocab_size, (3 + i % 7,)).tolist() for i in range(count)]
    return [(one, two)[i % 3 == 0] + own[i] + one[-4:] for i in range(count)]


@pytest.fixture
def tokens_read(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shape of what goes through the network, call by call: flat prompts, or (B, 1)."""
    shapes: list[tuple[int, ...]] = []
    forward = Backbone.forward

    def spy(self: Backbone, tokens: Tensor, **rest: object) -> Tensor:
        shapes.append(tuple(tokens.shape))
        return forward(self, tokens, **rest)

    monkeypatch.setattr(Backbone, "forward", spy)
    return shapes


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_greedy_texts_of_a_few_rows_at_a_time_equal_transformers(batch_size: int) -> None:
    model, prompts = _model_and_prompts()
    limits = [3 + 5 * (row % 6) for row in range(len(prompts))]
    twin = huggingface_twin(model)
    batch = _batch(prompts)._replace(max_new_tokens=torch.tensor(limits))
    ours = _texts(model, batch, GenerationConfig(), batch_size)
    for row, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
        out = twin.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt)),
            do_sample=False,
            max_new_tokens=limit,
            pad_token_id=0,
        )
        assert out[0, len(prompt) :].tolist() == ours[row, 0], row
    print(f"batch {batch_size}: {sum(limits)} of {sum(limits)} greedy tokens equal")


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"repetition_penalty": 1.3},
        {"temperature": 0.9, "top_p": 0.9},
        {"temperature": 1.0, "num_samples": 3, "repetition_penalty": 1.1},
    ],
    ids=str,
)
def test_texts_do_not_depend_on_how_many_run_at_a_time(
    fields: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    # In float64: the network rounds differently in each shape of batch.
    model, _ = _model_and_prompts()
    model.double()
    prompts = _templated(16)
    limits = torch.tensor([1 + (7 * row) % 18 for row in range(16)])
    stops = [[row, 100 + row] for row in range(16)]
    batch = _batch(prompts, stops)._replace(max_new_tokens=limits)
    config = GenerationConfig(seed=4, **fields)
    # The plain path: each prompt by itself, nothing to copy from.
    plain: Texts = {}
    for row in range(16):
        one = _batch([prompts[row]], [stops[row]], [row])
        one = one._replace(max_new_tokens=limits[row : row + 1])
        plain |= _texts(model, one, config, config.num_samples)
    kinds = len({token for text in plain.values() for token in text})
    assert kinds > 50
    for most_cells in (continuous_batch.MOST_CELLS, 1000):  # few steps go along then
        monkeypatch.setattr(continuous_batch, "MOST_CELLS", most_cells)
        for batch_size in (1, 3, 16, None):
            assert _texts(model, batch, config, batch_size) == plain, (most_cells, batch_size)
    print(f"{fields}: {len(plain)} texts the same, 1, 3, 16 and all at a time, and one by one")


def test_a_data_set_costs_what_its_tokens_cost(tokens_read: list[tuple[int, ...]]) -> None:
    model = small_llama()
    limits = [40 if row % 8 == 0 else 4 for row in range(64)]
    prompts = [[row, *torch.randint(SMALL.vocab_size, (4,)).tolist()] for row in range(64)]
    batch = _batch(prompts)._replace(max_new_tokens=torch.tensor(limits))
    _texts(model, batch, GenerationConfig(), batch_size=8)
    decodes = [shape[0] for shape in tokens_read if len(shape) == 2]
    static = 8 * 39  # eight batches, each as long as its longest row
    print(
        f"{len(decodes)} decode steps of {sum(decodes) / len(decodes):.1f} rows in the mean "
        f"(static batches: {static}); at most {max(decodes)} rows; {len(tokens_read)} passes"
    )
    # The first token of each comes with its prompt, and each but the last is read once.
    assert sum(map(math.prod, tokens_read)) == 64 * 5 + sum(limits) - 64
    assert max(decodes) == 8
    assert len(tokens_read) < 0.3 * static


def test_what_prompts_share_is_read_once(tokens_read: list[tuple[int, ...]]) -> None:
    model = small_llama()
    prompts = _templated(24)
    config = GenerationConfig(max_new_tokens=1)
    _texts(model, _batch(prompts), config, batch_size=8)
    read = sum(map(math.prod, tokens_read))
    given, distinct = sum(map(len, prompts)), 30 + 25 + sum(len(p[34:]) for p in prompts)
    print(f"{given} prompt tokens, {read} read in {len(tokens_read)} passes")
    assert read < 0.45 * given
    assert read >= distinct - 24 * 4
    tokens_read.clear()
    samples = GenerationConfig(max_new_tokens=1, temperature=1.0, num_samples=8)
    _texts(model, _batch(prompts[:1]), samples)
    assert tokens_read == [(len(prompts[0]),), (7,)]


def test_no_more_is_read_at_once_than_fits(
    tokens_read: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(continuous_batch, "PREFILL_TOKENS", 128)
    torch.manual_seed(0)
    model = small_llama()
    prompts = [torch.randint(SMALL.vocab_size, (50,)).tolist() for _ in range(7)]
    _texts(model, _batch(prompts), GenerationConfig(max_new_tokens=1))
    assert [shape for shape in tokens_read if len(shape) == 1] == [(100,)] * 3 + [(50,)]


def test_prompts_come_in_batch_by_batch() -> None:
    model, prompts = _model_and_prompts()
    config = GenerationConfig()
    limits = torch.tensor([30, 2, 2, 2, 9, 1, 1, 1, 5, 5, 5, 5, 2, 2, 2, 2])
    whole = _batch(prompts)._replace(max_new_tokens=limits)
    expected = _texts(model, whole, config)
    batch = ContinuousBatch(model, config, 4)
    texts: Texts = {}
    at_once: list[list[int]] = []
    for start in range(0, 16, 4):
        part = _batch(prompts[start : start + 4], row_ids=range(start, start + 4))
        batch.add(part._replace(max_new_tokens=limits[start : start + 4]))
        finished = list(batch.run(drain=start == 12))
        at_once.append([answer.row_id for answer in finished])
        texts |= {(answer.row_id, answer.sample): answer.tokens for answer in finished}
    print(f"finished batch by batch: {at_once}")
    assert at_once[0] == []  # all of the first batch are in the network, none has said anything
    assert 0 in at_once[-1]  # the longest answer runs on through all batches
    assert sum(map(len, at_once)) == 16
    assert texts == expected


def test_the_prompt_that_shares_most_is_found() -> None:
    numbers = random.Random(0)
    prompts = [[numbers.randrange(2) for _ in range(numbers.randrange(9))] for _ in range(80)]

    def shared(a: list[int], b: list[int]) -> int:
        pairs = zip(a, b, strict=False)
        return len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))

    found = []
    assert continuous_batch._nearest([1], []) == (0, 0)
    for size in range(1, 40):
        others = sorted((prompt, number) for number, prompt in enumerate(prompts[:size]))
        for prompt in prompts[40:]:
            most, number = continuous_batch._nearest(prompt, others)
            assert most == max(shared(prompt, other) for other in prompts[:size])
            assert most == shared(prompt, prompts[number])
            found.append(most)
    print(f"{len(found)} searches as by comparing with each; {Counter(found)} tokens shared")
    assert len(set(found)) > 6


def test_a_wrong_copy_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_llama()
    batch, config = _batch(_templated(6)), GenerationConfig(max_new_tokens=6)
    right = _texts(model, batch, config, 2)
    shared = "llama_lightning.model.continuous_batch._common"
    monkeypatch.setattr(shared, lambda a, b: min(len(a), len(b)) if b else 0)
    wrong = _texts(model, batch, config, 2)
    differing = sum(right[key] != wrong[key] for key in right)
    print(f"copying what is not shared changes {differing} of 6 texts")
    assert differing >= 3
    assert set(itertools.chain(right, wrong)) == {(row, 0) for row in range(6)}
