"""`python -m tests.benchmarks.startup`: from the start of a process to the end of its first step.

One LoRA step (q, k, v, o; rank 16) of a few records on a checkpoint that is there, by this project
and by transformers with PEFT, each in a process of its own and in turn; and the time of `--help`.
Both read the same safetensors in bf16 and the same tokens. Prints a JSON line a process, then one
with medians and ratios, by wall and by CPU time.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SHARED = Path(__file__).parents[3] / "shared" / "data"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]


def ours(args: argparse.Namespace, folder: Path) -> None:
    """Fit for one step."""
    from llama_lightning import AlpacaDataModule, LlamaModule, LoRAConfig, Trainer

    module = LlamaModule(
        base_model=str(folder), lora=LoRAConfig(rank=16, alpha=32, target_modules=TARGETS)
    )
    data = AlpacaDataModule(
        str(args.records),
        val_fraction=0.0,
        test_fraction=0.0,
        base_folder=str(folder),
        batch_size=args.batch,
    )
    trainer = Trainer(
        accelerator="cpu",
        precision="bf16-mixed",
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, datamodule=data)


def huggingface(args: argparse.Namespace, folder: Path) -> None:
    """The same by hand, with a padded batch."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    from llama_lightning.data.examples import encode_row
    from llama_lightning.data.rows import read_rows
    from llama_lightning.data.templates import TEMPLATES
    from llama_lightning.data.tokenizer import Tokenizer

    tokenizer, template = Tokenizer.from_path(folder), TEMPLATES["alpaca"]
    # The whole file, as ours does it too.
    encoded = [
        encode_row(row, tokenizer, template, max_seq_len=512) for row in read_rows(args.records)
    ]
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = get_peft_model(model, lora).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    batch = encoded[: args.batch]
    longest = max(len(e.tokens) for e in batch)
    pads = [longest - len(e.tokens) for e in batch]
    labels = [[t if learnt else -100 for t, learnt in zip(*e[:2], strict=True)] for e in batch]
    model(
        input_ids=torch.tensor([e.tokens + [0] * n for e, n in zip(batch, pads, strict=True)]),
        attention_mask=torch.tensor([[1] * (longest - n) + [0] * n for n in pads]),
        labels=torch.tensor([x + [-100] * n for x, n in zip(labels, pads, strict=True)]),
    ).loss.backward()
    optimizer.step()


def run(command: list[str]) -> dict[str, Any]:
    """Time a process from its start to its end."""
    start, before = time.perf_counter(), os.times()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wall, after = time.perf_counter() - start, os.times()
    cpu = sum(after[i] - before[i] for i in (2, 3))  # of children, in user and system mode
    return {"wall_s": round(wall, 2), "cpu_s": round(cpu, 2)}


def main() -> None:
    """Measure in turn and print."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.startup", description=__doc__)
    parser.add_argument("--peer", choices=["llama_lightning", "hf"], help="one process; no timing")
    parser.add_argument("--shape", default="1b-4l", help="as in tests/random_llama.py")
    parser.add_argument("--records", type=Path, default=SHARED / "instruction-data.json")
    parser.add_argument("--tokenizer", type=Path, default=SHARED / "llama3-tokenizer.model")
    parser.add_argument("--batch", type=int, default=4, help="records in the step")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    folder = Path(tempfile.gettempdir()) / "llama_lightning_benchmarks" / args.shape
    if args.peer is not None:
        (ours if args.peer == "llama_lightning" else huggingface)(args, folder)
        return
    from tests.random_llama import kept_random_llama  # torch: not in the processes that are timed

    kept_random_llama(args.shape, args.tokenizer)
    this = [sys.executable, "-m", "tests.benchmarks.startup", *sys.argv[1:], "--peer"]
    commands = {
        "llama_lightning": [*this, "llama_lightning"],
        "hf": [*this, "hf"],
        "help": [sys.executable, "-m", "llama_lightning", "--help"],
    }
    lines: dict[str, list[dict[str, Any]]] = {name: [] for name in commands}
    for _ in range(args.repeats):
        for name, command in commands.items():
            lines[name].append(run(command))
            print(json.dumps({"peer": name, "mode": "startup", **lines[name][-1]}), flush=True)
    medians = {
        name: {key: statistics.median(line[key] for line in ran) for key in ran[0]}
        for name, ran in lines.items()
    }
    ratios = {
        key: round(medians["llama_lightning"][key] / medians["hf"][key], 2) for key in medians["hf"]
    }
    print(json.dumps({"mode": "startup", "shape": args.shape, **medians, "ratio": ratios}))


if __name__ == "__main__":
    main()
