"""Causal attention over dense rows, over ragged rows laid end to end, or over a cache.

Letters: B rows, T tokens of a flat batch, U of them distinct, Q queries and S keys of a grid's
longest row, N heads, K kv heads, H head dimension.
"""

import inspect
import math
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from llama_lightning.model.kv_cache import NewTokens
from llama_lightning.records import Prefixes

# A row joins a grid when it fills at least this part of the grid's width: less padding is computed,
# at the price of more grids. On Alpaca-like lengths this makes 2 to 8 grids a batch.
MIN_FILL = 0.7
# On a CPU, a row asks only for its own tokens, behind those that it shares, when at most this part
# of a batch's tokens is distinct: of 9 short records 0.6 are, and attention and its backward pass
# take 0.68 of the CPU time (2 cores of an Intel Xeon with AMX). Where little is shared, causality
# alone saves as much; and a GPU's flash kernel takes no mask.
MAX_OWN = 0.75


class Grid(NamedTuple):
    """Similar rows, each padded on the right."""

    query_shape: torch.Size  # (rows, queries of the longest)
    key_shape: torch.Size  # (rows, keys of the longest)
    mask: Tensor | None  # (rows, 1, queries, keys), where rows have keys before their queries


class RaggedRows(NamedTuple):
    """Where the tokens of a flat batch stand in grids, and back."""

    grids: list[Grid]
    to_queries: Tensor  # of all grids, end to end: index into the flat tokens; pads repeat the last
    to_keys: Tensor  # likewise
    from_queries: Tensor  # index into the cells of all queries
    boundaries: Tensor  # (B + 1,) int32
    longest: int  # row, in tokens
    prefixes: Prefixes | None


def padded_grid(starts_B: Tensor, lengths_B: Tensor) -> Tensor:
    """Index a flat batch as a grid padded on the right, (B, S); a pad repeats the row's last token.

    For starts [0, 2] and lengths [2, 3]: [[0, 1, 1], [2, 3, 4]].
    """
    steps_S = torch.arange(int(lengths_B.max()), device=lengths_B.device)
    return starts_B[:, None] + torch.minimum(steps_S, lengths_B[:, None] - 1)


def _similar_rows(asked_B: Tensor, lengths_B: Tensor) -> Iterable[Tensor]:
    """Share out over grids the rows that ask for something: who asks for most comes first."""
    order = asked_B.argsort(descending=True, stable=True)
    sizes: list[int] = []
    most, first_length = math.inf, 1
    for asked, length in zip(asked_B[order].tolist(), lengths_B[order].tolist(), strict=True):
        if asked == 0:
            break  # another row has all of it
        if asked < MIN_FILL * most or not MIN_FILL <= length / first_length <= 1 / MIN_FILL:
            sizes.append(0)
            most, first_length = asked, length
        sizes[-1] += 1
    return torch.split(order[: sum(sizes)], sizes)


def _mask(before_B: Tensor, num_queries: int, num_keys: int) -> Tensor | None:
    """Let a query see the keys before all of its row's queries, and those up to its own."""
    if not before_B.any():
        return None  # causality alone says so
    steps_Q, steps_S = torch.arange(num_queries), torch.arange(num_keys)
    return (steps_S <= before_B[:, None, None] + steps_Q[:, None]).unsqueeze(1)


