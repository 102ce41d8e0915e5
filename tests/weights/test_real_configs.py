"""The config.json of real Llamas means here what it means to transformers, at tiny width."""

import base64
import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from llama_lightning.data.tokenizer import Tokenizer
from llama_lightning.model.config import LlamaConfig, RopeScaling
from llama_lightning.weights.base import load_base, read_config
from llama_lightning.weights.huggingface import CONFIG_FILE, save_huggingface
from tests.model.oracle import max_difference, small_llama

BOUND = 1e-4

# As they stand on the hub, in meta-llama's repositories of these names.
LLAMA_3_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}
LLAMA_3_1_8B = {
    **LLAMA_3_8B,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "transformers_version": "4.43.0.dev0",
}
STOPS = [128001, 128008, 128009]
LLAMA_3_1_8B_INSTRUCT = {**LLAMA_3_1_8B, "eos_token_id": STOPS}
LLAMA_3_2_1B_INSTRUCT = {
    **LLAMA_3_1_8B_INSTRUCT,
    "head_dim": 64,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "rope_scaling": {**LLAMA_3_1_8B["rope_scaling"], "factor": 32.0},
    "tie_word_embeddings": True,
    "transformers_version": "4.45.0.dev0",
}
LLAMA_3_2_3B_INSTRUCT = {
    **LLAMA_3_2_1B_INSTRUCT,
    "head_dim": 128,
    "hidden_size": 3072,
    "num_attention_heads": 24,
    "num_hidden_layers": 28,
}
# The Instruct models'.
GENERATION_CONFIG = {
    "bos_token_id": 128000,
    "do_sample": True,
    "eos_token_id": STOPS,
    "temperature": 0.6,
    "top_p": 0.9,
    "transformers_version": "4.45.0.dev0",
}

REAL = {
    "3 8B": (LLAMA_3_8B, None),
    "3.1 8B": (LLAMA_3_1_8B, 8.0),
    "3.1 8B Instruct": (LLAMA_3_1_8B_INSTRUCT, 8.0),
    "3.2 1B Instruct": (LLAMA_3_2_1B_INSTRUCT, 32.0),
    "3.2 3B Instruct": (LLAMA_3_2_3B_INSTRUCT, 32.0),
}


def _tiny(raw: dict[str, Any]) -> dict[str, Any]:
    """Make it narrow and short; a head stays as wide as it is, for the wavelengths."""
    head_dim = raw["hidden_size"] // raw["num_attention_heads"]
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    sizes |= {"hidden_size": 4 * head_dim, "intermediate_size": 320, "vocab_size": 300}
    return {**raw, **sizes}


@pytest.mark.parametrize("name", REAL)
def test_a_real_config_gives_transformers_logits(name: str, tmp_path: Path) -> None:
    raw, factor = REAL[name]
    tiny = _tiny(raw)
    (tmp_path / CONFIG_FILE).write_text(json.dumps(tiny))
    config = read_config(tmp_path)
    assert config == LlamaConfig(
        vocab_size=300,
        hidden_size=tiny["hidden_size"],
        intermediate_size=320,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=tiny["hidden_size"] // 4,
        rope_scaling=RopeScaling(factor=factor) if factor else None,
        max_position_embeddings=raw["max_position_embeddings"],
        tie_word_embeddings=raw["tie_word_embeddings"],
    )
    save_huggingface(small_llama(config, std=0.1), tmp_path)
    (tmp_path / CONFIG_FILE).write_text(json.dumps(tiny))  # the real one again, not ours
    (tmp_path / "generation_config.json").write_text(json.dumps(GENERATION_CONFIG))
    model = load_base(tmp_path, read_config(tmp_path), dtype=torch.float32).eval()
    twin = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    tokens = torch.randint(300, (2, 32))
    for first in (0, 8192):
        positions = torch.arange(first, first + 32)
        with torch.no_grad():
            ours = model(tokens, positions=positions)
            theirs = twin(tokens, position_ids=positions.expand_as(tokens), use_cache=False).logits
        difference = max_difference(ours, theirs)
        print(f"from position {first}: max |logit difference| {difference:.1e} (bound {BOUND:.0e})")
        assert difference <= BOUND
    if factor:
        swapped = replace(config, rope_scaling=RopeScaling(factor=40 - factor))
        wrong = load_base(tmp_path, swapped, dtype=torch.float32).eval()
        with torch.no_grad():
            difference = max_difference(wrong(tokens, positions=positions), theirs)
        print(f"with the other factor {difference:.1e}, must be above the bound")
        assert difference > 10 * BOUND


def test_an_instruct_models_stops_are_those_of_its_generation_config(tmp_path: Path) -> None:
    pairs = itertools.product(range(256), repeat=3)
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [bytes(p) for p in itertools.islice(pairs, 128_000 - 256)]
    lines = (f"{base64.b64encode(t).decode()} {rank}\n" for rank, t in enumerate(tokens))
    (tmp_path / "tokenizer.model").write_text("".join(lines))
    tokenizer = Tokenizer.from_path(tmp_path)
    assert tokenizer.size == LLAMA_3_1_8B["vocab_size"]
    assert tokenizer.bos_id == GENERATION_CONFIG["bos_token_id"]
    assert sorted(tokenizer.stop_ids) == GENERATION_CONFIG["eos_token_id"]
