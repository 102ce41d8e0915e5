"""Causal attention over dense rows, over ragged rows laid end to end, or over a cache.

Letters: B rows, T tokens, S slots of a cache, N heads, K kv heads, H head dimension.
"""

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from llama_lightning.model.grid_attention import over_grids
from llama_lightning.model.kv_cache import NewTokens
from llama_lightning.model.ragged_rows import RaggedRows


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2)


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
    return over_grids(q, k, v, rows) if kernel is None else end_to_end(q, k, v, rows, kernel)
