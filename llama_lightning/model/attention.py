"""Causal attention over dense rows, over ragged rows laid end to end, or over a cache.

Letters: B rows, T tokens of a flat batch, S longest row of a grid, N heads, K kv heads, H head
dimension.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

# A row joins a grid when it fills at least this part of the grid's width: less padding is computed,
# at the price of more grids. On Alpaca-like lengths this makes 5 to 8 grids a batch.
MIN_FILL = 0.7


class RaggedRows(NamedTuple):
    """Where the tokens of a flat batch stand in padded grids of similar rows, and back."""

    to_grids: list[Tensor]  # (b, s) each: index into the T flat tokens; pads repeat the row's last
    from_cells_T: Tensor  # index into the cells of all grids, laid end to end


def padded_grid(starts_B: Tensor, lengths_B: Tensor) -> Tensor:
    """Index a flat batch as a grid padded on the right, (B, S); a pad repeats the row's last token.

    For starts [0, 2] and lengths [2, 3]: [[0, 1, 1], [2, 3, 4]].
    """
    steps_S = torch.arange(int(lengths_B.max()), device=lengths_B.device)
    return starts_B[:, None] + torch.minimum(steps_S, lengths_B[:, None] - 1)


def ragged_rows(boundaries: Tensor) -> RaggedRows:
    """Sort the rows of a flat batch into grids, once for all layers.

    Args:
        boundaries: (B + 1,) int64; row b is tokens[boundaries[b]:boundaries[b + 1]].
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
    cells = torch.cat(real).nonzero().squeeze(1)
    tokens = torch.cat([grid.flatten() for grid in grids])[cells]
    return RaggedRows(grids, cells[tokens.argsort()])


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, rows: RaggedRows | None = None, mask: Tensor | None = None
) -> Tensor:
    """Let each token attend to itself and to what came before it in its own row.

    Args:
        q: (B, T, N, H) dense, or (T, N, H) flat with `rows`.
        k: like q with K heads; with `mask`, all slots of a cache, (B, K, S, H).
        v: like k.
        rows: the rows of a flat batch.
        mask: (B, 1, T, S) bool, true where a cached slot may be seen.

    Returns:
        Like q.
    """
    if mask is not None:
        # The queries of one group stand beside each other as if they were tokens: heads are then as
        # many as in the cache, and nothing in it is repeated.
        num_tokens, num_kv_heads = q.shape[1], k.shape[1]
        groups = q.shape[2] // num_kv_heads
        q = q.transpose(1, 2).reshape(len(q), num_kv_heads, groups * num_tokens, -1)
        mask = mask.repeat(1, 1, groups, 1)
        out = F.scaled_dot_product_attention(q, k.to(q.dtype), v.to(q.dtype), attn_mask=mask)
        return out.reshape(len(q), num_kv_heads * groups, num_tokens, -1).transpose(1, 2)
    if rows is not None:
        # In a grid padded on the right, causality alone hides the pads from every real token, so a
        # record can see neither pads nor its neighbours. Pad cells are never read back.
        grids = [attention(q[grid], k[grid], v[grid]).flatten(0, 1) for grid in rows.to_grids]
        return torch.cat(grids)[rows.from_cells_T]
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True
    )
    return out.transpose(1, 2)
