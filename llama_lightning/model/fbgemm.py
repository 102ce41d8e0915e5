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
U = TypeVar("U")

OUTPUTS = 2048  # in a part: with fewer products take longer, with more packing does
THREADS = 4  # at most: FBGEMM packs in one, and each of ours takes room for some parts
MAX_CODE = 127  # of a weight in int8
MAX_EXPONENT = 100  # of a scale, so that neither it nor what it scales leaves fp32
# FBGEMM adds 64 to an input; where it has no better instructions, it adds two products in 16 bits.
ZERO, MAX_INPUT = 64, 63


def is_there() -> bool:
    """Say whether torch has FBGEMM on this processor."""
    return torch.backends.quantized.engine in ("x86", "fbgemm")


def num_threads() -> int:
    """Return how many threads pay."""
    return min(torch.get_num_threads(), THREADS)


def in_threads(act: Callable[[U], T], arguments: Iterable[U]) -> list[T]:
    """Call with each of the arguments, in their order, in as many threads."""
    pool = ThreadPoolExecutor(num_threads())
    try:
        return list(pool.map(act, arguments))
    finally:
        pool.shutdown(cancel_futures=True)


def split(*tensors: Tensor, dim: int = 0) -> list[tuple[Tensor, ...]]:
    """Return the parts of each."""
    return [torch.split(tensor, OUTPUTS, dim) for tensor in tensors]


def _largest(weight: Tensor) -> Tensor:
    """Return the largest size (O, 1) of an output's weights (O, I), in fp32."""
    return torch.maximum(-weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)).float()


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
        largest_O1 = _largest(weight)
        exponents_O1 = torch.frexp(largest_O1).exponent - 15
        if not bool(largest_O1.isfinite().all() and exponents_O1.abs().amax() <= MAX_EXPONENT):
            raise ValueError("fp16 cannot hold the weights")
        self.scales_O1 = ((exponents_O1 + 127) << 23).view(torch.float32)  # 2 to their power
        # Packed, and where which numbers lose bits.
        self.parts: list[tuple[Any, tuple[Tensor, ...], Tensor]] = []
        room, halves, wide_halves = (
            torch.empty(min(OUTPUTS, len(weight)), weight.shape[1], dtype=dtype)
            for dtype in (torch.float32, torch.float16, torch.float32)
        )
        for part, scales in zip(*split(weight, self.scales_O1), strict=True):
            scaled = room[: len(part)].copy_(part).div_(scales)
            kept = wide_halves[: len(part)].copy_(halves[: len(part)].copy_(scaled))
            where = tuple((kept != scaled).nonzero().T)
            packed = torch.ops.quantized.linear_prepack_fp16(kept, None)
            self.parts.append((packed, where, part[where]))

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
        inputs = torch.ops.quantized.linear_unpack_fp16(self.parts[0][0])[0].shape[1]
        weight = torch.empty(len(self.scales_O1), inputs, dtype=torch.bfloat16)
        for (packed, where, lost), scales, part in zip(
            self.parts, *split(self.scales_O1, weight), strict=True
        ):
            part.copy_(torch.ops.quantized.linear_unpack_fp16(packed)[0].mul_(scales))
            part[where] = lost
        return weight


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
            pieces = in_threads(self._pack, weight.chunk(num_threads()))
        self.parts = [part for parts, _ in pieces for part in parts]
        self.scales_O = torch.cat([scales for _, scales in pieces])

    @staticmethod
    def _pack(weight: Tensor) -> tuple[list[Any], Tensor]:
        """Return the codes of some outputs, packed in parts, and their scales."""
        packed: list[Any] = []
        all_scales: list[Tensor] = []
        room = torch.empty(min(OUTPUTS, len(weight)), weight.shape[1])
        code_room = torch.empty_like(room, dtype=torch.int8)
        for (part,) in zip(*split(weight), strict=True):
            wide = room[: len(part)].copy_(part.to(torch.bfloat16))
            scales_O1 = (_largest(wide) / MAX_CODE).clamp_min_(torch.finfo(wide.dtype).tiny)
            codes = code_room[: len(part)].copy_(wide.div_(scales_O1).round_())
            quantized = torch._make_per_tensor_quantized_tensor(codes, 1.0, 0)
            packed.append(torch.ops.quantized.linear_prepack(quantized, None))
            all_scales.append(scales_O1.squeeze(1))
        return packed, torch.cat(all_scales)

    def product(self, x: Tensor) -> Tensor:
        """Multiply (M, I) whole numbers in fp32, to 63, by the codes into (M, O), exactly."""
        product = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
        return torch.cat([product(x, 1.0, ZERO, part) for part in self.parts], -1)
