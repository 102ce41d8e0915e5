"""The words of the command line: unknown keys and wrong values, said in one line.

jsonargparse answers a misspelt nested key with a page about unions. So keys are checked before it
parses, against the names it would accept, and its own errors are cut down to their innermost
reason.
"""

import contextlib
import difflib
import errno
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from llama_lightning.errors import UsageError, UserError

COMMAND_LINE = "the command line"
# Values that are classes of Lightning's with arguments of their own; jsonargparse checks those.
OPEN_KEYS = tuple(
    f"trainer.{key}" for key in ("callbacks", "logger", "plugins", "strategy", "profiler")
)


# Values that are mappings from a name of the user's own.
MAPPINGS = ("data.path", "data.columns")


def _flatten(value: Any, prefix: str = "") -> Iterator[str]:
    """List the dotted leaf keys of a parsed config; `init_args` is transparent."""
    if not isinstance(value, dict) or not value or prefix in MAPPINGS:
        yield prefix
        return
    for key, inner in value.items():
        if key == "class_path":
            continue
        dotted = prefix if key == "init_args" else f"{prefix}.{key}".lstrip(".")
        yield from _flatten(inner, dotted)


def read_config(path: Path) -> dict[str, Any]:
    """Read a YAML config.

    Raises:
        UsageError: missing, empty, broken, or not a mapping.
    """
    if not path.is_file():
        near = sorted(
            str(p) for p in (path.parent if path.parent.is_dir() else Path()).glob("*.yaml")
        )
        close = difflib.get_close_matches(str(path), near, 5, 0.0)
        hint = f"; there are {', '.join(close)}" if close else f"; looked for in {Path.cwd()}"
        problem = "a folder; name a file" if path.is_dir() else "no such file"
        raise UsageError(f"--config {path}: {problem}{hint}")
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise UsageError(f"--config {path}: byte {error.start} is not UTF-8") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not YAML"
        raise UsageError(f"--config {path}{where}: {problem}") from error
    if config is None:
        raise UsageError(f"--config {path}: the file is empty")
    if not isinstance(config, dict):
        raise UsageError(f"--config {path}: keys and values are needed, not {config!r}")
    return config


def config_files(arguments: list[str]) -> Iterator[str]:
    """List the config files that a command line names."""
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=False):
        if argument in ("--config", "-c") and following:
            yield following
        elif argument.startswith(("--config=", "-c=")):
            yield argument.partition("=")[2]


def given_keys(arguments: list[str]) -> Iterator[tuple[str, str]]:
    """List (dotted key, where it stands) for all keys of the config files and the command line."""
    for path in config_files(arguments):
        yield from ((key, path) for key in _flatten(read_config(Path(path))))
    for argument in arguments:
        key = argument[2:].partition("=")[0].rstrip("+")
        if argument.startswith("--") and key != "config":
            yield key.replace(".init_args", ""), COMMAND_LINE


# Names that other tools, and the original of this project, have for our keys.
ALIASES = {
    "learning_rate": "model.optimizer.lr",
    "warmup_ratio": "model.optimizer.warmup",
    "warmup_percentage": "model.optimizer.warmup",
    "lora_r": "model.lora.rank",
    "lora_rank": "model.lora.rank",
    "r": "model.lora.rank",
    "lora_alpha": "model.lora.alpha",
    "lora_dropout": "model.lora.dropout",
    "enable_lora": "model.lora.rank",
    "drop_rate": "model.dropout",
    "foundation_model": "model.base_model",
    "model_name_or_path": "model.base_model",
    "enable_gradient_checkpointing": "model.gradient_checkpointing",
    "use_8bit_optim": "model.optimizer.name",
    "max_gen_tokens": "model.generation.max_new_tokens",
    "max_length": "data.max_seq_len",
    "cutoff_len": "data.max_seq_len",
    "sequence_len": "data.max_seq_len",
    "data_path": "data.path",
    "micro_batch_size": "data.batch_size",
    "per_device_train_batch_size": "data.batch_size",
    "val_set_size": "data.val_fraction",
    "train_on_inputs": "data.train_on_prompt",
    "gradient_accumulation_steps": "trainer.accumulate_grad_batches",
    "epochs": "trainer.max_epochs",
    "num_epochs": "trainer.max_epochs",
    "num_train_epochs": "trainer.max_epochs",
    "num_train_iters": "trainer.max_steps",
    "device": "trainer.accelerator",
    "eval_freq": "trainer.val_check_interval",
    "generation_freq": "samples.every_n_steps",
    "use_bf16": "trainer.precision",
    "use_explicit_bfloat16": "trainer.precision",
    "lr_scheduling": "model.optimizer.warmup",
    "use_ollama_for_eval": "judge.backend",
    "ollama_model_name": "judge.model",
    "print_memory_usage": "memory.table",
    "preload_model": "ckpt_path",
    "output_dir": "trainer.default_root_dir",
    "model_save_path": "checkpoint.dirpath",
    "responses_save_path": "responses.path",
    "resume_from_checkpoint": "ckpt_path",
    "seed": "seed_everything",
}


def short_export_keys(arguments: list[str]) -> list[str]:
    """Write `--format hf` as `--export.format hf`, and `--overwrite` as what sets it to true."""
    written = []
    for argument, following in zip(arguments, [*arguments[1:], "--"], strict=True):
        name = re.sub(r"^--(?=(format|output|dtype|overwrite)(=|$))", "--export.", argument)
        alone = name == "--export.overwrite" and following.startswith("--")
        written.append(f"{name}=true" if alone else name)
    return written


