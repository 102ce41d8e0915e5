"""Keys and values of the tokens already seen, owned by whoever generates.

Rows are ragged: each has its own length. What stands behind a row's length is garbage and is hidden
by the mask until it is overwritten.
Letters: B rows, T new tokens, K kv heads, S slots, H head dimension; R new tokens of a flat batch.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from llama_lightning.model.config import LlamaConfig

GROWTH = 256  # `reserve` leaves a multiple of so many slots


class NewTokens(NamedTuple):
    """Tokens that come behind those of a cache: the same number a row, or a flat batch.

    Attributes:
        cache: they come to.
        rows: (B, 1) or (R,), of the cache.
        positions: (B, T) or (R,), in their rows, whose slots have these numbers.
        steps: (R,): how many new tokens of its row come before; of a flat batch only.
        mask: (B, 1, T, S) bool, true for the slots up to a token's own; T of the longest row.
    """

    cache: "KVCache"
    rows: Tensor
    positions: Tensor
    steps: Tensor | None
    mask: Tensor

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keep keys and values, (B, T, K, H) or (R, K, H), and return all, each (B, K, S, H).

        Raises:
            IndexError: a row has no slot left.
        """
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        keys[self.rows, :, self.positions] = k.to(keys.dtype)
        values[self.rows, :, self.positions] = v.to(values.dtype)
        return keys, values


class KVCache:
    """A preallocated cache for B rows of at most S tokens."""

    def __init__(self, keys: list[Tensor], values: list[Tensor], lengths_B: Tensor) -> None:
        self.keys = keys  # one (B, K, S, H) per layer
        self.values = values
        self.lengths_B = lengths_B  # (B,) int64, tokens seen by each row

    @classmethod
    def allocate(
        cls,
        config: LlamaConfig,
        batch_size: int,
        max_length: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> "KVCache":
        """Reserve `max_length` slots for each of `batch_size` rows, in every layer."""
        shape = (batch_size, config.num_key_value_heads, max_length, config.head_dim)
        layers = range(config.num_hidden_layers)
        return cls(
            keys=[torch.zeros(shape, dtype=dtype, device=device) for _ in layers],
            values=[torch.zeros(shape, dtype=dtype, device=device) for _ in layers],
            lengths_B=torch.zeros(batch_size, dtype=torch.int64, device=device),
        )

    def new_tokens(self, num_tokens: int) -> NewTokens:
        """Place the next `num_tokens` tokens of each row; the lengths stay until `advance`."""
        device = self.lengths_B.device
        rows_B1 = torch.arange(len(self.lengths_B), device=device)[:, None]
        positions_BT = self.lengths_B[:, None] + torch.arange(num_tokens, device=device)
        slots_S = torch.arange(self.keys[0].shape[2], device=device)
        mask = (slots_S <= positions_BT[..., None]).unsqueeze(1)
        return NewTokens(self, rows_B1, positions_BT, None, mask)

    def new_flat_tokens(self, boundaries: Tensor) -> NewTokens:
        """Place the next tokens of all rows, end to end: row b's from boundaries[b], (B + 1,)."""
        lengths_B = boundaries.diff()
        rows_R = torch.arange(len(lengths_B), device=boundaries.device).repeat_interleave(lengths_B)
        steps_R = torch.arange(len(rows_R), device=boundaries.device) - boundaries[rows_R]
        mask = self.new_tokens(int(lengths_B.max())).mask
        return NewTokens(self, rows_R, self.lengths_B[rows_R] + steps_R, steps_R, mask)

    def advance(self, num_tokens_B: Tensor) -> None:
        """Count what was appended: row b grew by `num_tokens_B[b]` real tokens."""
        self.lengths_B += num_tokens_B  # in place: a view counts for the whole

    def view(self, first: int, last: int, max_length: int) -> "KVCache":
        """Rows first to last - 1 and the first slots of each, in the same memory."""
        return KVCache(
            [k[first:last, :, :max_length] for k in self.keys],
            [v[first:last, :, :max_length] for v in self.values],
            self.lengths_B[first:last],
        )

    def copy_rows(self, sources: Tensor, targets: Tensor, num_slots: int) -> None:
        """Copy the first slots of some rows, and their lengths, over other rows.

        All are read before any is written, so a row may be both.
        """
        for tensor in (*self.keys, *self.values):
            tensor[targets, :, :num_slots] = tensor[sources, :, :num_slots]
        self.lengths_B[targets] = self.lengths_B[sources]

    def reserve(self, max_length: int) -> bool:
        """Make room for rows of so many tokens, where there is less; rarely, as it copies all.

        Returns:
            Whether keys and values have moved to other memory.
        """
        missing = max_length - self.keys[0].shape[2]
        if missing <= 0:
            return False
        missing += -max_length % GROWTH
        for tensors in (self.keys, self.values):
            for layer in range(len(tensors)):  # in place: of one layer alone there are two copies
                tensors[layer] = F.pad(tensors[layer], (0, 0, 0, missing))
        return True
