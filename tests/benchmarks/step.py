"""`python -m tests.benchmarks.step`: speed and memory of training, through the public path.

Fits random weights of a real shape on real records with AlpacaDataModule, LlamaModule and Trainer
and prints one JSON line. Tokens are those of records. `tok_s_cpu` divides by CPU seconds a thread:
it holds still when others use the cores too (with OMP_WAIT_POLICY=PASSIVE). `wait` is the part of
the time in which the loop waits for its next batch. `rows_real` is the part of the network's rows,
and `cells_real` of the queries in attention's grids, that is no padding. `mfu` counts 4 (LoRA) or 6
(full) operations a weight for each token, also where a step leaves them out: it may pass 1. Of
several processes (`--devices`) tokens and CPU time are summed; `wait` and memory are the first's.
With `--without LEVER` each batch is there four times, in turn as it is and without the lever: twice
to warm up, as kernels are made for each number of rows, and twice to be timed. `gain` is how often
the one fits in the other, `gain_cpu` by CPU time; `--steps` counts batches, and all else is of all.
With `--throughout` the lever is not there at all: what it saves of memory is seen beside a process
that has it.
"""

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.profilers import SimpleProfiler
from lightning.pytorch.utilities import rank_zero_only
from torch import distributed
from torch.utils.data import DataLoader

from llama_lightning.model.llama import Llama
from llama_lightning.model.lora import LLAMA_LINEARS, LoRAConfig
from llama_lightning.model.ragged_rows import ragged_rows
from llama_lightning.records import Batch
from llama_lightning.training.llama_module import LlamaModule
from llama_lightning.training.optim import OptimizerConfig
from llama_lightning.training.trainer import Trainer
from tests.benchmarks.folded import FoldedData
from tests.benchmarks.inputs import DATA, SHORT, TOKENIZER, check_files, device
from tests.benchmarks.machine import (
    machine_name,
    matmul_ceiling,
    memory,
    seconds_since_start,
    synchronize,
)
from tests.levers import WITHOUT
from tests.random_llama import SHAPES, kept_random_llama

PRECISION = {
    ("lora", "bf16"): "bf16-mixed",
    ("full", "bf16"): "bf16-true",
    ("lora", "fp32"): "32-true",
    ("full", "fp32"): "32-true",
}
CHECKPOINTING: dict[str, Any] = {"none": False, "selective": "selective", "full": True}


def counts(batch: Batch, sharing: bool) -> dict[str, int]:
    """Count what a micro-batch asks for, and the cells of the grids in which attention pads it."""
    prefixes = batch.prefixes if sharing else None
    some = len(batch.row_ids) > 0
    return {
        "tokens": len(batch.tokens),
        "supervised": int((batch.labels >= 0).sum()),
        "distinct": len(batch.tokens if prefixes is None else prefixes.distinct),
        "cells": len(ragged_rows(batch.boundaries, prefixes).to_queries) if some else 0,
    }


class Clock(Callback):
    """Wall and CPU seconds of each step, its batch's loading included, and what it computed."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.steps: list[dict[str, float]] = []
        self.first_step_at_s = 0.0
        self._batches: list[list[Batch]] = []  # of each step; they are counted outside the time

    def on_train_start(self, trainer, pl_module):
        def count(module, args, output):
            self._rows += output[..., 0].numel()

        # What is embedded is what the layers compute.
        pl_module.model.model.embed_tokens.register_forward_hook(count)
        self._start()

    def _start(self) -> None:
        self._rows = 0
        self._batches.append([])
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self._batches[-1].append(batch)
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        synchronize(self.device)
        self.first_step_at_s = self.first_step_at_s or seconds_since_start()
        seconds = {"wall": time.perf_counter() - self._wall, "cpu": time.process_time() - self._cpu}
        loss = float(trainer.callback_metrics["train/loss"])
        self.steps.append({**seconds, "rows": self._rows, "loss": loss})
        self._start()

    def on_train_end(self, trainer, pl_module):
        """Add up what each process did; they wait for each other, so that their time is one's."""
        for step, batches in zip(self.steps, self._batches, strict=False):
            several = [counts(batch, pl_module.share_prefixes) for batch in batches]
            step |= {name: sum(one[name] for one in several) for name in several[0]}
            for name in ("cpu", "rows", *several[0]):
                value = torch.tensor(step[name], dtype=torch.float64, device=pl_module.device)
                step[name] = float(trainer.strategy.reduce(value, reduce_op="sum"))


