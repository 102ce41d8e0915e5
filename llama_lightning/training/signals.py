"""Stop when asked to: a signal loses no step, and no unfinished run reports success.

Lightning stops inside an accumulation, whose gradients a resumed run would not have; it exits 0 on
SIGTERM, and does not look at one in predict.
"""

import os
import signal
import threading
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

# SIGUSR1 is how SLURM announces the end of a job's time; Windows has none.
SIGNALS = [signal.SIGINT, signal.SIGTERM, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else [])]


class Stopped(SystemExit):
    """The run was asked to stop; the exit code is the shell's for the signal, e.g. 130 or 143.

    Attributes:
        step_complete: an optimizer step has just ended: a checkpoint written now is exact.
    """

    def __init__(self, signum: int, *, step_complete: bool) -> None:
        super().__init__(128 + signum)
        self.step_complete = step_complete


class StopOnSignal(Callback):
    """Stop fit at the end of the optimizer step, every other verb at once.

    A second signal stops fit at once too. Ranks agree at each step's end, so that one signal to one
    rank stops all of them at the same step.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._training = False
        self._process = os.getpid()

    def _listen(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the place of Lightning's handlers, which it sets just before its loops start."""
        self._process = os.getpid()
        if threading.current_thread() is threading.main_thread():  # Python allows no other
            for signum in SIGNALS:
                signal.signal(signum, self._handle)

    on_sanity_check_start = on_validation_start = on_test_start = on_predict_start = _listen

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on there are steps to complete."""
        self._listen(trainer, pl_module)
        self._training = True

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a loader process: a signal may reach the whole group, the main one decides
        if not self._training or self._received is not None:
            raise Stopped(signum, step_complete=False)
        self._received = signum
        # Not print(): the signal may have come in the middle of one.
        os.write(2, b"\nstopping at the end of this step; a second signal stops at once\n")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop all ranks behind a whole optimizer step."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        asked = self._received is not None
        if trainer.strategy.reduce_boolean_decision(asked, all=False):
            raise Stopped(self._received or signal.SIGTERM, step_complete=True)
