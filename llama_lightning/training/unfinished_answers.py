"""Leave a module whole whose run ends between two batches of prompts.

By a signal, or by an error in another part of the run: a module is not told of it, a callback is.
"""

from lightning.pytorch import Callback, LightningModule, Trainer


class UnfinishedAnswers(Callback):
    """Have answers that a run has begun given up when it fails."""

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Give the module its weights back, whatever comes next."""
        pl_module.stop_answering()  # type: ignore[operator]
