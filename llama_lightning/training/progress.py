"""How far a run is: one bar over all optimizer steps."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar

from llama_lightning.progress import Bar


class RunProgress(ProgressBar):
    """A bar with loss, tokens/s and time left; without a terminal, a line at intervals.

    Lightning's own bars show one epoch at a time and, without a terminal, print only at the end.
    """

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._bar: Bar | None = None
        self._done = 0  # batches, where no step counts them

    def disable(self) -> None:
        """Say nothing; Lightning calls this on all ranks but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Speak again."""
        self._enabled = True

    def _start(self, what: str, total: int, done: int = 0) -> None:
        self._done = done
        self._bar = Bar(what, total, done) if self._enabled else None

    def _update(self, done: int, metrics: str) -> None:
        if self._bar is not None:
            self._bar.update(done, metrics)

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    @staticmethod
    def _metrics(trainer: Trainer) -> str:
        shown = {"train/loss": "loss {:.3f}", "val/loss": "val {:.3f}"}
        shown["perf/tokens_per_second"] = "{:,.0f} tokens/s"
        values = trainer.callback_metrics
        return "  ".join(text.format(float(values[k])) for k, text in shown.items() if k in values)

    # fit

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a bar over all steps of the run."""
        steps = trainer.estimated_stepping_batches
        total = trainer.global_step if steps == float("inf") else int(steps)
        self._start("fit", total, trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the bar when a step is complete."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self._update(trainer.global_step, self._metrics(trainer))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the finished bar."""
        self._stop()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Free the terminal for the message."""
        self._stop()

    # predict and test

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a bar over all batches of prompts."""
        self._start("predict", int(sum(trainer.num_predict_batches)))

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a bar over all batches, to measure and to answer."""
        self._start("test", int(sum(trainer.num_test_batches)))

    def _count(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Move the bar by a batch."""
        self._done += 1
        self._update(self._done, "")

    on_predict_batch_end = on_test_batch_end = _count

    def _end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the finished bar."""
        self._stop()

    on_predict_end = on_test_end = _end
