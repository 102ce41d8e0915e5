"""Named tensors into a Llama, one at a time, each checked before it takes its place.

It knows no format: who reads one says what a tensor is called here and where it was found.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from llama_lightning.errors import WeightsError
from llama_lightning.model.config import LlamaConfig
from llama_lightning.model.llama import Llama

STORED_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class NamedTensor(NamedTuple):
    """A tensor from a file."""

    name: str  # of the parameter it becomes
    where: str  # file and name there, for whoever has to mend it
    tensor: Tensor


def check_values(where: str, tensor: Tensor) -> None:
    """Refuse weights that are no numbers to compute with.

    Raises:
        WeightsError: quantised, NaN or infinity.
    """
    if tensor.dtype not in STORED_DTYPES:  # cast, quantised weights would lose their scales
        raise WeightsError(f"{where} is {tensor.dtype}; quantised weights are not read")
    low, high = tensor.aminmax()  # NaN goes through both; no copy of the tensor is made
    if not (low.isfinite() and high.isfinite()):
        raise WeightsError(f"{where} holds NaN or infinity")


def first_of(names: list[str]) -> str:
    """Write the first three of many names."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def assemble_llama(
    tensors: Iterable[NamedTensor],
    config: LlamaConfig,
    *,
    dtype: torch.dtype,
    mapped: bool,
    folder: Path,
    config_file: str,
) -> Llama:
    """Build a Llama on the meta device and put tensors into it, one by one.

    Biases of q, k and v that the config asks for and the folder lacks start at zero.

    Args:
        tensors: all there are, in any order; a tied head may be among them.
        config: of the network.
        dtype: type of the weights in memory.
        mapped: take tensors of this type as they are, not a copy of them.
        folder: where the tensors come from.
        config_file: name of the file there that the config was read from.

    Raises:
        WeightsError: a tensor missing, too many, misshapen, quantised or not finite.
    """
    with torch.device("meta"):
        model = Llama(config)
    expected = dict(model.named_parameters())  # a tied head is listed once, as the embedding
    loaded: set[str] = set()
    tied_head: Tensor | None = None
    for name, where, tensor in tensors:
        if name == "lm_head.weight" and config.tie_word_embeddings:
            tied_head = tensor
            continue
        if name not in expected:
            raise WeightsError(f"{where} is not part of a {config_file} of this kind")
        if tensor.shape != expected[name].shape:
            raise WeightsError(
                f"{where} has shape {tuple(tensor.shape)}, "
                f"{config_file} means {tuple(expected[name].shape)}"
            )
        check_values(where, tensor)
        _put(model, name, tensor.to(dtype, copy=not mapped))
        loaded.add(name)
    absent_biases = {name for name in expected.keys() - loaded if name.endswith("_proj.bias")}
    for name in absent_biases:
        _put(model, name, torch.zeros(expected[name].shape, dtype=dtype))
    if absent_biases:
        from lightning.pytorch.utilities import rank_zero_info  # seconds, for a rare line

        rank_zero_info(f"model: {len(absent_biases)} q, k and v biases are new and start at zero")
        loaded |= absent_biases
    if missing := sorted(expected.keys() - loaded):
        raise WeightsError(f"{folder}: tensors are missing: {first_of(missing)}")
    model.tie_head()
    if tied_head is not None and not torch.equal(
        tied_head.to(dtype), model.model.embed_tokens.weight
    ):
        raise WeightsError(
            f"{folder}: {config_file} ties the head to the embedding, but lm_head.weight differs"
        )
    return model


def _put(model: nn.Module, name: str, tensor: Tensor) -> None:
    parent, _, last_name = name.rpartition(".")
    setattr(model.get_submodule(parent), last_name, nn.Parameter(tensor))
