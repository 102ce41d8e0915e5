"""A folder that appears whole or not at all: built beside its target, then renamed.

It knows no formats, only the names of the files that exports write.
"""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from llama_lightning.errors import UsageError, WeightsError

EXPORTED = ("*.json", "*.safetensors", "*.gguf", "Modelfile", "README.md")


def check_target(output: Path, *, overwrite: bool) -> None:
    """Refuse a target that holds something.

    Args:
        output: the folder to be.
        overwrite: an earlier export may be there, and nothing else.

    Raises:
        UsageError: a file, the working directory, a folder that is not empty, or one with files
            that no export writes.
    """
    if not output.exists():
        return
    if not output.is_dir():
        raise UsageError(f"output {output}: a file; name a folder")
    if output.samefile(Path.cwd()):
        raise UsageError(f"output {output}: the working directory; name a folder in it")
    there = sorted(output.iterdir())
    others = [path.name for path in there if not any(path.match(name) for name in EXPORTED)]
    if others and overwrite:
        raise UsageError(
            f"output {output}: {others[0]} in it is not of an export; it is not overwritten, "
            "name another folder"
        )
    if there and not overwrite:
        raise UsageError(
            f"output {output}: not empty ({there[0].name}); name another folder, or set overwrite"
        )


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
    output = output.absolute()
    beside = output.with_name(f".{output.name}.new")
    before = output.with_name(f".{output.name}.old")
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
