"""Meta's own folder, consolidated.*.pth and params.json, into a Llama.

A .pth is a pickle: only tensors are let out of it, and they are mapped, not read, until their turn.
Source: llama3/model.py, llama3/args.py and checkpoint.py of meta-llama/llama-models.
"""

import json
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama_lightning.errors import WeightsError
from llama_lightning.model.config import LlamaConfig, RopeScaling
from llama_lightning.model.llama import Llama
from llama_lightning.weights.assembly import NamedTensor, assemble_llama

PARAMS_FILE = "params.json"
WEIGHTS_FILE = "consolidated.00.pth"
EMBEDDING, HEAD = "tok_embeddings.weight", "output.weight"

OUTER_NAMES = {
    EMBEDDING: "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    HEAD: "lm_head.weight",
}
LAYER_NAMES = {
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}
CUT_BY_COLUMNS = ("attention.wo.weight", "feed_forward.w2.weight")

# What changes a number; the two sizes are of Meta's own cache.
KNOWN_PARAMS = {"dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of"}
KNOWN_PARAMS |= {"ffn_dim_multiplier", "norm_eps", "rope_theta", "use_scaled_rope"}
KNOWN_PARAMS |= {"max_seq_len", "max_batch_size"}

Pieces = dict[str, list[Tensor]]  # Meta's name to what each file has of the tensor


def weight_files(folder: Path) -> list[Path]:
    """List a folder's consolidated.*.pth in their order, without opening them.

    Raises:
        WeightsError: none there, or one missing among them.
    """
    files = sorted(folder.glob("consolidated.*.pth"))
    if not files:
        raise WeightsError(f"model.base_model: {folder} has no {WEIGHTS_FILE}")
    expected = [f"consolidated.{number:02d}.pth" for number in range(len(files))]
    if missing := sorted(set(expected) - {file.name for file in files}):
        raise WeightsError(f"{folder}: {missing[0]} is missing, {files[-1].name} is there")
    return files


def _open(file: Path) -> dict[str, Tensor]:
    """Map a file's tensors, without running what a pickle may hold, nor reading a weight."""
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{file}: refused, none of it was run: a pickle that holds more than tensors could run "
            "code; take the file from its maker, or the model as safetensors"
        ) from error
    except Exception as error:  # torch raises any of a dozen types for a damaged file
        raise WeightsError(
            f"{file}: damaged, cut, or not written by torch.save ({type(error).__name__}); it has "
            f"{file.stat().st_size:,} bytes, download it again"
        ) from error
    if not (isinstance(tensors, dict) and all(isinstance(t, Tensor) for t in tensors.values())):
        raise WeightsError(f"{file}: holds something else than named tensors")
    return tensors


def _pieces(files: list[Path]) -> Pieces:
    """Bring the files' parts of each tensor together."""
    opened = [_open(file) for file in files]
    for file, tensors in zip(files, opened, strict=True):
        for name, first in opened[0].items():
            if name not in tensors or tensors[name].shape != first.shape:
                raise WeightsError(f"{file}: {name} is missing or unlike {files[0].name}'s")
    return {name: [tensors[name] for tensors in opened] for name in opened[0]}


def _is_tied(pieces: Pieces) -> bool:
    """Whether the head is the embedding: not there, or the same values once more."""
    embedding, head = pieces[EMBEDDING], pieces.get(HEAD)
    return head is None or (
        head[0].shape == embedding[0].shape
        and torch.equal(head[0][:1], embedding[0][:1])  # most heads differ here already
        and all(torch.equal(h, e) for h, e in zip(head, embedding, strict=True))
    )


