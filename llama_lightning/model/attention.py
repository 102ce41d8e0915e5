"""Causal attention over dense rows, over ragged rows laid end to end, or over a cache.

Letters: B rows, T tokens of a flat batch, S longest row of a grid, N heads, K kv heads, H head
dimension.
"""

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from llama_lightning.model.kv_cache import NewTokens
from llama_lightning.records import Prefixes

# A row joins a grid when it fills at least this part of the grid's width: less padding is computed,
# at the price of more grids. On Alpaca-like lengths this makes 5 to 8 grids a batch.
MIN_FILL = 0.7


class RaggedRows(NamedTuple):
    """Where the tokens of a flat batch stand in padded grids of similar rows, and back."""

    grids: list[tuple[int, int]]  # rows and steps of each
    to_cells: Tensor  # of all grids, end to end: index into the flat tokens; pads repeat the last
    from_cells: Tensor  # index into the cells
    boundaries: Tensor  # (B + 1,) int32
    longest: int  # row, in tokens
    prefixes: Prefixes | None


def padded_grid(starts_B: Tensor, lengths_B: Tensor) -> Tensor:
    """Index a flat batch as a grid padded on the right, (B, S); a pad repeats the row's last token.

    For starts [0, 2] and lengths [2, 3]: [[0, 1, 1], [2, 3, 4]].
    """
    steps_S = torch.arange(int(lengths_B.max()), device=lengths_B.device)
    return starts_B[:, None] + torch.minimum(steps_S, lengths_B[:, None] - 1)


def ragged_rows(boundaries: Tensor, prefixes: Prefixes | None = None) -> RaggedRows:
    """Sort the rows of a flat batch into grids, once for all layers.

    Args:
        boundaries: (B + 1,) int64; row b is tokens[boundaries[b]:boundaries[b + 1]].
        prefixes: if given, the flat tokens are the distinct ones only. Each row still has all its
            own in its grid; attention computes a shared one once a row and reads one result.
    """
    starts_B, lengths_B = boundaries[:-1], boundaries.diff()
    order = lengths_B.argsort(descending=True, stable=True)
    lengths = lengths_B[order].tolist()
    grids, real, first = [], [], 0
    for row in range(1, len(lengths) + 1):
        if row == len(lengths) or lengths[row] < MIN_FILL * lengths[first]:
            rows = order[first:row]
            grids.append(padded_grid(starts_B[rows], lengths_B[rows]))
            steps_S = torch.arange(lengths[first], device=boundaries.device)
            real.append((steps_S < lengths_B[rows, None]).flatten())
            first = row
    shapes = [(len(grid), grid.shape[1]) for grid in grids]
    to_cells = torch.cat([grid.flatten() for grid in grids])
    cells = torch.cat(real).nonzero().squeeze(1)
    from_cells = cells[to_cells[cells].argsort()]
    if prefixes is not None:
        to_cells, from_cells = prefixes.representative[to_cells], from_cells[prefixes.distinct]
    ends = boundaries.to(torch.int32), lengths[0], prefixes
    return RaggedRows(shapes, to_cells, from_cells, *ends)


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True
    )
    return out.transpose(1, 2)


def _over_grids(q: Tensor, k: Tensor, v: Tensor, rows: RaggedRows) -> Tensor:
    stored = q.dtype
    if q.device.type == "cpu":
        # torch's CPU kernel is slow in 16 bits: in fp32, casts included, rows of 60 tokens take
        # 0.36 of the time and rows of 200 half of it, which saves 6 % of a LoRA step at the 1B
        # shape with 4 layers (CPU time on 2 cores of an Intel Xeon with AVX512-BF16).
        q, k, v = (x.to(torch.promote_types(stored, torch.float32)) for x in (q, k, v))
    # In a grid padded on the right, causality alone hides the pads from every real token, so a
    # record can see neither pads nor its neighbours. Pad cells are never read back.
    # All grids are taken at once, as the backward pass of each would fill a tensor of all tokens;
    # and by index_select, as that of x[index] takes five times as long on a CPU.
    sizes = [num_rows * num_steps for num_rows, num_steps in rows.grids]
    taken = (torch.split(x.index_select(0, rows.to_cells), sizes) for x in (q, k, v))
    with torch.autocast(q.device.type, enabled=False):
        mixed = [
            _causal(*(x.view(*grid, *x.shape[1:]) for x in parts)).flatten(0, 1)
            for grid, *parts in zip(rows.grids, *taken, strict=True)
        ]
    return torch.cat(mixed).index_select(0, rows.from_cells).to(stored)


@cache
def varlen_kernel() -> Callable[..., Any] | None:
    """Find torch's flash attention for rows end to end, with grouped queries: torch 2.12's."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    has_groups = "enable_gqa" in inspect.signature(varlen_attn).parameters
    return varlen_attn if has_groups else None


def end_to_end(
    q: Tensor, k: Tensor, v: Tensor, rows: RaggedRows, kernel: Callable[..., Any]
) -> Tensor:
    """Attend within each row of a flat batch without grids, by a kernel like torch's varlen_attn.

    Arguments otherwise as in `attention`.
    """
    if rows.prefixes is not None:
        q, k, v = (x.index_select(0, rows.prefixes.representative) for x in (q, k, v))
    ends, longest = rows.boundaries, rows.longest
    # The window reaches back without limit, and forward not at all.
    out: Tensor = kernel(
        q, k, v, ends, ends, longest, longest, window_size=(-1, 0), enable_gqa=True
    )
    return out if rows.prefixes is None else out.index_select(0, rows.prefixes.distinct)


def _over_cache(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    # The queries of one group stand beside each other as if they were tokens: heads are then as
    # many as in the cache, and nothing in it is repeated.
    num_tokens, num_kv_heads = q.shape[1], k.shape[1]
    groups = q.shape[2] // num_kv_heads
    q = q.transpose(1, 2).reshape(len(q), num_kv_heads, groups * num_tokens, -1)
    # Of a product that left its rows apart (prepack.py), q would be taken a slow way.
    q, mask = q.contiguous(), mask.repeat(1, 1, groups, 1)
    out = F.scaled_dot_product_attention(q, k.to(q.dtype), v.to(q.dtype), attn_mask=mask)
    return out.reshape(len(q), num_kv_heads * groups, num_tokens, -1).transpose(1, 2)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    rows: RaggedRows | None = None,
    new: NewTokens | None = None,
) -> Tensor:
    """Let each token attend to itself and to what came before it in its own row.

    Args:
        q: (B, T, N, H) dense, or (T, N, H) flat with `rows` or `new`.
        k: like q with K heads; with `new`, all slots of a cache, (B, K, S, H).
        v: like k.
        rows: the rows of a flat batch.
        new: the tokens, dense or flat, where k and v are a cache's.

    Returns:
        Like q.
    """
    if new is not None:
        if new.steps is None:
            return _over_cache(q, k, v, new.mask)
        # A row's tokens are looked at together, so they stand in a grid here and nowhere else. What
        # pads beside them see does not matter.
        cells = new.rows, new.steps
        grid = q.new_zeros(len(k), new.mask.shape[2], *q.shape[1:])
        grid[cells] = q
        return _over_cache(grid, k, v, new.mask)[cells]
    if rows is None:
        return _causal(q, k, v)
    # The kernel computes in 16 bits, on Ampere and newer.
    fits = q.is_cuda and q.itemsize == 2 and torch.cuda.get_device_capability(q.device) >= (8, 0)
    kernel = varlen_kernel() if fits else None
    return _over_grids(q, k, v, rows) if kernel is None else end_to_end(q, k, v, rows, kernel)
