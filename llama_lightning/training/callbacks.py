"""What a person watches of a run: throughput and the parameter table."""

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table

from llama_lightning.records import Batch


class Throughput(Callback):
    """Log tokens per second over all ranks.

    The tokens counted are those of records: there are no pads among them.
    """

    def __init__(self) -> None:
        self._tokens, self._since = 0, 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._tokens, self._since = 0, time.perf_counter()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep validation out of the count."""
        self._paused = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on counting."""
        self._since += time.perf_counter() - self._paused

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        """Log at the end of a step, when the loop is about to log anyway."""
        self._tokens += len(batch.tokens)
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if trainer.global_step % every and not trainer.is_last_batch:
            return
        rate = self._tokens * trainer.world_size / (time.perf_counter() - self._since)
        self._tokens, self._since = 0, time.perf_counter()
        pl_module.log("perf/tokens_per_second", rate, prog_bar=True)


class ParameterTable(Callback):
    """Print what is trained and what is frozen, by part of the network."""

    PARTS = {
        "lora_": "LoRA",
        "embed_tokens": "embedding",
        "lm_head": "head",
        "self_attn": "attention",
        "mlp": "MLP",
        "norm": "norms",
    }

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the table once, on the first rank."""
        if not trainer.is_global_zero:
            return
        counts: dict[str, list[int]] = {}
        types: dict[str, set[str]] = {}
        for name, parameter in pl_module.named_parameters():
            part = next((p for key, p in self.PARTS.items() if key in name), "other")
            count = counts.setdefault(part, [0, 0])
            count[0 if parameter.requires_grad else 1] += parameter.numel()
            types.setdefault(part, set()).add(str(parameter.dtype).removeprefix("torch."))
        trained, frozen = (sum(column) for column in zip(*counts.values(), strict=True))
        table = Table("part", "type", title="Parameters", title_justify="left")
        for heading in ("trained", "frozen"):
            table.add_column(heading, justify="right")
        for part, (part_trained, part_frozen) in counts.items():
            table.add_row(
                part, ", ".join(sorted(types[part])), f"{part_trained:,}", f"{part_frozen:,}"
            )
        table.add_section()
        share = trained / (trained + frozen)
        table.add_row("all", "", f"{trained:,} ({share:.2%})", f"{frozen:,}")
        Console().print(table)
