"""A screened head finds the token that the whole product gives, and goes as it came."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from llama_lightning.model import screened_head
from llama_lightning.model.linear import Linear
from llama_lightning.model.llama import Llama
from llama_lightning.model.lora import LoRAConfig, LoRALinear, inject_lora
from llama_lightning.model.sampling import GenerationConfig
from llama_lightning.model.screened_head import MAX_ROWS, ScreenedHead, screened
from llama_lightning.records import Generation, PromptBatch
from llama_lightning.training.answering import Answering
from tests.model.oracle import small_config, small_llama

V, D, ROWS = 4096, 256, 8


def _logits(x: Tensor, weight: Tensor) -> Tensor:
    """The whole product, summed in fp32 and rounded to bf16 as by instructions for it."""
    return (x.bfloat16().float() @ weight.bfloat16().float().T).bfloat16()


def _normal() -> tuple[Tensor, Tensor]:
    return torch.randn(ROWS, D), torch.randn(V, D)


def _outliers() -> tuple[Tensor, Tensor]:
    """A few inputs and weights far larger than the rest, as trained networks have them."""
    x, weight = _normal()
    x[:, :3] *= 100
    weight[torch.rand(V, D) < 0.01] *= 30
    return x, weight


def _ties() -> tuple[Tensor, Tensor]:
    """Each token's weights stand there four times."""
    x, weight = _normal()
    return x, weight[: V // 4].repeat(4, 1)


def _near_ties() -> tuple[Tensor, Tensor]:
    """All tokens are so near each other that rounding to bf16 decides."""
    x, weight = _normal()
    return x.abs(), 1 + weight / 1000


def _nothing() -> tuple[Tensor, Tensor]:
    x, weight = _normal()
    return x, torch.zeros_like(weight)


def _tiny() -> tuple[Tensor, Tensor]:
    """Scales that bf16 has no normal number for."""
    x, weight = _normal()
    return x, weight * 1e-37


def _huge() -> tuple[Tensor, Tensor]:
    x, weight = _normal()
    return x * 1e15, weight * 1e15


@pytest.mark.parametrize(
    "draw",
    [_normal, _outliers, _ties, _near_ties, _nothing, _tiny, _huge],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_likeliest_token_is_the_whole_products(
    draw: Callable[[], tuple[Tensor, Tensor]], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    x, weight = (t.to(dtype) for t in draw())
    logits = ScreenedHead(weight)(x)
    whole = _logits(x, weight)
    kept = logits > -torch.inf
    print(f"{draw.__name__}: {kept.any(0).sum()} of {V} tokens computed")
    assert torch.equal(logits.max(-1).indices, whole.max(-1).indices)
    assert torch.equal(logits[kept], whole[kept])
    if draw in (_normal, _outliers):
        assert kept.any(0).sum() < V / 4


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


def test_without_the_whole_bound_another_token_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x, weight = _rounded_against()
    whole = _logits(x, weight)
    head = ScreenedHead(weight)
    rough = torch._weight_int8pack_mm(x.bfloat16(), head.codes_VD, head.scales_V)
    print(f"logits {whole.tolist()}, by codes {rough.tolist()}")
    assert whole.argmax() == 0
    assert head(x).argmax() == 0
    monkeypatch.setattr(screened_head, "OFF", 0.85 * screened_head.OFF)
    assert head(x).argmax() == 1


# While prompts are answered.


def _answer(
    model: Llama, config: GenerationConfig, rows: int, kinds: set[type]
) -> list[Generation]:
    """Answer prompts with two batches, and note what stands in the head's place meanwhile."""
    answering = Answering()
    answering.listeners.append(lambda generation: kinds.add(type(model.lm_head)))
    finished = []
    for first in (0, rows):
        batch = PromptBatch(
            torch.randint(300, (6 * rows,), generator=torch.Generator().manual_seed(first)),
            torch.arange(rows + 1) * 6,
            torch.arange(rows) + first,
            torch.full((rows, 1), 7),
        )
        finished += answering.answer(model, config, batch, drain=bool(first))
    return sorted(finished)


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
    odd = small_llama(small_config(hidden_size=200)).bfloat16()  # a kernel would read past its end
    with screened(odd, 1):
        assert type(odd.lm_head) is Linear
    untied = small_llama(small_config(tie_word_embeddings=False)).bfloat16()
    inject_lora(untied, LoRAConfig(rank=4, target_modules=["lm_head"]), dtype=torch.float32)
    with screened(untied, 1):
        assert isinstance(untied.lm_head, LoRALinear)
    with pytest.raises(KeyboardInterrupt), screened(bf16_model, 1):
        raise KeyboardInterrupt
    assert bf16_model.lm_head.weight is bf16_model.model.embed_tokens.weight
