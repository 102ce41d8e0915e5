"""A screened head finds the token that the whole product gives, and goes as it came."""

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor

from llama_lightning.model import fbgemm, screened_head
from llama_lightning.model.embedding_table import CodeTable
from llama_lightning.model.fbgemm import INPUT_ERROR, MAX_CODE, MAX_INPUT, Int8Matrix
from llama_lightning.model.linear import Linear
from llama_lightning.model.llama import Llama
from llama_lightning.model.lora import LoRAConfig, LoRALinear, inject_lora
from llama_lightning.model.sampling import GenerationConfig
from llama_lightning.model.screened_head import (
    CODE_ERROR,
    LOGIT_ERROR,
    ScreenedHead,
    screened,
)
from llama_lightning.records import Generation, PromptBatch
from llama_lightning.training.answering import Answering
from tests.model.oracle import small_config, small_llama

pytestmark = pytest.mark.skipif(not fbgemm.is_there(), reason="no FBGEMM on this processor")

V, D, ROWS = 4096, 256, 8
MAX_ROWS = 4


@pytest.fixture(autouse=True)
def _whatever_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screened_head, "MAX_ROWS", MAX_ROWS)


@pytest.fixture(params=[Int8Matrix, CodeTable])
def matrix(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> type:
    """What multiplies by the codes, whatever the processor."""
    most = ROWS if request.param is CodeTable else 0
    monkeypatch.setattr(screened_head, "TABLE_MAX_ROWS", most)
    kind: type = request.param
    return kind


def _logits(x: Tensor, weight: Tensor) -> Tensor:
    """The whole product, summed in fp32 and rounded to bf16 as by instructions for it."""
    return (x.bfloat16().float() @ weight.bfloat16().float().T).bfloat16()


# Whole numbers, whose sums fp32 holds in any order: what is equal here is equal anywhere.


def _even() -> tuple[Tensor, Tensor]:
    x, weight = torch.randint(-8, 9, (ROWS, D)), torch.randint(-128, 129, (V, D))
    return x.float(), weight.float()


def _outliers() -> tuple[Tensor, Tensor]:
    """A few inputs and weights far larger than the rest, as trained networks have them."""
    x, weight = _even()
    x[:, :3] *= 32
    weight[torch.rand(V, D) < 0.01] *= 16
    return x, weight


def _ties() -> tuple[Tensor, Tensor]:
    """Each token's weights stand there four times."""
    x, weight = _even()
    return x, weight[: V // 4].repeat(4, 1)


def _near_ties() -> tuple[Tensor, Tensor]:
    """All tokens are so near each other that rounding to bf16 decides."""
    x, weight = _even()
    return x.abs(), 200 + (weight % 4)


def _nothing() -> tuple[Tensor, Tensor]:
    x, weight = _even()
    return x, torch.zeros_like(weight)


def _tiny() -> tuple[Tensor, Tensor]:
    """Scales that bf16 has no normal number for."""
    x, weight = _even()
    return x, weight * 2.0**-128


def _huge() -> tuple[Tensor, Tensor]:
    x, weight = _even()
    return x * 2.0**50, weight * 2.0**50


def _no_numbers() -> tuple[Tensor, Tensor]:
    """Rows with NaN and infinity beside sound ones."""
    x, weight = _even()
    x[1, 5], x[2, 5], x[3, 7] = torch.nan, torch.inf, -torch.inf
    return x, weight


def _infinite_weight() -> tuple[Tensor, Tensor]:
    x, weight = _even()
    weight[77, 5] = -torch.inf
    return x.abs() + 1, weight


DRAWS = [_even, _outliers, _ties, _near_ties, _nothing, _tiny, _huge]
DRAWS += [_no_numbers, _infinite_weight]


@pytest.mark.parametrize("draw", DRAWS, ids=[draw.__name__ for draw in DRAWS])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_likeliest_token_is_the_whole_products(
    draw: Callable[[], tuple[Tensor, Tensor]], dtype: torch.dtype, matrix: type
) -> None:
    torch.manual_seed(0)
    x, weight = (t.to(dtype) for t in draw())
    head = ScreenedHead(weight, ROWS)
    assert type(head.codes) is matrix
    logits = head(x)
    whole = _logits(x, weight)
    kept = logits > -torch.inf
    print(f"{draw.__name__}: {kept.any(0).sum()} of {V} tokens computed")
    assert torch.equal(logits.max(-1).indices, whole.max(-1).indices)
    assert torch.equal(logits[kept], whole[kept])
    if draw in (_even, _outliers):
        assert kept.any(0).sum() < V / 4


def test_the_whole_product_is_the_networks_own(matrix: type) -> None:
    torch.manual_seed(0)
    head = Linear(D, V, bias=False).bfloat16()
    x = torch.randn(ROWS, 3, D).bfloat16()
    with torch.inference_mode():  # as Lightning predicts
        own, screened_logits = head(x), ScreenedHead(head.weight, ROWS)(x)
    assert torch.equal(screened_logits.max(-1).indices, own.max(-1).indices)


def test_any_view_of_hidden_states_will_do(matrix: type) -> None:
    head = ScreenedHead(_even()[1], ROWS)
    x = torch.randint(-8, 9, (3, D + 1)).bfloat16()
    for view in (x[:, 1:], x[:, 1:].T.contiguous().T, x[:0, 1:], x[None, :, 1:]):
        assert head(view).shape == (*view.shape[:-1], V)
        assert torch.equal(head(view), head(view.clone()))


# Without one of its parts the bound is too small.


def _rounded_against() -> tuple[Tensor, Tensor]:
    """The likeliest token's codes all fall short of its weights, its rival's all go beyond."""
    size = 1024
    x = torch.randint(0, 2, (1, size)).float() * 2 - 1
    even = torch.zeros(2, size)
    even[1, 1 : size // 2 - 4] = 2  # before rounding all but level with the likeliest
    halves = torch.tensor([[0.5], [-0.5]])  # which are rounded to even
    weight = (even + halves) * x
    weight[:, 0] = 127 * x[:, 0]  # so that the scale of both is 1
    return x, weight


def _inputs_rounded() -> tuple[Tensor, Tensor]:
    """All inputs but one are less than half a part of a step, and only they tell two tokens apart.

    By the codes the rival is ahead as far as can be.
    """
    size = 2**14
    x = torch.full((1, size), 2.0**-8)
    x[:, 0] = MAX_INPUT  # so that a step is 1
    weight = torch.full((2, size), float(MAX_CODE))
    weight[0, 0], weight[1, 1:] = -MAX_CODE, -MAX_CODE
    return x, weight


def _rounded_to_one() -> tuple[Tensor, Tensor]:
    """Logits 65,800.5 and 66,289.5, by codes 65,289 and 66,801: in bf16 one, and the first wins."""
    weight = torch.tensor([[62.5], [63.5]]).repeat(1, 1024)
    weight[0, 1:869], weight[1, 1:602] = 64.5, 65.5
    weight[:, 0] = MAX_CODE
    return torch.ones(1, 1024), weight


@pytest.mark.parametrize(
    ("matrix", "draw", "where", "part", "smaller"),
    [
        (Int8Matrix, _rounded_against, screened_head, "CODE_ERROR", 0.85 * CODE_ERROR),
        (Int8Matrix, _inputs_rounded, fbgemm, "INPUT_ERROR", 0.9 * INPUT_ERROR),
        (Int8Matrix, _rounded_to_one, screened_head, "LOGIT_ERROR", LOGIT_ERROR / 4),
        (CodeTable, _rounded_against, screened_head, "CODE_ERROR", 0.85 * CODE_ERROR),
        (CodeTable, _rounded_to_one, screened_head, "LOGIT_ERROR", LOGIT_ERROR / 4),
    ],
    indirect=["matrix"],
)
@pytest.mark.usefixtures("matrix")
def test_without_the_whole_bound_another_token_wins(
    draw: Callable[[], tuple[Tensor, Tensor]],
    where: ModuleType,
    part: str,
    smaller: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    x, weight = draw()
    head, token = ScreenedHead(weight, len(x)), _logits(x, weight).max(-1).indices
    assert torch.equal(head(x).max(-1).indices, token)
    monkeypatch.setattr(where, part, smaller)
    found = head(x).max(-1).indices
    print(f"{part} {smaller}: tokens {found.tolist()} for {token.tolist()}")
    assert not torch.equal(found, token)


# While prompts are answered.


def _batch(rows: int, first: int = 0) -> PromptBatch:
    return PromptBatch(
        torch.randint(300, (6 * rows,), generator=torch.Generator().manual_seed(first)),
        torch.arange(rows + 1) * 6,
        torch.arange(rows) + first,
        torch.full((rows, 1), 7),
    )


def _answer(
    model: Llama, config: GenerationConfig, rows: int, kinds: set[type]
) -> list[Generation]:
    """Answer prompts with two batches, and note what stands in the head's place meanwhile."""
    answering = Answering()
    answering.listeners.append(lambda generation: kinds.add(type(model.lm_head)))
    finished = answering.answer(model, config, _batch(rows), drain=False)
    return sorted(finished + answering.answer(model, config, _batch(rows, rows), drain=True))


@pytest.fixture
def bf16_model() -> Llama:
    torch.manual_seed(0)
    return small_llama().bfloat16()


def test_answers_are_those_of_the_whole_product(
    bf16_model: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    head, kinds = bf16_model.lm_head, set[type]()
    config = GenerationConfig(max_new_tokens=24)
    whole = _answer(bf16_model, config, 3, kinds)
    assert ScreenedHead not in kinds  # so small a head is in the cache
    kinds.clear()
    monkeypatch.setattr(screened_head, "MIN_BYTES", 0)
    screened = _answer(bf16_model, config, 3, kinds)
    print(f"{sum(len(g.tokens) for g in whole)} tokens of {len(whole)} answers")
    assert kinds == {ScreenedHead}
    assert screened == whole
    assert bf16_model.lm_head is head


@pytest.mark.parametrize(
    ("config", "rows"),
    [
        (GenerationConfig(max_new_tokens=2, temperature=0.7), 2),
        (GenerationConfig(max_new_tokens=2, repetition_penalty=1.2), 2),
        (GenerationConfig(max_new_tokens=2), MAX_ROWS + 1),
    ],
    ids=["sampling", "penalty", "many rows"],
)
def test_who_needs_all_logits_gets_them(
    bf16_model: Llama, config: GenerationConfig, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(screened_head, "MIN_BYTES", 0)
    kinds = set[type]()
    _answer(bf16_model, config, rows, kinds)
    assert kinds
    assert ScreenedHead not in kinds


def test_only_a_plain_head_that_multiplies_in_bf16_is_screened(
    bf16_model: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(screened_head, "MIN_BYTES", 0)
    wide = small_llama()
    with screened(wide, 1):
        assert type(wide.lm_head) is Linear
    with torch.autocast("cpu", torch.bfloat16), screened(wide, 1):
        assert isinstance(wide.lm_head, ScreenedHead)
    odd = small_llama(small_config(hidden_size=201)).bfloat16()
    x = torch.randint(-8, 9, (3, 201)).bfloat16()
    whole = _logits(x, odd.lm_head.weight).max(-1).indices
    with screened(odd, 1):
        assert isinstance(odd.lm_head, ScreenedHead)
        assert torch.equal(odd.lm_head(x).max(-1).indices, whole)
    untied = small_llama(small_config(tie_word_embeddings=False)).bfloat16()
    inject_lora(untied, LoRAConfig(rank=4, target_modules=["lm_head"]), dtype=torch.float32)
    with screened(untied, 1):
        assert isinstance(untied.lm_head, LoRALinear)


def test_whatever_happens_the_head_comes_back(
    bf16_model: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(screened_head, "MIN_BYTES", 0)
    head, keys, kinds = bf16_model.lm_head, list(bf16_model.state_dict()), set[type]()
    config, batch = GenerationConfig(max_new_tokens=3), _batch(2)
    answering = Answering()

    def interrupt(generation: Generation) -> None:
        kinds.add(type(bf16_model.lm_head))
        raise KeyboardInterrupt

    answering.answer(bf16_model, config, batch, drain=False)
    assert isinstance(bf16_model.lm_head, ScreenedHead)
    answering.stop()
    assert bf16_model.lm_head is head
    answering.listeners.append(interrupt)
    with pytest.raises(KeyboardInterrupt):
        answering.answer(bf16_model, config, batch, drain=True)
    assert kinds == {ScreenedHead}
    assert bf16_model.lm_head is head
    assert head.weight is bf16_model.model.embed_tokens.weight
    assert list(bf16_model.state_dict()) == keys
