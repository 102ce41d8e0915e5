"""A Hugging Face folder, config.json and safetensors, into a Llama and back.

The names of our modules are the names of the file's tensors, so there is no table of names here.
Only safetensors: a pickle could run code.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llama_lightning.errors import WeightsError
from llama_lightning.model.config import LlamaConfig, config_from_huggingface, config_to_huggingface
from llama_lightning.model.llama import Llama
from llama_lightning.weights.assembly import NamedTensor, assemble_llama

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"
MAX_SHARD_BYTES = 5e9  # as transformers 4 has it
HEAD = "lm_head.weight"
TYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}  # that a base may have, and their names


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


def _tensors(files: list[Path], stays: str | None) -> Iterator[NamedTensor]:
    """Read tensor after tensor, so that one at a time is in memory beside the module.

    Tensors of the type that stays, if any, share one mapping of their file.
    """
    for file in files:
        try:
            shard: Any = safe_open(file, framework="pt")
            for name in list(shard.keys()):
                if name.endswith("rotary_emb.inv_freq"):
                    continue  # old exports hold it; it is a function of the config
                # What was read stays mapped, and counts as memory of the process, until the file is
                # closed: it is opened anew for each copy, and once for what stays in it, as two
                # mappings would each count what lies between. A head may be one tensor too many.
                is_kept = name != HEAD and shard.get_slice(name).get_dtype() == stays
                opened: Any = shard if is_kept else safe_open(file, framework="pt")
                tensor = opened.get_tensor(name)
                yield NamedTensor(name, f"{file}: {name}", tensor)
                del opened, tensor
        except (SafetensorError, OSError) as error:
            raise WeightsError(
                f"{file}: damaged or cut ({error}); it has {file.stat().st_size:,} bytes, "
                "download it again"
            ) from error


def load_huggingface(
    folder: Path, config: LlamaConfig, *, dtype: torch.dtype, mapped: bool = False
) -> Llama:
    """Build a Llama of the folder's tensors, one by one.

    Args:
        folder: with config.json and safetensors.
        config: usually `read_config(folder)`; dropout and qkv_bias may differ.
        dtype: type of the weights in memory.
        mapped: as in base.py.

    Raises:
        WeightsError: see `assemble_llama`; or a file that is damaged.
    """
    tensors = _tensors(weight_files(folder), stays=TYPES.get(dtype) if mapped else None)
    return assemble_llama(
        tensors, config, dtype=dtype, mapped=mapped, folder=folder, config_file=CONFIG_FILE
    )


def _shards(tensors: dict[str, Tensor], max_bytes: float) -> list[dict[str, Tensor]]:
    """Share tensors out, in their order, over as many files as keep each within `max_bytes`."""
    shards: list[dict[str, Tensor]] = [{}]
    room = max_bytes
    for name, tensor in tensors.items():
        if tensor.nbytes > room and shards[-1]:
            shards.append({})
            room = max_bytes
        shards[-1][name] = tensor
        room -= tensor.nbytes
    return shards


def save_huggingface(
    model: Llama,
    folder: Path,
    *,
    bos_id: int | None = None,
    stop_ids: Sequence[int] = (),
    max_shard_bytes: float = MAX_SHARD_BYTES,
) -> None:
    """Write config.json and the weights; a tied head is not written twice.

    Args:
        model: without LoRA.
        folder: made if it is not there.
        bos_id: for config.json: the token every text begins with.
        stop_ids: likewise: the tokens that end a response.
        max_shard_bytes: one file up to this size, else several and their index.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: p.detach().contiguous() for name, p in model.named_parameters()}
    shards = _shards(tensors, max_shard_bytes)
    names = [WEIGHTS_FILE]
    if len(shards) > 1:
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        index = {
            "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
            "weight_map": {key: name for name, s in zip(names, shards, strict=True) for key in s},
        }
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, folder / name, metadata={"format": "pt"})
    dtype = str(model.model.embed_tokens.weight.dtype).removeprefix("torch.")
    raw = config_to_huggingface(model.config, dtype, bos_id=bos_id, stop_ids=stop_ids)
    (folder / CONFIG_FILE).write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
