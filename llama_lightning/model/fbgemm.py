"""Matrices packed for FBGEMM, a library in torch whose products wait less for memory than others.

On x86-64 it multiplies fp32 by a matrix in fp16, which processors widen as they load it, and small
whole numbers by a matrix in int8, of which they add four products at once. A matrix is packed in
parts of some outputs, as packing jumps from output to output, and they should stay in the cache.
Letters: M rows, I inputs, O outputs.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from operator import itemgetter
from typing import Any, TypeVar

import torch
from torch import Tensor

from llama_lightning.heap import give_back_memory

T = TypeVar("T")
U = TypeVar("U")

# Numbers in a part: with fewer products take longer, with more packing does. A product by codes,
# which are read faster, waits longer for each part to begin.
FP16_PART, INT8_PART = 2**22, 2**24
CODED = 2**20  # numbers whose codes are made at a time, in the cache
THREADS = 4  # at most: packing takes one, and each of ours has room for some parts
# Of fp16's scales: so that neither they leave fp32's normal numbers, nor any weight fp32.
LEAST_EXPONENT, MOST_EXPONENT = -100, 16
MAX_CODE = 127  # of a weight in int8
# FBGEMM adds 64 to an input; where it has no better instructions, it adds two products in 16 bits.
ZERO, MAX_INPUT = 64, 63
PARTS = 2 * MAX_INPUT  # of a step of inputs that are no whole numbers
# By how much a product by codes is off: an input by half a part of a step, and rounding, at the
# largest code; and two sums of I products in fp32, of codes up to 127, by less than I 2^-16 of the
# sum of |x|, of which as much again is left for what else rounds.
INPUT_ERROR, SUM_ERROR = 1.01 * MAX_CODE / 2 / PARTS, 2**-15


class FP16RangeError(ValueError):
    """A weight is not finite, or an output's are as large or small as no network's are."""


def is_there() -> bool:
    """Say whether torch has FBGEMM on this processor."""
    return torch.backends.quantized.engine in ("x86", "fbgemm")


def in_threads(act: Callable[[U], T], arguments: Iterable[U]) -> Iterator[T]:
    """Yield what an act returns for each argument, as they end; acts run in several threads.

    An act that has not begun when nobody waits any more does not begin.
    """
    pool = ThreadPoolExecutor(min(torch.get_num_threads(), THREADS))
    try:
        for ended in as_completed([pool.submit(act, argument) for argument in arguments]):
            yield ended.result()
            give_back_memory()
    finally:
        pool.shutdown(cancel_futures=True)


def _num_outputs(part: int, inputs: int) -> int:
    """Return of how many outputs a part of about so many numbers is."""
    return max(part // inputs // 64, 1) * 64


def _split(outputs: int, *tensors: Tensor, dim: int = 0) -> Iterator[tuple[Tensor, ...]]:
    """Yield the parts of all tensors, side by side."""
    return zip(*(torch.split(tensor, outputs, dim) for tensor in tensors), strict=True)


def _largest(weight: Tensor) -> Tensor:
    """Return the largest size (O, 1) of an output's weights (O, I), in fp32."""
    return torch.maximum(-weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)).float()


class FP16Matrix:
    """A matrix of bf16 numbers in fp16, which keeps each bit of them.

    An output's weights are scaled by the power of two that brings the largest of them near fp16's
    largest number. What is 2^31 times smaller loses bits, and is kept beside as well: a product
    misses at most 2^-39 of the output's largest weight times the sum of |x|.

    Args:
        weight: (O, I) in bf16 on the CPU.

    Raises:
        FP16RangeError: this cannot be done.
    """

    def __init__(self, weight: Tensor) -> None:
        self.shape, self.num_outputs = weight.shape, _num_outputs(FP16_PART, weight.shape[1])
        largest_O1 = _largest(weight)
        exponents_O1 = torch.frexp(largest_O1).exponent - 15
        low, high = exponents_O1.aminmax()
        if not largest_O1.isfinite().all() or low < LEAST_EXPONENT or high > MOST_EXPONENT:
            raise FP16RangeError
        self.scales_O1 = ((exponents_O1 + 127) << 23).view(torch.float32)  # 2 to their power
        # Packed, and where which numbers lose bits.
        self.parts: list[tuple[Any, tuple[Tensor, ...], Tensor]] = []
        scaled_room, half_room, kept_room = (
            torch.empty(min(self.num_outputs, self.shape[0]), self.shape[1], dtype=dtype)
            for dtype in (torch.float32, torch.float16, torch.float32)
        )
        for part, scales in _split(self.num_outputs, weight, self.scales_O1):
            scaled = scaled_room[: len(part)].copy_(part).div_(scales)
            kept = kept_room[: len(part)].copy_(half_room[: len(part)].copy_(scaled))
            where = tuple((kept != scaled).nonzero().T)
            packed = torch.ops.quantized.linear_prepack_fp16(kept, None)
            self.parts.append((packed, where, part[where]))

    def product(self, x: Tensor) -> Tensor:
        """Multiply (..., I) in bf16 into (..., O) in bf16, with sums in fp32."""
        x_MI = x.reshape(-1, self.shape[1]).float()
        out_MO = x.new_empty(len(x_MI), self.shape[0])
        scales_1O = self.scales_O1.T
        for (packed, *_), (scales, out) in zip(
            self.parts, _split(self.num_outputs, scales_1O, out_MO, dim=1), strict=True
        ):
            torch.mul(torch.ops.quantized.linear_dynamic_fp16(x_MI, packed), scales, out=out)
        return out_MO.view(*x.shape[:-1], self.shape[0])

    def unpacked(self) -> Tensor:
        """Return the weight."""
        weight = torch.empty(self.shape, dtype=torch.bfloat16)
        for (packed, where, lost), (scales, part) in zip(
            self.parts, _split(self.num_outputs, self.scales_O1, weight), strict=True
        ):
            part.copy_(torch.ops.quantized.linear_unpack_fp16(packed)[0].mul_(scales))
            part[where] = lost
        return weight


