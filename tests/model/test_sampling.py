"""What is sampled from is what transformers' logits processors would sample from."""

import itertools
from functools import partial
from unittest import mock

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llama_lightning.model.generate import generate
from llama_lightning.model.sampling import (
    SORTED,
    GenerationConfig,
    candidates,
    next_tokens,
    penalise_repetition,
    row_generator,
)
from tests.model.oracle import huggingface_twin, small_llama
from tests.model.test_generate import LENGTHS, _batch, _model_and_prompts, _texts

ROWS, VOCABULARY = 100, 1000
BOUND = 1e-6


def _logits() -> torch.Tensor:
    logits = torch.randn(ROWS, VOCABULARY) * 4
    # Ties at the edge of a filter: both must be kept or dropped as transformers does.
    logits[::3] = logits[::3].round()
    return logits


def _oracle(logits: torch.Tensor, seen: torch.Tensor, config: GenerationConfig) -> torch.Tensor:
    """Transformers' processors, in the order in which its `generate` builds them.

    Its sort leaves equals in an order that depends on the processor, and so which of them top-p
    keeps. Here it is a stable one.
    """
    steps = LogitsProcessorList()
    if config.repetition_penalty != 1.0:
        steps.append(RepetitionPenaltyLogitsProcessor(config.repetition_penalty))
    steps.append(TemperatureLogitsWarper(config.temperature))
    if config.top_k:
        steps.append(TopKLogitsWarper(config.top_k))
    if config.top_p < 1.0:
        steps.append(TopPLogitsWarper(config.top_p))
    if config.min_p:
        steps.append(MinPLogitsWarper(config.min_p))
    with mock.patch("torch.sort", partial(torch.sort, stable=True)):
        return steps(seen, logits.double()).softmax(-1)


def _probabilities(logits: torch.Tensor, config: GenerationConfig) -> torch.Tensor:
    probs, tokens = candidates(logits, config)
    assert (tokens.diff() > 0).all()
    return torch.zeros_like(logits, dtype=torch.float64).scatter_(1, tokens, probs)


def _ours(logits: torch.Tensor, seen: torch.Tensor, config: GenerationConfig) -> torch.Tensor:
    mask = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, seen, True)
    return _probabilities(penalise_repetition(logits, mask, config.repetition_penalty), config)


def _total_variation(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest over rows: the most that any event's probability differs by."""
    return float(0.5 * (one - other).abs().sum(-1).max())


CONFIGS = [
    {"temperature": 0.7},
    {"top_k": 1},
    {"top_k": 50},
    {"top_k": 5000},
    {"top_p": 0.9},
    {"top_p": 0.01},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.8},
    {"temperature": 1.7, "top_k": 40, "top_p": 0.95, "min_p": 0.02, "repetition_penalty": 1.1},
    {"temperature": 0.2, "top_k": 3, "top_p": 0.5, "repetition_penalty": 2.0},
]


@pytest.mark.parametrize("fields", CONFIGS, ids=str)
def test_probabilities_are_transformers(fields: dict[str, float]) -> None:
    config = GenerationConfig(**{"temperature": 1.0, **fields})
    logits, seen = _logits(), torch.randint(VOCABULARY, (ROWS, 20))
    variation = _total_variation(_ours(logits, seen, config), _oracle(logits, seen, config))
    print(f"{fields}: total variation {variation:.1e} over {ROWS} rows (bound {BOUND:.0e})")
    assert variation <= BOUND


@pytest.mark.parametrize("fields", CONFIGS[:3] + CONFIGS[4:9], ids=str)
def test_a_setting_left_out_fails_the_comparison(fields: dict[str, float]) -> None:
    # CONFIGS[3] keeps every token: leaving it out changes nothing, rightly.
    config = GenerationConfig(**{"temperature": 1.0, **fields})
    logits, seen = _logits(), torch.randint(VOCABULARY, (ROWS, 20))
    plain = _ours(logits, seen, GenerationConfig(temperature=1.0))
    assert _total_variation(plain, _oracle(logits, seen, config)) > 1000 * BOUND


@pytest.mark.parametrize(
    "fields",
    [
        {"top_p": 0.1},
        {"top_p": 0.9},
        {"top_p": 0.999},
        {"top_k": 40},
        {"top_k": SORTED[0]},
        {"top_k": SORTED[0], "top_p": 0.9},
    ],
    ids=str,
)
@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0])
def test_a_filter_keeps_transformers_tokens_however_many(
    scale: float, fields: dict[str, float]
) -> None:
    # As in bf16, many are equal, so that the edge falls among equals.
    logits = (torch.randn(24, 2 * SORTED[1]) * 8).round().double() / 8 * scale
    config = GenerationConfig(temperature=1.0, **fields)
    kept = _probabilities(logits, config) > 0
    expected = _oracle(logits, torch.zeros(24, 1, dtype=torch.int64), config) > 0
    counts = expected.sum(-1)
    edges = logits.masked_fill(~expected, torch.inf).amin(-1, keepdim=True)
    parted = int((((logits == edges) & ~expected).sum(-1) > 0).sum())
    print(f"{counts.min()} to {counts.max()} of {2 * SORTED[1]} kept, {parted} edges among equals")
    assert parted > 12 or counts.max() <= 2 or config.top_p == 1.0  # top-k keeps all equals
    assert torch.equal(kept, expected)


