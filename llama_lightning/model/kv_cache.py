"""Keys and values of the tokens already seen, owned by whoever generates.

Rows are ragged: each has its own length. What stands behind a row's length is garbage and is hidden
by the mask until it is overwritten.
Letters: B rows, T new tokens, K kv heads, S slots, H head dimension.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from llama_lightning.model.config import LlamaConfig

GROWTH = 256  # `reserve` leaves a multiple of so many slots


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

    def positions(self, num_tokens: int) -> Tensor:
        """Positions of the next `num_tokens` tokens of each row, (B, T)."""
        return self.lengths_B[:, None] + torch.arange(num_tokens, device=self.lengths_B.device)

    def mask(self, num_tokens: int) -> Tensor:
        """Who sees whom: (B, 1, T, S) bool, true for the slots up to the token's own."""
        slots = torch.arange(self.keys[0].shape[2], device=self.lengths_B.device)
        return (slots <= self.positions(num_tokens)[..., None]).unsqueeze(1)

    def append(self, layer: int, k_BTKH: Tensor, v_BTKH: Tensor) -> tuple[Tensor, Tensor]:
        """Write T new tokens behind each row's length and return all slots, each (B, K, S, H).

        The lengths stay until `advance`, so that every layer of one forward writes to the same
        slots.

        Raises:
            IndexError: a row has no slot left.
        """
        batch, num_tokens = k_BTKH.shape[:2]
        keys, values = self.keys[layer], self.values[layer]
        rows = torch.arange(batch, device=k_BTKH.device)[:, None]
        slots = self.positions(num_tokens)
        keys[rows, :, slots] = k_BTKH.to(keys.dtype)
        values[rows, :, slots] = v_BTKH.to(values.dtype)
        return keys, values

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