def ragged_rows(boundaries: Tensor, prefixes: Prefixes | None = None) -> RaggedRows:
    """Sort the rows of a flat batch into grids, once for all layers.

    Args:
        boundaries: (B + 1,) int64; row b is tokens[boundaries[b]:boundaries[b + 1]].
        prefixes: if given, the flat tokens are the distinct ones only. Each row still has all its
            keys in its grid, and as queries all its tokens or its own.
    """
    starts_B, lengths_B = boundaries[:-1], boundaries.diff()
    asked_B, own_only = lengths_B, False
    if prefixes is not None and boundaries.device.type == "cpu":
        own_only = len(prefixes.distinct) <= MAX_OWN * len(prefixes.representative)
        if own_only:
            rows_U = torch.bucketize(prefixes.distinct, boundaries[1:], right=True)
            asked_B = rows_U.bincount(minlength=len(lengths_B))
    asked_starts_B = asked_B.cumsum(0) - asked_B
    grids, query_cells, key_cells = [], [], []
    for rows in _similar_rows(asked_B, lengths_B):
        queries = padded_grid(asked_starts_B[rows], asked_B[rows])
        keys = padded_grid(starts_B[rows], lengths_B[rows])
        before_B = (lengths_B - asked_B)[rows]
        mask = _mask(before_B, queries.shape[1], keys.shape[1]) if own_only else None
        grids.append(Grid(queries.shape, keys.shape, mask))
        query_cells.append(queries.flatten())
        key_cells.append(keys.flatten())
    to_queries, to_keys = torch.cat(query_cells), torch.cat(key_cells)
    # The first of the cells in which a token stands: pads come behind it.
    cells = torch.arange(len(to_queries), device=boundaries.device)
    from_queries = cells.new_empty(int(asked_B.sum()))
    from_queries.scatter_reduce_(0, to_queries, cells, "amin", include_self=False)
    if prefixes is not None:
        to_keys = prefixes.representative[to_keys]
        if not own_only:
            to_queries, from_queries = to_keys, from_queries[prefixes.distinct]
    ends = boundaries.to(torch.int32), int(lengths_B.max()), prefixes
    return RaggedRows(grids, to_queries, to_keys, from_queries, *ends)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True
    )
    return out.transpose(1, 2)


def _laid_out(x: Tensor, index: Tensor, shapes: list[torch.Size]) -> list[Tensor]:
    """Take the cells of all grids at once, and view each grid's as (rows, steps, heads, H).

    At once, as the backward pass of each grid would fill a tensor of all tokens; and by
    index_select, as that of x[index] takes five times as long on a CPU.
    """
    parts = torch.split(x.index_select(0, index), [shape.numel() for shape in shapes])
    return [part.view(*shape, *x.shape[1:]) for part, shape in zip(parts, shapes, strict=True)]


def _over_grids(q: Tensor, k: Tensor, v: Tensor, rows: RaggedRows) -> Tensor:
    stored = q.dtype
    if q.device.type == "cpu":
        # torch's CPU kernel is slow in 16 bits: in fp32, casts included, rows of 60 tokens take
        # 0.36 of the time and rows of 200 half of it, which saves 6 % of a LoRA step at the 1B
        # shape with 4 layers (CPU time on 2 cores of an Intel Xeon with AVX512-BF16).
        q, k, v = (x.to(torch.promote_types(stored, torch.float32)) for x in (q, k, v))
    # In a grid padded on the right, no real token sees a pad behind it, so a record can see neither
    # pads nor its neighbours. Pad cells are never read back.
    queries = _laid_out(q, rows.to_queries, [grid.query_shape for grid in rows.grids])
    keys, values = (
        _laid_out(x, rows.to_keys, [grid.key_shape for grid in rows.grids]) for x in (k, v)
    )
    with torch.autocast(q.device.type, enabled=False):
        mixed = [
            _attend(q_BQNH, k_BSKH, v_BSKH, grid.mask).flatten(0, 1)
            for grid, q_BQNH, k_BSKH, v_BSKH in zip(rows.grids, queries, keys, values, strict=True)
        ]
    return torch.cat(mixed).index_select(0, rows.from_queries).to(stored)


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
        return _attend(q, k, v)
    # The kernel computes in 16 bits, on Ampere and newer.
    fits = q.is_cuda and q.itemsize == 2 and torch.cuda.get_device_capability(q.device) >= (8, 0)
    kernel = varlen_kernel() if fits else None
    return _over_grids(q, k, v, rows) if kernel is None else end_to_end(q, k, v, rows, kernel)