def coded(weight: Tensor, room: Tensor) -> tuple[Tensor, Tensor]:
    """Round weights (O, I), seen in bf16, to whole numbers from -127 to 127 times a scale (O, 1).

    The numbers stand in `room`, fp32; scales of outputs that are not all finite are not either.
    Source: LLM.int8() (arXiv 2208.07339).
    """
    wide = room[: len(weight)].copy_(weight.to(torch.bfloat16))
    scales_O1 = (_largest(wide) / MAX_CODE).clamp_min_(torch.finfo(wide.dtype).tiny)
    return wide.div_(scales_O1).round_(), scales_O1


class Int8Matrix:
    """A matrix in codes of 8 bits with one scale for each output, and so not what it was.

    Args:
        weight: (O, I) on the CPU; seen in bf16.

    Attributes:
        scales_O: by which codes are to be multiplied.
    """

    def __init__(self, weight: Tensor) -> None:
        parts = torch.split(weight, _num_outputs(INT8_PART, weight.shape[1]))

        def packed(number: int) -> tuple[int, Any, Tensor]:
            return number, *self._packed(parts[number])

        with warnings.catch_warnings():  # torch 2.13 means to give quantized tensors up
            warnings.filterwarnings("ignore", ".*quantized tensor creation", UserWarning)
            in_order = sorted(in_threads(packed, range(len(parts))), key=itemgetter(0))
        self.parts = [part for _, part, _ in in_order]
        self.scales_O = torch.cat([scales for *_, scales in in_order])

    @staticmethod
    def _packed(weight: Tensor) -> tuple[Any, Tensor]:
        """Pack some outputs' codes; return their scales (O,) too."""
        codes = torch.empty(weight.shape, dtype=torch.int8)
        scales_O1 = torch.empty(len(weight), 1, dtype=torch.float32)
        num_outputs = _num_outputs(CODED, weight.shape[1])
        wide_room = torch.empty(num_outputs, weight.shape[1], dtype=torch.float32)
        for part, part_codes, scales in _split(num_outputs, weight, codes, scales_O1):
            part_codes[:], scales[:] = coded(part, wide_room)
        quantized = torch._make_per_tensor_quantized_tensor(codes, 1.0, 0)
        return torch.ops.quantized.linear_prepack(quantized, None), scales_O1.squeeze(1)

    def product(self, x: Tensor) -> Tensor:
        """Multiply (M, I) whole numbers in fp32, to 63, by the codes into (M, O).

        Sums are exact, and rounded once, to fp32.
        """
        product = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
        return torch.cat([product(x, 1.0, ZERO, part) for part in self.parts], -1)

    def roughly(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Multiply (M, I) in fp32 by the codes into (M, O); say how far off it may be, (M, 1)."""
        # Whole numbers of steps first, then of parts of what is left of one.
        step_M1 = x.abs().amax(1, keepdim=True) / MAX_INPUT
        step_M1.clamp_min_(torch.finfo(x.dtype).tiny)
        steps = x / step_M1
        whole = steps.round()
        rest = ((steps - whole) * PARTS).round()
        of_whole, of_rest = self.product(torch.cat([whole, rest])).chunk(2)
        off_M1 = step_M1 * INPUT_ERROR + x.abs().sum(1, keepdim=True) * SUM_ERROR
        return (of_whole + of_rest / PARTS) * step_M1, off_M1 * x.shape[1]
