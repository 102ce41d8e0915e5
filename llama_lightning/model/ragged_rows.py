"""Where the rows of a flat batch stand in grids, so that attention sees similar rows side by side.

Letters: B rows, T tokens of a flat batch, U of them distinct, Q queries and S keys of a grid's
longest row.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from llama_lightning.records import Prefixes

# Nothing but attention pads: a LoRA step at the 1B shape with 4 layers takes 0.5 of the time that
# it takes on rows padded to the longest of 9 short records, and 0.6 of 4 long ones; in dense rows
# equal beginnings, and the last layer where nobody asks for it, are computed too (2 cores of an
# Intel Xeon with AMX).
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
    sees = (steps_S <= before_B[:, None, None] + steps_Q[:, None]).unsqueeze(1)
    return torch.zeros(sees.shape).masked_fill_(~sees, -torch.inf)


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