class Alternating(Callback):
    """Do without a lever in every other step."""

    def __init__(self, lever: str) -> None:
        self.lever = lever
        self._replaced: list[tuple[Any, str, Any]] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self._restore()
        if trainer.global_step % 2:
            WITHOUT[self.lever](self._put)

    def on_train_end(self, trainer, pl_module):
        self._restore()

    def _put(self, thing: Any, name: str, value: Any) -> None:
        self._replaced.append((thing, name, getattr(thing, name)))
        setattr(thing, name, value)

    def _restore(self) -> None:
        while self._replaced:
            setattr(*self._replaced.pop())


class FourTimes(FoldedData):
    """Every batch four times."""

    def train_dataloader(self):
        batches = [batch for batch in super().train_dataloader() for _ in range(4)]
        return DataLoader(batches, batch_size=None, collate_fn=lambda batch: batch)


class Quiet(SimpleProfiler):
    """Lightning's profiler without its report: it knows how long the loop waits for data."""

    def describe(self) -> None:
        pass

    def waits(self) -> list[float]:
        return next(
            seconds
            for name, seconds in self.recorded_durations.items()
            if name.endswith("train_dataloader_next")
        )


def generate_records(path: Path, count: int, words: int) -> None:
    """Write records of so many words an answer; by default (0) spread as in Alpaca, mean 60."""
    rng = random.Random(0)
    some = ["the", "of", "a", "to", "in", "is", "for", "on", "with", "as", "by", "at", "from"]

    def text(size: float) -> str:
        return " ".join(rng.choices(some, k=max(1, min(400, round(size)))))

    records = []
    for _ in range(count):
        instruction, size = text(rng.lognormvariate(2.3, 0.4)), rng.lognormvariate(3.6, 1)
        output = " ".join(rng.choices(some, k=words)) if words else text(size)
        records.append({"instruction": instruction, "output": output})
    path.write_text(json.dumps(records))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.step", description=__doc__)
    parser.add_argument("--mode", choices=["lora", "full"], default="lora")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="1b-4l")
    parser.add_argument("--records", type=Path, default=DATA / SHORT)
    parser.add_argument(
        "--generated", type=int, default=0, help="so many generated records instead"
    )
    parser.add_argument("--words", type=int, default=0, help="an answer of a generated record")
    parser.add_argument("--tokenizer", type=Path, default=DATA / TOKENIZER)
    parser.add_argument("--batch", type=int, default=9, help="records a step")
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--devices", type=int, default=1, help="processes, of --threads each")
    parser.add_argument("--steps", type=int, default=3, help="timed steps")
    parser.add_argument("--warmup", type=int, default=1, help="steps before those")
    parser.add_argument("--targets", choices=["attn", "all"], default="attn")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--device", type=device, choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--max-seq-len", type=int, default=512)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--checkpointing", choices=CHECKPOINTING, default="none")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--no-prefix-sharing", action="store_true")
    parser.add_argument("--without", choices=sorted(WITHOUT), help="a lever, in every other step")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--throughout", action="store_true", help="... in every step instead")
    args = parser.parse_args()
    if args.throughout and not args.without:
        parser.error("--throughout: name a lever by --without")
    args.alternates = bool(args.without) and not args.throughout
    if args.alternates:
        args.warmup, args.steps = 0, 4 * args.steps
    check_files(parser, args.tokenizer, *([] if args.generated else [args.records]))
    return args


def fit(args: argparse.Namespace, folder: Path, records: Path) -> tuple[Clock, Quiet]:
    """Train for the steps asked for."""
    targets = LLAMA_LINEARS if args.targets == "all" else LLAMA_LINEARS[:4]
    module = LlamaModule(
        base_model=str(folder),
        base_dtype="bfloat16" if args.dtype == "bf16" else "float32",
        lora=LoRAConfig(
            rank=args.rank if args.mode == "lora" else 0,
            alpha=2 * args.rank,
            target_modules=targets,
        ),
        optimizer=OptimizerConfig(lr=1e-4, weight_decay=0.0),
        gradient_checkpointing=CHECKPOINTING[args.checkpointing],
        compile=args.compile,
        share_prefixes=not args.no_prefix_sharing,
    )
    data = (FourTimes if args.alternates else FoldedData)(
        str(records),
        val_fraction=0.0,
        test_fraction=0.0,
        base_folder=str(folder),
        max_seq_len=args.max_seq_len,
        batch_size=args.batch,
        num_workers=args.workers,
    )
    data.vocab_size = SHAPES[args.shape].vocab_size
    clock, profiler = Clock(args.device), Quiet()
    trainer = Trainer(
        accelerator=args.device,
        devices=args.devices,
        strategy="auto" if args.devices == 1 else "ddp",
        precision=PRECISION[args.mode, args.dtype],
        max_steps=args.warmup + args.steps,
        accumulate_grad_batches=args.accumulate,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=[clock, *([Alternating(args.without)] if args.alternates else [])],
        profiler=profiler,
    )
    trainer.fit(module, datamodule=data)
    return clock, profiler


