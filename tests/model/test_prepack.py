"""Prepacked weights give the numbers they gave, and come back as they were."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llama_lightning.model import fbgemm, prepack
from llama_lightning.model.linear import Linear
from llama_lightning.model.llama import Llama
from llama_lightning.model.lora import LoRAConfig, inject_lora
from llama_lightning.model.prepack import (
    LEFT_MAX_ROWS,
    TABLE_MAX_ROWS,
    BF16Linear,
    FP16Linear,
    LeftLinear,
    OneDNNLinear,
    PrepackedLinear,
    prepacked,
)
from tests.model.oracle import randomise_lora, small_config, small_llama

needs_onednn = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this CPU has no bf16 in oneDNN"
)
needs_fbgemm = pytest.mark.skipif(not fbgemm.is_there(), reason="no FBGEMM on this processor")
ROWS = 8


def _pretend(monkeypatch: pytest.MonkeyPatch, *, has_bf16: bool, has_amx: bool = False) -> None:
    for module in ("linear", "embedding_table", "prepack"):
        monkeypatch.setattr(f"llama_lightning.model.{module}.CPU_HAS_BF16", has_bf16)
    monkeypatch.setattr(prepack, "CPU_HAS_AMX", has_amx)


@pytest.fixture(
    params=[
        "left",
        pytest.param("oneDNN", marks=needs_onednn),
        pytest.param("table", marks=needs_fbgemm),
        pytest.param("fp16", marks=needs_fbgemm),
    ]
)
def layout(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The layout that is taken: of a CPU with AMX, with instructions for bf16, and without."""
    name = str(request.param)
    _pretend(monkeypatch, has_bf16=name in ("left", "oneDNN"), has_amx=name == "left")
    if name == "table":
        monkeypatch.setattr(prepack, "TABLE_MAX_ROWS", ROWS)
    monkeypatch.setattr(fbgemm, "FP16_PART", 2**14)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    return name


def _lora_model() -> Llama:
    torch.manual_seed(0)
    model = small_llama(small_config(qkv_bias=True)).bfloat16()
    inject_lora(model, LoRAConfig(rank=4), dtype=torch.float32)
    randomise_lora(model)
    return model


