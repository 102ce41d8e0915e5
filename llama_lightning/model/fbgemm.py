"""Matrices packed for FBGEMM, the library of torch whose products read less than bf16 gives them.

It is there on x86-64 and multiplies inputs in fp32 by a matrix in fp16, which processors widen as
they load it, and small whole numbers by a matrix in int8, four at once. A matrix is packed in parts
of some outputs, which stay in the cache meanwhile.
Letters: M rows, I inputs, O outputs.
"""

import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

OUTPUTS = 2048  # in a part: with fewer products take longer, with more packing does
THREADS = 4  # at most: FBGEMM packs in one, and each of ours holds a part in fp32
MAX_CODE = 127  # of a weight in int8
MAX_EXPONENT = 100  # of a scale, so that neither it nor what it scales leaves fp32
# FBGEMM adds 64 to an input; where it has no better instructions, it adds two products in 16 bits.
ZERO, MAX_INPUT = 64, 63


def is_there() -> bool:
    """Say whether torch has FBGEMM on this processor."""
    return torch.backends.quantized.engine in ("x86", "fbgemm")


def in_threads(act: Callable[..., T], *arguments: Iterable[Any]) -> list[T]:
    """Call with each of the arguments, as `map`, in as many threads as pay."""
    pool = ThreadPoolExecutor(min(torch.get_num_threads(), THREADS))
    try:
        return list(pool.map(act, *arguments))
    finally:
        pool.shutdown(cancel_futures=True)


def split(*tensors: Tensor, dim: int = 0) -> list[tuple[Tensor, ...]]:
    """Return the parts of each."""
    return [torch.split(tensor, OUTPUTS, dim) for tensor in tensors]


class FP16Matrix:
    """A matrix of bf16 numbers in fp16, which keeps each bit of them.

    An output's weights are scaled by the power of two that brings the largest of them near fp16's
    largest number. What is 2^31 times smaller loses bits, less than fp32's sums do by far, and is
    kept beside as well.

    Args:
        weight: (O, I) in bf16 on the CPU.

    Raises:
        ValueError: a weight is not finite, or all of an output's are as large or small as no
            network's are.
    """

    def __init__(self, weight: Tensor) -> None:
        largest_O1 = weight.abs().amax(1, keepdim=True).float()
        exponents_O1 = torch.frexp(largest_O1).exponent - 15
        if not bool(largest_O1.isfinite().all() and exponents_O1.abs().amax() <= MAX_EXPONENT):
            raise ValueError("fp16 cannot hold the weights")
        self.scales_O1 = ((exponents_O1 + 127) << 23).view(torch.float32)  # 2 to their power
        self.parts = [
            self._pack(*part) for part in zip(*split(weight, self.scales_O1), strict=True)
        ]

    @staticmethod
    def _pack(weight: Tensor, scales: Tensor) -> tuple[Any, Tensor, Tensor]:
        """Return some outputs' weights packed, and where some lose bits, with these as they are."""
        scaled = weight.float().div_(scales)
        halves = scaled.half().float()
        where = (halves != scaled).nonzero()
        packed = torch.ops.quantized.linear_prepack_fp16(halves, None)
        return packed, where, weight[tuple(where.T)]

    def product(self, x: Tensor) -> Tensor:
        """Multiply (..., I) in bf16 into (..., O) in bf16, with sums in fp32."""
        out = x.new_empty(*x.shape[:-1], len(self.scales_O1))
        wide_x = x.float()
        parts = zip(self.parts, *split(self.scales_O1.squeeze(1), out, dim=-1), strict=True)
        for (packed, *_), scales, sums in parts:
            torch.mul(torch.ops.quantized.linear_dynamic_fp16(wide_x, packed), scales, out=sums)
        return out

    def unpacked(self) -> Tensor:
        """Return the weight."""
        weights = []
        for (packed, where, lost), scales in zip(self.parts, *split(self.scales_O1), strict=True):
            halves, _ = torch.ops.quantized.linear_unpack_fp16(packed)
            weights.append(halves.mul_(scales).to(torch.bfloat16))
            weights[-1][tuple(where.T)] = lost
        return torch.cat(weights)


class Int8Matrix:
    """A matrix in codes of 8 bits with one scale for each output, and so not what it was.

    Source: LLM.int8() (arXiv 2208.07339).

    Args:
        weight: (O, I) on the CPU.

    Attributes:
        scales_O: by which codes are to be multiplied; those of an output that is not all finite
            numbers are not finite either.
    """

    def __init__(self, weight: Tensor) -> None:
        with warnings.catch_warnings():  # torch 2.13 means to give quantized tensors up
            warnings.filterwarnings("ignore", ".*quantized tensor creation", UserWarning)
            parts = in_threads(self._pack, *split(weight))
        self.parts = [packed for packed, _ in parts]
        self.scales_O = torch.cat([scales for _, scales in parts])

    @staticmethod
    def _pack(weight: Tensor) -> tuple[Any, Tensor]:
        """Return some outputs' codes packed, and their scales."""
        wide = weight.to(torch.bfloat16).float()
        scales = (wide.abs().amax(1) / MAX_CODE).clamp_min_(torch.finfo(wide.dtype).tiny)
        codes = wide.div_(scales[:, None]).round_().to(torch.int8)
        quantized = torch._make_per_tensor_quantized_tensor(codes, 1.0, 0)
        return torch.ops.quantized.linear_prepack(quantized, None), scales

    def product(self, x: Tensor) -> Tensor:
        """Multiply (M, I) whole numbers in fp32, to 63, by the codes into (M, O), exactly."""
        product = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
        return torch.cat([product(x, 1.0, ZERO, part) for part in self.parts], -1)
