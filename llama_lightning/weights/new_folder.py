"""A folder that appears whole or not at all: built beside its target, then renamed.

It knows no formats, only the names of the files that exports write and the lines that say so.
"""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from llama_lightning.errors import UsageError, WeightsError

EXPORTED = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "adapter_config.json",
    "adapter_model.safetensors",
    "model-*.gguf",
    "README.md",
    "Modelfile",
)
# Other programs write files of these names too: the line by which an export of ours is known.
ORIGIN = {
    "README.md": "tags: [llama, llama-lightning]",
    "Modelfile": "# By llama_lightning. To serve it: ollama create NAME -f Modelfile",
}


def check_target(output: Path, *, overwrite: bool) -> None:
    """Refuse a target that holds something.

    An earlier export that lost its name when this one was killed gets it back first.

    Args:
        output: the folder to be.
        overwrite: an earlier export may be there, and nothing else.

    Raises:
        UsageError: a file, the working directory, a folder that is not empty, or one that is no
            earlier export.
    """
    _restore(output)
    if not output.exists():
        return
    if not output.is_dir():
        raise UsageError(f"output {output}: a file; name a folder")
    if output.samefile(Path.cwd()):
        raise UsageError(f"output {output}: the working directory; name a folder in it")
    there = sorted(output.iterdir())
    if there and not overwrite:
        raise UsageError(
            f"output {output}: not empty ({there[0].name}); name another folder, or set overwrite"
        )
    others = [path.name for path in there if not _is_exported(path)]
    if others:
        raise UsageError(
            f"output {output}: {others[0]} in it is not of an export; it is not overwritten, "
            "name another folder"
        )
    if there and not any(_has_line(output / name, line) for name, line in ORIGIN.items()):
        raise UsageError(
            f"output {output}: neither README.md nor Modelfile in it says that llama_lightning has "
            "exported it; it is not overwritten, name another folder"
        )


def _is_exported(path: Path) -> bool:
    return path.is_file() and any(path.match(name) for name in EXPORTED)


def _has_line(path: Path, line: str) -> bool:
    return path.is_file() and line in path.read_text("utf-8", errors="replace").splitlines()


def _before(output: Path) -> Path:
    """Where an earlier export stays until the new one has its name."""
    output = output.resolve()
    return output.with_name(f".{output.name}.old")


def _restore(output: Path) -> None:
    if not output.exists() and _before(output).is_dir():
        _before(output).replace(output.resolve())


@contextmanager
def new_folder(output: Path, *, overwrite: bool) -> Iterator[Path]:
    """Give a folder to build in; it takes its name at the end, or is gone.

    Args:
        output: the folder to be.
        overwrite: an earlier export there is replaced.

    Raises:
        UsageError: see `check_target`.
        WeightsError: it cannot be written, e.g. as the disk is full.
    """
    check_target(output, overwrite=overwrite)
    output = output.resolve()
    beside, before = output.with_name(f".{output.name}.new"), _before(output)
    try:
        for left_over in (beside, before):  # by an export that was killed
            shutil.rmtree(left_over, ignore_errors=True)
        beside.mkdir(parents=True)
        yield beside
        _flush(beside)
        if output.exists():
            output.replace(before)
        beside.replace(output)
        shutil.rmtree(before, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise WeightsError(
            f"output {output}: cannot be written ({_reason(error)}); nothing was left there. "
            "Make room, or name another folder"
        ) from error
    finally:
        _restore(output)
        shutil.rmtree(beside, ignore_errors=True)


def _flush(folder: Path) -> None:
    """Have the files on the disk, and readable to whom the folder is, before it gets its name."""
    for path in folder.iterdir():
        path.chmod(folder.stat().st_mode & 0o666)  # safetensors writes for the owner alone
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):  # numpy gives no number
        return error.strerror or f"no room: {error}"
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):  # Rust has its own words
        if f"os error {number}" in str(error) or f"code: {number}," in str(error):
            return os.strerror(number)
    return " ".join(str(error).split())