def _kinds(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


def _logits(model: Llama, rows: int, kind: type) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, and their logits plain and by layers of a kind."""
    tokens = torch.randint(300, (rows, 1))
    with torch.inference_mode():
        plain = model(tokens)
        with prepacked(model, rows):
            assert kind in _kinds(model)
            return tokens, plain, model(tokens)


@needs_onednn
@pytest.mark.parametrize("rows", [2, 8, 33])
def test_logits_by_onednn_are_equal_bit_for_bit(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend(monkeypatch, has_bf16=True)
    _, plain, packed = _logits(_lora_model(), rows, OneDNNLinear)
    assert torch.equal(packed, plain)


@pytest.mark.parametrize(
    ("rows", "processor", "kind"),
    [
        *((rows, "with AMX", LeftLinear) for rows in (1, 2, 8, 33, LEFT_MAX_ROWS + 1)),
        pytest.param(1, "with bf16", BF16Linear, marks=[needs_onednn, needs_fbgemm]),
        pytest.param(1, "without", BF16Linear, marks=needs_fbgemm),
        *(pytest.param(rows, "without", FP16Linear, marks=needs_fbgemm) for rows in (2, 8, 33)),
    ],
)
def test_logits_are_as_near_to_float64s(
    rows: int, processor: str, kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    _pretend(monkeypatch, has_bf16=processor != "without", has_amx=processor == "with AMX")
    model = _lora_model()
    tokens, plain, packed = _logits(model, rows, kind)
    with torch.inference_mode():
        exact = model.double()(tokens)
    errors = [float((logits - exact).norm() / exact.norm()) for logits in (packed, plain)]
    print(f"{rows} rows: off by {errors[0]:.2e}, without packing by {errors[1]:.2e}")
    assert errors[0] < 1.1 * errors[1]


def test_with_amx_a_bf16_weight_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend(monkeypatch, has_bf16=True, has_amx=True)
    model = nn.Sequential(Linear(64, 64)).bfloat16()
    place = model[0].weight.data_ptr()
    with prepacked(model, ROWS):
        assert model[0].packed.data_ptr() == place
    assert model[0].weight.data_ptr() == place


def test_all_layers_but_loras_own_are_packed_and_come_back(layout: str) -> None:
    model = _lora_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.inference_mode(), prepacked(model, ROWS):
        kinds = _kinds(model)
    assert sum(issubclass(kind, PrepackedLinear) for kind in kinds) == 2 * 7 + 1  # and the head
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_there_are_never_two_copies_and_training_goes_on(layout: str) -> None:
    model = nn.Sequential(Linear(64, 64, bias=False)).bfloat16()
    weight, before = model[0].weight, model[0].weight.detach().clone()
    with torch.inference_mode(), prepacked(model, ROWS):
        assert weight.nbytes == 0
    assert model[0].weight is weight
    assert torch.equal(weight, before)
    model(torch.randn(3, 64, dtype=torch.bfloat16)).sum().backward()
    assert weight.grad is not None
    with pytest.raises(KeyboardInterrupt), prepacked(model, ROWS):
        raise KeyboardInterrupt
    assert torch.equal(weight, before)


def test_whatever_happens_while_packing_the_weights_come_back(
    layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(*(Linear(64, 64, bias=False) for _ in range(9))).bfloat16()
    modules, before = list(model), [linear.weight.detach().clone() for linear in model]
    replace, num = prepack._replace, 0

    def interrupted(*args: Any) -> None:
        nonlocal num
        num += 1
        if num == 4:
            raise KeyboardInterrupt
        replace(*args)

    monkeypatch.setattr(prepack, "_replace", interrupted)
    with pytest.raises(KeyboardInterrupt), prepacked(model, ROWS):
        pass
    assert num > 4
    assert list(model) == modules
    for linear, weight in zip(modules, before, strict=True):
        assert torch.equal(linear.weight, weight)


def test_a_weight_that_something_else_has_too_is_not_given_up(layout: str) -> None:
    one, two = Linear(64, 64), Linear(64, 64)
    two.weight = one.weight
    model = nn.Sequential(one, two, one).bfloat16()
    x = torch.randn(ROWS, 64).bfloat16()
    with torch.inference_mode():
        plain = model(x)
        with prepacked(model, ROWS):
            torch.testing.assert_close(model(x), plain)
            assert one.weight.nbytes
    assert list(model) == [one, two, one]


def test_autocast_weights_are_packed_as_it_would_cast_them(layout: str) -> None:
    model = nn.Sequential(Linear(64, 96), Linear(96, 8))
    x = torch.randn(ROWS, 64)
    if layout != "oneDNN":  # whose sums have an order of their own: whole numbers, exact in any
        x = torch.randint(-8, 9, (ROWS, 64)).float()
        for linear in model:
            nn.init.uniform_(linear.weight, -8, 8).data.round_()
            nn.init.uniform_(linear.bias, -8, 8).data.round_()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        plain = model(x)
        with prepacked(model, ROWS):
            assert torch.equal(model(x), plain)
            assert isinstance(model[0], PrepackedLinear)
    assert model[0].weight.dtype == torch.float32


def test_other_types_stay_as_they_are(layout: str) -> None:
    model = small_llama()
    with prepacked(model, ROWS):
        assert not any(issubclass(kind, PrepackedLinear) for kind in _kinds(model))


@needs_fbgemm
def test_fp16_leaves_what_it_cannot_hold_and_a_single_row(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend(monkeypatch, has_bf16=False)
    model = nn.Sequential(Linear(64, 64), Linear(64, 64)).bfloat16()
    with prepacked(model, TABLE_MAX_ROWS):
        assert _kinds(model)[1:] == [BF16Linear, BF16Linear]
    with torch.no_grad():
        model[0].weight[3, 5] = torch.inf
    before = model[0].weight.detach().clone()
    with prepacked(model, TABLE_MAX_ROWS + 1):
        assert isinstance(model[1], PrepackedLinear)
        assert type(model[0]) is Linear
    assert torch.equal(model[0].weight, before)
