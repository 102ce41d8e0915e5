"""Next-token cross-entropy at supervised positions, never with the logits of all of them at once.

The head is the widest matrix of a Llama. Logits of positions without a label are never computed,
and those of the others a few rows at a time, so that memory does not grow with their number.
Letters: T tokens, D hidden size, L supervised positions, V vocabulary.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llama_lightning.records import IGNORE_INDEX

# Positions whose logits are in memory at a time. With the 1B shape's frozen head 128 take 0.46 GiB
# for any number of positions, 512 at once 0.74 and 1,024 at once 1.9, in the same CPU time; 64 are
# 10 % slower (2 cores of an Intel Xeon). torch 2.13's linear_cross_entropy took 5 times as long in
# chunks of its own choice. A GPU reads the head's weights once a chunk: by arithmetic, below some
# 300 positions it would wait for them.
CPU_CHUNK, GPU_CHUNK = 128, 512


def supervised_positions(labels: Tensor) -> Tensor:
    """Index those of (T,) labels that carry loss, (L,)."""
    return (labels != IGNORE_INDEX).nonzero().squeeze(1)


def _chunks(hidden_LD: Tensor, targets_L: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    size = CPU_CHUNK if hidden_LD.device.type == "cpu" else GPU_CHUNK
    return zip(torch.split(hidden_LD, size), torch.split(targets_L, size), strict=True)


def _logits(hidden: Tensor, lm_head: nn.Module) -> Tensor:
    """Apply the head; (.., V) in fp32 at least."""
    logits: Tensor = lm_head(hidden)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _add(sums: list[Tensor], terms: list[Tensor]) -> list[Tensor]:
    """Add in place, in fp32 at least; without sums yet, the terms are their beginning."""
    if not sums:
        return [term.to(torch.promote_types(term.dtype, torch.float32)) for term in terms]
    for total, term in zip(sums, terms, strict=True):
        total += term
    return sums


class _SummedCrossEntropy(torch.autograd.Function):
    """Take each chunk's gradient as soon as its loss is known, and drop its logits."""

    @staticmethod
    def forward(
        ctx: Any, lm_head: nn.Module, targets_L: Tensor, hidden_LD: Tensor, *weights: Tensor
    ) -> Tensor:
        losses: list[Tensor] = []
        of_hidden: list[Tensor] = []
        of_weights: list[Tensor] = []
        for hidden, targets in _chunks(hidden_LD, targets_L):
            with torch.enable_grad():
                hidden = hidden.detach().requires_grad_()
                loss = F.cross_entropy(_logits(hidden, lm_head), targets, reduction="sum")
            gradients = list(torch.autograd.grad(loss, [hidden, *weights]))
            losses.append(loss.detach())
            of_hidden.append(gradients.pop(0))
            of_weights = _add(of_weights, gradients)
            del loss, gradients  # large, and not needed while the next are made
        stored = (total.to(weight.dtype) for total, weight in zip(of_weights, weights, strict=True))
        ctx.save_for_backward(torch.cat(of_hidden), *stored)
        return torch.stack(losses).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, factor: Tensor) -> Any:
        return None, None, *(gradient * factor for gradient in ctx.saved_tensors)


def summed_cross_entropy(hidden_LD: Tensor, targets_L: Tensor, lm_head: nn.Module) -> Tensor:
    """Sum the losses over positions. The caller divides: it alone knows the step's token count.

    Args:
        hidden_LD: at supervised positions.
        targets_L: int64.
        lm_head: D to V, with or without trained weights.

    Returns:
        () in fp32 at least.
    """
    weights = [p for p in lm_head.parameters() if p.requires_grad]
    loss: Tensor = _SummedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        lm_head, targets_L, hidden_LD, *weights
    )
    return loss


@torch.no_grad()
def loss_and_hits(
    hidden_LD: Tensor, targets_L: Tensor, lm_head: nn.Module
) -> tuple[Tensor, Tensor]:
    """Sum the losses, and count the targets that are the likeliest token. Arguments as above."""
    losses, hits = [], []
    for hidden, targets in _chunks(hidden_LD, targets_L):
        logits = _logits(hidden, lm_head)
        losses.append(F.cross_entropy(logits, targets, reduction="sum"))
        hits.append((logits.argmax(-1) == targets).sum())
    return torch.stack(losses).sum(), torch.stack(hits).sum()
