"""Checkpoint files: written whole or not at all, read without running code.

Lightning writes to $TMPDIR and moves; across file systems a kill leaves half a file under the final
name. Here the temporary file stands beside its target and is renamed.
"""

import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from llama_lightning.errors import CheckpointError


def read_checkpoint(
    path: str | Path, map_location: Any = "cpu", *, mmap: bool = False
) -> dict[str, Any]:
    """Load a checkpoint of this project with weights_only=True.

    Args:
        path: the file.
        map_location: device of its tensors.
        mmap: read a tensor when it is used, for a look at the rest.

    Raises:
        CheckpointError: a URL, no such file, damaged, or not a checkpoint of this project.
    """
    if "://" in str(path):
        raise CheckpointError(
            f"--ckpt_path {path}: URLs are refused, a checkpoint from the network could run code; "
            "download it and give the file"
        )
    if Path(path).is_dir():
        found = sorted(Path(path).rglob("last.ckpt"))
        raise CheckpointError(
            f"--ckpt_path {path}: a folder; give a file"
            + (f", e.g. {found[-1]}" if found else ", e.g. checkpoints/last.ckpt of a run")
        )
    if not Path(path).is_file():
        beside = ", ".join(sorted(str(p) for p in Path(path).parent.glob("*.ckpt")))
        hint = f"; there are {beside}" if beside else ""
        raise CheckpointError(f"--ckpt_path {path}: no such file{hint}")
    try:
        checkpoint = torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
    except Exception as error:  # torch raises any of a dozen types for a damaged or hostile file
        raise CheckpointError(
            f"--ckpt_path {path}: damaged, or not a checkpoint "
            f"({type(error).__name__}; {Path(path).stat().st_size:,} bytes)"
        ) from error
    if not isinstance(checkpoint, dict) or "llama_lightning" not in checkpoint:
        raise CheckpointError(
            f"--ckpt_path {path}: not a checkpoint written by `fit`; base weights go to "
            "model.base_model"
        )
    return checkpoint


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's way to checkpoint files, made atomic and safe."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Write beside the target, flush to disk, rename."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(target.name + ".tmp")
        with temporary.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name itself
        finally:
            os.close(folder)

    def load_checkpoint(
        self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read with weights_only=True, whatever was asked for."""
        return read_checkpoint(path, map_location)
