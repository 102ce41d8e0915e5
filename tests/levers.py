"""What a step or an answer costs without each of its levers: the plain way, with the same result.

Tests hold the losses of both ways together; benchmarks divide their costs. A switch is given how to
put another thing in the place of one: pytest's `monkeypatch.setattr`, or `setattr`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llama_lightning.model import continuous_batch, grid_attention, llama, loss, ragged_rows
from llama_lightning.model.embedding import Embedding
from llama_lightning.model.llama import Backbone
from llama_lightning.model.rms_norm import RMSNorm
from llama_lightning.records import IGNORE_INDEX, Batch, Prefixes
from llama_lightning.training import llama_module
from llama_lightning.training.llama_module import LlamaModule

Put = Callable[[Any, str, Any], None]


def plain_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Write the norm out, for autograd to go back through."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


def plain_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Write the gate out, for autograd to go back through."""
    return F.silu(gate) * up


def plain_loss(hidden: Tensor, targets: Tensor, lm_head: nn.Module) -> Tensor:
    """Compute all logits, and their loss in fp32 at least."""
    logits: Tensor = lm_head(hidden)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide, targets, reduction="sum", ignore_index=IGNORE_INDEX)


# What is computed


def padded_rows(put: Put) -> None:
    """Pad each row to the longest, and compute every cell."""
    flat = Backbone.forward

    def forward(
        self: Backbone,
        tokens: Tensor,
        *,
        positions: Tensor,
        boundaries: Tensor,
        wanted: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        lengths = boundaries.diff()
        dense = tokens[ragged_rows.padded_grid(boundaries[:-1], lengths)]
        rows = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        hidden = flat(self, dense)[rows, positions]
        return hidden if wanted is None else hidden[wanted]

    put(Backbone, "forward", forward)


def beginnings_apart(put: Put) -> None:
    """Compute what records share for each of them."""
    shared = Backbone.forward

    def forward(
        self: Backbone, tokens: Tensor, *, prefixes: Prefixes | None = None, **place: Any
    ) -> Tensor:
        return shared(self, tokens, **place)

    put(Backbone, "forward", forward)


def whole_last_layer(put: Put) -> None:
    """Compute the last layer's output projection and MLP at every position."""
    only_wanted = Backbone.forward

    def forward(
        self: Backbone, tokens: Tensor, *, wanted: Tensor | None = None, **place: Any
    ) -> Tensor:
        hidden = only_wanted(self, tokens, **place)
        return hidden if wanted is None else hidden[wanted]

    put(Backbone, "forward", forward)


def logits_everywhere(put: Put) -> None:
    """Compute the logits of all positions, at once, in fp32."""

    def all_positions(labels: Tensor) -> Tensor:
        return torch.arange(len(labels))

    put(llama_module, "supervised_positions", all_positions)
    put(llama_module, "summed_cross_entropy", plain_loss)


def logits_at_once(put: Put) -> None:
    """Compute the logits of all supervised positions at once, in fp32, and go back through them."""
    put(llama_module, "summed_cross_entropy", plain_loss)


def trained_base(put: Put) -> None:
    """Compute gradients of frozen weights too; the optimizer does not know them."""
    step = LlamaModule.training_step
    frozen: list[nn.Parameter] = []

    def training_step(self: LlamaModule, batch: Batch, batch_idx: int) -> Tensor:
        frozen.extend(parameter for parameter in self.parameters() if not parameter.requires_grad)
        for parameter in frozen:
            parameter.requires_grad_()
        return step(self, batch, batch_idx)

    def on_after_backward(self: LlamaModule) -> None:
        while frozen:
            parameter = frozen.pop()
            parameter.grad = None
            parameter.requires_grad_(False)

    put(LlamaModule, "training_step", training_step)
    put(LlamaModule, "on_after_backward", on_after_backward)


def kept_gradients(put: Put) -> None:
    """Free gradients when the next are computed, as Lightning does."""
    put(LlamaModule, "optimizer_step", super(LlamaModule, LlamaModule).optimizer_step)


# How


def autograds_norm(put: Put) -> None:
    """Leave the norm's backward pass to autograd."""
    put(RMSNorm, "forward", lambda norm, x: plain_norm(x, norm.weight, norm.eps))


def autograds_gate(put: Put) -> None:
    """Leave the backward pass of the MLP's gate to autograd."""
    put(llama, "swiglu", plain_swiglu)


def autograds_attention(put: Put) -> None:
    """Leave the backward pass of attention on a CPU to autograd."""
    put(grid_attention, "CPU_HAS_GROUPS", False)


def autograds_embedding(put: Put) -> None:
    """Leave the embedding's backward pass to autograd."""
    put(Embedding, "forward", nn.Embedding.forward)


def narrow_attention(put: Put) -> None:
    """Compute attention on a CPU in the run's type."""
    put(grid_attention, "CPU_LEAST", torch.bfloat16)


def all_queries(put: Put) -> None:
    """Let a record ask for what it shares with others, too."""
    put(ragged_rows, "MAX_OWN", 0.0)


def one_grid(put: Put) -> None:
    """Let attention pad all rows to the longest."""
    put(ragged_rows, "MIN_FILL", 1e-9)


def rows_as_they_are(put: Put) -> None:
    """Multiply any number of rows."""
    for module in (llama, loss):
        put(module, "fills_up_rows", lambda weight: False)


# Generation


def computed_beginnings(put: Put) -> None:
    """Compute all of a prompt, whatever is in the cache already."""
    put(continuous_batch, "_nearest", lambda prompt, others: (0, 0))


def logits_of_prompts(put: Put) -> None:
    """Compute the logits of every token of a prompt; the head is a tied one."""
    only_wanted = Backbone.forward

    def forward(
        self: Backbone, tokens: Tensor, *, wanted: Tensor | None = None, **place: Any
    ) -> Tensor:
        hidden = only_wanted(self, tokens, **place)
        if wanted is None:
            return hidden
        F.linear(hidden, self.embed_tokens.weight)
        return hidden[wanted]

    put(Backbone, "forward", forward)


WITHOUT: dict[str, Callable[[Put], None]] = {
    "equal beginnings once": beginnings_apart,
    "padding-free rows": padded_rows,
    "a last layer only where it is wanted": whole_last_layer,
    "logits only at labels": logits_everywhere,
    "logits chunk by chunk": logits_at_once,
    "frozen weights": trained_base,
    "freed gradients": kept_gradients,
    "a norm's own backward pass": autograds_norm,
    "a gate's own backward pass": autograds_gate,
    "attention's own backward pass": autograds_attention,
    "an embedding's own backward pass": autograds_embedding,
    "attention in fp32": narrow_attention,
    "own queries": all_queries,
    "similar rows in a grid": one_grid,
    "rows in multiples": rows_as_they_are,
}
ANSWERING_WITHOUT: dict[str, Callable[[Put], None]] = {
    "copied beginnings": computed_beginnings,
    "logits only of a prompt's last token": logits_of_prompts,
}
