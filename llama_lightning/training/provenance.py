"""What a checkpoint was trained with, held against the run that wants to read it.

Nothing here changes a run: two values that differ are both shown, and the run stops.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llama_lightning.errors import CheckpointError


def _settings(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """List what weights and optimizer state mean something with, by the names of the keys.

    Learning rate and decay stand in the optimizer's state too, and would override ours in silence.
    """
    lora, optimizer = arguments["lora"], arguments["optimizer"]
    lora = {**lora, "target_modules": sorted(lora["target_modules"])}
    optimizer = {**optimizer, "betas": list(optimizer["betas"])}
    return {
        **{f"model.lora.{key}": value for key, value in lora.items() if key != "dropout"},
        "model.qkv_bias": arguments["qkv_bias"],
        **{f"model.optimizer.{key}": value for key, value in optimizer.items()},
    }


def check_arguments(ours: Mapping[str, Any], theirs: Mapping[str, Any], *, resume: bool) -> None:
    """Compare the constructor arguments of two LlamaModules, ours and a checkpoint's.

    Args:
        ours: plain values, as `LlamaModule.arguments` gives them.
        theirs: likewise.
        resume: whether training goes on; only then the optimizer matters.

    Raises:
        CheckpointError: the checkpoint was trained with other settings.
    """
    here, there = _settings(ours), _settings(theirs)
    keys = [key for key in here if resume or not key.startswith("model.optimizer.")]
    if differing := [key for key in keys if here[key] != there.get(key)]:
        shown = "; ".join(
            f"{key} is {here[key]}, the checkpoint has {there.get(key)}" for key in differing
        )
        raise CheckpointError(f"{shown}. Set the checkpoint's value, or leave --ckpt_path out")


def check_tensors(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    """Compare names and shapes: what is misnamed would otherwise be loaded as nothing.

    Raises:
        CheckpointError: the checkpoint has other tensors.
    """
    here = {name: list(tensor.shape) for name, tensor in ours.items()}
    there = {name: list(tensor.shape) for name, tensor in theirs.items()}
    names = sorted(here.keys() | there.keys())
    if differing := [name for name in names if here.get(name) != there.get(name)]:
        first = differing[0]
        raise CheckpointError(
            f"{len(differing)} tensors differ from the checkpoint's, the first: {first} is "
            f"{here.get(first)} here, {there.get(first)} there"
        )


def fingerprint(model: nn.Module) -> str:
    """Tell one base from another by some 64 weights of each tensor, which is quick at any size."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        sample = parameter.detach().flatten()[:: max(1, parameter.numel() // 64)]
        # In bf16, so that base_dtype does not matter.
        digest.update(sample.bfloat16().view(torch.int16).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
