"""What stands around the training step: checkpoints, throughput, the parameter table."""

import tempfile
import time
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from rich.console import Console
from rich.table import Table

from llama_lightning.errors import UsageError
from llama_lightning.records import Batch
from llama_lightning.training.signals import Stopped


class LastAndBest(ModelCheckpoint):
    """Keep two files: `last.ckpt` to go on from, and `best.ckpt` by validation loss.

    last.ckpt is only ever written between two optimizer steps, for the gradients accumulated inside
    a step are not in the file. A validation may fall inside one: it writes best.ckpt alone.

    Args:
        every_n_train_steps: write last.ckpt after so many optimizer steps, and always at the end;
            a killed run loses at most so many. 0 writes it at the end only.
        dirpath: folder of the files; by default checkpoints/ in the run's folder.
        monitor: the metric that best.ckpt has the best of.
    """

    def __init__(
        self,
        every_n_train_steps: int = 100,
        dirpath: str | None = None,
        monitor: Literal["val/loss", "val/token_accuracy"] = "val/loss",
    ) -> None:
        super().__init__(
            dirpath=dirpath,
            filename="best",
            monitor=monitor,
            mode="max" if monitor == "val/token_accuracy" else "min",
            save_last=True,
            save_on_train_epoch_end=False,
            enable_version_counter=False,
        )
        self.every = every_n_train_steps
        self._last_step = 0
        self._given = dirpath is not None
        self._stop_at_step_end = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find out early that the folder cannot be written.

        Raises:
            UsageError: it cannot, or the run has no folder.
        """
        super().setup(trainer, pl_module, stage)
        if stage != "fit" or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if not (trainer.loggers or self._given):
            raise UsageError(
                "trainer.logger false leaves the run without a folder; set checkpoint.dirpath"
            )
        folder = Path(str(self.dirpath))
        if trainer.is_global_zero:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=folder):
                    pass
            except OSError as error:
                raise UsageError(
                    f"checkpoint.dirpath: {folder} cannot be written ({error.strerror})"
                ) from error

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A resumed run has its last.ckpt already."""
        super().on_train_start(trainer, pl_module)
        self._last_step = trainer.global_step

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what a resumed run knew, and say where its best stays."""
        super().load_state_dict(state_dict)
        best = state_dict.get("best_model_path")
        if best and not self.best_model_path:
            score = float(state_dict["best_model_score"])
            rank_zero_info(f"the best so far, {self.monitor} {score:.4f}, stays in {best}")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write last.ckpt every so many optimizer steps."""
        self._hold_stop(trainer)
        if self.every and trainer.global_step % self.every == 0:
            self._write_last(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write best.ckpt if this validation was the best so far."""
        # Lightning's own would skip it where last.ckpt has just been written at the same step.
        dry = trainer.fast_dev_run or trainer.sanity_checking  # type: ignore[attr-defined]
        if trainer.state.fn == TrainerFn.FITTING and not dry:
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
            self._hold_stop(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write last.ckpt, so that fit always ends with one."""
        self._write_last(trainer)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Write last.ckpt when a signal stopped the run between two steps."""
        if isinstance(exception, Stopped) and exception.step_complete:
            self._write_last(trainer)
            if trainer.is_global_zero:
                path = Path(self.last_model_path)
                print(f"stopped behind step {trainer.global_step}; go on with --ckpt_path {path}")

    @staticmethod
    def _inside_step(trainer: Trainer) -> bool:
        progress = trainer.fit_loop.epoch_loop.batch_progress
        done = progress.current.processed  # type: ignore[attr-defined]
        return bool(done % trainer.accumulate_grad_batches) and not progress.is_last_batch

    def _hold_stop(self, trainer: Trainer) -> None:
        """Let a stop that EarlyStopping or max_time asks for inside a step wait for its end.

        Lightning calls this callback behind all others, so their wishes are known.
        """
        if self._inside_step(trainer):
            self._stop_at_step_end |= trainer.should_stop
            trainer.should_stop = False
        elif self._stop_at_step_end:
            trainer.should_stop = True

    def _write_last(self, trainer: Trainer) -> None:
        # The count stands still during an accumulation: write once, and only what is new.
        # The Trainer sets some of its attributes where mypy cannot see them.
        dry = trainer.fast_dev_run  # type: ignore[attr-defined]
        if trainer.global_step != self._last_step and not dry and not self._inside_step(trainer):
            self._last_step = trainer.global_step
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))


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