def test_draws_follow_the_filtered_probabilities() -> None:
    draws = 20_000
    config = GenerationConfig(temperature=0.8, top_k=6, top_p=0.95, min_p=0.05)
    logits = torch.randn(1, 50).expand(draws, -1)
    generators = [row_generator(5, row) for row in range(draws)]
    counts = torch.bincount(next_tokens(logits, config, generators), minlength=50)
    expected = _probabilities(logits[:1], config)[0] * draws
    possible = expected > 0
    assert possible.sum() >= 4
    assert counts[~possible].sum() == 0
    chi_square = ((counts - expected)[possible].square() / expected[possible]).sum().item()
    print(f"{int(possible.sum())} tokens possible, chi-square {chi_square:.1f}")
    assert chi_square < 38.3  # chance below 1e-6 with up to 6 degrees of freedom


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"top_k": 20, "top_p": 0.9},
        {"min_p": 0.1, "repetition_penalty": 1.2},
        {"repetition_penalty": 1.2, "temperature": 0.0},
    ],
    ids=str,
)
def test_a_rows_text_is_the_same_at_batch_1_3_and_16(fields: dict[str, float]) -> None:
    model, prompts = _model_and_prompts()
    assert len(prompts) == len(LENGTHS) == 16
    config = GenerationConfig(**{"temperature": 0.9, "max_new_tokens": 16, "seed": 7, **fields})
    texts = {}
    for size in (1, 3, 16):
        texts[size] = [
            text
            for start in range(0, 16, size)
            for text in _texts(
                model,
                _batch(
                    prompts[start : start + size],
                    row_ids=list(range(start, min(start + size, 16))),
                ),
                config,
            )
        ]
    equal = sum(one == three == all_ for one, three, all_ in zip(*texts.values(), strict=True))
    print(f"{fields}: {equal} of 16 rows the same text at batch 1, 3 and 16")
    assert equal == 16


@pytest.mark.parametrize("size", [VOCABULARY, 1024, 1001])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_greedy_takes_the_first_of_equals(dtype: torch.dtype, size: int) -> None:
    torch.manual_seed(0)
    logits = (torch.randn(ROWS, size) * 2).round().to(dtype)
    logits[:3, size // 3 :: size // 4] = torch.nan  # which is seen before all numbers
    equals = (logits == logits.amax(-1, keepdim=True)).sum(-1)
    assert (equals > 1).sum() > ROWS / 10
    for laid_out in (logits, logits.T.contiguous().T):
        tokens = next_tokens(laid_out, GenerationConfig(), [])
        assert torch.equal(tokens, logits.argmax(-1))


def test_penalised_greedy_text_is_transformers() -> None:
    model, prompts = _model_and_prompts()
    twin = huggingface_twin(model)
    config = GenerationConfig(max_new_tokens=24, repetition_penalty=1.3)
    ours = _texts(model, _batch(prompts), config)
    plain = _texts(model, _batch(prompts), GenerationConfig(max_new_tokens=24))
    for prompt, text in zip(prompts, ours, strict=True):
        out = twin.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt)),
            do_sample=False,
            max_new_tokens=24,
            min_new_tokens=24,
            repetition_penalty=1.3,
        )
        assert out[0, len(prompt) :].tolist() == text
    assert ours != plain


def test_several_samples_a_prompt() -> None:
    model = small_llama()
    batch = _batch([[1, 2, 3], [4, 5]], row_ids=[8, 9])

    def answers(num_samples: int) -> dict[tuple[int, int], list[int]]:
        config = GenerationConfig(
            max_new_tokens=12, temperature=1.0, num_samples=num_samples, repetition_penalty=1.1
        )
        return {(g.row_id, g.sample): g.tokens for g in generate(model, batch, config)}

    five, one = answers(5), answers(1)
    assert sorted(five) == list(itertools.product([8, 9], range(5)))
    assert len({tuple(tokens) for tokens in five.values()}) == 10
    assert {key: five[key] for key in one} == one  # the first sample is what one sample would be


def test_samples_stop_each_at_its_own_end() -> None:
    model = small_llama()
    config = GenerationConfig(max_new_tokens=30, temperature=1.5, num_samples=16)
    stop_ids = [list(range(0, model.config.vocab_size, 8))]
    answers = list(generate(model, _batch([[1, 2, 3]], stop_ids), config))
    lengths = [len(answer.tokens) for answer in answers]
    print(f"lengths of 16 samples: {lengths}")
    assert lengths == sorted(lengths)
    assert len(set(lengths)) > 3
    assert {answer.sample for answer in answers} == set(range(16))
    assert not set(stop_ids[0]) & {token for answer in answers for token in answer.tokens}
