"""Next-token cross-entropy at supervised positions, never with the logits of all of them at once.

The head is the widest matrix of a Llama. Logits of positions without a label are never computed:
LoRA steps at the 1B shape with 4 layers are 2.1 times as fast for it on answers of 13 tokens, and
1.3 times on answers of 145. Those of the others are there a few rows at a time, so that memory does
not grow with their number: 2.2 instead of 3.3 GiB for 4 long answers (2 cores of an Intel Xeon with
AMX).
Letters: T tokens, D hidden size, L supervised positions, V vocabulary.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llama_lightning.model.linear import TILE, fills_up_rows
from llama_lightning.records import IGNORE_INDEX

# Positions whose logits are in memory at a time, at most, and with a frozen head on a GPU.
# 1,024 take 0.25 GiB in bf16 at the vocabulary of Llama 3, however many there are. Each chunk reads
# a frozen head's weights twice, and without instructions for bf16 casts them: 915 positions took
# 1.3 times the CPU time in chunks of 256, in fp32 1.1 times (2 cores of an AMD EPYC). A GPU, by
# arithmetic, waits for those weights below some 300 positions. Each further chunk of a trained head
# means a sum of its gradients in fp32 beside them: at width 512 as large as the bf16 logits of
# 1,024 positions, at 2,048 four times that.
# torch 2.13's linear_cross_entropy took 5 times as long in chunks of its own choice (2 cores of an
# Intel Xeon).
CHUNK, GPU_FROZEN_CHUNK = 1024, 512
# Of those, positions whose softmax each thread of a CPU computes at a time: what it needs stays in
# the cache, and the loss of 264 positions takes 0.9 of the CPU time with a frozen head of width
# 2,048, and 0.6 with a trained one of 512 (the same Xeon, in slices of 16 positions). In slices of
# 8, two threads take 0.85 of that again for the softmax of 132 positions (2 cores of an Intel Xeon
# with AMX). A GPU would wait for the launches.
SLICE_A_THREAD = 4


def supervised_positions(labels: Tensor) -> Tensor:
    """Index those of (T,) labels that carry loss, (L,)."""
    return (labels != IGNORE_INDEX).nonzero().squeeze(1)


def _chunks(
    hidden_LD: Tensor, targets_L: Tensor, *, trained: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    size = CHUNK if trained or hidden_LD.device.type == "cpu" else GPU_FROZEN_CHUNK
    count = max(1, math.ceil(len(targets_L) / size))  # of one size: few left over cost much
    parts = (tensor.tensor_split(count) for tensor in (hidden_LD, targets_L))
    return zip(*parts, strict=True)


def _filled_up(hidden_LD: Tensor, lm_head: nn.Module) -> Tensor:
    """Append zeros up to a whole tile of rows, where each number of rows has kernels of its own.

    They add nothing to any gradient. oneDNN keeps some 1,000 kernels, between which the heap falls
    to pieces: by the 100th full step at width 512 a process took 1.46 GiB at most, so 1.25; by the
    20th LoRA step at the 1B shape with 4 layers 1.69, so 1.57 (2 cores of an AMD EPYC with
    AVX512-BF16).
    """
    if not fills_up_rows(next(lm_head.parameters())):
        return hidden_LD
    return F.pad(hidden_LD, (0, 0, 0, -len(hidden_LD) % TILE))


def _slices(logits_LV: Tensor, targets_L: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield some rows at a time, and their log-probabilities in fp32 at least, until the next."""
    wide = torch.promote_types(logits_LV.dtype, torch.float32)
    if logits_LV.device.type != "cpu":
        yield logits_LV, targets_L, logits_LV.log_softmax(-1, wide)
        return
    size = SLICE_A_THREAD * torch.get_num_threads()
    # In the same memory each time: 132 positions take 0.6 of the time, 520 half of it, and glibc's
    # heap does not grow by a slice for each of them, 50 MB in all (the Xeon with AMX).
    rooms = logits_LV.new_empty(2, min(size, len(logits_LV)), logits_LV.shape[1], dtype=wide)
    for logits, targets in zip(
        torch.split(logits_LV, size), torch.split(targets_L, size), strict=True
    ):
        room, result = rooms[:, : len(logits)]
        yield logits, targets, torch.log_softmax(room.copy_(logits), -1, out=result)


def _loss_into_gradient(logits_LV: Tensor, targets_L: Tensor) -> Tensor:
    """Sum the losses, and put the sum's gradient in the place of the logits."""
    losses = []
    for logits, targets, gradient in _slices(logits_LV, targets_L):
        losses.append(-gradient.gather(1, targets[:, None]).sum())
        gradient.exp_()[torch.arange(len(targets), device=targets.device), targets] -= 1.0
        logits.copy_(gradient)
    return torch.stack(losses).sum()


def _add(sums: list[Tensor], terms: list[Tensor]) -> list[Tensor]:
    """Add in fp32 at least; without sums yet, the terms are their beginning."""
    if not sums:
        return terms
    wide = [torch.promote_types(total.dtype, torch.float32) for total in sums]
    return [
        total.to(dtype).add_(term) for total, dtype, term in zip(sums, wide, terms, strict=True)
    ]


class _SummedCrossEntropy(torch.autograd.Function):
    """Take each chunk's gradient as soon as its loss is known, and drop its logits."""

    @staticmethod
    def forward(
        ctx: Any, lm_head: nn.Module, targets_L: Tensor, hidden_LD: Tensor, *weights: Tensor
    ) -> Tensor:
        losses: list[Tensor] = []
        of_hidden: list[Tensor] = []
        of_weights: list[Tensor] = []
        for hidden, targets in _chunks(hidden_LD, targets_L, trained=bool(weights)):
            with torch.enable_grad():
                hidden = hidden.detach().requires_grad_()
                logits: Tensor = lm_head(_filled_up(hidden, lm_head))
            # The gradient takes the logits' place, which saves two copies in fp32: a linear layer
            # needs what went in, not what came out.
            gradient = logits.detach()
            losses.append(_loss_into_gradient(gradient[: len(targets)], targets))
            gradients = list(torch.autograd.grad(logits, [hidden, *weights], gradient))
            of_hidden.append(gradients.pop(0))
            of_weights = _add(of_weights, gradients)
            del logits, gradient, gradients  # large, and not needed while the next are made
        stored = (total.to(weight.dtype) for total, weight in zip(of_weights, weights, strict=True))
        ctx.save_for_backward(torch.cat(of_hidden), *stored)
        return torch.stack(losses).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, factor: Tensor) -> Any:
        of_hidden, *of_weights = ctx.saved_tensors
        # Nothing the size of a trained head is copied: scaled in place, and handed on as a tensor
        # that nobody else holds, to which autograd adds a tied embedding's gradient in place.
        scaled = (total.mul_(factor).detach() for total in of_weights)
        return None, None, of_hidden * factor, *scaled


def summed_cross_entropy(hidden_LD: Tensor, targets_L: Tensor, lm_head: nn.Module) -> Tensor:
    """Sum the losses over positions. The caller divides: it alone knows the step's token count.

    The gradient exists from the start, once: a second backward pass through it is an error.

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
        all_logits = lm_head(_filled_up(hidden, lm_head))[: len(targets)]
        for logits, goals, log_probabilities in _slices(all_logits, targets):
            picked = log_probabilities.gather(1, goals[:, None])
            losses.append(-picked.sum())
            # max, as argmax takes 6 times as long on a CPU
            hits.append((logits.max(-1).indices == goals).sum())
    return torch.stack(losses).sum(), torch.stack(hits).sum()
