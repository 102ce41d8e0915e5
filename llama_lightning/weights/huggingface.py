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
from torch import Tensor, nn

from llama_lightning.errors import WeightsError
from llama_lightning.model.config import LlamaConfig, config_from_huggingface, config_to_huggingface
from llama_lightning.model.llama import Llama

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"
STORED_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


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


def _tensors(files: list[Path]) -> Iterator[tuple[Path, str, Tensor]]:
    """Read tensor after tensor, so that one at a time is in memory beside the module."""
    for file in files:
        try:
            with safe_open(file, framework="pt") as shard:
                for name in shard.keys():  # noqa: SIM118 - safe_open is no mapping
                    yield file, name, shard.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise WeightsError(
                f"{file}: damaged or cut ({error}); it has {file.stat().st_size:,} bytes, "
                "download it again"
            ) from error


def load_huggingface(folder: Path, config: LlamaConfig, *, dtype: torch.dtype) -> Llama:
    """Build a Llama on the meta device and put the folder's tensors into it, one by one.

    Biases of q, k and v that the config asks for and the folder lacks start at zero.

    Args:
        folder: with config.json and safetensors.
        config: usually `read_config(folder)`; dropout and qkv_bias may differ.
        dtype: type of the weights in memory.

    Raises:
        WeightsError: a tensor missing, too many, misshapen, quantised or not finite.
    """
    with torch.device("meta"):
        model = Llama(config)
    expected = dict(model.named_parameters())  # a tied head is listed once, as the embedding
    loaded: set[str] = set()
    tied_head: Tensor | None = None
    for file, name, tensor in _tensors(weight_files(folder)):
        if name.endswith("rotary_emb.inv_freq"):
            continue  # old exports hold it; it is a function of the config
        if name == "lm_head.weight" and config.tie_word_embeddings:
            tied_head = tensor
            continue
        if name not in expected:
            raise WeightsError(f"{file}: {name} is not part of a {CONFIG_FILE} of this kind")
        if tensor.shape != expected[name].shape:
            raise WeightsError(
                f"{file}: {name} has shape {tuple(tensor.shape)}, "
                f"{CONFIG_FILE} means {tuple(expected[name].shape)}"
            )
        if tensor.dtype not in STORED_DTYPES:  # cast, quantised weights would lose their scales
            raise WeightsError(f"{file}: {name} is {tensor.dtype}; quantised weights are not read")
        low, high = tensor.aminmax()  # NaN goes through both; no copy of the tensor is made
        if not (low.isfinite() and high.isfinite()):
            raise WeightsError(f"{file}: {name} holds NaN or infinity")
        _put(model, name, tensor.to(dtype, copy=True))
        loaded.add(name)
    absent_biases = {name for name in expected.keys() - loaded if name.endswith("_proj.bias")}
    for name in absent_biases:
        _put(model, name, torch.zeros(expected[name].shape, dtype=dtype))
    if absent_biases:
        from lightning.pytorch.utilities import rank_zero_info  # seconds, for a rare line

        rank_zero_info(f"model: {len(absent_biases)} q, k and v biases are new and start at zero")
        loaded |= absent_biases
    if missing := sorted(expected.keys() - loaded):
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise WeightsError(f"{folder}: tensors are missing: {', '.join(missing[:3])}{more}")
    model.tie_head()
    if tied_head is not None and not torch.equal(
        tied_head.to(dtype), model.model.embed_tokens.weight
    ):
        raise WeightsError(
            f"{folder}: {CONFIG_FILE} ties the head to the embedding, but lm_head.weight differs"
        )
    return model


def _put(model: nn.Module, name: str, tensor: Tensor) -> None:
    parent, _, last_name = name.rpartition(".")
    setattr(model.get_submodule(parent), last_name, nn.Parameter(tensor))


def save_huggingface(model: Llama, folder: Path) -> None:
    """Write config.json and model.safetensors; a tied head is not written twice."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: p.detach().contiguous() for name, p in model.named_parameters()}
    dtype = str(model.model.embed_tokens.weight.dtype).removeprefix("torch.")
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    text = json.dumps(config_to_huggingface(model.config, dtype), indent=2)
    (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
