"""Rotary position embeddings with Llama 3's scaling, in the half-split layout of Hugging Face.

Tables are fp32 whatever the weights are: bf16 cannot count beyond 256.
Source: RoFormer (arXiv 2104.09864); the scaling of transformers' modeling_rope_utils.
Letters: T tokens (any leading shape), N heads, H head dimension.
"""

import math

import torch
from torch import Tensor

from llama_lightning.model.config import LlamaConfig

# MKL looks for a function's kernel when it is first called, and of two threads that call at once,
# one may get a coarse one for that call: in 5 % of processes half the first cosines were off by up
# to 1.5e-4 (2 cores of an Intel Xeon with AMX; pytorch/pytorch#188792). So one thread calls first,
# here, and exp for loss.py.
for _function in (torch.cos, torch.sin, torch.exp):
    _function(torch.zeros(1, device="cpu"))


def inverse_frequencies(config: LlamaConfig, device: torch.device | None = None) -> Tensor:
    """Compute how many radians each pair of dimensions turns per token.

    Bit for bit transformers' values: fp32 and the same order of operations. A float64 computation
    would be closer to the formula and 1e-3 away from the reference's logits at position 8192.

    Returns:
        (H / 2,) fp32.
    """
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.int64, device=device).float()
    inv_freq = 1.0 / (config.rope_theta ** (exponent / config.head_dim))
    scaling = config.rope_scaling
    if scaling is None:
        return inv_freq
    context = scaling.original_max_position_embeddings
    wavelength = 2 * math.pi / inv_freq  # tokens for a full turn
    longest_blended = context / scaling.low_freq_factor
    shortest_blended = context / scaling.high_freq_factor
    scaled = torch.where(wavelength > longest_blended, inv_freq / scaling.factor, inv_freq)
    # 1 at the short end of the blended band (keep), 0 at its long end (divide by the factor).
    keep = (context / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    blended = (1 - keep) * scaled / scaling.factor + keep * scaled
    in_band = ~(wavelength < shortest_blended) & ~(wavelength > longest_blended)
    return torch.where(in_band, blended, scaled)


def rope_tables(positions: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    """Compute cosine and sine for each position.

    Args:
        positions: (..., T) int64.
        inv_freq: (H / 2,) fp32.

    Returns:
        cos and sin, each (..., T, 1, H) fp32; the 1 broadcasts over heads.
    """
    angles = positions.unsqueeze(-1).float() * inv_freq
    angles = torch.cat((angles, angles), dim=-1).unsqueeze(-2)
    return angles.cos(), angles.sin()


def apply_rope(x_TNH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + H/2) of each head; (..., T, N, H) in and out, same dtype.

    The rotation itself runs in fp32 (the tables' type) for 16-bit x and in float64 for float64 x.
    """
    first, second = x_TNH.chunk(2, dim=-1)
    rotated = torch.cat((-second, first), dim=-1)
    return (x_TNH * cos + rotated * sin).to(x_TNH.dtype)
