"""Lay bf16 weights out once for the products of a CPU, for as long as tokens are generated.

oneDNN multiplies by a matrix in blocks of its own layout, into which an ordinary product brings the
weight again each time. The products are equal bit for bit. A decode step of the 1B shape with 4
layers takes 92 instead of 120 ms of CPU time at 1 row, 176 instead of 204 ms at 8; packing and
unpacking cost as much as some 10 steps of one row (2 cores of an Intel Xeon).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llama_lightning.model.linear import CPU_HAS_BF16, Linear


class PrepackedLinear(nn.Module):
    """A linear layer whose weight has oneDNN's layout.

    Args:
        linear: on the CPU.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().to(torch.bfloat16)
        self.bias = None if linear.bias is None else linear.bias.detach().to(torch.bfloat16)
        self.packed: Any = torch.ops.mkldnn._reorder_linear_weight(weight, None)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., I) to (..., O), as under autocast in bf16."""
        out: Tensor = torch.ops.mkldnn._linear_pointwise(
            x.to(torch.bfloat16), self.packed, self.bias, "none", [], ""
        )
        return out


def _has_kernels() -> bool:
    ops = torch.ops.mkldnn
    there = hasattr(ops, "_reorder_linear_weight") and hasattr(ops, "_linear_pointwise")
    return there and CPU_HAS_BF16


@contextmanager
def prepacked(model: nn.Module) -> Iterator[None]:
    """Prepack the model's linear layers, and unpack them at the end; nothing where it cannot be.

    A bf16 weight is given up for its packed form and comes back from it bit for bit, so that there
    are never two copies; but for a head tied to the embedding, which is needed as it was.
    """
    tied = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    linears = {
        name: module
        for name, module in model.named_modules()
        if _has_kernels()
        and type(module) is Linear
        and "lora_" not in name  # small, and LoRALinear reads their type
        and module.weight.device.type == "cpu"
        and module.computes_in_bf16(module.weight.dtype)
    }
    try:
        for name, linear in linears.items():
            _replace(model, name, PrepackedLinear(linear))
            if linear.weight.dtype == torch.bfloat16 and id(linear.weight) not in tied:
                linear.weight.data = linear.weight.data.new_empty(0)
        yield
    finally:
        with torch.inference_mode(False):  # a weight that comes back within it could not be trained
            for name, linear in linears.items():
                layer = model.get_submodule(name)
                if isinstance(layer, PrepackedLinear) and not linear.weight.nbytes:
                    linear.weight.data = layer.packed.to_dense()
                _replace(model, name, linear)
                del layer  # the packed form goes before the next weight comes back


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last_name = name.rpartition(".")
    setattr(model.get_submodule(parent), last_name, module)
