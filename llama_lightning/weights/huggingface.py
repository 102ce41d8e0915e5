"""A Hugging Face folder, config.json and safetensors, into a Llama and back.

The names of our modules are the names of the file's tensors, so there is no table of names here.
Only safetensors: a pickle could run code.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from llama_lightning.errors import WeightsError
from llama_lightning.model.config import LlamaConfig, config_from_huggingface, config_to_huggingface
from llama_lightning.model.llama import Llama
from llama_lightning.weights.assembly import NamedTensor, assemble_llama

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"


def read_config(folder: Path) -> LlamaConfig:
    """Read a folder's config.json.

    Raises:
        WeightsError: no such file, or a network that is not a Llama of this kind.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise WeightsError(f"model.base_model: {folder} has no {CONFIG_FILE}")
    try:
        return config_from_huggingface(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{path}: {error}") from error


def weight_files(folder: Path) -> list[Path]:
    """List a folder's safetensors files, single or sharded, without opening them.

    Raises:
        WeightsError: none there, a shard missing, or a shard named outside the folder.
    """
    index = folder / INDEX_FILE
    if not index.is_file():
        if not (folder / WEIGHTS_FILE).is_file():
            raise WeightsError(
                f"model.base_model: {folder} has no weights ({WEIGHTS_FILE} or {INDEX_FILE}); "
                "only safetensors are read"
            )
        return [folder / WEIGHTS_FILE]
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted({str(name) for name in weight_map.values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{index}: not an index of safetensors ({error!r})") from error
    for name in names:
        if Path(name).name != name:
            raise WeightsError(f"{index}: '{name}' is not a file of this folder")
        if not (folder / name).is_file():
            raise WeightsError(f"{index}: the shard {name} is missing; download it again")
    return [folder / name for name in names]


def _tensors(files: list[Path]) -> Iterator[NamedTensor]:
    """Read tensor after tensor, so that one at a time is in memory beside the module."""
    for file in files:
        try:
            with safe_open(file, framework="pt") as shard:
                for name in shard.keys():  # noqa: SIM118 - safe_open is no mapping
                    if name.endswith("rotary_emb.inv_freq"):
                        continue  # old exports hold it; it is a function of the config
                    yield NamedTensor(name, f"{file}: {name}", shard.get_tensor(name))
        except (SafetensorError, OSError) as error:
            raise WeightsError(
                f"{file}: damaged or cut ({error}); it has {file.stat().st_size:,} bytes, "
                "download it again"
            ) from error


def load_huggingface(folder: Path, config: LlamaConfig, *, dtype: torch.dtype) -> Llama:
    """Build a Llama of the folder's tensors, one by one.

    Args:
        folder: with config.json and safetensors.
        config: usually `read_config(folder)`; dropout and qkv_bias may differ.
        dtype: type of the weights in memory.

    Raises:
        WeightsError: see `assemble_llama`; or a file that is damaged.
    """
    tensors = _tensors(weight_files(folder))
    return assemble_llama(tensors, config, dtype=dtype, folder=folder, config_file=CONFIG_FILE)


def save_huggingface(model: Llama, folder: Path) -> None:
    """Write config.json and model.safetensors; a tied head is not written twice."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: p.detach().contiguous() for name, p in model.named_parameters()}
    dtype = str(model.model.embed_tokens.weight.dtype).removeprefix("torch.")
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    text = json.dumps(config_to_huggingface(model.config, dtype), indent=2)
    (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
