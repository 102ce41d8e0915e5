"""Lay bf16 weights out once for the products of a CPU, for as long as tokens are generated.

With AMX, whose tiles want one of two matrices in an order of their own, the weight stands on the
left of the product and stays as it is: the few rows are what oneDNN brings into that order. A
block's products of the 1B shape take 6.0 instead of 8.8 ms at 1 row, 5.6 instead of 7.7 at 8, 9.9
instead of 12 at 32 and 23 instead of 32 at 128 (2 cores of an Intel Xeon with AMX).
Without, FBGEMM adds up a table of embeddings for a single row, which is packed and unpacked in
0.1 s a block: a decode step of the 1B shape with 4 layers takes 48 instead of 60 ms (2 cores of an
AMD EPYC), and its matrices 0.8 of the time of oneDNN's, kept from AMX (2 cores of an Intel Xeon).
For more, with instructions for bf16, oneDNN multiplies by a matrix in blocks of its own layout,
into which an ordinary product brings the weight again each time. The products are equal bit for
bit. A decode step takes 176 instead of 204 ms of CPU time at 8 rows; packing and unpacking cost as
much as some 10 steps of one row (2 cores of an Intel Xeon without AMX).
Without them, FBGEMM multiplies by a matrix in fp16, where a bf16 weight times a power of two is the
same. A block's products of the 1B shape take 7.5 instead of 13 ms at 2 rows, 12 instead of 35 at 8
and 34 instead of 50 at 32; packing it takes 0.6 s and unpacking 0.5 (the EPYC).
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llama_lightning.model import fbgemm
from llama_lightning.model.embedding_table import BF16Matrix
from llama_lightning.model.linear import CPU_HAS_AMX, CPU_HAS_BF16, Linear

# fp16 is about as fast at one row, and packed in five times the time.
TABLE_MAX_ROWS = 1
# Of more, the product on the right takes as long, and what follows has rows in their own order.
LEFT_MAX_ROWS = 256


class PrepackedLinear(nn.Module):
    """A linear layer whose bf16 weight is in another layout.

    Args:
        linear: on the CPU.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.bias = None if linear.bias is None else linear.bias.detach().to(torch.bfloat16)

    def unpacked(self) -> Tensor:
        """Return the weight (O, I) bit for bit."""
        raise NotImplementedError


class LeftLinear(PrepackedLinear):
    """One whose weight is as it was, and stands on the left of the product."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        self.packed = linear.weight.detach().to(torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., I) to (..., O), as under autocast in bf16, with rows apart in memory."""
        rows = x.to(torch.bfloat16).reshape(-1, x.shape[-1])
        if len(rows) > LEFT_MAX_ROWS:
            return F.linear(x.to(torch.bfloat16), self.packed, self.bias)
        # A single column would be multiplied by another kernel, which reads slower.
        columns = F.pad(rows, (0, 0, 0, 1)).T if len(rows) == 1 else rows.T
        if self.bias is None:
            out = torch.mm(self.packed, columns)
        else:
            out = torch.addmm(self.bias[:, None], self.packed, columns)
        return out[:, : len(rows)].T.view(*x.shape[:-1], -1)

    def unpacked(self) -> Tensor:
        """Return the weight (O, I) bit for bit."""
        return self.packed


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


class FBGEMMLinear(PrepackedLinear):
    """One whose weight is packed for FBGEMM, in one way or another."""

    matrix: type[BF16Matrix] | type[fbgemm.FP16Matrix]

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        self.packed = self.matrix(linear.weight.detach().to(torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., I) to (..., O), as under autocast in bf16."""
        out = self.packed.product(x.to(torch.bfloat16))
        return out if self.bias is None else out + self.bias

    def unpacked(self) -> Tensor:
        """Return the weight (O, I) bit for bit."""
        return self.packed.unpacked()


class BF16Linear(FBGEMMLinear):
    """One whose weight is as it was, but in the order of a table of embeddings."""

    matrix = BF16Matrix


class FP16Linear(FBGEMMLinear):
    """One whose weight is in fp16 and FBGEMM's layout.

    Raises:
        FP16RangeError: fp16 has no place for the weight.
    """

    matrix = fbgemm.FP16Matrix


def _layout(rows: int) -> type[PrepackedLinear] | None:
    """Name the layout that pays on this processor, where torch has the kernels."""
    if CPU_HAS_AMX:
        return LeftLinear
    if rows <= TABLE_MAX_ROWS and fbgemm.is_there():
        return BF16Linear
    if CPU_HAS_BF16:
        ops = torch.ops.mkldnn
        there = hasattr(ops, "_reorder_linear_weight") and hasattr(ops, "_linear_pointwise")
        return OneDNNLinear if there else None
    return FP16Linear if fbgemm.is_there() else None


@contextmanager
def prepacked(model: nn.Module, rows: int) -> Iterator[None]:
    """Prepack the model's linear layers for so many rows, and unpack them at the end.

    Nothing changes where that cannot be or gains nothing. A bf16 weight is given up for its packed
    form and comes back from it bit for bit, so that there are never two copies of all; but for one
    that something else has too, such as a head tied to the embedding.
    """
    layout = _layout(rows)
    if layout is None:
        yield
        return
    owners = Counter(id(weight) for _, weight in model.named_parameters(remove_duplicate=False))
    linears = {
        name: module
        for name, module in model.named_modules()
        if type(module) is Linear
        and "lora_" not in name  # small, and LoRALinear reads their type
        and module.weight.device.type == "cpu"
        and module.computes_in_bf16(module.weight.dtype)
    }
    layers: dict[str, PrepackedLinear] = {}

    def pack(name: str) -> tuple[str, PrepackedLinear | None]:
        try:
            return name, layout(linears[name])
        except fbgemm.FP16RangeError:
            return name, None  # it stays as it is

    def unpack(name: str) -> tuple[str, Tensor | None]:
        layer = layers.pop(name, None)  # which goes as soon as it is replaced
        return name, None if layer is None or linears[name].weight.nbytes else layer.unpacked()

    # Threads make tensors only, and what is abandoned changes no model.
    in_turn = fbgemm.in_threads if issubclass(layout, FBGEMMLinear) else map
    largest_first = sorted(linears, key=lambda name: -linears[name].weight.numel())
    try:
        for name, layer in in_turn(pack, largest_first):
            if layer is None:
                continue
            layers[name] = layer
            _replace(model, name, layer)
            weight = linears[name].weight
            if weight.dtype == torch.bfloat16 and owners[id(weight)] == 1:
                weight.data = weight.data.new_empty(0)
        yield
    finally:
        with torch.inference_mode(False):  # a weight that comes back within it could not be trained
            for name, restored in in_turn(unpack, largest_first):
                if restored is not None:
                    linears[name].weight.data = restored
                _replace(model, name, linears[name])


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last_name = name.rpartition(".")
    setattr(model.get_submodule(parent), last_name, module)
