"""AdamW in 32 or 8 bits, which parameters decay, and the learning rate step by step."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn


@dataclass(frozen=True)
class OptimizerConfig:
    """How weights are updated. All counts are in optimizer steps.

    Attributes:
        name: `adamw`; bitsandbytes' `adamw8bit` (a quarter of the optimizer's memory), or
            `paged_adamw8bit`, whose state may move to the host when the GPU is full.
        lr: learning rate after the warmup.
        weight_decay: decoupled decay of matrices; norms, biases and embeddings do not decay.
        betas: averaging of the first and second moment.
        eps: added to the root of the second moment.
        init_lr: learning rate of the first step; by default lr.
        warmup: fraction of all steps in which the rate goes linearly from init_lr to lr.
        eta_min: learning rate of the last step, reached by a cosine; by default lr.
    """

    name: Literal["adamw", "adamw8bit", "paged_adamw8bit"] = "adamw"
    lr: float = 2e-4
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    init_lr: float | None = None
    warmup: float = 0.0
    eta_min: float | None = None

    def __post_init__(self) -> None:
        if not 0.0 < self.lr < math.inf:
            raise ValueError(f"optimizer.lr is {self.lr}; use a value above 0, e.g. 2e-4")
        if not 0.0 <= self.warmup < 1.0:
            raise ValueError(f"optimizer.warmup is {self.warmup}; use a fraction in [0, 1)")
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ValueError(f"optimizer.betas is {list(self.betas)}; use values in [0, 1)")
        if self.weight_decay < 0.0:
            raise ValueError(f"optimizer.weight_decay is {self.weight_decay}; use 0 or more")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Sort the trainable parameters: matrices decay; norms and biases do not; nor do embeddings.

    Embeddings stand apart because bitsandbytes' author advises 32-bit state for them
    (huggingface/transformers#14819). A tied head is the embedding and counted once.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    matrices, vectors, embedded = [], [], []
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in embeddings:
            embedded.append(parameter)
        elif parameter.ndim < 2:
            vectors.append(parameter)
        else:
            matrices.append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": weight_decay, "optim_bits": 8},
        {"params": vectors, "weight_decay": 0.0, "optim_bits": 8},
        {"params": embedded, "weight_decay": 0.0, "optim_bits": 32},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Make the optimizer of a model's trainable parameters."""
    groups = parameter_groups(model, config.weight_decay)
    settings: dict[str, Any] = {"lr": config.lr, "betas": tuple(config.betas), "eps": config.eps}
    if config.name == "adamw":
        for group in groups:
            del group["optim_bits"]
        return torch.optim.AdamW(groups, **settings, fused=True)

    # Imported here: it takes a second, and only this optimizer needs it.
    import bitsandbytes

    class GroupedAdamW8bit(bitsandbytes.optim.AdamW8bit):  # type: ignore[misc, name-defined]
        """The bits of the state are a group's setting; bitsandbytes has a global registry."""

        def get_config(self, gindex: int, pindex: int, group: dict[str, Any]) -> dict[str, Any]:
            return {**super().get_config(gindex, pindex, group), "optim_bits": group["optim_bits"]}

    # Paged memory is CUDA's; elsewhere bitsandbytes falls back to the other, with a warning.
    paged = config.name == "paged_adamw8bit"
    optimizer: torch.optim.Optimizer = GroupedAdamW8bit(groups, **settings, is_paged=paged)
    return optimizer


def learning_rate(step: int, total_steps: int, config: OptimizerConfig) -> float:
    """Compute the rate of one optimizer step, `step` counted from 0."""
    init_lr = config.lr if config.init_lr is None else config.init_lr
    eta_min = config.lr if config.eta_min is None else config.eta_min
    warmup_steps = round(config.warmup * total_steps)
    if step < warmup_steps:
        return init_lr + (config.lr - init_lr) * step / warmup_steps
    # The last step, total_steps - 1, gets eta_min exactly.
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps))
    return eta_min + (config.lr - eta_min) * 0.5 * (1.0 + math.cos(math.pi * progress))


def build_scheduler(
    optimizer: torch.optim.Optimizer, total_steps: int, config: OptimizerConfig
) -> torch.optim.lr_scheduler.LambdaLR:
    """Make the schedule that `learning_rate` describes, to be stepped once an optimizer step."""
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate(step, total_steps, config) / config.lr
    )


def total_norm(parameters: Iterable[torch.Tensor]) -> torch.Tensor:
    """Compute the Euclidean norm of all gradients together, in fp32 at least.

    From the norms of rows: over a whole matrix in bf16, torch's sum on a CPU loses what is small
    beside it. Of a head of 128,256 by 2,048 its norm is 4 % too small, and takes 1.8 times as long
    (2 cores of an Intel Xeon with AMX).
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    rows = [torch.linalg.vector_norm(grad, dim=-1) for grad in grads]
    wide = [row.to(torch.promote_types(row.dtype, torch.float32)) for row in rows]
    return torch.nn.utils.get_total_norm(wide)
