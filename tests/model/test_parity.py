"""Our logits are transformers' logits, and the comparison notices every constant that matters."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

from llama_lightning.errors import WeightsError
from llama_lightning.model import llama
from llama_lightning.model.config import LlamaConfig, RopeScaling
from llama_lightning.model.llama import Block, Llama
from llama_lightning.model.rope import apply_rope, rope_tables
from llama_lightning.weights.huggingface import load_huggingface, read_config
from tests.model.oracle import (
    SMALL,
    huggingface_twin,
    max_difference,
    randomise,
    small_config,
    small_llama,
)

BOUND = 1e-4
NUM_TOKENS = 64


def _inputs(first_position: int) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(SMALL.vocab_size, (2, NUM_TOKENS))
    return tokens, torch.arange(first_position, first_position + NUM_TOKENS)


@torch.no_grad()
def _reference(model: Llama, tokens: Tensor, positions: Tensor, attention: str = "sdpa") -> Tensor:
    twin = huggingface_twin(model, attention=attention)
    logits: Tensor = twin(tokens, position_ids=positions.expand_as(tokens), use_cache=False).logits
    return logits


@torch.no_grad()
def _difference(model: Llama, tokens: Tensor, positions: Tensor, reference: Tensor) -> float:
    return max_difference(model(tokens, positions=positions), reference)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("first_position", [0, 8192])
def test_logits_equal_transformers(first_position: int, tied: bool) -> None:
    model = small_llama(small_config(tie_word_embeddings=tied))
    tokens, positions = _inputs(first_position)
    reference = _reference(model, tokens, positions)
    difference = _difference(model, tokens, positions, reference)
    own = max_difference(_reference(model, tokens, positions, attention="eager"), reference)
    size = reference.abs().max().item()
    print(
        f"max |logit difference| {difference:.2e} (bound {BOUND:.0e}; logits up to {size:.0f}); "
        f"transformers' eager against its sdpa {own:.2e}"
    )
    assert difference <= BOUND


def test_logits_equal_transformers_without_scaling_and_grouping() -> None:
    model = small_llama(small_config(rope_scaling=None, num_key_value_heads=4, rope_theta=1e4))
    tokens, positions = _inputs(8192)
    difference = _difference(model, tokens, positions, _reference(model, tokens, positions))
    print(f"max |logit difference| {difference:.2e} (bound {BOUND:.0e})")
    assert difference <= BOUND


def _scaling(**changes: Any) -> LlamaConfig:
    return small_config(rope_scaling=replace(RopeScaling(), **changes))


BROKEN_CONFIGS = {
    "rope_theta": small_config(rope_theta=10_000.0),
    "factor": _scaling(factor=8.0),  # Llama 3.1's
    "low_freq_factor": _scaling(low_freq_factor=2.0),
    "high_freq_factor": _scaling(high_freq_factor=8.0),
    "original_max_position_embeddings": _scaling(original_max_position_embeddings=4096),
    "no rope_scaling": small_config(rope_scaling=None),
    "rms_norm_eps": small_config(rms_norm_eps=1e-6),  # the default of other Llamas
    "tie_word_embeddings": small_config(tie_word_embeddings=False),
}


@pytest.mark.parametrize("first_position", [0, 8192])
@pytest.mark.parametrize("name", BROKEN_CONFIGS)
def test_a_wrong_constant_fails_the_comparison(name: str, first_position: int) -> None:
    model = small_llama()
    tokens, positions = _inputs(first_position)
    reference = _reference(model, tokens, positions)
    broken = Llama(BROKEN_CONFIGS[name]).eval()
    randomise(broken)  # an untied head stays random: it is not in the tied network's weights
    weights = dict(model.named_parameters())
    missing, unexpected = broken.load_state_dict(weights, strict=False)
    assert not unexpected
    assert missing == ["lm_head.weight"]  # of a tied head, the embedding's own name was loaded
    difference = _difference(broken, tokens, positions, reference)
    print(f"{name} broken, from position {first_position}: {difference:.2e} (bound {BOUND:.0e})")
    assert difference > BOUND


def _tiled_heads(q: Tensor, k: Tensor, v: Tensor, **rest: Any) -> Tensor:
    # Head n would read kv head n % K instead of n // (N / K).
    groups = q.shape[-2] // k.shape[-2]
    return attention_of_llama(q, k.repeat(1, 1, groups, 1), v.repeat(1, 1, groups, 1), **rest)


def _interleaved_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    # The layout of Meta's own files: pairs (2i, 2i + 1).
    halves = x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
    rotated = apply_rope(halves, cos, sin)
    return rotated.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)


def _bf16_tables(positions: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = rope_tables(positions, inv_freq.bfloat16())
    return cos.bfloat16().float(), sin.bfloat16().float()


def _uncausal(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)


attention_of_llama = llama.attention
BROKEN_PARTS = {
    "grouping of kv heads": ("attention", _tiled_heads),
    "causality": ("attention", _uncausal),
    "rotary layout": ("apply_rope", _interleaved_rope),
    "type of the rotary tables": ("rope_tables", _bf16_tables),
}


@pytest.mark.parametrize("name", BROKEN_PARTS)
def test_a_wrong_part_fails_the_comparison(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_llama()
    tokens, positions = _inputs(0)
    reference = _reference(model, tokens, positions)
    part: tuple[str, Callable[..., Any]] = BROKEN_PARTS[name]
    monkeypatch.setattr(llama, *part)
    difference = _difference(model, tokens, positions, reference)
    print(f"{name} broken: {difference:.2e} (bound {BOUND:.0e})")
    assert difference > BOUND


def test_qkv_bias_equals_qwen2() -> None:
    # Qwen2 has hidden_size // heads where Llama has head_dim.
    model = small_llama(small_config(qkv_bias=True, hidden_size=256))
    config, scaling = model.config, model.config.rope_scaling
    assert scaling is not None
    rope = {"rope_type": "llama3", **vars(scaling)}
    twin = transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            max_position_embeddings=config.max_position_embeddings,
            rms_norm_eps=config.rms_norm_eps,
            tie_word_embeddings=True,
            rope_theta=config.rope_theta,
            rope_scaling=rope,
            attn_implementation="sdpa",
        )
    ).eval()
    twin.load_state_dict(model.state_dict())
    tokens, positions = _inputs(0)
    with torch.no_grad():
        reference = twin(tokens, position_ids=positions[None], use_cache=False).logits
        difference = _difference(model, tokens, positions, reference)
        for block in model.model.layers:
            block.self_attn.k_proj.bias.zero_()
            block.self_attn.v_proj.bias.zero_()
            block.self_attn.q_proj.bias.zero_()
        without = _difference(model, tokens, positions, reference)
    print(f"max |logit difference| {difference:.2e}; with the biases at zero {without:.2e}")
    assert difference <= BOUND < without


def _mistral(**changes: Any) -> transformers.MistralForCausalLM:
    """A Mistral of version 0.2's kind: untied head, a theta of a million, no scaling, no window."""
    shape = {
        key: value
        for key, value in vars(SMALL).items()
        if key not in ("rope_scaling", "rope_theta", "qkv_bias", "dropout", "tie_word_embeddings")
    }
    constants = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    config = transformers.MistralConfig(**shape, **{"sliding_window": None, **constants, **changes})
    twin = transformers.MistralForCausalLM(config).eval()
    randomise(twin)
    return twin


