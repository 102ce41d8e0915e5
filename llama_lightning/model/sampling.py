"""Choose the next token: logits in, tokens out.

Letters: B rows, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class GenerationConfig:
    """How responses are generated.

    Attributes:
        max_new_tokens: a response is cut after so many tokens.
        temperature: 0 takes the likeliest token; above 0 logits are divided by it and sampled.
        seed: with the row's number it fixes what is sampled for that row.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"generation.max_new_tokens is {self.max_new_tokens}; use 1 or more")
        if self.temperature < 0:
            raise ValueError(f"generation.temperature is {self.temperature}; use 0 or more")


def row_generator(seed: int, row_id: int) -> torch.Generator:
    """Make a row's own source of randomness, so that its sample does not depend on its batch."""
    # An odd multiplier spreads neighbouring pairs of (seed, row) over the 63 bits a seed may have.
    mixed = (seed * 0x9E3779B97F4A7C15 + row_id * 0xBF58476D1CE4E5B9 + 1) % (1 << 63)
    return torch.Generator().manual_seed(mixed)


def next_tokens(
    logits_BV: Tensor, temperature: float, generators: Sequence[torch.Generator]
) -> Tensor:
    """Choose one token a row, (B,) int64.

    Sampling inverts the cumulative distribution at one uniform draw of the row's generator: one
    draw a token, on the CPU, so that the same seed gives the same text on every device.
    """
    if temperature == 0:
        return logits_BV.argmax(-1)
    cumulative_BV = (logits_BV.double() / temperature).softmax(-1).cumsum(-1)
    draws_B1 = torch.stack([torch.rand(1, generator=g, dtype=torch.float64) for g in generators])
    # The sum may end a rounding below 1: scale the draw instead of falling off the end.
    draws_B1 = draws_B1.to(logits_BV.device) * cumulative_BV[:, -1:]
    return torch.searchsorted(cumulative_BV, draws_B1, right=True).squeeze(1)
