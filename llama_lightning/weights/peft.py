"""A PEFT adapter, adapter_config.json and adapter_model.safetensors, into our LoRA and back.

The names of its tensors are ours behind a prefix. A setting that our LoRA does not have is refused,
never ignored.
Source: tuners/lora/config.py and utils/save_and_load.py of huggingface/peft.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from llama_lightning.errors import WeightsError
from llama_lightning.model.llama import Llama
from llama_lightning.model.lora import LLAMA_LINEARS, LoRAConfig
from llama_lightning.weights.assembly import check_values, first_of

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
HEAD = "lm_head.base_layer.weight"  # PEFT writes a copy of the base's head beside its update

# Every other key has to be null, false or empty: it would change what the adapter computes.
READ = {"r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "peft_type"}
ABOUT = {"task_type", "base_model_name_or_path", "revision", "auto_mapping", "peft_version"}
ABOUT |= {"inference_mode"}
HARMLESS: dict[str, tuple[Any, ...]] = {  # values that change nothing here
    "bias": ("none",),
    # The others (pissa, olora, corda, loftq ...) take what they put into A and B out of the base.
    "init_lora_weights": (True, "gaussian", "orthogonal"),
    "megatron_core": ("megatron.core",),
    "qalora_group_size": (16,),
}


def _weights_file(folder: Path) -> Path:
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        why = "; adapter_model.bin is not read, a pickle could run code" if pickled else ""
        raise WeightsError(f"model.adapter: {folder} has no {WEIGHTS_FILE}{why}")
    return path


def _shapes(folder: Path) -> dict[str, list[int]]:
    """List names and shapes of an adapter's tensors, without reading them."""
    path = _weights_file(folder)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise WeightsError(
            f"{path}: damaged or cut ({error}); it has {path.stat().st_size:,} bytes"
        ) from error


def _config(raw: dict[str, Any], adapted: set[str]) -> LoRAConfig:
    """Read the dictionary of an adapter_config.json.

    Args:
        raw: as PEFT writes it.
        adapted: last names of the layers that the adapter has tensors of.

    Raises:
        ValueError: a number missing, or a setting that our LoRA does not have.
    """
    if raw.get("peft_type") != "LORA":
        raise ValueError(f"peft_type is {raw.get('peft_type')!r}, not 'LORA'")
    for key, value in raw.items():
        if value and key not in READ | ABOUT and value not in HARMLESS.get(key, ()):
            raise ValueError(f"{key}={value!r} is not supported")
    targets = raw.get("target_modules")
    if isinstance(targets, list):
        adapted = {str(target).rpartition(".")[2] for target in targets}
    # A pattern is not matched again: the tensors say what it has matched.
    linears = [name for name in [*LLAMA_LINEARS, "lm_head"] if name in adapted]
    if not linears:
        raise ValueError(f"target_modules={targets!r} names no linear layer of a Llama")
    rank, alpha = raw.get("r"), raw.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1:
        raise ValueError(f"r={rank!r} is not a rank")
    if not isinstance(alpha, (int, float)):
        raise ValueError(f"lora_alpha={alpha!r} is not a number")
    if raw.get("use_rslora"):
        alpha *= math.sqrt(rank)  # its scale is alpha / sqrt(rank), ours alpha / rank
    return LoRAConfig(rank, float(alpha), float(raw.get("lora_dropout") or 0.0), linears)


def read_peft_config(folder: Path) -> LoRAConfig:
    """Read an adapter's settings.

    A layer that is not a Llama's is left out of the targets, as PEFT does.

    Raises:
        WeightsError: no adapter there, or one with settings that our LoRA does not have.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise WeightsError(f"model.adapter: {folder} has no {CONFIG_FILE}; give PEFT's folder")
    ending = ".lora_A.weight"
    adapted = {
        name.removesuffix(ending).rpartition(".")[2]
        for name in _shapes(folder)
        if name.endswith(ending)
    }
    try:
        return _config(json.loads(path.read_text(encoding="utf-8")), adapted)
    except (ValueError, TypeError, AttributeError) as error:
        raise WeightsError(f"{path}: {error}") from error


def agreed_lora(given: LoRAConfig, folder: Path) -> LoRAConfig:
    """Take the settings of an adapter, unless others are given.

    Args:
        given: the run's; of rank 0 nothing is given. Its dropout may differ.
        folder: of the adapter.

    Raises:
        WeightsError: the run's rank, alpha or targets are not the adapter's.
    """
    adapter = read_peft_config(folder)
    if not given.rank:
        return adapter
    pairs = {
        "rank": (given.rank, adapter.rank),
        "alpha": (given.alpha, adapter.alpha),
        "target_modules": (sorted(given.target_modules), sorted(adapter.target_modules)),
    }
    if differing := [name for name, (ours, theirs) in pairs.items() if ours != theirs]:
        shown = "; ".join(
            f"model.lora.{name} is {pairs[name][0]}, the adapter {folder} has {pairs[name][1]}"
            for name in differing
        )
        raise WeightsError(f"{shown}. Set model.lora.rank to 0 to take all of it from the adapter")
    return given


def _parameters(model: Llama) -> dict[str, nn.Parameter]:
    """List what an adapter may hold, by PEFT's names."""
    named = model.named_parameters()
    return {PREFIX + name: p for name, p in named if ".lora_" in name or name == HEAD}


def check_peft(model: Llama, folder: Path) -> None:
    """Hold names and shapes of an adapter's tensors against a network, reading none of them.

    Args:
        model: with LoRA; it may be on the meta device.
        folder: of the adapter.

    Raises:
        WeightsError: a tensor missing, too many or misshapen.
    """
    path, there, here = _weights_file(folder), _shapes(folder), _parameters(model)
    if extra := sorted(there.keys() - here.keys()):
        raise WeightsError(f"{path}: not part of this model's LoRA: {first_of(extra)}")
    if missing := sorted(here.keys() - there.keys() - {PREFIX + HEAD}):
        raise WeightsError(f"{path}: tensors are missing: {first_of(missing)}")
    for name, shape in there.items():
        if shape != list(here[name].shape):
            raise WeightsError(
                f"{path}: {name} has shape {tuple(shape)}, {CONFIG_FILE} and the base model mean "
                f"{tuple(here[name].shape)}"
            )


@torch.no_grad()
def load_peft(model: Llama, folder: Path) -> None:
    """Put an adapter's tensors into a network's LoRA, in its type.

    Raises:
        WeightsError: see `check_peft`; or values that are quantised or not finite; or a head that
            is not the base model's.
    """
    check_peft(model, folder)
    path, here = _weights_file(folder), _parameters(model)
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
            tensor, parameter = file.get_tensor(name), here[name]
            check_values(f"{path}: {name}", tensor)
            if name != PREFIX + HEAD:
                parameter.copy_(tensor)
            elif not torch.equal(tensor.to(parameter.dtype), parameter):
                raise WeightsError(f"{path}: {name} is not the head of this base model")


def save_peft(model: Llama, lora: LoRAConfig, folder: Path, *, base_model: str) -> None:
    """Write an adapter that PeftModel.from_pretrained loads.

    Args:
        model: with LoRA.
        lora: what it was injected with.
        folder: made if it is not there.
        base_model: folder or hub name that PEFT is to look for the base under.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        PREFIX + name: parameter.detach().contiguous()
        for name, parameter in model.named_parameters()
        if ".lora_" in name
    }
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    raw = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": lora.rank,
        # Some readers take whole numbers only.
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": sorted(lora.target_modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
    }
    (folder / CONFIG_FILE).write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
