"""Where a run's memory goes: weights, gradients, optimizer state, and the rest of the peak.

Parts are counted from their tensors; the peak is the device's own count. What is left between them
is activations, logits, workspace, and on a CPU the program itself.
"""

import resource
import sys
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table
from torch import Tensor


def host_peak_gib() -> float:
    """Most memory this process has had resident, in GiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)  # bytes there, KiB elsewhere


def _gib(tensors: Any) -> float:
    return float(sum(t.numel() * t.element_size() for t in tensors)) / 2**30


def gradients_gib(model: torch.nn.Module) -> float:
    """Count the gradients that are there."""
    return _gib(p.grad for p in model.parameters() if p.grad is not None)


def memory_parts(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, gradients: float
) -> dict[str, float]:
    """Count the tensors of a training step by part, in GiB; a tied head counts once.

    Args:
        model: with trained and frozen weights.
        optimizer: after a step, which makes its state.
        gradients: GiB counted before the step, which frees them.
    """
    parameters = list(model.parameters())
    states = (state for state in optimizer.state.values())
    return {
        "frozen_weights": _gib(p for p in parameters if not p.requires_grad),
        "trained_weights": _gib(p for p in parameters if p.requires_grad),
        "gradients": gradients,
        "optimizer_state": _gib(t for s in states for t in s.values() if isinstance(t, Tensor)),
    }


class MemoryReport(Callback):
    """Log memory by part, and print it as a table when fit ends.

    Args:
        table: print the table; the scalars memory/* are logged in any case.
    """

    def __init__(self, table: bool = True) -> None:
        self.table = table
        self._parts: dict[str, float] = {}
        self._gradients = 0.0

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Count the gradients, which the step will free."""
        self._gradients = gradients_gib(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log with the other figures of a step."""
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        if not self._parts or trainer.global_step % every == 0:
            self._parts = memory_parts(pl_module, trainer.optimizers[0], self._gradients)
        if trainer.global_step % every:
            return
        for name, value in self._measure(pl_module.device).items():
            pl_module.log(f"memory/{name}_gib", value)

    def _measure(self, device: torch.device) -> dict[str, float]:
        host = host_peak_gib()
        peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else host
        rest = max(0.0, peak - sum(self._parts.values()))
        return {**self._parts, "rest_of_peak": rest, "peak": peak, "host_peak": host}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the table, on the first rank."""
        if not (self.table and trainer.is_global_zero and self._parts):
            return
        table = Table("part", title=f"Memory on {pl_module.device}", title_justify="left")
        table.add_column("GiB", justify="right")
        measured = self._measure(pl_module.device)
        if pl_module.device.type == "cpu":
            del measured["host_peak"]  # the same
        for name, gib in measured.items():
            if name == "peak":
                table.add_section()
            table.add_row(name.replace("_", " "), f"{gib:.3f}")
        Console().print(table)
