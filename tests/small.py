"""Small real things that tests run on: a random Llama on disk and a tokenizer of 256 bytes."""

import base64
from pathlib import Path

import torch

from llama_lightning.model.config import LlamaConfig, RopeScaling
from llama_lightning.model.llama import Llama
from llama_lightning.weights.huggingface import save_huggingface


def write_small_llama(folder: Path, *, vocab_size: int, seed: int = 0) -> LlamaConfig:
    """Write a random Llama with grouped queries, a tied head and scaled positions."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rope_scaling=RopeScaling(),
    )
    model = Llama(config)
    model.init_weights(torch.Generator().manual_seed(seed))
    save_huggingface(model, folder)
    return config


def write_byte_tokenizer(folder: Path) -> None:
    """Write a tokenizer.model in which every byte is a token; its 256 special tokens follow."""
    lines = (f"{base64.b64encode(bytes([byte])).decode()} {byte}\n" for byte in range(256))
    (folder / "tokenizer.model").write_text("".join(lines))
