"""Lightning's Trainer with the parts that every run of this project needs."""

import secrets
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint, ProgressBar
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from llama_lightning.errors import DataError, UsageError
from llama_lightning.training.callbacks import ParameterTable, Throughput
from llama_lightning.training.checkpoint_io import AtomicCheckpointIO, read_checkpoint
from llama_lightning.training.clearml_logger import ClearMLLogger
from llama_lightning.training.export import Export, Format, StoredType, export
from llama_lightning.training.last_and_best import LastAndBest
from llama_lightning.training.llama_module import LlamaModule
from llama_lightning.training.progress import RunProgress
from llama_lightning.training.run_logger import RunLogger
from llama_lightning.training.signals import StopOnSignal
from llama_lightning.training.unfinished_answers import UnfinishedAnswers

# fp16 needs a loss scaler, whose overflows the check for finite gradients would stop.
PRECISIONS = ("bf16-mixed", "bf16-true", "32-true", "64-true")


class Trainer(pl.Trainer):
    """Lightning's Trainer, with our progress, table, throughput, logs and checkpoint files.

    Args:
        max_steps: stop after so many optimizer steps; null for no such limit.
        project_name: runs of a project stand together, in lightning_logs/PROJECT.
        experiment_name: the run's folder there, instead of version_N; a random text is appended, so
            that a second run does not meet the first.
        log_to_clearml: log to ClearML too; needs `pip install -e '.[clearml]'`.
        **kwargs: all other arguments of lightning.pytorch.Trainer.
    """

    def __init__(
        self,
        *,
        max_steps: int | None = None,
        project_name: str | None = None,
        experiment_name: str | None = None,
        log_to_clearml: bool = False,
        **kwargs: Any,
    ) -> None:
        # The paths that a run prints are then those that a user types.
        kwargs["default_root_dir"] = kwargs.get("default_root_dir") or "."
        # Lightning's sampler repeats and reorders records; the data module shares them out.
        kwargs["use_distributed_sampler"] = False
        for key, text in (("project_name", project_name), ("experiment_name", experiment_name)):
            if text is not None and (Path(text).name != text or text in ("", "..")):
                raise UsageError(f"trainer.{key} is {text!r}; use a name without /")
        if kwargs.get("logger") in (None, True):
            name = str(Path("lightning_logs", project_name or ""))
            # Not from the seeded generators: the same seed twice is two runs.
            version = f"{experiment_name}-{secrets.token_hex(3)}" if experiment_name else None
            kwargs["logger"] = [RunLogger(kwargs["default_root_dir"], name=name, version=version)]
            if log_to_clearml:
                task = str(version or Path(kwargs["logger"][0].log_dir).name)
                kwargs["logger"].append(
                    ClearMLLogger(project_name or "llama_lightning", task_name=task)
                )
        elif project_name or experiment_name or log_to_clearml:
            raise UsageError(
                "trainer.project_name, .experiment_name and .log_to_clearml are for the loggers "
                "that are made when trainer.logger is not given; name all loggers there"
            )
        given = kwargs.get("callbacks") or []
        callbacks = [given] if isinstance(given, pl.Callback) else list(given)
        callbacks += [StopOnSignal(), UnfinishedAnswers(), Throughput(), ParameterTable()]
        shown = kwargs.get("enable_progress_bar") is not False
        if shown and not any(isinstance(callback, ProgressBar) for callback in callbacks):
            callbacks.append(RunProgress())
        checkpoints = kwargs.get("enable_checkpointing") is not False and kwargs["logger"]
        if checkpoints and not any(isinstance(c, ModelCheckpoint) for c in callbacks):
            callbacks.append(LastAndBest())
        plugins = kwargs.get("plugins") or []
        kwargs["plugins"] = [*plugins] if isinstance(plugins, list) else [plugins]
        kwargs["plugins"].append(AtomicCheckpointIO())
        if SLURMEnvironment.detect():
            # Requeued by Lightning, a run would go on from inside a step; see StopOnSignal.
            kwargs["plugins"].append(SLURMEnvironment(auto_requeue=False))
        kwargs["callbacks"] = callbacks
        kwargs["enable_model_summary"] = False
        self.given_max_steps = max_steps
        self.given_max_epochs = kwargs.get("max_epochs")
        # Lightning takes null for 1000 epochs, with a warning.
        if max_steps is None and kwargs.get("max_epochs") is None:
            kwargs["max_epochs"] = -1
        try:
            super().__init__(max_steps=-1 if max_steps is None else max_steps, **kwargs)
        except (TypeError, MisconfigurationException) as error:
            if "devices" not in kwargs or "devices" not in str(error):
                raise
            raise UsageError(
                f"trainer.devices is {kwargs['devices']}; use auto, or a number of devices or "
                f"processes, 1 or more ({' '.join(str(error).split())})"
            ) from error

    def check(self) -> None:
        """Refuse a fit whose step would not be exact, or whose length is not given once.

        Raises:
            UsageError: both or none of max_steps and max_epochs, or one below 1; a strategy, a
                callback, a clipping or a precision that this project does not have.
        """
        if not isinstance(self.strategy, (SingleDeviceStrategy, DDPStrategy)):
            raise UsageError(
                f"trainer.strategy {type(self.strategy).__name__}: use auto or ddp; with sharded "
                "weights the step would not be exact"
            )
        if any(isinstance(c, GradientAccumulationScheduler) for c in self.callbacks):  # type: ignore[attr-defined]
            raise UsageError(
                "GradientAccumulationScheduler changes the accumulation behind the data's back; "
                "use trainer.accumulate_grad_batches"
            )
        if self.overfit_batches:  # type: ignore[attr-defined]
            raise UsageError(
                "trainer.overfit_batches changes the order of records; use a small file"
            )
        clip, algorithm = self.gradient_clip_val, self.gradient_clip_algorithm
        if algorithm not in (None, "norm"):
            raise UsageError(f"trainer.gradient_clip_algorithm {algorithm}: only norm is built")
        if clip is not None and clip < 0:
            raise UsageError(f"trainer.gradient_clip_val is {clip}; use a norm above 0, or null")
        if self.precision not in PRECISIONS:
            raise UsageError(
                f"trainer.precision {self.precision}: use one of {', '.join(PRECISIONS)}"
            )
        for name, value in (("steps", self.given_max_steps), ("epochs", self.given_max_epochs)):
            if value is not None and value < 1:
                raise UsageError(f"trainer.max_{name} is {value}; use 1 or more")
        if self.given_max_steps is not None and self.given_max_epochs is not None:
            raise UsageError(
                f"trainer.max_steps {self.given_max_steps} and trainer.max_epochs "
                f"{self.given_max_epochs} are both given; set one of them to null "
                "(--trainer.max_steps null)"
            )
        if self.given_max_steps is None and self.given_max_epochs is None:
            raise UsageError(
                "neither trainer.max_steps nor trainer.max_epochs is given; set one of them"
            )

    def export(
        self,
        model: LlamaModule,
        datamodule: pl.LightningDataModule,
        ckpt_path: str | None = None,
        format: Format = "auto",
        output: str | None = None,
        dtype: StoredType = "auto",
        overwrite: bool = False,
    ) -> None:
        """Write a trained model, or the base, for other programs.

        Args:
            model: the module, with its weights or still without.
            datamodule: its tokenizer, its template, and the validation part to measure on.
            ckpt_path: a file written by fit; without it the model as it is.
            format: `peft` (the adapter), `hf` (a folder for transformers and vLLM) or `gguf` (for
                llama.cpp and Ollama); `auto` is peft for LoRA and hf for a full run.
            output: the folder to write.
            dtype: type of the weights; `auto` is the one in which the run computes its products;
                `q8_0` is for gguf.
            overwrite: an earlier export in `output` is replaced.

        Raises:
            UsageError: a format that cannot hold it, or an output that is not empty.
            CheckpointError: a checkpoint of another base, or trained otherwise.
            WeightsError: a disk that is full.
        """
        if output is None:
            raise UsageError("output: not given; name the folder to write, --output FOLDER")
        if self.world_size > 1:
            raise UsageError("export runs in one process; set trainer.devices to 1")
        what = Export(Path(output), format, dtype, overwrite)
        what.check(model)
        untrained = ckpt_path is None and model.model is None and model.adapter is None
        if what.kind(model) == "peft" and untrained:
            raise UsageError("format peft: without ckpt_path there is no adapter; use hf or gguf")
        model.trainer = datamodule.trainer = self
        model.compile_blocks = False  # not for two losses
        try:
            datamodule.setup("validate")
        except DataError as error:
            print(f"the validation loss is not measured: {error}")
        model.configure_model()
        steps = 0
        if ckpt_path is not None:
            checkpoint = read_checkpoint(ckpt_path)
            model.on_load_checkpoint(checkpoint)
            model.load_state_dict(checkpoint["state_dict"], strict=False)
            datamodule.load_state_dict(checkpoint[type(datamodule).__qualname__])
            steps = int(checkpoint["global_step"])
        model = self.precision_plugin.convert_module(model)  # type: ignore[assignment]
        export(self, model.to(self.strategy.root_device), datamodule, what, steps=steps)
