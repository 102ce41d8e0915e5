"""`python -m tests.random_llama FOLDER --shape llama-3.2-1b`: random weights in a real shape.

Writes a Hugging Face folder as the hub would hold it, shard by shard, so that the 1B and 3B paths
can run where no real weights are. What it answers is noise.
"""

import argparse
import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from llama_lightning.model.config import PRESETS, config_to_huggingface
from llama_lightning.model.llama import Llama

# The real shapes, the same with four layers for a CPU's patience, and two narrow ones.
_1B, _3B = PRESETS["llama-3.2-1b"], PRESETS["llama-3.2-3b"]
_S512 = replace(
    _1B,
    hidden_size=512,
    intermediate_size=2048,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=2,
)
SHAPES = {
    **PRESETS,
    "1b": _1B,
    "1b-4l": replace(_1B, num_hidden_layers=4),
    "3b": _3B,
    "3b-4l": replace(_3B, num_hidden_layers=4),
    "s512": _S512,
    "s512v4k": replace(_S512, vocab_size=4096),
}


def write_random_llama(folder: Path, shape: str, *, tokenizer: Path | None = None) -> int:
    """Write config.json, bf16 shards of about 500 MB and their index; return the weights' bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    config = SHAPES[shape]
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in Llama(config).named_parameters()}
    generator = torch.Generator().manual_seed(0)
    shards: list[dict[str, torch.Tensor]] = [{}]
    weight_map: dict[str, str] = {}
    total = 0

    def file_name(number: int) -> str:
        return f"model-{number:05d}.safetensors"

    def flush() -> None:
        save_file(shards[-1], folder / file_name(len(shards)), metadata={"format": "pt"})
        shards[-1] = {}

    held = 0
    for name, size in shapes.items():
        if len(size) == 1:
            tensor = torch.ones(size, dtype=torch.bfloat16)
        else:
            tensor = torch.randn(size, dtype=torch.bfloat16, generator=generator).mul_(0.02)
        if held and held + tensor.nbytes > 500e6:
            flush()
            shards.append({})
            held = 0
        shards[-1][name] = tensor
        weight_map[name] = file_name(len(shards))
        held += tensor.nbytes
        total += tensor.nbytes
    flush()
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    raw = config_to_huggingface(config, "bfloat16")
    (folder / "config.json").write_text(json.dumps(raw, indent=1))
    if tokenizer is not None:
        shutil.copy(tokenizer, folder / "tokenizer.model")
    return total


def kept_random_llama(shape: str, tokenizer: Path) -> Path:
    """Random weights of a shape, written once and kept in the temporary folder."""
    folder = Path(tempfile.gettempdir()) / "llama_lightning_benchmarks" / shape
    if not (folder / "tokenizer.model").is_file():  # what is written last
        write_random_llama(folder, shape, tokenizer=tokenizer)
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.random_llama", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-3.2-1b")
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer.model to put beside them")
    arguments = parser.parse_args()
    size = write_random_llama(arguments.folder, arguments.shape, tokenizer=arguments.tokenizer)
    print(f"{size / 2**30:.2f} GiB of random weights in {arguments.folder}")