def _config(raw: dict[str, Any], pieces: Pieces) -> LlamaConfig:
    """Read params.json, and from the tensors what it leaves out.

    Raises:
        ValueError: a missing key, or a feature this network does not have.
    """
    if unknown := sorted(raw.keys() - KNOWN_PARAMS):
        raise ValueError(f"{unknown[0]}={raw[unknown[0]]!r} is not supported")
    if EMBEDDING not in pieces:
        raise ValueError(f"the weights beside it have no {EMBEDDING}")
    try:
        dim, heads = int(raw["dim"]), int(raw["n_heads"])
        num_layers = int(raw["n_layers"])
    except KeyError as error:
        raise ValueError(f"the key {error} is missing") from error
    if dim % heads:
        raise ValueError(f"dim={dim} is not a multiple of n_heads={heads}")
    vocab_size = int(raw.get("vocab_size", -1))
    if vocab_size == -1:  # Llama 2: it was the tokenizer's
        rows, columns = pieces[EMBEDDING][0].shape
        vocab_size = rows * len(pieces[EMBEDDING]) if columns == dim else rows
    multiple = int(raw.get("multiple_of", 256))
    width = int(float(raw.get("ffn_dim_multiplier") or 1) * int(8 * dim / 3))
    tied, scaled = _is_tied(pieces), bool(raw.get("use_scaled_rope", False))
    # params.json does not tell 3.1, whose factor is 8, from 3.2, whose factor is 32. The head does:
    # of the models with scaled positions only 3.2's are tied.
    scaling = RopeScaling(factor=32.0 if tied else 8.0) if scaled else None
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=dim,
        intermediate_size=(width + multiple - 1) // multiple * multiple,
        num_hidden_layers=num_layers,
        num_attention_heads=heads,
        num_key_value_heads=int(raw.get("n_kv_heads") or heads),
        head_dim=dim // heads,
        rope_scaling=scaling,
        rope_theta=float(raw.get("rope_theta", 10_000.0)),
        rms_norm_eps=float(raw.get("norm_eps", 1e-5)),
        max_position_embeddings=131_072 if scaled else 8192,
        tie_word_embeddings=tied,
    )


def read_config(folder: Path) -> LlamaConfig:
    """Read a folder's params.json, held against the tensors beside it.

    Raises:
        WeightsError: a file missing, damaged or refused, or another kind of network.
    """
    path = folder / PARAMS_FILE
    pieces = _pieces(weight_files(folder))
    try:
        return _config(json.loads(path.read_text(encoding="utf-8")), pieces)
    except (OSError, ValueError, TypeError, AttributeError, ArithmeticError) as error:
        raise WeightsError(f"{path}: {error}") from error


def _joined(name: str, pieces: list[Tensor], hidden_size: int) -> Tensor:
    """Put a tensor's pieces together along the dimension that model parallelism had cut.

    Column-parallel layers are cut by rows, row-parallel ones by columns; norms are in each file
    whole. The embedding is cut by vocabulary in Llama 3, and across D in Llama 2.
    """
    if len(pieces) == 1 or pieces[0].ndim == 1:
        return pieces[0]
    by_columns = name.endswith(CUT_BY_COLUMNS)
    if name == EMBEDDING:
        by_columns = pieces[0].shape[-1] != hidden_size
    return torch.cat(pieces, dim=1 if by_columns else 0)


def _half_split(weight: Tensor, head_dim: int) -> Tensor:
    """Reorder the rows of each head of q or k: Meta rotates pairs (2i, 2i + 1), we (i, i + H/2)."""
    if weight.ndim != 2 or weight.shape[0] % head_dim:
        return weight  # not of this config; to be refused by its shape
    rows, columns = weight.shape
    pairs = weight.reshape(-1, head_dim // 2, 2, columns)
    return pairs.transpose(1, 2).reshape(rows, columns)


def _our_name(name: str) -> str | None:
    """Translate Meta's name of a tensor; None if there is no such part."""
    if name in OUTER_NAMES:
        return OUTER_NAMES[name]
    match = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
    if match is None or match[2] not in LAYER_NAMES:
        return None
    return f"model.layers.{match[1]}.{LAYER_NAMES[match[2]]}"


def _tensors(files: list[Path], config: LlamaConfig) -> Iterator[NamedTensor]:
    """Read tensor after tensor, so that one at a time is in memory beside the module."""
    source = files[0] if len(files) == 1 else files[0].with_name("consolidated.*.pth")
    for name, pieces in _pieces(files).items():
        if name == "rope.freqs" or (name == HEAD and config.tie_word_embeddings):
            continue  # a function of the config; the embedding once more
        ours = _our_name(name)
        if ours is None:
            raise WeightsError(f"{source}: {name} is not part of a Llama")
        tensor = _joined(name, pieces, config.hidden_size)
        if name.endswith(("wq.weight", "wk.weight")):
            tensor = _half_split(tensor, config.head_dim)
        yield NamedTensor(ours, f"{source}: {name}", tensor)


def load_meta(folder: Path, config: LlamaConfig, *, dtype: torch.dtype) -> Llama:
    """Build a Llama of the folder's tensors, one by one.

    Args:
        folder: with params.json and consolidated.*.pth, one or several.
        config: usually `read_config(folder)`; dropout and qkv_bias may differ.
        dtype: type of the weights in memory.

    Raises:
        WeightsError: see `assemble_llama`; or a file that is damaged or refused.
    """
    tensors = _tensors(weight_files(folder), config)
    return assemble_llama(
        tensors, config, dtype=dtype, mapped=False, folder=folder, config_file=PARAMS_FILE
    )