@torch.no_grad()
def test_a_mistral_without_a_window_is_a_llama(tmp_path: Path) -> None:
    twin = _mistral()
    twin.save_pretrained(tmp_path)
    config = read_config(tmp_path)
    assert (config.rope_theta, config.rope_scaling, config.tie_word_embeddings) == (
        1e6,
        None,
        False,
    )
    model = load_huggingface(tmp_path, config, dtype=torch.float32).eval()
    tokens, positions = _inputs(8192)
    reference = twin(tokens, position_ids=positions.expand_as(tokens), use_cache=False).logits
    difference = _difference(model, tokens, positions, reference)
    wrong = Llama(replace(config, rope_theta=5e5)).eval()
    wrong.load_state_dict(model.state_dict())
    broken = _difference(wrong, tokens, positions, reference)
    print(f"max |logit difference| {difference:.2e} (bound {BOUND:.0e}); theta broken {broken:.2e}")
    assert difference <= BOUND < broken


@pytest.mark.parametrize("window", [32, "absent"])
def test_a_mistral_with_a_window_is_refused(window: int | str, tmp_path: Path) -> None:
    raw = _mistral(sliding_window=32).config.to_dict()
    if window == "absent":
        del raw["sliding_window"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(WeightsError, match="window is not supported") as caught:
        read_config(tmp_path)
    print(caught.value)
    assert "\n" not in str(caught.value)


def test_dropout_is_only_on_in_training() -> None:
    plain = small_llama()
    model = Llama(small_config(dropout=0.3))
    model.load_state_dict(plain.state_dict())
    tokens, _ = _inputs(0)
    assert torch.equal(model.eval()(tokens), plain(tokens))
    model.train()
    assert not torch.equal(model(tokens), plain(tokens))
    assert not torch.equal(model(tokens), model(tokens))


@pytest.mark.parametrize("silent", ["mlp.down_proj", "self_attn.o_proj"])
def test_dropout_keeps_the_expectation(silent: str) -> None:
    # With one branch silent the other is added to x: each element is gone, or 1 / (1 - p) larger.
    p = 0.3
    block = Block(small_config(dropout=p), layer=0).double()
    randomise(block)
    torch.nn.init.zeros_(block.get_submodule(silent).weight)
    x = torch.randn(4, NUM_TOKENS, SMALL.hidden_size, dtype=torch.float64)
    rope = rope_tables(torch.arange(NUM_TOKENS), llama.inverse_frequencies(SMALL))
    with torch.no_grad():
        added = block.eval()(x, rope) - x
        added_in_training = block.train()(x, rope) - x
    gone = added_in_training.abs() < 1e-12
    kept_error = max_difference(added_in_training[~gone], added[~gone] / (1 - p))
    share = gone.double().mean().item()
    deviation = (p * (1 - p) / gone.numel()) ** 0.5
    print(f"share dropped {share:.4f} of p={p}; kept elements scaled within {kept_error:.1e}")
    assert kept_error <= 1e-9
    assert abs(share - p) < 5 * deviation
