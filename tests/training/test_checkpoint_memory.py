"""Writing a checkpoint copies no weights: not the frozen base, nor what a full run trains."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llama_lightning.model.llama import Llama
from llama_lightning.weights.huggingface import save_huggingface
from tests.model.oracle import small_config
from tests.small import write_byte_tokenizer

# Anonymous memory is what the process itself fills. A thread reads it all the while.
MEASURE = """
import sys
import threading
from pathlib import Path
from llama_lightning import AlpacaDataModule, LlamaModule, LoRAConfig, Trainer

def memory():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Anonymous:"))

def watch():
    global peak
    while not written.wait(0.001):
        peak = max(peak, memory())

folder, rank, file = Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
module = LlamaModule(base_model=str(folder), base_dtype="bfloat16", lora=LoRAConfig(rank=rank))
data = AlpacaDataModule(
    str(folder / "records.json"), val_fraction=0.0, test_fraction=0.0, base_folder=str(folder)
)
trainer = Trainer(
    accelerator="cpu",
    max_steps=1,
    precision="bf16-mixed" if rank else "bf16-true",
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
)
trainer.fit(module, datamodule=data)
trainer.save_checkpoint(file)  # the first imports what it needs
more = []
for write in (trainer.save_checkpoint, lambda _: [p.clone() for p in module.parameters()]):
    written, before = threading.Event(), memory()
    peak = before
    watcher = threading.Thread(target=watch)
    watcher.start()
    write(file)
    written.set()
    watcher.join()
    more.append(peak - before)
print(sum(p.nbytes for p in module.parameters()), *more, file.stat().st_size)
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's smaps_rollup"
)
@pytest.mark.parametrize("rank", [8, 0], ids=["lora", "full"])
def test_a_checkpoint_is_written_without_a_copy_of_weights(tmp_path: Path, rank: int) -> None:
    config = small_config(
        vocab_size=16_000,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=5,
        num_attention_heads=16,
        num_key_value_heads=8,
    )
    model = Llama(config).bfloat16()
    model.init_weights(torch.Generator().manual_seed(0))
    save_huggingface(model, tmp_path)
    write_byte_tokenizer(tmp_path)
    records = [{"instruction": "count", "output": "one two three"}] * 8
    (tmp_path / "records.json").write_text(json.dumps(records))
    file = tmp_path / "some.ckpt"
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path), str(rank), str(file)],
        # Memory that is freed goes back at once, as that of a real model's larger tensors does.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"},
        capture_output=True,
        text=True,
        check=True,
    )
    weights, more, of_a_copy, size = map(int, done.stdout.split()[-4:])
    print(
        f"rank {rank}: {weights / 2**20:.0f} MiB of weights, a file of {size / 2**20:.0f}, "
        f"{more / 2**20:.1f} more in memory while it was written (a copy: {of_a_copy / 2**20:.0f})"
    )
    assert of_a_copy > 0.8 * weights  # it would be seen
    assert more < 0.05 * weights
    assert (size < 0.1 * weights) == (rank > 0)
