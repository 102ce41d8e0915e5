"""Random weights in Meta's own layout, and the network that reads them as they are.

It rotates pairs of neighbours by complex numbers, as Meta's does, so that what our loader reorders
is compared with something that was never reordered.
Letters: B rows, T tokens, D hidden size, N heads, H head dimension.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

# As in Llama 3.2 1B's params.json, but for the sizes; 64 is its head dimension too.
PARAMS: dict[str, Any] = {
    "dim": 256,
    "ffn_dim_multiplier": 1.5,
    "multiple_of": 32,
    "n_heads": 4,
    "n_kv_heads": 2,
    "n_layers": 2,
    "norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "use_scaled_rope": True,
    "vocab_size": 512,
}
INTERMEDIATE = 1024  # by the rule of Meta's FeedForward: 682 * 1.5 = 1023, and up to 32 * 32

Weights = dict[str, Tensor]


def random_weights(*, head: str, num_layers: int = 2, std: float = 0.1) -> Weights:
    """Draw weights of PARAMS' sizes; `head` is "own", "equal" to the embedding, or "absent"."""
    dim, kv = PARAMS["dim"], PARAMS["dim"] // 2
    shapes = {"tok_embeddings.weight": (PARAMS["vocab_size"], dim), "norm.weight": (dim,)}
    for i in range(num_layers):
        shapes |= {
            f"layers.{i}.attention.wq.weight": (dim, dim),
            f"layers.{i}.attention.wk.weight": (kv, dim),
            f"layers.{i}.attention.wv.weight": (kv, dim),
            f"layers.{i}.attention.wo.weight": (dim, dim),
            f"layers.{i}.feed_forward.w1.weight": (INTERMEDIATE, dim),
            f"layers.{i}.feed_forward.w2.weight": (dim, INTERMEDIATE),
            f"layers.{i}.feed_forward.w3.weight": (INTERMEDIATE, dim),
            f"layers.{i}.attention_norm.weight": (dim,),
            f"layers.{i}.ffn_norm.weight": (dim,),
        }
    if head == "own":
        shapes["output.weight"] = (PARAMS["vocab_size"], dim)
    weights = {
        name: torch.randn(shape) * std if len(shape) == 2 else 1 + 0.1 * torch.randn(shape)
        for name, shape in shapes.items()
    }
    if head == "equal":
        weights["output.weight"] = weights["tok_embeddings.weight"]
    return weights


def cut(weights: Weights, num_files: int, *, embedding_dim: int = 0) -> list[Weights]:
    """Cut weights as fairscale's model parallelism does."""
    shards: list[Weights] = [{} for _ in range(num_files)]
    for name, tensor in weights.items():
        dim = 1 if name.endswith(("wo.weight", "w2.weight")) else 0
        if name == "tok_embeddings.weight":
            dim = embedding_dim
        whole = tensor.ndim == 1
        parts = [tensor] * num_files if whole else tensor.chunk(num_files, dim)
        for shard, part in zip(shards, parts, strict=True):
            shard[name] = part.clone()
    return shards


def write_meta(folder: Path, shards: list[Weights], **changes: Any) -> None:
    """Write consolidated.*.pth and params.json; a parameter changed to None is left out."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, shard in enumerate(shards):
        torch.save(shard, folder / f"consolidated.{number:02d}.pth")
    params = {k: v for k, v in {**PARAMS, **changes}.items() if v is not None}
    (folder / "params.json").write_text(json.dumps(params))


def _rotate(x_BTNH: Tensor, turns_TH: Tensor) -> Tensor:
    """Turn each pair of neighbours (2i, 2i + 1) as one complex number."""
    pairs = torch.view_as_complex(x_BTNH.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turns_TH[:, None]).flatten(-2)


@torch.no_grad()
def meta_logits(weights: Weights, tokens: Tensor, first_position: int, factor: float) -> Tensor:
    """Compute logits in Meta's layout; the frequencies are transformers'.

    Args:
        weights: whole, with a head.
        tokens: (B, T).
        first_position: of the first token.
        factor: of the llama3 scaling; 0 for none.

    Returns:
        (B, T, vocabulary).
    """
    heads, kv_heads = PARAMS["n_heads"], PARAMS["n_kv_heads"]
    scaling = {"rope_type": "default"}
    if factor:
        scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0}
        scaling |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    config = LlamaConfig.from_dict(
        {
            "hidden_size": PARAMS["dim"],
            "num_attention_heads": heads,
            "max_position_embeddings": 131072,
            "rope_theta": PARAMS["rope_theta"],
            "rope_scaling": scaling,
        }
    )
    inv_freq = LlamaRotaryEmbedding(config).inv_freq
    positions = first_position + torch.arange(tokens.shape[1])
    turns = torch.polar(torch.ones(()), positions[:, None].float() * inv_freq)

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"].T

    def norm(x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], weights[f"{name}.weight"], PARAMS["norm_eps"])

    x = weights["tok_embeddings.weight"][tokens]
    num_layers = sum(name.endswith("wq.weight") for name in weights)
    for layer in (f"layers.{i}" for i in range(num_layers)):
        normed = norm(x, f"{layer}.attention_norm")
        q, k, v = (
            linear(normed, f"{layer}.attention.{name}").unflatten(-1, (n, -1))
            for name, n in (("wq", heads), ("wk", kv_heads), ("wv", kv_heads))
        )
        q, k = _rotate(q, turns), _rotate(k, turns)
        k, v = (t.repeat_interleave(heads // kv_heads, dim=2) for t in (k, v))
        scores = torch.einsum("bqnh,bknh->bnqk", q, k) / q.shape[-1] ** 0.5
        ahead = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        mixed = torch.einsum(
            "bnqk,bknh->bqnh", scores.masked_fill(ahead, -torch.inf).softmax(-1), v
        )
        x = x + linear(mixed.flatten(-2), f"{layer}.attention.wo")
        normed = norm(x, f"{layer}.ffn_norm")
        gate = F.silu(linear(normed, f"{layer}.feed_forward.w1"))
        x = x + linear(
            gate * linear(normed, f"{layer}.feed_forward.w3"), f"{layer}.feed_forward.w2"
        )
    return linear(norm(x, "norm"), "output")
