"""Attention of a flat batch over grids of similar rows.

On a CPU it keeps queries, keys, values and its result as they are outside, and brings them into
grids again for its backward pass. Autograd would keep all of the grids, in fp32: a block of the 1B
shape keeps 16 instead of 22 MiB of 9 short records, and attention takes 1.1 times as long, which is
some 1 % of a step (2 cores of an Intel Xeon with AMX).
Source: the flash attention of torch for CPUs (arXiv 2205.14135, 2307.08691).
Letters: T tokens of a flat batch, N heads, K kv heads, H head dimension.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from llama_lightning.model.ragged_rows import Grid, RaggedRows

# torch's kernel for CPUs does not look at how many heads keys have before 2.9 (pytorch/pytorch
# #157893).
CPU_HAS_GROUPS = torch.__version__ >= "2.9"  # compared as versions
# It is slow in 16 bits: in fp32, casts included, rows of 60 tokens take 0.36 of the time and rows
# of 200 half of it, which saves 6 % of a LoRA step at the 1B shape with 4 layers (CPU time on 2
# cores of an Intel Xeon with AVX512-BF16).
CPU_LEAST = torch.float32


def _laid_out(cells: Tensor, shapes: list[torch.Size]) -> list[Tensor]:
    """View the cells of all grids as one (rows, heads, steps, H) each."""
    parts = torch.split(cells, [shape.numel() for shape in shapes])
    return [
        part.view(*shape, *cells.shape[1:]).transpose(1, 2)
        for part, shape in zip(parts, shapes, strict=True)
    ]


# By index_select for all grids at once: the backward pass of each would fill a tensor of all
# tokens, and that of x[index] takes five times as long on a CPU.
def _queries(x: Tensor, rows: RaggedRows, dtype: torch.dtype) -> list[Tensor]:
    shapes = [grid.query_shape for grid in rows.grids]
    return _laid_out(x.index_select(0, rows.to_queries).to(dtype), shapes)


def _keys(x: Tensor, rows: RaggedRows, dtype: torch.dtype) -> list[Tensor]:
    shapes = [grid.key_shape for grid in rows.grids]
    return _laid_out(x.index_select(0, rows.to_keys).to(dtype), shapes)


def _end_to_end(grids: list[Tensor]) -> Tensor:
    """Lay the cells of all grids end to end, (cells, heads, H)."""
    return torch.cat([grid.transpose(1, 2).flatten(0, 1) for grid in grids])


def _order(grid: Grid, dtype: torch.dtype) -> dict[str, Any]:
    """Say who sees whom, in the words of torch's kernel."""
    mask = None if grid.mask is None else grid.mask.to(dtype)
    return {"is_causal": mask is None, "attn_mask": mask}


# As products of matrices over blocks of queries it takes 0.7 to 0.8 of the CPU time, and a LoRA
# step 0.98. But those products are many and small: where threads sleep in between
# (OMP_WAIT_POLICY), full steps at width 512 take 1.1 times as long (2 cores of an AMD EPYC with
# AVX512-BF16).
class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, rows: RaggedRows) -> Tensor:
        wide = torch.promote_types(q.dtype, CPU_LEAST)
        mixed, sums = [], []
        with torch.autocast("cpu", enabled=False):
            for grid, *qkv in zip(
                rows.grids,
                _queries(q, rows, wide),
                _keys(k, rows, wide),
                _keys(v, rows, wide),
                strict=True,
            ):
                out, log_sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                    *qkv, **_order(grid, wide)
                )
                mixed.append(out)
                sums.append(log_sums)
            flat = _end_to_end(mixed).index_select(0, rows.from_queries).to(q.dtype)
        ctx.rows = rows
        ctx.save_for_backward(q, k, v, flat, *sums)
        return flat

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, flat, *sums = ctx.saved_tensors
        rows: RaggedRows = ctx.rows
        wide = torch.promote_types(q.dtype, CPU_LEAST)
        # Of cells that nobody reads, such as pads, it is zero.
        of_cells = gradient.new_zeros(len(rows.to_queries), *gradient.shape[1:], dtype=wide)
        of_cells.index_add_(0, rows.from_queries, gradient.to(wide))
        of_qkv = [
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *operands, dropout_p=0.0, **_order(grid, wide)
            )
            for grid, *operands in zip(
                rows.grids,
                _laid_out(of_cells, [grid.query_shape for grid in rows.grids]),
                _queries(q, rows, wide),
                _keys(k, rows, wide),
                _keys(v, rows, wide),
                _queries(flat, rows, wide),
                sums,
                strict=True,
            )
        ]
        of_q, of_k, of_v = (
            torch.zeros_like(x, dtype=wide)
            .index_add_(0, index, _end_to_end(list(cells)))
            .to(x.dtype)
            for x, index, cells in zip(
                (q, k, v),
                (rows.to_queries, rows.to_keys, rows.to_keys),
                zip(*of_qkv, strict=True),
                strict=True,
            )
        )
        return of_q, of_k, of_v, None


def by_autograd(q: Tensor, k: Tensor, v: Tensor, rows: RaggedRows) -> Tensor:
    """Do as `over_grids`, on any device, with a backward pass of torch's own."""
    with torch.autocast(q.device.type, enabled=False):
        mixed = [
            F.scaled_dot_product_attention(
                queries, keys, values, enable_gqa=True, **_order(grid, q.dtype)
            )
            for grid, queries, keys, values in zip(
                rows.grids,
                _queries(q, rows, q.dtype),
                _keys(k, rows, q.dtype),
                _keys(v, rows, q.dtype),
                strict=True,
            )
        ]
    return _end_to_end(mixed).index_select(0, rows.from_queries)


def over_grids(q: Tensor, k: Tensor, v: Tensor, rows: RaggedRows) -> Tensor:
    """Let each token attend to itself and to what came before it in its own row.

    In a grid padded on the right, no real token sees a pad behind it, so a record can see neither
    pads nor its neighbours. Pad cells are never read back.

    Args:
        q: (T, N, H).
        k: (T, K, H).
        v: like k.
        rows: of the batch.

    Returns:
        Like q.
    """
    if q.device.type != "cpu":
        return by_autograd(q, k, v, rows)
    if CPU_HAS_GROUPS:
        out: Tensor = _Flash.apply(q, k, v, rows)  # type: ignore[no-untyped-call]
        return out
    wide = torch.promote_types(q.dtype, CPU_LEAST)
    return by_autograd(q.to(wide), k.to(wide), v.to(wide), rows).to(q.dtype)
