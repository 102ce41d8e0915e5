"""Find a few rows' likeliest token by half the bytes of the head: what cannot win is not computed.

At few rows a decode step takes as long as memory takes to give the weights, and the head is the
largest of them. Codes of 8 bits tell each logit to within a bound. Only the logits that may be the
largest by it, of random weights about a hundred a row, are computed from the head itself. So the
token is the one that the whole product gives, unless two are so near that the order of sums in fp32
decides. A decode step of the 1B shape with 4 layers takes 57 instead of 71 ms at 1 row, 87 instead
of 119 at 2, 147 instead of 216 at 4 and 232 instead of 277 at 8; the codes are made in 0.4 to
1.1 s, once a run (2 cores of an AMD EPYC, which has no instructions for bf16).
Source: codes with one scale for each output as in LLM.int8() (arXiv 2208.07339); what they are off
by changes x.w by no more than the sum of |x| times the largest of it.
Letters: B rows, D hidden size, V vocabulary, K tokens kept.
"""

import platform
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llama_lightning.model.linear import CPU_HAS_BF16, Linear
from llama_lightning.model.llama import Llama

# Above, a step gains little or loses: torch's kernel brings the codes in again for every 4 rows.
# Beside instructions for bf16 the number is reckoned from what is read, and not measured.
MAX_ROWS = 4 if CPU_HAS_BF16 else 8
# A smaller head stays in the processor's cache, and is not what a step waits for.
MIN_BYTES = 2**26
TOKENS = 128  # whose codes are made, or logits computed, at a time: in the cache
INPUTS = 16  # torch's kernel reads so many at once, from their own multiples, there or not
# By how much a rough logit differs from the true one: a weight by half a code, and a logit by twice
# what two of them are rounded to bf16 by (as long as bf16 has normal numbers for them).
CODE_ERROR, LOGIT_ERROR = 0.5, 2**-6


class ScreenedHead(nn.Module):
    """A head of 8-bit codes beside the weights, which it reads for a few tokens only.

    Args:
        weight: (V, D) on the CPU, to be multiplied in bf16; D in sixteens.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight_VD = weight.detach()
        self.codes_VD = torch.empty(weight.shape, dtype=torch.int8)
        self.scales_V = torch.empty(len(weight), dtype=torch.bfloat16)
        parts = (torch.split(t, TOKENS) for t in (self.weight_VD, self.codes_VD, self.scales_V))
        for weights, codes, scales in zip(*parts, strict=True):
            weights = weights.to(torch.bfloat16)
            scales.copy_(weights.abs().amax(1) / 127).clamp_min_(torch.finfo(scales.dtype).tiny)
            codes.copy_(weights.float().mul_(1 / scales.float()[:, None]).round_())

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., D) to (..., V) in bf16; -inf for tokens that are not the likeliest."""
        x_BD = x.reshape(-1, x.shape[-1]).to(  # a copy begins where the kernel may read
            torch.bfloat16, copy=True, memory_format=torch.contiguous_format
        )
        rough_BV = torch._weight_int8pack_mm(x_BD, self.codes_VD, self.scales_V).float()
        # Two sums of D products in fp32, of codes up to 127, add less than D 2^-16 to what a weight
        # is off by; as much again is left for scales and what else rounds here.
        off_B1 = x_BD.float().abs().sum(1, keepdim=True) * (CODE_ERROR + x_BD.shape[1] * 2**-15)
        error_BV = off_B1 * self.scales_V + rough_BV.abs() * LOGIT_ERROR
        best_B1 = (rough_BV - error_BV).amax(1, keepdim=True)
        # Not "at least the best": what is no number is kept, and seen as by the whole product.
        kept_K = (~(rough_BV + error_BV < best_B1)).any(0).nonzero().squeeze(1)
        logits_BV = x_BD.new_full(rough_BV.shape, -torch.inf)
        with torch.autocast("cpu", enabled=False):  # sums in fp32, as those of a bf16 product
            for tokens in torch.split(kept_K, TOKENS):
                weights = self.weight_VD[tokens].to(torch.bfloat16).float()
                logits_BV[:, tokens] = F.linear(x_BD.float(), weights).to(torch.bfloat16)
        return logits_BV.view(*x.shape[:-1], len(self.codes_VD))


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
            and head.in_features % INPUTS == 0
            and head.weight.device.type == "cpu"
            and head.weight.nbytes >= MIN_BYTES
            and head.computes_in_bf16(head.weight.dtype)
            # Elsewhere torch's kernel does without vectors (Windows), or has not been tried.
            and platform.machine() == "x86_64"
        ):
            model.register_module("lm_head", ScreenedHead(head.weight))
        yield
    finally:
        model.register_module("lm_head", head)