def group_arguments(arguments: list[str], groups: tuple[str, ...]) -> Iterator[str]:
    """Write some groups of the config files as arguments, for a parser that knows no others."""
    for path in config_files(arguments):
        for group, values in read_config(Path(path)).items():
            if group not in groups:
                continue
            if not isinstance(values, dict):
                raise UsageError(f"{group} in {path}: keys and values are needed, not {values!r}")
            for key, value in values.items():
                if value is None:
                    continue
                text = value if isinstance(value, str) else json.dumps(value)
                yield f"--{group}.{key}={text}"


def check_keys(
    arguments: list[str], known: Iterable[str], groups: tuple[str, ...] | None = None
) -> None:
    """Refuse a key that nothing would read, naming the nearest that something would.

    Args:
        arguments: the command line.
        known: the keys that are read.
        groups: if given, keys of other groups may stand in a config file, for other verbs.

    Raises:
        UsageError: unknown key.
    """
    known = {*known, "help", "config", "print_config"}
    parents = {key[: match.start()] for key in known for match in re.finditer(r"\.", key)}
    known = sorted(known - parents)
    for key, where in given_keys(arguments):
        if key in known or key in parents or key.startswith(OPEN_KEYS):
            continue
        if key.endswith(".class_path") and key.removesuffix(".class_path") in parents:
            continue
        in_a_file = where != COMMAND_LINE
        if groups and in_a_file and key.partition(".")[0] not in groups:
            continue
        nearest = ALIASES.get(key.rpartition(".")[2])
        nearest = nearest or max(known, key=lambda name: _likeness(key, name))
        raise UsageError(f"unknown key {key} in {where}; did you mean {nearest}?")


def _likeness(key: str, name: str) -> float:
    """Score how near a name is: as a whole, and by its last part, which people know best."""
    last, name_last = key.rpartition(".")[2], name.rpartition(".")[2]
    ratios = (
        difflib.SequenceMatcher(None, given, there).ratio()
        for given, there in ((key, name), (last, name_last))
    )
    return sum(ratios)


# jsonargparse's words for a type, and ours.
WORDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "a text",
    "dict": "a mapping",
}


def plain_reason(text: str) -> str:
    """Cut one of jsonargparse's messages down to its innermost key and reason."""
    if "nrecognized arguments" in text:
        return f"{' '.join(text.split())}; a config file goes behind --config"
    if missing := re.search(r"arguments are required: (.+)", text):
        names = re.sub(r"\b\w+\.", "", missing[1])  # without the verb
        return f"{names}: not given; name a config, e.g. --config configs/tiny_lora.yaml"
    keys = [k for k in dict.fromkeys(re.findall(r'Parser key "([^"]+)"', text)) if k != "init_args"]
    unknown = r"Expected a dot import path string: (.+)|class_path '(.+)':\s+(?:No m|m)odule .*'"
    if no_class := re.search(unknown, text):
        return f"{'.'.join(keys)}: there is no class {no_class[1] or no_class[2]}"
    wanted = []
    for kind in re.findall(r"Expected an? (.+?)(?:\. Got value: .*)?$", text, re.MULTILINE):
        if literal := re.fullmatch(r"typing\.Literal\[(.*)\]", kind):
            wanted.append(f"one of {literal[1]}")
        elif (name := re.fullmatch(r"<class '(?:\w+\.)*(\w+)'>", kind)) and name[1] != "NoneType":
            wanted.append(WORDS.get(name[1], name[1]))
    value = re.search(r"(?:Got value|Given value): (.*)$", text, re.MULTILINE)
    if not wanted or value is None:
        return " ".join(text.split())
    return f"{'.'.join(keys)}: expected {' or '.join(dict.fromkeys(wanted))}, got {value[1]}"


NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def plain_file_errors() -> Iterator[None]:
    """Turn an error of the file system's into one line.

    Raises:
        UserError: there is no more room.
        UsageError: a file that cannot be used.
    """
    try:
        yield
    except OSError as error:
        if error.errno in NO_ROOM:
            what = error.filename or "the file that was being written"
            raise UserError(
                f"{what}: {error.strerror}; make room, what was written is kept"
            ) from error
        if error.filename is None or error.strerror is None:
            raise
        raise UsageError(f"{error.filename}: {error.strerror}") from error


def compilers_part(error: RuntimeError) -> UsageError | None:
    """Say what torch.compile could not do; None for another error."""
    # Private, but there is no public name for what a compiled function raises.
    from torch._dynamo.exc import TorchDynamoException

    if not isinstance(error, TorchDynamoException):
        return None
    lines = [line.strip() for line in str(error).splitlines() if not line.startswith("backend=")]
    reason = next((line for line in lines if line), type(error).__name__)
    return UsageError(f"model.compile: torch cannot compile here ({reason}); set it to false")


def users_part(error: BaseException) -> BaseException:
    """Find what a user can mend in an error that a library wrapped; else the error itself.

    Our dataclasses say what is wrong with a value by a ValueError; they know no exit codes.
    """
    import lightning  # behind the checks of keys, which are quick

    home = Path(str(lightning.__file__)).parent
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, UserError):
            return inner
        trace = inner.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        code = trace.tb_frame.f_code if trace is not None else None
        if code is not None and code.co_name == "__post_init__":
            return UsageError(f"model.{inner}")
        # What Lightning itself refuses by a ValueError is a setting of the Trainer.
        if code is not None and Path(code.co_filename).is_relative_to(home):
            return UsageError(f"trainer: {' '.join(str(inner).split())}")
        inner = inner.__cause__ or inner.__context__
    return error
