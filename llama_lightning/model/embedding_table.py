"""A matrix as a table of embeddings, of which a product with a single row takes weighted bags.

A row of the table is what one input is multiplied by for a group of outputs. A bag of all inputs'
rows, each weighted by its input, sums to the group's outputs. FBGEMM's kernel for that, in torch on
x86-64, reads the 1B shape's matrices at 19 to 22 GB/s, torch's product of a row and a bf16 matrix
at 16 to 18 (2 cores of an AMD EPYC with AVX2, on which others read too). On 2 cores of an Intel
Xeon with AMX it reads them at 19, oneDNN in its own layout at 12 to 14 while others read too.
Letters: M rows, I inputs, O outputs, G groups of W outputs.
"""

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from llama_lightning.model import fbgemm
from llama_lightning.model.linear import CPU_HAS_BF16

# Outputs of a group: the kernel has sums of so many in half of its registers. AVX-512 has four
# times the room, and products of 256 take 0.83 of the time of 64 there (the same Xeon).
HAS_AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
GROUP = 256 if HAS_AVX512 else 64
PART = 512 // GROUP  # groups that are written or cast at a time, so that they stay in the cache
# Numbers between outputs, without which they would all fall into the same few lines of the cache.
GAP = 32
# What stands behind each row of bytes: the scale and the offset that make numbers of them.
BYTE_ZERO = 128
ROW_END = torch.tensor([1.0, -BYTE_ZERO], dtype=torch.float32).view(torch.uint8)
# By how much a product of codes is off, for each input, of the sum of |x|: what a row adds may be
# 382 times that and is rounded twice, which is less than 2^-14.4.
SUM_ERROR = 2**-14


@cache
def _bags(groups: int, inputs: int) -> tuple[Tensor, Tensor]:
    """Number a table's rows, and say where its bags begin."""
    rows = torch.arange(groups * inputs, dtype=torch.int32)
    return rows, rows[::inputs].contiguous()


class BF16Matrix:
    """A matrix of bf16 numbers as they are, quick to multiply by one row.

    Args:
        weight: (O, I) in bf16 on the CPU.
    """

    def __init__(self, weight: Tensor) -> None:
        self.shape = weight.shape
        outputs, inputs = weight.shape
        self.table_GIW = weight.new_empty(-(-outputs // GROUP), inputs, GROUP)
        room_GWI = weight.new_empty(PART, GROUP, inputs + GAP)[..., :inputs]
        room_OI = room_GWI.flatten(0, 1)
        for part, table in zip(
            torch.split(weight, PART * GROUP), torch.split(self.table_GIW, PART), strict=True
        ):
            room_OI[: len(part)] = part
            table.copy_(room_GWI[: len(table)].transpose(1, 2))

    def product(self, x: Tensor) -> Tensor:
        """Multiply (..., I) in bf16 into (..., O) in bf16, with sums in fp32.

        A single row's sums midway between two numbers of bf16 may be rounded away from zero.
        """
        outputs, inputs = self.shape
        x_MI = x.reshape(-1, inputs)
        out_MO = self._of_one(x_MI) if len(x_MI) == 1 else self._of_many(x_MI)
        return out_MO[:, :outputs].reshape(*x.shape[:-1], outputs)

    def _of_one(self, x_1I: Tensor) -> Tensor:
        groups, inputs, _ = self.table_GIW.shape
        rows, starts = _bags(groups, inputs)
        sums_GW = F.embedding_bag(
            rows,
            self.table_GIW.flatten(0, 1),
            starts,
            mode="sum",
            per_sample_weights=x_1I.expand(groups, -1).flatten(),
        )
        return sums_GW.view(1, -1)

    def _of_many(self, x_MI: Tensor) -> Tensor:
        """Multiply in bf16 where there are instructions; else in fp32, some groups at a time."""
        if CPU_HAS_BF16:
            return torch.matmul(x_MI, self.table_GIW).transpose(0, 1).flatten(1)
        wide_x, out_MGW = x_MI.float(), x_MI.new_empty(len(x_MI), len(self.table_GIW), GROUP)
        wide_room = torch.empty(PART, *self.table_GIW.shape[1:], dtype=torch.float32)
        with torch.autocast("cpu", enabled=False):
            for table, out in zip(
                torch.split(self.table_GIW, PART), torch.split(out_MGW, PART, 1), strict=True
            ):
                out.copy_((wide_x @ wide_room[: len(table)].copy_(table)).transpose(0, 1))
        return out_MGW.flatten(1)

    def unpacked(self) -> Tensor:
        """Return the weight."""
        weight = self.table_GIW.transpose(1, 2).flatten(0, 1)
        outputs = self.shape[0]
        return weight if len(weight) == outputs else weight[:outputs].clone()


class CodeTable:
    """A matrix in codes of 8 bits with one scale for each output, quick to multiply by one row.

    Args:
        weight: (O, I) on the CPU; seen in bf16.

    Attributes:
        scales_O: by which codes are to be multiplied.
    """

    def __init__(self, weight: Tensor) -> None:
        outputs, inputs = weight.shape
        self.num_outputs = outputs
        shape = -(-outputs // GROUP), inputs, GROUP + len(ROW_END)
        with torch.inference_mode(False):  # as threads are, which write into these
            self.rows_GIW = torch.empty(shape, dtype=torch.uint8)
            self.scales_O = torch.empty(outputs, dtype=torch.float32)
        parts, scales = (torch.split(tensor, GROUP) for tensor in (weight, self.scales_O))

        def write(group: tuple[Tensor, Tensor, Tensor]) -> None:
            part, scales_W, rows_IW = group
            room = torch.empty(len(part), inputs, dtype=torch.float32)
            codes, scales_W[:, None] = fbgemm.coded(part, room)
            rows_IW[:, : len(part)] = codes.add_(BYTE_ZERO).T
            rows_IW[:, GROUP:] = ROW_END

        for _ in fbgemm.in_threads(write, zip(parts, scales, self.rows_GIW, strict=True)):
            pass

    def roughly(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Multiply (M, I) in fp32 by the codes into (M, O); say how far off it may be, (M, 1)."""
        groups, inputs, _ = self.rows_GIW.shape
        rows, starts = _bags(groups, inputs)
        product = torch.ops.quantized.embedding_bag_byte_rowwise_offsets
        sums = [
            product(
                self.rows_GIW.flatten(0, 1),
                rows,
                starts,
                per_sample_weights=x_I.expand(groups, -1).flatten(),
            )
            for x_I in x
        ]
        out_MO = torch.stack(sums).flatten(1) if sums else x.new_empty(0, groups * GROUP)
        return out_MO[:, : self.num_outputs], x.abs().sum(1, keepdim=True) * inputs * SUM_ERROR
