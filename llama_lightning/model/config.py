"""The shape of a Llama: the fields of a Hugging Face config.json that change a number.

Fields a config.json may hold and this network does not have are refused, never ignored. A Mistral
without a sliding window is the same network.
Source: config.json of meta-llama/Llama-3.2-1B and -3B; MistralConfig of transformers.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's stretching of the rotary wavelengths beyond the original context.

    Wavelengths below `original_max_position_embeddings / high_freq_factor` tokens stay, those above
    `original_max_position_embeddings / low_freq_factor` grow by `factor`, those between are
    blended.
    """

    factor: float = 32.0  # 3.2; Llama 3.1 has 8
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192  # tokens


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes and constants of one network; names as in Hugging Face's config.json.

    Raises:
        ValueError: sizes that do not fit together.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_scaling: RopeScaling | None
    rope_theta: float = 500_000.0
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 131_072  # tokens
    tie_word_embeddings: bool = True
    qkv_bias: bool = False  # not in Llama; a bias on q, k and v, as Qwen2 has it
    dropout: float = 0.0  # on what attention and MLP add to the residual stream, in training

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd; rotary positions need pairs")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout={self.dropout} is not in [0, 1)")


# Sizes of config.json in the hub's repositories of these names; `tiny` is the embedded model, whose
# scaling is 3.2's over a context that fits it.
PRESETS = {
    "llama-3.2-1b": LlamaConfig(
        vocab_size=128_256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        rope_scaling=RopeScaling(),
    ),
    "llama-3.2-3b": LlamaConfig(
        vocab_size=128_256,
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        num_key_value_heads=8,
        head_dim=128,
        rope_scaling=RopeScaling(),
    ),
    "tiny": LlamaConfig(
        vocab_size=1472,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        rope_scaling=RopeScaling(original_max_position_embeddings=512),
        rope_theta=10_000.0,
        max_position_embeddings=4096,
    ),
}


def config_from_huggingface(raw: dict[str, Any]) -> LlamaConfig:
    """Read the dictionary of a config.json as transformers 4 or 5 writes it.

    Raises:
        ValueError: a missing key, or a feature this network does not have.
    """
    kind = raw.get("model_type")
    if kind not in ("llama", "mistral"):
        raise ValueError(f"model_type is {kind!r}, not 'llama' or 'mistral'")
    # transformers takes a Mistral's missing key for a window of 4096 tokens.
    window = raw.get("sliding_window", 4096) if kind == "mistral" else None
    if window is not None:
        raise ValueError(
            f"sliding_window is {window!r}: attention in a window is not supported, only a Mistral "
            "without one (null; from version 0.2 on)"
        )
    # transformers 5 moved rope_theta and rope_scaling into one dictionary.
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("llama3", "default"):
        raise ValueError(f"rope_type {rope_type!r} is not supported (llama3, default)")
    for key, only in {
        "hidden_act": "silu",
        "attention_bias": False,  # would put a bias on o_proj too
        "mlp_bias": False,
        "pretraining_tp": 1,
        "quantization_config": None,
    }.items():
        if raw.get(key, only) != only:
            raise ValueError(f"{key}={raw[key]!r} is not supported, only {only!r}")
    try:
        scaling = None
        if rope_type == "llama3":
            scaling = RopeScaling(
                factor=float(rope["factor"]),
                low_freq_factor=float(rope["low_freq_factor"]),
                high_freq_factor=float(rope["high_freq_factor"]),
                original_max_position_embeddings=int(rope["original_max_position_embeddings"]),
            )
        heads = int(raw["num_attention_heads"])
        return LlamaConfig(
            vocab_size=int(raw["vocab_size"]),
            hidden_size=int(raw["hidden_size"]),
            intermediate_size=int(raw["intermediate_size"]),
            num_hidden_layers=int(raw["num_hidden_layers"]),
            num_attention_heads=heads,
            num_key_value_heads=int(raw.get("num_key_value_heads") or heads),
            head_dim=int(raw.get("head_dim") or raw["hidden_size"] // heads),
            rope_scaling=scaling,
            rope_theta=float(rope.get("rope_theta") or raw.get("rope_theta") or 10_000.0),
            rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
            max_position_embeddings=int(raw.get("max_position_embeddings", 2048)),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            qkv_bias=bool(raw.get("qkv_bias", False)),
        )
    except KeyError as error:
        raise ValueError(f"the key {error} is missing") from error


def config_to_huggingface(
    config: LlamaConfig, dtype: str, *, bos_id: int | None = None, stop_ids: Sequence[int] = ()
) -> dict[str, Any]:
    """Write the dictionary of a config.json which transformers 4.57 and 5 both read right.

    The keys are version 4's: version 5 reads them, while 4.57 ignores version 5's `rope_parameters`
    without a word.

    Args:
        config: the network's shape.
        dtype: the name of the stored type, e.g. "bfloat16".
        bos_id: the token every text begins with, if a tokenizer is known.
        stop_ids: the tokens that end a response, likewise.
    """
    raw = asdict(config)
    del raw["dropout"]
    if not config.qkv_bias:
        del raw["qkv_bias"]
    if config.rope_scaling is not None:
        raw["rope_scaling"] = {"rope_type": "llama3", **asdict(config.rope_scaling)}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": dtype,
        **raw,
        **({} if bos_id is None else {"bos_token_id": bos_id}),
        **(
            {"eos_token_id": stop_ids[0] if len(stop_ids) == 1 else [*stop_ids]} if stop_ids else {}
        ),
    }
