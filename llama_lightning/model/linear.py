"""Linear layers, with bf16 products in fp32 on a processor that has no instructions for bf16.

Such processors are most of those without AVX-512. torch then multiplies bf16 matrices number by
number: the product of 512 rows and a matrix of 2,048 by 2,048 takes 6 times as long as this one,
and its gradient 400 times (2 cores of an AMD EPYC with AVX2). A block of the weight is cast while
it is in the cache, so that there is no second copy of it, and the casts take a tenth of a step. The
sums are in fp32 and their ends are rounded to bf16, as instructions for bf16 do it.
Letters: M rows, I inputs, O outputs.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Numbers of a weight that are in fp32 at a time, for rows up to a number: 4 MB, which the cache
# holds; 16 MB, as the cores wait for each other less often. For 8 to 32 rows 16 MB take 1.2 times
# as long, and in a step of 503 rows 4 MB take 1.03 times the CPU time and 1.05 of that by wall.
FEW_ROWS, FEW_BLOCK, BLOCK = 64, 2**20, 2**22
# So many rows stand on the left of a product, fewer on its right, filled up to whole tiles. There
# 503 take 1.1 times as long; 126, as 128, 0.85 of what they take as 126 or on the left (CPU time,
# the same cores).
MANY_ROWS, TILE = 256, 16
# With instructions for bf16, oneDNN makes kernels for each number of rows and keeps only so many:
# the first products of a block take 0.25 s more. Micro-batches filled up to multiples of 32 share
# kernels, and 16 steps of some 300 rows take 0.87 of the CPU time (1B shape with 4 layers, 2 cores
# of an Intel Xeon with AMX).
ROW_MULTIPLE = 32
# Below so many rows torch's own product reads the weight as fast as memory gives it; its gradient,
# however, takes 20 times as long at a single row.
MIN_ROWS = 6


def has_bf16_products() -> bool:
    """Say whether oneDNN multiplies bf16 matrices on this processor."""
    asked = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return asked is not None and bool(asked())


def has_amx() -> bool:
    """Say whether this processor multiplies whole tiles (Intel's AMX)."""
    asked = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return asked is not None and bool(asked())


CPU_HAS_BF16 = has_bf16_products()
CPU_HAS_AMX = CPU_HAS_BF16 and has_amx()


def computes_in_bf16(*dtypes: torch.dtype) -> bool:
    """Say whether an input and a weight of these types on the CPU are multiplied in bf16."""
    if torch.float64 not in dtypes and torch.is_autocast_enabled("cpu"):  # which leaves float64
        return torch.get_autocast_dtype("cpu") == torch.bfloat16
    return all(dtype == torch.bfloat16 for dtype in dtypes)


def fills_up_rows(weight: Tensor) -> bool:
    """Say whether a number of rows is best filled up to a round one, beside such a weight."""
    return CPU_HAS_BF16 and weight.device.type == "cpu" and computes_in_bf16(weight.dtype)


def _size(num_rows: int, num_others: int) -> int:
    """Say how many outputs, or inputs, make a block with all of the others."""
    numbers = FEW_BLOCK if num_rows <= FEW_ROWS else BLOCK
    return max(1, numbers // max(1, num_others))


def _blocks(weight_OI: Tensor, rows: Tensor, dim: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the weights of some outputs (0) or inputs (1) in fp32, good until the next.

    With each go those outputs or inputs of all rows, (M, O) or (M, I).
    """
    shape = list(weight_OI.shape)
    size = _size(len(rows), shape[1 - dim])
    shape[dim] = min(shape[dim], size)
    wide = weight_OI.new_empty(shape, dtype=torch.float32)
    parts = torch.split(weight_OI, size, dim)
    for part, columns in zip(parts, torch.split(rows, size, 1), strict=True):
        yield wide.narrow(dim, 0, part.shape[dim]).copy_(part), columns


@torch.library.custom_op("llama_lightning::product_in_fp32", mutates_args=())
def product_in_fp32(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply (M, I) by a transposed (O, I), both bf16 on the CPU, into (M, O)."""
    num_rows = len(x)
    wide_x = F.pad(x, (0, 0, 0, -num_rows % TILE)).float()
    out = x.new_empty(num_rows, weight.shape[0])
    with torch.autocast("cpu", enabled=False):
        for block, outputs in _blocks(weight, out, 0):
            product = wide_x @ block.T if num_rows >= MANY_ROWS else (block @ wide_x.T).T
            outputs.copy_(product[:num_rows])
    return out


@product_in_fp32.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])  # len() would compile for one length only


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    # As F.linear: beside a frozen weight nobody needs x.
    x, weight = inputs
    x_needs, weight_needs = ctx.needs_input_grad[:2]
    ctx.save_for_backward(x if weight_needs else None, weight if x_needs else None)


def _of_input(gradient_MO: Tensor, weight_OI: Tensor) -> Tensor:
    """Multiply (M, O) by (O, I) into (M, I)."""
    (num_rows, num_outputs), num_inputs = gradient_MO.shape, weight_OI.shape[1]
    if num_outputs <= num_inputs:
        # Whole sums of some inputs at a time: 0.92 of the time of parts of all of them (503 rows,
        # 2,048 outputs, CPU time, the same cores). A head's outputs would be too many.
        wide, of_x = gradient_MO.float(), gradient_MO.new_empty(num_rows, num_inputs)
        for block, inputs in _blocks(weight_OI, of_x, 1):
            inputs.copy_(wide @ block)
        return of_x
    sums = gradient_MO.new_zeros(num_rows, num_inputs, dtype=torch.float32)
    for block, gradient in _blocks(weight_OI, gradient_MO, 0):
        sums.addmm_(gradient.float(), block)
    return sums.to(gradient_MO.dtype)


def _of_weight(gradient_MO: Tensor, x_MI: Tensor) -> Tensor:
    """Multiply a transposed (M, O) by (M, I) into (O, I)."""
    num_outputs, num_inputs = gradient_MO.shape[1], x_MI.shape[1]
    wide_x, of_weight = x_MI.float(), x_MI.new_empty(num_outputs, num_inputs)
    size = _size(len(x_MI), num_inputs)
    by_outputs = torch.split(gradient_MO, size, 1)
    for gradient, rows in zip(by_outputs, torch.split(of_weight, size), strict=True):
        rows.copy_(gradient.T.float() @ wide_x)
    return of_weight


def _gradients(ctx: Any, gradient_MO: Tensor) -> tuple[Tensor | None, Tensor | None]:
    x, weight = ctx.saved_tensors
    with torch.autocast("cpu", enabled=False):
        return (
            None if weight is None else _of_input(gradient_MO, weight),
            None if x is None else _of_weight(gradient_MO, x),
        )


product_in_fp32.register_autograd(_gradients, setup_context=_keep)


class Linear(nn.Linear):
    """torch's, but for how bf16 is multiplied on such a processor."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., I) to (..., O)."""
        if CPU_HAS_BF16 or x.device.type != "cpu" or not self.computes_in_bf16(x.dtype):
            return super().forward(x)
        if not torch.is_grad_enabled() and x.shape[:-1].numel() < MIN_ROWS:
            return super().forward(x)
        rows = x.reshape(-1, x.shape[-1]).to(torch.bfloat16)
        out: Tensor = product_in_fp32(rows, self.weight.to(torch.bfloat16))
        out = out if self.bias is None else out + self.bias.to(torch.bfloat16)
        return out.view(*x.shape[:-1], self.out_features)

    def computes_in_bf16(self, dtype: torch.dtype) -> bool:
        """Say whether an input of this type on the CPU is multiplied in bf16."""
        return computes_in_bf16(dtype, self.weight.dtype)
