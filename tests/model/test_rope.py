"""Rotary positions are transformers' bit for bit, in fp32 whatever the weights are."""

import math

import pytest
import torch
import transformers
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from llama_lightning.model import llama
from llama_lightning.model.config import PRESETS, LlamaConfig, RopeScaling, config_to_huggingface
from llama_lightning.model.rope import apply_rope, inverse_frequencies, rope_tables
from tests.model.oracle import (
    SMALL,
    huggingface_twin,
    max_difference,
    small_config,
    small_llama,
)

CONFIGS = {
    **PRESETS,
    "small": SMALL,
    # No power of two: only then does the order of a division and a product change the last bit.
    "factor 10": small_config(
        head_dim=128, rope_scaling=RopeScaling(10.0, 0.7, 5.3, original_max_position_embeddings=999)
    ),
    "short context": small_config(
        head_dim=16,
        rope_theta=10_000.0,
        rope_scaling=RopeScaling(factor=8.0, original_max_position_embeddings=64),
    ),
}
POSITIONS = torch.tensor([0, 1, 2, 63, 255, 257, 2047, 8191, 8192, 30_000, 65_537, 131_071])


def _huggingface(config: LlamaConfig) -> transformers.LlamaConfig:
    return transformers.LlamaConfig.from_dict(config_to_huggingface(config, "float32"))


def _in_float64(config: LlamaConfig) -> Tensor:
    """The formula of the scaling, written anew and in float64."""
    frequencies, s = [], config.rope_scaling
    for i in range(0, config.head_dim, 2):
        frequency = config.rope_theta ** (-i / config.head_dim)
        if s is not None:
            turns = s.original_max_position_embeddings * frequency / (2 * math.pi)
            keep = (turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
            keep = min(max(keep, 0.0), 1.0)
            frequency = keep * frequency + (1 - keep) * frequency / s.factor
        frequencies.append(frequency)
    return torch.tensor(frequencies, dtype=torch.float64)


@pytest.mark.parametrize("name", CONFIGS)
def test_scaled_frequencies_equal_transformers_bit_for_bit(name: str) -> None:
    ours = inverse_frequencies(CONFIGS[name])
    theirs, attention_scaling = ROPE_INIT_FUNCTIONS["llama3"](
        _huggingface(CONFIGS[name]), torch.device("cpu")
    )
    assert ours.dtype == torch.float32
    assert attention_scaling == 1.0  # so there is nothing of it to multiply into the tables
    assert torch.equal(ours, theirs)
    kept = inverse_frequencies(small_config(**{**vars(CONFIGS[name]), "rope_scaling": None}))
    scaling = CONFIGS[name].rope_scaling
    assert scaling is not None
    divided = ours == kept / scaling.factor
    blended = (ours != kept) & ~divided
    print(
        f"{name}: {int((ours == kept).sum())} kept, {int(blended.sum())} blended, "
        f"{int(divided.sum())} divided"
    )
    assert all(part.any() for part in (ours == kept, blended, divided))


def test_unscaled_frequencies_equal_transformers_bit_for_bit() -> None:
    config = small_config(rope_scaling=None)
    theirs = LlamaRotaryEmbedding(_huggingface(config)).inv_freq
    assert torch.equal(inverse_frequencies(config), theirs)


@pytest.mark.parametrize("name", CONFIGS)
def test_float64_frequencies_are_close_but_not_equal(name: str) -> None:
    # Close: the formula is right. Not equal: bit equality above does say something.
    ours, exact = inverse_frequencies(CONFIGS[name]), _in_float64(CONFIGS[name])
    relative = ((ours.double() - exact) / exact).abs().max().item()
    print(f"{name}: float64 frequencies differ by {relative:.1e} of their size")
    assert relative < 1e-6
    assert not torch.equal(ours, exact.float())


def test_float64_frequencies_fail_parity_at_long_positions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = small_llama()
    tokens = torch.randint(SMALL.vocab_size, (2, 64))
    positions = torch.arange(8192, 8192 + 64)
    twin = huggingface_twin(model)
    with torch.no_grad():
        reference = twin(tokens, position_ids=positions.expand_as(tokens), use_cache=False).logits
        monkeypatch.setattr(llama, "inverse_frequencies", lambda c, _: _in_float64(c).float())
        difference = max_difference(model(tokens, positions=positions), reference)
    print(f"with frequencies computed in float64: {difference:.1e} at position 8192")
    assert difference > 1e-4


@pytest.mark.parametrize("name", CONFIGS)
def test_tables_equal_transformers_up_to_the_last_position(name: str) -> None:
    config = CONFIGS[name]
    ours = rope_tables(POSITIONS, inverse_frequencies(config))
    theirs = LlamaRotaryEmbedding(_huggingface(config))(torch.zeros(1), POSITIONS[None])
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.shape == (len(POSITIONS), 1, config.head_dim)
        print(f"{name}: max |difference| {max_difference(mine.squeeze(1), other[0]):.1e}")
        assert torch.equal(mine.squeeze(1), other[0])


def test_tables_are_fp32_in_a_bf16_network(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_llama().bfloat16()
    seen: list[Tensor] = []

    def spy(positions: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
        tables = rope_tables(positions, inv_freq)
        seen.extend(tables)
        return tables

    monkeypatch.setattr(llama, "rope_tables", spy)
    logits = model(torch.randint(SMALL.vocab_size, (1, 4)), positions=torch.arange(8188, 8192))
    assert logits.dtype == torch.bfloat16
    assert [table.dtype for table in seen] == [torch.float32] * 2
    expected = rope_tables(torch.arange(8188, 8192), inverse_frequencies(SMALL))
    assert all(torch.equal(*pair) for pair in zip(seen, expected, strict=True))


def test_rotation_equals_transformers() -> None:
    tables = rope_tables(POSITIONS, inverse_frequencies(SMALL))
    q, k = torch.randn(2, len(POSITIONS), 4, 64)
    theirs = apply_rotary_pos_emb(q, k, *(t.squeeze(1) for t in tables), unsqueeze_dim=1)
    assert torch.equal(apply_rope(q, *tables), theirs[0])
    assert torch.equal(apply_rope(k, *tables), theirs[1])


def test_bf16_rotation_is_the_fp32_rotation_rounded() -> None:
    cos, sin = rope_tables(POSITIONS, inverse_frequencies(SMALL))
    x = torch.randn(len(POSITIONS), 4, 64).bfloat16()
    expected = apply_rope(x.float(), cos, sin).bfloat16()
    assert torch.equal(apply_rope(x, cos, sin), expected)
    narrow = apply_rope(x, cos.bfloat16(), sin.bfloat16())
    print(f"a rotation in bf16 would be {max_difference(narrow, expected):.1e} off")
    assert not torch.equal(narrow, expected)
