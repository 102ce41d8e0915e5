"""Backward passes written by hand give autograd's gradients, and keep little but what came in."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from llama_lightning.model.rms_norm import RMSNorm
from llama_lightning.model.swiglu import swiglu
from tests.levers import plain_norm, plain_swiglu
from tests.model.oracle import max_difference, relative_difference

TOKENS, SIZE = 6, 40
EPS = 0.1  # shows beside means of squares near 1

Function = Callable[[Tensor, Tensor], Tensor]


def norm(x: Tensor, weight: Tensor) -> Tensor:
    module = RMSNorm(SIZE, EPS)
    return torch.func.functional_call(module, {"weight": weight}, x)


# Ours, its definition, the shape of the second operand, and numbers it makes a token and may keep.
FUNCTIONS: dict[str, tuple[Function, Function, tuple[int, ...], int]] = {
    "norm": (norm, partial(plain_norm, eps=EPS), (SIZE,), 1),
    "swiglu": (swiglu, plain_swiglu, (2, TOKENS, SIZE), 0),
}
each = pytest.mark.parametrize("name", FUNCTIONS)


def _operands(name: str, dtype: torch.dtype) -> list[Tensor]:
    shapes = (2, TOKENS, SIZE), FUNCTIONS[name][2]
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


@each
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    first, second = _operands(name, torch.float64)
    function = FUNCTIONS[name][0]
    assert torch.autograd.gradcheck(function, (first, second))
    assert torch.autograd.gradcheck(function, (first, second.detach()))
    assert torch.autograd.gradcheck(function, (first.detach(), second))


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_and_gradients_are_autograds(name: str, dtype: torch.dtype) -> None:
    ours, plain, _, _ = FUNCTIONS[name]
    operands = _operands(name, dtype)
    out, expected = ours(*operands), plain(*operands)
    assert torch.equal(out, expected)
    gradient = torch.randn_like(out)
    found = torch.autograd.grad(out, operands, gradient)
    wanted = torch.autograd.grad(expected, operands, gradient)
    worst = max(map(relative_difference, found, wanted))
    print(f"{name} {dtype}: worst relative difference of a gradient {worst:.1e}")
    assert worst < (1e-6 if dtype == torch.float32 else 4e-3)
    assert [tensor.dtype for tensor in found] == [dtype, dtype]


@each
def test_little_is_kept_but_what_came_in(name: str) -> None:
    ours, plain, _, extra = FUNCTIONS[name]
    operands = _operands(name, torch.bfloat16)
    came_in = {tensor.untyped_storage().data_ptr() for tensor in operands}

    def kept(function: Function) -> int:
        storages = {}

        def keep(tensor: Tensor) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            function(*operands)
        return sum(s.nbytes() for address, s in storages.items() if address not in came_in)

    print(f"{name}: {kept(ours)} bytes kept beside the operands, by autograd {kept(plain)}")
    assert kept(ours) == 2 * TOKENS * extra * 4 < kept(plain)


def test_mixed_types() -> None:
    """As in full fine-tuning under autocast: a wide weight beside narrow activations."""
    x, weight = _operands("norm", torch.float32)
    narrow = x.detach().bfloat16().requires_grad_()
    out = norm(narrow, weight)
    assert max_difference(out, plain_norm(narrow, weight, EPS)) == 0.0
    of_x, of_weight = torch.autograd.grad(out.sum(), (narrow, weight))
    assert (out.dtype, of_x.dtype, of_weight.dtype) == (torch.float32, torch.bfloat16, weight.dtype)
