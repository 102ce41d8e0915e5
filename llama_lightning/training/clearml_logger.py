"""A run as a ClearML task: scalars, hyper-parameters, texts, files and how it ended.

It hands on what the Trainer logs and patches nothing; it knows neither the model nor the data.
Source: https://clear.ml/docs/latest/docs/clearml_sdk/task_sdk
"""

import math
import signal
import sys
from argparse import Namespace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from llama_lightning.errors import UsageError

if TYPE_CHECKING:
    from clearml import Task

# The keys of Task.init's auto_connect_frameworks; those left out are on. False for all would leave
# detect_repository on, which sends the working tree's diff, and whose git processes hang when a
# data loader or ClearML's own reporter is forked at the wrong moment.
NOT_CONNECTED = dict.fromkeys(
    ("catboost", "detect_repository", "fastai", "gradio", "hydra", "joblib", "lightgbm")
    + ("matplotlib", "megengine", "pytorch", "scikit", "tensorboard", "tensorflow", "tfdefines")
    + ("xgboost",),
    False,
)


def _place(name: str) -> tuple[str, str]:
    """Say in which plot of ClearML's a metric goes, and under what name: `train/loss`, `run/x`."""
    title, slash, series = name.partition("/")
    return (title, series) if slash else ("run", name)


def _open_task(project_name: str, task_name: str) -> "Task":
    from clearml import Task
    from clearml.backend_api import Session
    from clearml.backend_api.session.session import LoginError

    try:
        if not Task.is_offline():
            # Task.init would try for hours to reach a server that is not there.
            Session(http_retries_config={"total": 0})
    except (LoginError, ValueError) as error:
        reason = str(error).splitlines()[0].rstrip("!.")
        raise UsageError(
            f"no ClearML server: {reason}; run `clearml-init`, or set CLEARML_API_HOST, "
            "CLEARML_API_ACCESS_KEY and CLEARML_API_SECRET_KEY, or CLEARML_OFFLINE_MODE=1 to keep "
            "the session in a file"
        ) from error
    # The process that ClearML forks to report inherits the mask: it outlives a signal to the whole
    # group, such as Ctrl-C's or a scheduler's, and sends what the stopping run still logs.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        Task.set_random_seed(None)  # or it would seed every generator anew, in the middle of a run
        task: Task = Task.init(
            project_name,
            task_name,
            reuse_last_task_id=False,
            auto_connect_arg_parser=False,
            auto_connect_frameworks=NOT_CONNECTED,
            auto_connect_streams=False,
            auto_resource_monitoring=False,
        )
        # Of the seven signals it took, StopOnSignal needs two, here and in the loaders' processes;
        # and a crash (SIGSEGV) that Python handles never ends.
        Task._remove_signal_hooks()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return task


class ClearMLLogger(Logger):
    """Log to ClearML; every run of a verb is a task of its own.

    The task opens at first use. In a list of loggers put TensorBoardLogger first: Lightning keeps
    the run's files in the first one's folder.

    Args:
        project_name: the project the task is filed under.
        task_name: the task's name; names need not be unique.

    Raises:
        UsageError: clearml is not installed, or, at first use, no server takes us in.
    """

    def __init__(self, project_name: str = "llama_lightning", task_name: str = "fit") -> None:
        if find_spec("clearml") is None:
            raise UsageError(
                "ClearMLLogger needs clearml, which is not installed; pip install -e '.[clearml]'"
            )
        super().__init__()
        self._project_name, self._task_name = project_name, task_name
        self._task: Task | None = None
        self._version: str | None = None
        self._checkpoint: ModelCheckpoint | None = None

    @property
    @rank_zero_experiment
    def experiment(self) -> "Task":
        """ClearML's task, for whatever else it can do."""
        if self._task is None:
            self._task = _open_task(self._project_name, self._task_name)
            self._version = self._task.id
        return self._task

    @property
    def name(self) -> str:
        """The project."""
        return self._project_name

    @property
    def version(self) -> str | None:
        """The id of the task opened last."""
        return self._version

    @property
    def save_dir(self) -> str | None:
        """Where the run keeps its files if this is its first logger."""
        return self._version and str(Path("lightning_logs", self._version))

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Add a point to the curve of each metric: `train/loss` is `loss` in the plot `train`."""
        logger = self.experiment.get_logger()
        for name, value in metrics.items():
            # Lightning adds the epoch to every call; ClearML would draw NaN and infinity as 0.
            if name != "epoch" and math.isfinite(value):
                logger.report_scalar(*_place(name), value=value, iteration=step or 0)

    @rank_zero_only
    def log_hyperparams(
        self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any
    ) -> None:
        """Add to the task's hyper-parameters, under General."""
        flat = vars(params) if isinstance(params, Namespace) else params
        self.experiment.update_parameters({f"General/{k}": str(v) for k, v in flat.items()})

    @rank_zero_only
    def log_text(self, key: str, columns: list[str], data: list[list[str]], step: int) -> None:
        """Log a table of texts, such as generations; the signature is WandbLogger's."""
        table = [columns, *data]
        self.experiment.get_logger().report_table(*_place(key), iteration=step, table_plot=table)

    @rank_zero_only
    def log_artifact(self, name: str, path: Path) -> None:
        """Upload a file, in the background.

        Raises:
            FileNotFoundError: there is no such file.
        """
        if not path.is_file():  # ClearML would take its name for a pattern
            raise FileNotFoundError(f"artifact {name}: no file {path}")
        self.experiment.upload_artifact(name, path)

    def after_save_checkpoint(self, checkpoint_callback: ModelCheckpoint) -> None:
        """Remember whose files to upload at the end; at every checkpoint it would be too much."""
        self._checkpoint = checkpoint_callback

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Upload last.ckpt and best.ckpt, and close the task as completed, stopped or failed."""
        task, checkpoint = self._task, self._checkpoint
        if task is None:
            return
        if checkpoint is not None:
            files = {
                "last.ckpt": Path(checkpoint.last_model_path),
                "best.ckpt": Path(checkpoint.best_model_path),
            }
            for name, path in files.items():
                if path.is_file():
                    self.log_artifact(name, path)
        self._task = self._checkpoint = None
        task.close()
        if status not in ("failed", "aborted"):
            return
        # Lightning finalizes where it handles the error. Closing has marked the task as completed.
        error = sys.exc_info()[1]
        reason = status if error is None else f"{type(error).__name__}: {error}"
        if isinstance(error, KeyboardInterrupt | SystemExit):
            task.mark_stopped(force=True, status_message=reason)
        else:
            task.mark_failed(force=True, status_reason=reason)
