"""What is computed of a flat batch: tokens that stand for others once, and whole tiles of rows.

Letters: B rows, T tokens of a flat batch, W wanted positions.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from llama_lightning.model.linear import ROW_MULTIPLE
from llama_lightning.model.ragged_rows import RaggedRows, ragged_rows
from llama_lightning.records import Prefixes


class Computed(NamedTuple):
    """The tokens that go through the network, and what is asked for of them."""

    tokens: Tensor
    positions: Tensor
    rows: RaggedRows
    wanted: Tensor | None  # index into the tokens; none: all of them
    num_wanted: int | None  # those behind are there to fill up; none: all are wanted


def computed(
    tokens: Tensor,
    positions: Tensor,
    boundaries: Tensor,
    prefixes: Prefixes | None,
    wanted: Tensor | None,
    *,
    fills_up: bool,
) -> Computed:
    """Say what to compute.

    Args:
        tokens: (T,).
        positions: like tokens.
        boundaries: (B + 1,) int64, where each row begins, and the end.
        prefixes: what the rows share, to be computed once.
        wanted: (W,), index into the flat batch; by default all of it.
        fills_up: compute a multiple of ROW_MULTIPLE, of tokens and of what is wanted.
    """
    rows = ragged_rows(boundaries, prefixes)
    if prefixes is not None:
        tokens, positions = tokens[prefixes.distinct], positions[prefixes.distinct]
        shared = prefixes.representative
        wanted = shared if wanted is None else shared[wanted]
    if not fills_up:
        return Computed(tokens, positions, rows, wanted, None)
    wanted = torch.arange(len(tokens)) if wanted is None else wanted
    num_wanted = len(wanted)
    # With token 0 at position 0, which nobody asks for.
    tokens, positions, wanted, from_queries = (
        F.pad(each, (0, -len(each) % ROW_MULTIPLE))
        for each in (tokens, positions, wanted, rows.from_queries)
    )
    rows = rows._replace(from_queries=from_queries)
    return Computed(tokens, positions, rows, wanted, num_wanted)
