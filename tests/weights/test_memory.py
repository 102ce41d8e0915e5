"""A base model is loaded in little more memory than its weights take, in either format."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llama_lightning.model.config import LlamaConfig, config_to_huggingface
from llama_lightning.model.llama import Llama
from llama_lightning.weights import meta
from llama_lightning.weights.huggingface import CONFIG_FILE, INDEX_FILE
from tests.model.oracle import small_config
from tests.weights.meta_reference import cut, write_meta

# Anonymous memory is what the process itself fills; pages mapped from the file are in the resident
# memory only. A thread reads both all the while, for a copy of one tensor may live only for some
# milliseconds.
MEASURE = """
import sys
import threading
from pathlib import Path
import torch
from llama_lightning.model.llama import Llama
from llama_lightning.weights import base

def memory():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    sizes = {line.split()[0]: int(line.split()[1]) * 1024 for line in lines[1:]}
    return sizes["Anonymous:"], sizes["Rss:"]

def watch():
    global peak
    while not loaded.wait(0.001):
        peak = tuple(map(max, peak, memory()))

folders = [Path(name) for name in sys.argv[1:]]
with torch.device("meta"):
    Llama(base.read_config(folders[0]))  # at its first use torch imports more, which is no weight
cases = [(folder, torch.bfloat16, False) for folder in folders]
cases += [(folders[0], torch.bfloat16, True), (folders[0], torch.float16, True)]
for folder, dtype, mapped in cases:
    model = None
    peak, loaded, before = (0, 0), threading.Event(), memory()
    watcher = threading.Thread(target=watch)
    watcher.start()
    model = base.load_base(folder, base.read_config(folder), dtype=dtype, mapped=mapped)
    loaded.set()
    watcher.join()
    peak = tuple(map(max, peak, memory()))  # it may have slept when the last tensor came
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    print(size, peak[0] - before[0], memory()[0] - before[0], peak[1] - before[1])
"""


def _write_shards(folder: Path, config: LlamaConfig, max_bytes: float) -> int:
    """Write random bf16 weights in shards a little over a size, as the hub has them."""
    folder.mkdir(exist_ok=True)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in Llama(config).named_parameters()}
    weight_map: dict[str, str] = {}
    shard: dict[str, Tensor] = {}
    shards = 0
    for i, (name, shape) in enumerate(shapes.items()):
        shard[name] = torch.empty(shape, dtype=torch.bfloat16).uniform_(-0.1, 0.1)
        if sum(t.nbytes for t in shard.values()) > max_bytes or i == len(shapes) - 1:
            shards += 1
            file = f"model-{shards:05}.safetensors"
            save_file(shard, folder / file)
            weight_map |= dict.fromkeys(shard, file)
            shard = {}
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    text = json.dumps(config_to_huggingface(config, "bfloat16"))
    (folder / CONFIG_FILE).write_text(text)
    return shards


def _write_meta_twin(source: Path, folder: Path, config: LlamaConfig) -> None:
    """Write the tensors of Hugging Face shards as two of Meta's files; the values do not matter."""
    names = {ours: theirs for theirs, ours in {**meta.OUTER_NAMES, **meta.LAYER_NAMES}.items()}
    weights: dict[str, Tensor] = {}
    for file in source.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            layer, _, rest = name.removeprefix("model.layers.").partition(".")
            inside = layer.isdigit()
            weights[f"layers.{layer}.{names[rest]}" if inside else names[name]] = tensor
    write_meta(
        folder,
        cut(weights, 2),
        dim=config.hidden_size,
        n_layers=config.num_hidden_layers,
        n_heads=config.num_attention_heads,
        n_kv_heads=config.num_key_value_heads,
        vocab_size=config.vocab_size,
        multiple_of=config.intermediate_size,
    )


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's smaps_rollup"
)
def test_loading_needs_little_more_memory_than_the_weights(tmp_path: Path) -> None:
    config = small_config(
        vocab_size=16_000,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=5,
        num_attention_heads=16,
        num_key_value_heads=8,
    )
    hub, whole, original = tmp_path, tmp_path / "whole", tmp_path / "original"
    shards = _write_shards(hub, config, 50e6)
    _write_shards(whole, config, math.inf)
    _write_meta_twin(hub, original, config)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(hub), str(whole), str(original)],
        # Memory that is freed goes back at once, as that of a real model's larger tensors does.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"},
        capture_output=True,
        text=True,
        check=True,
    )
    *measured, mapped, cast = done.stdout.splitlines()
    kinds = f"{shards} shards", "one file", "Meta's, in 2 files"
    for line, what in zip(measured, kinds, strict=True):
        size, peak, after, resident = map(int, line.split())
        print(
            f"{what}, {size / 1e6:.0f} MB of weights: peak {peak / size:.3f} and at the end "
            f"{after / size:.3f} times as much (bound 1.15); with what is mapped "
            f"{resident / size:.3f} (bound 1.25 but for Meta's, which are mapped whole)"
        )
        assert size > 180e6
        assert after > 0.95 * size  # the weights are in what is measured
        assert max(peak, after) <= 1.15 * size
        assert resident <= 1.25 * size or what == kinds[-1]
    assert shards >= 3
    size, peak, _, resident = map(int, mapped.split())
    print(
        f"weights that stay in {shards} shards: {peak / size:.3f} times as much is copied (bound "
        f"0.05); with what is mapped {resident / size:.3f} (bound 1.05)"
    )
    assert peak <= 0.05 * size
    assert 0.95 * size < resident <= 1.05 * size
    size, peak, _, resident = map(int, cast.split())
    print(
        f"weights of another type: peak {peak / size:.3f} (bound 1.15); with what is mapped "
        f"{resident / size:.3f} (bound 1.25)"
    )
    assert peak <= 1.15 * size
    assert resident <= 1.25 * size
