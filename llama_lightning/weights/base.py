"""The one door to a base model's folder: which format it has, and then that format's reader.

Hugging Face's goes first where both are there.
"""

from pathlib import Path

import torch

from llama_lightning.errors import WeightsError
from llama_lightning.model.config import LlamaConfig
from llama_lightning.model.llama import Llama
from llama_lightning.weights import huggingface, meta


def _is_meta(folder: Path) -> bool:
    """Tell Meta's folder from Hugging Face's.

    Raises:
        WeightsError: it is neither.
    """
    if (folder / huggingface.CONFIG_FILE).is_file():
        return False
    if (folder / meta.PARAMS_FILE).is_file():
        return True
    original = folder / "original"  # where Meta's repositories on the hub keep their own format
    nearby = f"; give {original}" if (original / meta.PARAMS_FILE).is_file() else ""
    raise WeightsError(
        f"model.base_model: {folder} has no {huggingface.CONFIG_FILE} (Hugging Face) and no "
        f"{meta.PARAMS_FILE} (Meta){nearby}"
    )


def read_config(folder: Path) -> LlamaConfig:
    """Read the network's shape.

    Raises:
        WeightsError: no config there, or a network that is not a Llama of this kind.
    """
    return meta.read_config(folder) if _is_meta(folder) else huggingface.read_config(folder)


def check_files(folder: Path) -> None:
    """Find a missing file before any weight is read.

    Raises:
        WeightsError: no weights there, or a part of them missing.
    """
    _ = meta.weight_files(folder) if _is_meta(folder) else huggingface.weight_files(folder)


def load_base(
    folder: Path, config: LlamaConfig, *, dtype: torch.dtype, mapped: bool = False
) -> Llama:
    """Build a Llama with the folder's weights.

    Args:
        folder: of either format.
        config: usually `read_config(folder)`; dropout and qkv_bias may differ.
        dtype: type of the weights in memory.
        mapped: leave weights of this type in Hugging Face's files, which must stay as they are as
            long as the network lives, and let the system bring them to memory. They can be written
            to, and no file changes.

    Raises:
        WeightsError: a tensor missing, too many, misshapen, quantised or not finite, or a file that
            is damaged or refused.
    """
    if _is_meta(folder):  # whose rows are reordered
        return meta.load_meta(folder, config, dtype=dtype)
    return huggingface.load_huggingface(folder, config, dtype=dtype, mapped=mapped)
