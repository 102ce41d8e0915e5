"""Which checkpoints a run keeps, and when they are written: between optimizer steps, never inside.

How a file is written and read is in checkpoint_io.py, what it holds in stored_module.py.
"""

import tempfile
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from llama_lightning.errors import UsageError
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
                how = f"--ckpt_path {path}"
                if not self._given and (config := path.parents[1] / "config.yaml").is_file():
                    how = f"python -m llama_lightning fit --config {config} {how}"
                print(f"stopped behind step {trainer.global_step}; go on with {how}")

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
