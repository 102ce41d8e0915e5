"""Find a few rows' likeliest token by half the bytes of the head: what cannot win is not computed.

At few rows a decode step takes as long as memory takes to give the weights, and the head is the
largest of them. Codes of 8 bits tell each logit to within a bound. Only the logits that may be the
largest by it, of random weights about a hundred a row, are computed from the head itself. So the
token is the one that the whole product gives, unless two are so near that the order of sums in fp32
decides. The likeliest token of 1, 2 and 4 rows of the 1B shape takes 14, 17 and 18 ms, by the whole
head laid out in fp16 27, 30 and 32; a decode step of one row with 4 layers takes 48 ms; the codes
are made in 1.3 s, once a run (2 cores of an AMD EPYC).
Source: codes with one scale for each output as in LLM.int8() (arXiv 2208.07339); what they are off
by changes x.w by no more than the sum of |x| times the largest of it.
Letters: B rows, D hidden size, V vocabulary, K tokens kept.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llama_lightning.heap import give_back_memory
from llama_lightning.model import fbgemm
from llama_lightning.model.embedding_table import HAS_AVX512, CodeTable
from llama_lightning.model.linear import CPU_HAS_AMX, Linear
from llama_lightning.model.llama import Llama

# Above, the whole product takes no longer; with AMX 19 ms at 1, 2 and 4 rows where this one takes
# 15, 20 and 25 (2 cores of an Intel Xeon). Without, beside instructions for bf16, that is reckoned
# from what is read, and not measured.
MAX_ROWS = 1 if CPU_HAS_AMX else 4
# With AVX-512 one row by a table of the codes takes 14 instead of 19 ms, which is made in a third
# of the time; two rows take 25 instead of 20 (2 cores of an Intel Xeon).
TABLE_MAX_ROWS = 1 if HAS_AVX512 else 0
# A smaller head stays in the processor's cache, and is not what a step waits for.
MIN_BYTES = 2**26
TOKENS = 128  # whose logits are computed at a time: in the cache
# By how much a rough logit differs from the true one, beside what its product is off by: a weight
# by half a code; and a logit by what two of them may differ by, and be the same in bf16 (as long as
# bf16 has normal numbers for them).
CODE_ERROR, LOGIT_ERROR = 0.5, 2**-7


class ScreenedHead(nn.Module):
    """A head of 8-bit codes beside the weights, which it reads for a few tokens only.

    Args:
        weight: (V, D) on the CPU, to be multiplied in bf16.
        rows: that are usually multiplied at a time.
    """

    def __init__(self, weight: Tensor, rows: int) -> None:
        super().__init__()
        self.weight_VD = weight.detach()
        matrix = CodeTable if rows <= TABLE_MAX_ROWS else fbgemm.Int8Matrix
        self.codes: CodeTable | fbgemm.Int8Matrix = matrix(self.weight_VD)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., D) to (..., V) in bf16; -inf for tokens that are not the likeliest."""
        x_BD = x.reshape(-1, x.shape[-1]).to(torch.bfloat16).float()
        sums_BV, off_B1 = self.codes.roughly(x_BD)
        off_B1 += x_BD.abs().sum(1, keepdim=True) * CODE_ERROR
        rough_BV = sums_BV * self.codes.scales_O
        error_BV = off_B1 * self.codes.scales_O + rough_BV.abs() * LOGIT_ERROR
        best_B1 = (rough_BV - error_BV).amax(1, keepdim=True)
        # Not "at least the best": what is no number is kept, and seen as by the whole product.
        kept_K = (~(rough_BV + error_BV < best_B1)).any(0).nonzero().squeeze(1)
        logits_BV = x.new_full(rough_BV.shape, -torch.inf, dtype=torch.bfloat16)
        with torch.autocast("cpu", enabled=False):  # sums in fp32, as those of a bf16 product
            for tokens in torch.split(kept_K, TOKENS):
                weights = self.weight_VD[tokens].to(torch.bfloat16).float()
                logits_BV[:, tokens] = F.linear(x_BD, weights).to(torch.bfloat16)
        return logits_BV.view(*x.shape[:-1], len(self.weight_VD))


@contextmanager
def screened(model: Llama, rows: int) -> Iterator[None]:
    """Screen the model's head, for whoever asks for the likeliest token of so many rows.

    Nothing changes where that gains little, and at the end all is as it was. Meanwhile the model
    must not be moved, nor its state saved.
    """
    head = model.lm_head
    try:
        if (
            rows <= MAX_ROWS
            and type(head) is Linear
            and head.bias is None
            and head.weight.device.type == "cpu"
            and head.weight.nbytes >= MIN_BYTES
            and head.computes_in_bf16(head.weight.dtype)
            and fbgemm.is_there()
        ):
            model.register_module("lm_head", ScreenedHead(head.weight, rows))
        yield
    finally:
        if model.lm_head is not head:
            model.register_module("lm_head", head)
            give_back_memory()
