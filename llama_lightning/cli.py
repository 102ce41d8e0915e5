"""The command line: verbs over one YAML config. The one file that sees every layer."""

import contextlib
import logging
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

VERBS = """\
usage: python -m llama_lightning VERB --config FILE [--KEY VALUE ...]

verbs:
  fit        fine-tune a base model; writes lightning_logs/version_N/
  validate   loss, perplexity and token accuracy of the validation part
  test       the same of the test part, and exact match and ROUGE-L of its answers
  predict    answer the test part (or data.predict_path); writes responses.jsonl
  export     write a trained model for transformers, vLLM, PEFT, llama.cpp or Ollama
  judge      grade responses.path by a judge (judge.backend); writes verdicts.jsonl, report.html
  compare    two judged runs, A B: the difference, its interval; writes compare.html

Every key of the YAML file can be given on the command line: --model.lora.rank 8
  python -m llama_lightning fit --help                       all keys with their meaning
  python -m llama_lightning fit --config FILE --print_config the config a run would use
  python -m llama_lightning fit --config configs/tiny_lora.yaml          start here
"""
TRAINER_VERBS = ("fit", "validate", "test", "predict", "export")
NAMES = (*TRAINER_VERBS, "judge", "compare")


@contextlib.contextmanager
def _signals_stop() -> Iterator[None]:
    """End with the shell's code for Ctrl-C and SIGTERM, 130 and 143, wherever they come.

    Lightning ends with 1 on a Ctrl-C outside its loops, where the judge grades.
    """

    def stop(signum: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + signum)

    if threading.current_thread() is not threading.main_thread():  # Python allows no other
        yield
        return
    before = {signum: signal.signal(signum, stop) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb and return the process's exit code.

    Errors a user can mend are one line on stderr and a code: 2 for usage, 3 for data, weights,
    checkpoints and judges.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(VERBS, end="")
        return 0 if given else 2
    # On a CPU whose cores others use too, OpenMP threads that spin while they wait for each other
    # take the very core that the other needs (tests/benchmarks/busy_cores.py). It is read when
    # torch is imported.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    # Everything heavy is imported behind the help.
    from llama_lightning.errors import UserError

    try:
        if given[0] not in NAMES:
            from llama_lightning.errors import UsageError

            what = "the verb goes first" if given[0].startswith("-") else f"unknown verb {given[0]}"
            raise UsageError(f"{what}; verbs are {', '.join(NAMES)}")
        from llama_lightning.usage import plain_file_errors

        with _signals_stop(), plain_file_errors():
            if given[0] in TRAINER_VERBS:
                _run(given)
            else:
                from llama_lightning import verbs

                getattr(verbs, given[0])(given[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _run(arguments: list[str]) -> None:
    """Parse and run; turn the libraries' errors that a user can mend into one line."""
    import argparse
    import inspect
    import textwrap
    from pathlib import Path

    # First, as torch and Lightning are imported faster through the package's own names.
    from llama_lightning import AlpacaDataModule, LlamaModule, Trainer

    # isort: split
    import lightning.pytorch
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
    from torch import distributed

    from llama_lightning.errors import UsageError
    from llama_lightning.evaluation.callbacks import (
        JudgeCallback,
        ResponseWriter,
        SampleResponses,
        TestScores,
    )
    from llama_lightning.evaluation.judge import JudgeConfig
    from llama_lightning.keys import help_text, keys_of
    from llama_lightning.training.checkpoint_io import read_checkpoint
    from llama_lightning.training.export import ExportAtEnd
    from llama_lightning.training.last_and_best import LastAndBest
    from llama_lightning.training.memory import MemoryReport
    from llama_lightning.usage import (
        check_keys,
        compilers_part,
        given_keys,
        plain_reason,
        short_export_keys,
        users_part,
    )

    SECTIONS = {
        "model": LlamaModule,
        "data": AlpacaDataModule,
        "checkpoint": LastAndBest,
        "export": ExportAtEnd,
        "samples": SampleResponses,
        "memory": MemoryReport,
        "responses": ResponseWriter,
        "judge": JudgeConfig,
        "trainer": Trainer,
    }
    if "--help" in arguments or "-h" in arguments:
        usage = f"usage: python -m llama_lightning {arguments[0]} --config FILE [--KEY VALUE ...]"
        names = inspect.signature(lightning.pytorch.Trainer).parameters
        lightnings = ", ".join(name for name in names if name not in ("max_steps", "self"))
        closing = textwrap.fill(f"  and Lightning's own: {lightnings}", 100, subsequent_indent="  ")
        closing += "\n\nother\n  --seed_everything  --ckpt_path FILE  --print_config"
        if arguments[0] == "export":
            closing += "\n  --format  --output  --dtype  --overwrite are short for --export.*"
        print(help_text(usage, SECTIONS, closing))
        return
    if arguments[0] == "export":
        arguments = short_export_keys(arguments)
    _quiet_libraries()

    class RunConfig(SaveConfigCallback):
        """Write config.yaml beside the run, and what was chosen in it to the loggers."""

        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            """Write config.yaml only into a folder of the run's own."""
            # All ranks ask for it, as it is a broadcast.
            self.folder = Path(trainer.log_dir or ".")
            self.save_to_log_dir = self.folder != Path(trainer.default_root_dir)
            super().setup(trainer, pl_module, stage)

        def save_config(self, trainer: Any, pl_module: Any, stage: str) -> None:
            """Log the values that the config file and the command line give, not the defaults."""
            given = {key for key, _ in given_keys(arguments[1:])}
            # A run's own config.yaml gives every value, so that not all that is given was chosen.
            defaults = {k: str(v) for k, v in vars(self.parser.get_defaults().as_flat()).items()}
            for prefix, kind in SECTIONS.items():
                defaults |= {k: shown.rpartition(" = ")[2] for k, shown, _ in keys_of(kind, prefix)}
            chosen = {}
            for key, value in vars(self.config.as_flat()).items():
                name = key.replace(".init_args", "")
                if name in given and value is not None and str(value) != defaults.get(name):
                    chosen[name] = value if isinstance(value, (bool, int, float)) else str(value)
            for logger in trainer.loggers:
                logger.log_hyperparams(chosen)
                if hasattr(logger, "log_artifact") and self.save_to_log_dir:
                    logger.log_artifact("config.yaml", self.folder / "config.yaml")

    class CLI(LightningCLI):
        """LightningCLI with our callbacks, and every check before weights are read."""

        @staticmethod
        def subcommands() -> dict[str, set[str]]:
            # Only the verb that runs: to add all keys to the parsers of the other four takes 0.8 s
            # of a core of an AMD EPYC.
            verbs = LightningCLI.subcommands() | {"export": {"model", "datamodule"}}
            return {arguments[0]: verbs[arguments[0]]}

        def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> Any:
            if subcommand != "export":
                return super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
            # Its arguments are the keys of the callback, which Lightning would add a second time.
            parser = self.init_parser(**kwargs)
            self._add_arguments(parser)
            parser.add_argument("--ckpt_path", type=str)
            parser.add_argument("--weights_only", type=bool)  # in a run's own config; always so
            self._subcommand_method_arguments[subcommand] = ["ckpt_path"]
            return parser

        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            # Last: Lightning calls it behind the others, and `_hold_stop` relies on that.
            parser.add_lightning_class_args(LastAndBest, "checkpoint")
            for prefix in ("export", "samples", "memory", "responses"):
                parser.add_lightning_class_args(SECTIONS[prefix], prefix)
            parser.add_lightning_class_args(JudgeCallback, "judge")
            parser.set_defaults({"seed_everything": 42, "trainer.log_every_n_steps": 10})
            parser.link_arguments(
                "model",
                "data.init_args.base_folder",
                compute_fn=lambda model: str(model.folder),
                apply_on="instantiate",
            )

        def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
            verb = self._subcommand_parsers[arguments[0]]
            if arguments[0] in ("validate", "test"):
                verb.set_defaults({"verbose": False})  # see `report`
            known = list(verb.get_defaults().keys(branches=True))
            for prefix in ("model", "data"):
                known += [key for key, _, _ in keys_of(SECTIONS[prefix], prefix)]
            check_keys(arguments[1:], known)
            super().parse_arguments(parser, args)

        def _parse_ckpt_path(self) -> None:
            """Never let a checkpoint's hyper-parameters override the command line in silence.

            Lightning would; `check_checkpoint` shows both values instead.
            """

        def before_instantiate_classes(self) -> None:
            config = self.config[self.subcommand]
            path = config.get("ckpt_path")
            self.checkpoint = None
            if path:
                read = read_checkpoint(path, mmap=True)
                self.checkpoint = {key: read[key] for key in ("llama_lightning", "global_step")}

        def check(self) -> None:
            """Everything that can be wrong and is not in a weights file."""
            if self.checkpoint is not None:
                resume = self.subcommand == "fit"
                self.model.check_checkpoint(self.checkpoint, resume=resume)
            self.model.check_base()
            vocabulary, size = self.model.llama_config.vocab_size, self.datamodule.tokenizer.size
            if size > vocabulary:
                raise UsageError(
                    f"the tokenizer {self.datamodule.tokenizer_path} has {size:,} tokens, the "
                    f"embedding of {self.model.base_model} only {vocabulary:,}; set data.tokenizer "
                    "to the tokenizer of this base model"
                )

        def before_fit(self) -> None:
            assert isinstance(self.trainer, Trainer)
            self.trainer.check()
            self.check()

        before_validate = before_test = before_predict = before_export = check

        def export(self, **arguments: Any) -> None:
            """Run the verb with what stands under `export` in the config."""
            given = dict(self.config.export.export)
            if given["format"] == "none":  # is about the end of fit
                given["format"] = "auto"
            assert isinstance(self.trainer, Trainer)
            self.trainer.export(**arguments, **given)

        def report(self) -> None:
            """Print what was measured as one line; Lightning's table has a column a loader."""
            measured = self.trainer.callback_metrics.items()
            if self.trainer.is_global_zero:
                print("  ".join(f"{name} {float(value):.4f}" for name, value in measured))

        after_validate = after_test = report

        def after_fit(self) -> None:
            callback = self.trainer.checkpoint_callback
            # The run's own config: it has what the command line changed. All ranks ask, as it is a
            # broadcast.
            config = Path(self.trainer.log_dir or ".") / "config.yaml"
            if not (self.trainer.is_global_zero and isinstance(callback, LastAndBest)):
                return
            last = callback.last_model_path or self.config.fit.ckpt_path
            if last is None:  # fast_dev_run
                return
            last = Path(last)
            if self.checkpoint and self.checkpoint["global_step"] == self.trainer.global_step:
                print(
                    f"nothing was trained: {self.config.fit.ckpt_path} is at step "
                    f"{self.trainer.global_step} already, where this run ends; trainer.max_steps "
                    "or trainer.max_epochs sets a later end"
                )
            print(f"trained weights: {last}")
            if not callback.best_model_path:
                print("no best.ckpt: no validation in this run (trainer.val_check_interval)")
            if config.is_file():
                print(
                    f"next: python -m llama_lightning predict --config {config} --ckpt_path {last}"
                )

    try:
        CLI(
            LlamaModule,
            AlpacaDataModule,
            save_config_callback=RunConfig,
            save_config_kwargs={"overwrite": True},
            trainer_class=Trainer,
            trainer_defaults={"callbacks": [TestScores()]},
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,  # LlamaModule has its own
            parser_kwargs={
                "exit_on_error": False,
                "prog": "python -m llama_lightning",
                arguments[0]: {"allow_abbrev": False, "exit_on_error": False},
            },
            args=arguments,
        )
        if distributed.is_available() and distributed.is_initialized():
            # Lightning leaves gloo's threads to the end of the process, which may abort on them.
            distributed.barrier()
            distributed.destroy_process_group()
    except argparse.ArgumentError as error:
        inner = users_part(error)
        raise (UsageError(plain_reason(str(error))) if inner is error else inner) from error
    except MisconfigurationException as error:
        text = " ".join(str(error).split())
        if "accelerator" in text or "backend" in text:
            text = f"trainer.accelerator: {text} Use --trainer.accelerator cpu (or auto)"
        raise UsageError(text) from error
    except ValueError as error:
        raise users_part(error) from error
    except RuntimeError as error:
        if (plain := compilers_part(error)) is None:
            raise
        raise plain from error


def _quiet_libraries() -> None:
    """Leave out advertising, and warnings about choices that are made on purpose here."""
    said = re.compile("💡|TPU available|Trainer.fit` stopped")
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch.trainer.setup"):
        logging.getLogger(name).addFilter(lambda record: not said.search(record.getMessage()))
    # It misses a kernel for 4-bit products on a CPU, which nothing here computes.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    for message in (
        ".*does not have many workers.*",  # records are in memory
        ".*dataloader is not resumable.*",  # our sampler is
        ".*logging interval.*",  # a short run is logged at its end
        ".*LightningCLI's args parameter.*",
        ".*LeafSpec.*",
        ".*sync_dist=True.*",  # torchmetrics has reduced over the ranks already
        ".*Checkpoint directory .* exists.*",
        ".*dirpath has changed.*",
    ):
        warnings.filterwarnings("ignore", message)
