"""A product by a table of embeddings is the exact one, and the weight comes back bit for bit."""

import pytest
import torch
from torch import Tensor

from llama_lightning.model import embedding_table, fbgemm
from llama_lightning.model.embedding_table import GROUP, PART, BF16Matrix, CodeTable
from llama_lightning.model.fbgemm import Int8Matrix
from llama_lightning.model.linear import has_bf16_products

pytestmark = pytest.mark.skipif(not fbgemm.is_there(), reason="no FBGEMM on this processor")

# Between neighbours of bf16 lies 2^-8 to 2^-7 of their size: rounding is off by half of that.
HALF_STEP = 2**-8
# One group, one that is not full, several, more than one part; odd numbers of inputs.
SIZES = [
    (16, GROUP),
    (1201, 5),
    (96, 3 * GROUP),
    (129, 2 * GROUP + 1),
    (33, (PART + 1) * GROUP + 7),
]

# What multiplies several rows: fp32 where there are no instructions for bf16.
HAS_BF16 = [
    False,
    pytest.param(
        True,
        marks=pytest.mark.skipif(not has_bf16_products(), reason="this CPU has no bf16 in oneDNN"),
    ),
]


def _whole_numbers(*sizes: int) -> Tensor:
    """Numbers whose sums of 16 products are exact in any order, and in bf16."""
    return torch.randint(-4, 5, sizes).bfloat16()


@pytest.mark.parametrize("rows", [0, 1, 2, 40])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("has_bf16", HAS_BF16)
def test_a_product_is_the_exact_one_rounded(
    sizes: tuple[int, int],
    rows: int,
    autocast: bool,
    has_bf16: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(embedding_table, "CPU_HAS_BF16", has_bf16)
    inputs, outputs = sizes
    torch.manual_seed(0)
    x = torch.randn(rows, inputs).bfloat16()
    weight = (torch.randn(outputs, inputs) * 2.0 ** torch.randint(-90, 9, (outputs, 1))).bfloat16()
    matrix = BF16Matrix(weight)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = matrix.product(x)
    assert found.dtype == torch.bfloat16
    assert found.shape == (rows, outputs)
    exact = x.double() @ weight.double().T
    # Sums of fp32 are off by some of its steps of what is added, here by 2^-20.
    allowed = HALF_STEP * exact.abs() + (x.abs().double() @ weight.abs().double().T) * 2**-20
    errors = (found.double() - exact).abs() / allowed
    print(f"{sizes}, {rows} rows: off by {errors.max() if rows else 0:.3f} of what rounding allows")
    assert (errors <= 1).all()
    assert torch.equal(matrix.unpacked().view(torch.int16), weight.view(torch.int16))


def test_each_input_meets_its_own_weight() -> None:
    torch.manual_seed(0)
    weight = _whole_numbers((PART + 1) * GROUP, 24)
    matrix = BF16Matrix(weight)
    one_by_one = [matrix.product(row) for row in torch.eye(24).bfloat16()]
    assert torch.equal(torch.stack(one_by_one).T, weight)
    assert torch.equal(matrix.product(torch.eye(24).bfloat16()).T, weight)


def test_a_product_takes_any_number_of_dimensions_and_any_view() -> None:
    torch.manual_seed(0)
    weight, x = _whole_numbers(70, 16), _whole_numbers(3, 2, 33)
    matrix = BF16Matrix(weight)
    views = x[..., 1:17], x[0, 0, 1::2], x[:1, :1, ::2][..., :16], x[..., :16].transpose(0, 1)
    for view in (*views, x[:0, :, :16], weight[:1].T.contiguous().T):
        found = matrix.product(view)
        assert found.shape == (*view.shape[:-1], 70)
        assert torch.equal(found.float(), view.float() @ weight.float().T)


@pytest.mark.parametrize("rows", [1, 40])
def test_products_are_the_same_where_bf16_is_the_default_type(rows: int) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(70, 900).bfloat16(), torch.randn(rows, 900).bfloat16()
    found = BF16Matrix(weight).product(x)
    torch.set_default_dtype(torch.bfloat16)  # as Lightning has it at precision bf16-true
    assert torch.equal(BF16Matrix(weight).product(x), found)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("number", [torch.inf, -torch.inf, torch.nan])
def test_what_is_no_number_shows_where_it_belongs(rows: int, number: float) -> None:
    weight, x = torch.ones(130, 20).bfloat16(), torch.ones(rows, 20).bfloat16()
    weight[77, 5] = number
    expected = x.float() @ weight.float().T
    torch.testing.assert_close(
        BF16Matrix(weight).product(x).float(), expected, rtol=0, atol=0, equal_nan=True
    )
    x[-1, 3] = number
    expected = x.float() @ weight.float().T
    torch.testing.assert_close(
        BF16Matrix(weight).product(x).float(), expected, rtol=0, atol=0, equal_nan=True
    )


@pytest.mark.parametrize("rows", [0, 1, 3])
@pytest.mark.parametrize("sizes", [*SIZES, (2048, GROUP), (8192, 40)])
def test_a_product_by_codes_is_no_further_off_than_it_says(
    sizes: tuple[int, int], rows: int
) -> None:
    inputs, outputs = sizes
    torch.manual_seed(0)
    x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs)
    table = CodeTable(weight)
    sums, off = table.roughly(x)
    codes = (weight.bfloat16().float() / table.scales_O[:, None]).round()
    assert torch.equal(codes.abs().amax(1), torch.full((outputs,), 127.0))
    assert sums.dtype == torch.float32
    parts = (sums.double() - x.double() @ codes.double().T).abs() / off
    print(f"{sizes}, {rows} rows: {parts.max() if rows else 0:.4f} of what it says")
    assert sums.shape == (rows, outputs)
    assert (parts <= 1).all()


def test_both_kinds_of_codes_are_the_same() -> None:
    torch.manual_seed(0)
    weight = (torch.randn(300, 24) * torch.logspace(-3, 3, 300)[:, None]).bfloat16()
    table, packed, x = CodeTable(weight), Int8Matrix(weight), torch.eye(24)
    assert torch.equal(table.scales_O, packed.scales_O)
    assert torch.equal(table.roughly(x)[0], packed.product(x))


def test_a_table_of_codes_is_the_same_where_bf16_is_the_default_type() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(130, 24), torch.randn(1, 24)
    found = CodeTable(weight).roughly(x)
    torch.set_default_dtype(torch.bfloat16)
    for one, other in zip(CodeTable(weight).roughly(x), found, strict=True):
        assert torch.equal(one, other)
