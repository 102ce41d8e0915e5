"""FBGEMM's products are the exact ones, and what is packed in fp16 comes back bit for bit."""

import threading

import pytest
import torch
from torch import Tensor

from llama_lightning.model import fbgemm
from llama_lightning.model.fbgemm import (
    MAX_CODE,
    MAX_INPUT,
    FP16Matrix,
    FP16RangeError,
    Int8Matrix,
    in_threads,
)

pytestmark = pytest.mark.skipif(not fbgemm.is_there(), reason="no FBGEMM on this processor")

# Between neighbours of bf16 lies 2^-8 to 2^-7 of their size: rounding is off by half of that.
HALF_STEP = 2**-8


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    for part in ("FP16_PART", "CODED"):
        monkeypatch.setattr(fbgemm, part, 1)  # which makes them of 64 outputs each
    monkeypatch.setattr(fbgemm, "INT8_PART", 2**14)  # of 96 inputs, twice as many
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int16)


# One part, one that is not full, several, a last one of one output; odd numbers of inputs.
SIZES = [(1, 16, 64), (3, 1201, 5), (40, 96, 192), (7, 129, 129), (0, 16, 70)]


@pytest.mark.parametrize("sizes", SIZES)
def test_a_product_in_fp16_is_the_exact_one_rounded(sizes: tuple[int, int, int]) -> None:
    rows, inputs, outputs = sizes
    torch.manual_seed(0)
    x = torch.randn(rows, inputs).bfloat16()
    # Outputs with weights 2^90 times as large as others' are summed as exactly as these.
    weight = (torch.randn(outputs, inputs) * 2.0 ** torch.randint(-80, 9, (outputs, 1))).bfloat16()
    matrix = FP16Matrix(weight)
    found, exact = matrix.product(x), x.double() @ weight.double().T
    assert found.dtype == torch.bfloat16
    # Sums of fp32 are off by some of its steps of what is added, here by 2^-20.
    allowed = HALF_STEP * exact.abs() + (x.abs().double() @ weight.abs().double().T) * 2**-20
    errors = (found.double() - exact).abs() / allowed
    print(f"{sizes}: off by {errors.max() if rows else 0:.3f} of what rounding allows")
    assert (errors <= 1).all()
    assert torch.equal(_bits(matrix.unpacked()), _bits(weight))


def test_a_product_takes_any_number_of_dimensions_and_any_view() -> None:
    matrix = FP16Matrix(torch.randn(40, 16).bfloat16())
    x = torch.randn(3, 2, 17).bfloat16()
    for view in (x[..., 1:], x[0, 0, 1:], x[..., :16].transpose(0, 1), x[:0, :, 1:]):
        found = matrix.product(view)
        assert found.shape == (*view.shape[:-1], 40)
        assert torch.equal(found, matrix.product(view.clone(memory_format=torch.contiguous_format)))


def test_numbers_that_fp16_rounds_come_back_and_do_not_show_in_a_product() -> None:
    torch.manual_seed(0)
    weight = torch.randn(70, 64).bfloat16()
    exponents = torch.randint(-130, 1, weight.shape)
    weight[:, 1:] *= 2.0 ** exponents[:, 1:]
    weight[3], weight[4, 5] = 0.0, -0.0
    weight[5, :2] = torch.tensor([2.0**30, 2.0**-133])  # bf16's least number, and the widest row
    matrix, x = FP16Matrix(weight), torch.randn(9, 64).bfloat16()
    x[:, 0] = 0  # so that the large ones do not hide what is lost
    lost = sum(len(lost) for _, _, lost in matrix.parts)
    print(f"{lost} of {weight.numel()} weights are kept beside")
    assert lost > weight.numel() / 4
    assert torch.equal(_bits(matrix.unpacked()), _bits(weight))
    exact = x.double() @ weight.double().T
    largest = weight.abs().amax(1).double()
    allowed = HALF_STEP * exact.abs() + x.abs().double().sum(1, keepdim=True) * largest * 2**-39
    errors = (matrix.product(x).double() - exact).abs()
    assert (errors <= allowed).all()
    assert (errors > HALF_STEP * exact.abs()).any()


@pytest.mark.parametrize("number", [torch.inf, -torch.inf, torch.nan, 2.0**31, 2.0**-87])
def test_numbers_beyond_fp16_and_its_scales_are_refused(number: float) -> None:
    weight = torch.zeros(40, 16).bfloat16()
    weight[33, 7] = number
    with pytest.raises(FP16RangeError):
        FP16Matrix(weight)


@pytest.mark.parametrize("sizes", [*SIZES, (4, 8192, 40)])
@pytest.mark.parametrize("largest", [False, True])
def test_a_product_of_whole_numbers_by_codes_is_exact(
    sizes: tuple[int, int, int], largest: bool
) -> None:
    rows, inputs, outputs = sizes
    torch.manual_seed(0)
    if largest:  # where sums in 16 bits would end
        x = MAX_INPUT * (torch.randint(0, 2, (rows, inputs)) * 2 - 1)
        codes = MAX_CODE * (torch.randint(0, 2, (outputs, 1)) * 2 - 1).expand(outputs, inputs)
    else:
        x = torch.randint(-MAX_INPUT, MAX_INPUT + 1, (rows, inputs))
        codes = torch.randint(-MAX_CODE, MAX_CODE + 1, (outputs, inputs))
        codes[:, 0] = MAX_CODE  # so that the scale is 1
    matrix = Int8Matrix(codes.float())
    assert torch.equal(matrix.scales_O, torch.ones(outputs))
    exact = (x.double() @ codes.double().T).float()
    assert torch.equal(matrix.product(x.float()), exact)


def test_codes_are_the_nearest_to_the_weights_and_their_scale_is_the_outputs() -> None:
    torch.manual_seed(0)
    weight = (torch.randn(70, 24) * torch.logspace(-3, 3, 70)[:, None]).bfloat16()
    matrix = Int8Matrix(weight)
    codes = matrix.product(torch.eye(24)).T
    errors = (codes * matrix.scales_O[:, None] - weight.float()).abs() / matrix.scales_O[:, None]
    print(f"off by {errors.max():.4f} of a code at most")
    assert errors.max() <= 0.5 + 1e-4
    assert torch.equal(codes.abs().amax(1), torch.full((70,), float(MAX_CODE)))


def test_matrices_are_the_same_where_bf16_is_the_default_type() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(130, 24), torch.randint(-9, 10, (5, 24)).float()
    codes, halves = Int8Matrix(weight), FP16Matrix(weight.bfloat16())
    torch.set_default_dtype(torch.bfloat16)  # as Lightning has it at precision bf16-true
    assert torch.equal(Int8Matrix(weight).scales_O, codes.scales_O)
    assert torch.equal(Int8Matrix(weight).product(x), codes.product(x))
    assert torch.equal(FP16Matrix(weight.bfloat16()).product(x), halves.product(x))


def test_what_fails_in_a_thread_fails_for_the_caller_and_ends_the_rest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert sorted(in_threads(abs, range(-9, 0))) == list(range(1, 10))
    begun, go = [], threading.Event()

    def act(number: int) -> None:
        begun.append(number)
        if number == 0:
            raise ValueError("zero")
        go.wait(10)

    threading.Timer(0.2, go.set).start()
    with pytest.raises(ValueError, match="zero"):
        list(in_threads(act, range(100)))
    print(f"{len(begun)} of 100 had begun")
    assert len(begun) < 10