def report(
    args: argparse.Namespace,
    clock: Clock,
    profiler: Quiet,
    peaks: dict[str, Any],
    ceiling: float,
) -> dict[str, Any]:
    """Make the JSON line's content."""
    steps = clock.steps[args.warmup :]
    total = {key: sum(s[key] for s in steps) for key in steps[0]}
    tokens, wall = round(total["tokens"]), total["wall"]
    config = SHAPES[args.shape]
    with torch.device("meta"):
        weights = sum(p.numel() for p in Llama(config).parameters())
    flop_a_token = (4 if args.mode == "lora" else 6) * weights
    gains = {}
    if args.alternates:
        pairs = list(zip(steps[2::4], steps[3::4], strict=True))
        for key, name in (("wall", "gain"), ("cpu", "gain_cpu")):
            gain = sum(other[key] for _, other in pairs) / sum(one[key] for one, _ in pairs)
            gains[name] = round(gain, 3)
    waits = profiler.waits()[args.warmup * args.accumulate :][: args.steps * args.accumulate]
    return {
        "peer": "llama_lightning",
        "mode": args.mode,
        "shape": args.shape,
        "data": args.records.name if not args.generated else f"{args.generated} generated",
        "dtype": args.dtype,
        "targets": args.targets,
        "batch": args.batch,
        "devices": args.devices,
        "threads": args.threads,
        "prefixes": not args.no_prefix_sharing,
        "checkpointing": args.checkpointing,
        "compile": args.compile,
        "without": args.without or "",
        **gains,
        "tag": os.environ.get("PEER_TAG", ""),
        "tok_s": round(tokens / wall, 2),
        "tok_s_median": round(statistics.median(s["tokens"] / s["wall"] for s in steps), 2),
        "tok_s_cpu": round(tokens / total["cpu"] * args.threads * args.devices, 2),
        "step_s": [round(s["wall"], 3) for s in steps],
        "step_cpu_s": [round(s["cpu"], 3) for s in steps],
        "tokens": tokens,
        "supervised": round(total["supervised"]),
        "rows_real": round(total["distinct"] / total["rows"], 4),
        "cells_real": round(total["distinct"] / total["cells"], 4),
        "wait": round(sum(waits) / wall, 5),
        "first_step_at_s": round(clock.first_step_at_s, 2),
        "ceiling_gflops": round(ceiling),
        "mfu": round(flop_a_token * tokens / wall / ceiling / args.devices / 1e9, 3),
        "losses": [round(s["loss"], 6) for s in clock.steps],
        "machine": machine_name(args.device),
        "torch": torch.__version__,
        **peaks,
    }


def main() -> None:
    """Measure and print."""
    args = parse()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.throughout:
        WITHOUT[args.without](setattr)
    folder = kept_random_llama(args.shape, args.tokenizer)
    with tempfile.TemporaryDirectory() as scratch:
        records = args.records
        if args.generated:
            records = Path(scratch) / "records.json"
            generate_records(records, args.generated, args.words)
        clock, profiler = fit(args, folder, records)
    if distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()  # gloo's threads may abort a process that ends
    if rank_zero_only.rank:
        return
    peaks = memory(args.device)  # the fit's: the matrices of the ceiling add 0.05 GiB
    # In fp32 too: what has no instructions for bf16 is faster so.
    dtypes = [torch.float32, torch.bfloat16] if args.dtype == "bf16" else [torch.float32]
    ceiling = max(matmul_ceiling(dtype, args.device) for dtype in dtypes)
    print(json.dumps(report(args, clock, profiler, peaks, ceiling)), flush=True)


if __name__ == "__main__":
    main()
