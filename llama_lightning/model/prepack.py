"""Lay bf16 weights out once for the products of a CPU, for as long as tokens are generated.

With instructions for bf16, oneDNN multiplies by a matrix in blocks of its own layout, into which an
ordinary product brings the weight again each time. The products are equal bit for bit. A decode
step of the 1B shape with 4 layers takes 92 instead of 120 ms of CPU time at 1 row, 176 instead of
204 ms at 8; packing and unpacking cost as much as some 10 steps of one row (2 cores of an Intel
Xeon).
Without them, FBGEMM multiplies by a matrix in fp16, where a bf16 weight times a power of two is the
same. FIGURES
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llama_lightning.model import fbgemm
from llama_lightning.model.linear import CPU_HAS_BF16, Linear

# For one row torch's own product reads a bf16 weight about as fast as memory gives it.
FP16_MIN_ROWS = 2


class PrepackedLinear(nn.Module):
    """A linear layer whose bf16 weight is in another layout.

    Args:
        linear: on the CPU.

    Raises:
        ValueError: that layout has no place for the weight.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.bias = None if linear.bias is None else linear.bias.detach().to(torch.bfloat16)

    def unpacked(self) -> Tensor:
        """Return the weight (O, I) bit for bit."""
        raise NotImplementedError


class OneDNNLinear(PrepackedLinear):
    """One whose weight has oneDNN's layout."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        weight = linear.weight.detach().to(torch.bfloat16)
        self.packed: Any = torch.ops.mkldnn._reorder_linear_weight(weight, None)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., I) to (..., O), as under autocast in bf16."""
        out: Tensor = torch.ops.mkldnn._linear_pointwise(
            x.to(torch.bfloat16), self.packed, self.bias, "none", [], ""
        )
        return out

    def unpacked(self) -> Tensor:
        """Return the weight (O, I) bit for bit."""
        weight: Tensor = self.packed.to_dense()
        return weight


class FP16Linear(PrepackedLinear):
    """One whose weight is in fp16 and FBGEMM's layout."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        self.packed = fbgemm.FP16Matrix(linear.weight.detach().to(torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., I) to (..., O), as under autocast in bf16."""
        out = self.packed.product(x.to(torch.bfloat16))
        return out if self.bias is None else out + self.bias

    def unpacked(self) -> Tensor:
        """Return the weight (O, I) bit for bit."""
        return self.packed.unpacked()


def _layout(rows: int) -> type[PrepackedLinear] | None:
    """Name the layout that pays on this processor, where torch has the kernels."""
    if CPU_HAS_BF16:
        ops = torch.ops.mkldnn
        there = hasattr(ops, "_reorder_linear_weight") and hasattr(ops, "_linear_pointwise")
        return OneDNNLinear if there else None
    return FP16Linear if rows >= FP16_MIN_ROWS and fbgemm.is_there() else None


@contextmanager
def prepacked(model: nn.Module, rows: int) -> Iterator[None]:
    """Prepack the model's linear layers for so many rows, and unpack them at the end.

    Nothing changes where that cannot be or gains nothing. A bf16 weight is given up for its packed
    form and comes back from it bit for bit, so that there are never two copies; but for a head tied
    to the embedding, which is needed as it was.
    """
    layout = _layout(rows)
    tied = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    linears = {
        name: module
        for name, module in model.named_modules()
        if layout is not None
        and type(module) is Linear
        and "lora_" not in name  # small, and LoRALinear reads their type
        and module.weight.device.type == "cpu"
        and module.computes_in_bf16(module.weight.dtype)
    }

    def pack(name: str) -> None:
        assert layout is not None
        linear = linears[name]
        try:
            _replace(model, name, layout(linear))
        except ValueError:
            return  # and stays as it is
        if linear.weight.dtype == torch.bfloat16 and id(linear.weight) not in tied:
            linear.weight.data = linear.weight.data.new_empty(0)

    def unpack(name: str) -> None:
        linear, layer = linears[name], model.get_submodule(name)
        with torch.inference_mode(False):  # a weight that comes back within it could not be trained
            if isinstance(layer, PrepackedLinear) and not linear.weight.nbytes:
                linear.weight.data = layer.unpacked()
        _replace(model, name, linear)  # and the packed form goes

    try:
        _each(pack, linears)
        yield
    finally:
        _each(unpack, linears)


def _each(act: Callable[[str], None], linears: dict[str, Linear]) -> None:
    """Act on the linear layers; in threads, the largest first, where the library uses only one."""
    if CPU_HAS_BF16:
        for name in linears:
            act(name)
    else:
        sizes = {name: layer.in_features * layer.out_features for name, layer in linears.items()}
        fbgemm.in_threads(act, sorted(sizes, key=sizes.__getitem__, reverse=True))


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last_name = name.rpartition(".")
    setattr(model.get_submodule(parent), last_name, module)
