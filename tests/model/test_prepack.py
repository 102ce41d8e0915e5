"""Prepacked weights give the same numbers bit for bit, and come back as they were."""

import pytest
import torch
from torch import nn

from llama_lightning.model.linear import Linear
from llama_lightning.model.lora import LoRAConfig, inject_lora
from llama_lightning.model.prepack import PrepackedLinear, prepacked
from tests.model.oracle import randomise_lora, small_config, small_llama

needs_onednn = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this CPU has no bf16 in oneDNN"
)


@needs_onednn
@pytest.mark.parametrize("rows", [1, 8, 33])
def test_logits_are_equal_bit_for_bit(rows: int) -> None:
    model = small_llama(small_config(qkv_bias=True)).bfloat16()
    inject_lora(model, LoRAConfig(rank=4), dtype=torch.float32)
    randomise_lora(model)
    tokens = torch.randint(300, (rows, 1))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.inference_mode():
        plain = model(tokens)
        with prepacked(model):
            kinds = [type(module) for module in model.modules()]
            packed = model(tokens)
    num = kinds.count(PrepackedLinear)
    print(f"{rows} rows, {num} layers packed: {(packed == plain).float().mean():.0%} equal")
    assert num == 2 * 7 + 1  # the head too; LoRA's own matrices are fp32
    assert torch.equal(packed, plain)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert model.lm_head.weight is model.model.embed_tokens.weight


@needs_onednn
def test_there_are_never_two_copies_and_training_goes_on() -> None:
    model = nn.Sequential(Linear(64, 64, bias=False)).bfloat16()
    weight, before = model[0].weight, model[0].weight.detach().clone()
    with torch.inference_mode(), prepacked(model):
        assert weight.nbytes == 0
    assert model[0].weight is weight
    assert torch.equal(weight, before)
    model(torch.randn(3, 64, dtype=torch.bfloat16)).sum().backward()
    assert weight.grad is not None
    with pytest.raises(KeyboardInterrupt), prepacked(model):
        raise KeyboardInterrupt
    assert torch.equal(weight, before)


@needs_onednn
def test_autocast_weights_are_packed_as_it_would_cast_them() -> None:
    model = nn.Sequential(Linear(64, 96), Linear(96, 8))
    x = torch.randn(5, 64)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        plain = model(x)
        with prepacked(model):
            assert torch.equal(model(x), plain)
            assert isinstance(model[0], PrepackedLinear)
    assert model[0].weight.dtype == torch.float32


def test_other_types_stay_as_they_are() -> None:
    model = small_llama()
    with prepacked(model):
        assert not any(isinstance(module, PrepackedLinear) for module in model.modules())
