"""Products of bf16 matrices in fp32, block by block: exact but for the rounding of their ends."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from llama_lightning.data.prefixes import find_prefixes
from llama_lightning.model import linear
from llama_lightning.model.linear import Linear, product_in_fp32
from llama_lightning.model.lora import LoRAConfig, inject_lora
from llama_lightning.model.loss import summed_cross_entropy, supervised_positions
from tests.model.oracle import (
    flat_batch,
    random_records,
    randomise_lora,
    small_config,
    small_llama,
    supervised_hidden,
)

# Between neighbours of bf16 lies 2^-8 to 2^-7 of their size: rounding is off by half of that.
HALF_STEP = 2**-8


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "FEW_BLOCK", 1024)
    monkeypatch.setattr(linear, "BLOCK", 2048)
    monkeypatch.setattr(linear, "CPU_HAS_BF16", False)


def _operands(rows: int, inputs: int, outputs: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    shapes = (rows, inputs), (outputs, inputs), (rows, outputs)
    x, weight, gradient = (torch.randn(shape).bfloat16() for shape in shapes)
    return x.requires_grad_(), weight.requires_grad_(), gradient


def _largest_error(found: Tensor, exact: Tensor) -> float:
    """In what rounding an exact result to bf16 may be off; sums in fp32 add little to it."""
    assert found.dtype == torch.bfloat16
    allowed = HALF_STEP * exact.abs() + 1e-5 * exact.abs().max()
    return float(((found.double() - exact).abs() / allowed).max())


# One block, one that is not full, several, a last one of one output; as many rows as stand on the
# left, which no tile holds.
@pytest.mark.parametrize("default", [torch.float32, torch.bfloat16])  # the latter in bf16-true
@pytest.mark.parametrize(
    "sizes", [(6, 16, 32), (9, 1200, 5), (40, 96, 192), (7, 128, 65), (261, 40, 70)]
)
def test_product_and_gradients_are_the_exact_ones_rounded(
    sizes: tuple[int, int, int], default: torch.dtype
) -> None:
    x, weight, gradient = _operands(*sizes)
    torch.set_default_dtype(default)
    try:
        out = product_in_fp32(x, weight)
        out.backward(gradient)
    finally:
        torch.set_default_dtype(torch.float32)
    wide_x, wide_weight = x.detach().double(), weight.detach().double()
    errors = [
        _largest_error(out.detach(), wide_x @ wide_weight.T),
        _largest_error(x.grad, gradient.double() @ wide_weight),
        _largest_error(weight.grad, gradient.double().T @ wide_x),
    ]
    print(f"{sizes}: {max(errors):.3f} of what rounding allows")
    assert max(errors) <= 1.0


@pytest.mark.parametrize("trained", ["x", "weight", "both", "none"])
def test_only_what_a_gradient_needs_is_kept(trained: str) -> None:
    x, weight, gradient = _operands(7, 24, 90)
    x.requires_grad_(trained in ("x", "both"))
    weight.requires_grad_(trained in ("weight", "both"))
    kept: list[tuple[int, ...]] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = product_in_fp32(x, weight)
    expected = {"x": [(90, 24)], "weight": [(7, 24)], "both": [(7, 24), (90, 24)], "none": []}
    assert kept == expected[trained]
    if trained != "none":
        out.backward(gradient)
    assert (x.grad is None, weight.grad is None) == (not x.requires_grad, not weight.requires_grad)


def test_no_rows_are_a_product_of_no_rows() -> None:
    layer = Linear(24, 90, dtype=torch.bfloat16)
    out = layer(torch.empty(0, 24, dtype=torch.bfloat16))
    assert out.shape == (0, 90)
    out.sum().backward()
    assert not layer.weight.grad.any()


def test_it_is_an_operation_like_torchs_own() -> None:
    x, weight, _ = _operands(7, 24, 90)
    # Of its schema, its gradient, its shapes while traced: raises where one is not as it should be.
    for operands in ((x, weight), (x.detach(), weight.detach())):
        results = torch.library.opcheck(product_in_fp32, operands)
        print(results)
        assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("autocast", [False, True])
def test_a_layer_takes_any_number_of_dimensions_and_a_bias(autocast: bool) -> None:
    torch.manual_seed(0)
    dtype = torch.float32 if autocast else torch.bfloat16
    layer = Linear(24, 90, dtype=dtype)
    x = torch.randn(2, 5, 24, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = layer(x)
    rounded = (tensor.detach().bfloat16().double() for tensor in (x, layer.weight, layer.bias))
    assert out.dtype == torch.bfloat16
    # The bias is added to what is rounded already.
    torch.testing.assert_close(out.double(), F.linear(*rounded), atol=2e-2, rtol=2 * HALF_STEP)
    out.sum().backward()
    assert layer.weight.grad.dtype == dtype
    assert torch.equal(layer.bias.grad, torch.full_like(layer.bias, 10.0))


def test_what_is_not_bf16_or_a_few_rows_goes_torchs_way(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []

    def spy(x: Tensor, weight: Tensor) -> Tensor:
        calls.append(tuple(x.shape))
        return F.linear(x, weight)

    monkeypatch.setattr(linear, "product_in_fp32", spy)
    for dtype in (torch.float32, torch.float64, torch.float16):
        Linear(8, 8, dtype=dtype)(torch.randn(50, 8, dtype=dtype))
    layer = Linear(8, 8, dtype=torch.bfloat16)
    with torch.no_grad():
        layer(torch.randn(1, 5, 8, dtype=torch.bfloat16))
    with torch.autocast("cpu", torch.float16):
        layer(torch.randn(50, 8))
    with torch.autocast("cpu", torch.bfloat16):
        wide = Linear(8, 8, dtype=torch.float64)(torch.randn(50, 8, dtype=torch.float64))
    assert wide.dtype == torch.float64
    with pytest.raises(RuntimeError, match="dtype"):
        layer(torch.randn(50, 8))
    assert not calls
    with torch.no_grad():
        layer(torch.randn(2, 3, 8, dtype=torch.bfloat16))
    layer(torch.randn(1, 8, dtype=torch.bfloat16))
    monkeypatch.setattr(linear, "CPU_HAS_BF16", True)
    layer(torch.randn(2, 3, 8, dtype=torch.bfloat16))
    assert calls == [(6, 8), (1, 8)]


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_step_gives_the_loss_of_torchs_products(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_llama(small_config(qkv_bias=True), std=0.05).bfloat16()
    if kind == "lora":
        inject_lora(model, LoRAConfig(rank=4), dtype=torch.float32)
        randomise_lora(model)
    records = random_records([(12, 4), (9, 1), (30, 2)])
    batch, prefixes = flat_batch(records), find_prefixes([r.tokens.tolist() for r in records])

    def step(dtype: torch.dtype = torch.bfloat16) -> tuple[float, dict[str, Tensor]]:
        in_bf16 = dtype == torch.bfloat16
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "lora" and in_bf16):
            hidden = supervised_hidden(model, batch, prefixes)
            targets = batch.labels[supervised_positions(batch.labels)]
            loss = summed_cross_entropy(hidden, targets, model.lm_head)
        loss.backward()
        gradients = {n: p.grad.double() for n, p in model.named_parameters() if p.requires_grad}
        model.zero_grad()
        return float(loss.detach()) / len(targets), gradients

    calls: list[int] = []

    def spy(x: Tensor, weight: Tensor) -> Tensor:
        calls.append(len(x))
        out: Tensor = product_in_fp32(x, weight)
        return out

    monkeypatch.setattr(linear, "product_in_fp32", spy)
    loss, gradients = step()
    assert len(calls) == 7 * 2 * (3 if kind == "lora" else 1) + 1
    calls.clear()
    monkeypatch.setattr(linear, "CPU_HAS_BF16", True)
    expected, expected_gradients = step()
    assert not calls
    model.double()
    exact_loss, exact = step(torch.float64)

    def error(found: dict[str, Tensor]) -> float:
        squares = sum((found[name] - g).square().sum() for name, g in exact.items())
        return float((squares / sum(g.square().sum() for g in exact.values())).sqrt())

    mine, theirs = error(gradients), error(expected_gradients)
    print(
        f"{kind}: loss {abs(loss - expected):.1e}; gradients {mine:.1e} from float64's in relative "
        f"norm, torch's {theirs:.1e}"
    )
    assert abs(loss - expected) < 1e-2
    assert abs(loss - exact_loss) < 1e-2
    assert mine < 2e-2
    assert mine < 1.5 * theirs
