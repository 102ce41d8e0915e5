"""`python -m tests.benchmarks.generate`: speed and memory of generation, through the public path.

Answers the first rows of a file with random weights of a real shape, `--batch` at a time, and
prints one JSON line. Random weights never end, so each row's answer has `--new` tokens, or with
`--new reference` as many as its reference. `--peer hf` does the same work with transformers: static
batches in file order, of whose tokens only those up to each row's own length are counted.
`--peers` runs both in turn, at several sizes, and prints the ratios as a table.
`*_cpu` divides by CPU seconds a thread: it holds still when others use the cores too (with
OMP_WAIT_POLICY=PASSIVE).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from llama_lightning.data.alpaca import AlpacaDataModule
from llama_lightning.data.examples import Row
from llama_lightning.records import PromptBatch
from llama_lightning.training.llama_module import LlamaModule
from llama_lightning.training.trainer import Trainer
from tests.benchmarks.machine import machine_name, memory, synchronize
from tests.random_llama import SHAPES, kept_random_llama

SHARED = Path(__file__).parents[3] / "shared" / "data"
# Rows, batch, new tokens: a few batches of equal answers, then a data set of uneven ones.
PLAN = [(4, 1, "64"), (16, 8, "64"), (64, 32, "64"), (200, 8, "reference"), (200, 32, "reference")]
NO_STOP = -1


class FixedLengths(AlpacaDataModule):
    """Prompts whose answers have a given length each."""

    new: str

    def num_new(self, row: Row) -> int:
        """Tokens to generate, an end token included where they are the reference's."""
        return (
            len(self.tokenizer.encode(row.output)) + 1 if self.new == "reference" else int(self.new)
        )

    def prompts(self, rows: Sequence[Row]) -> PromptBatch:
        batch = super().prompts(rows)
        limits = torch.tensor([self.num_new(row) for row in rows], dtype=torch.int64)
        stop_ids = torch.full((len(rows), 1), NO_STOP)
        return batch._replace(stop_ids=stop_ids, max_new_tokens=limits)


def ours(args: argparse.Namespace, folder: Path, data: FixedLengths) -> Callable[[], None]:
    """Make a call of `predict`; the weights are read by the first."""
    module = LlamaModule(base_model=str(folder), base_dtype=args.dtype)
    trainer = Trainer(
        accelerator=args.device,
        devices=1,
        precision="bf16-true" if args.dtype == "bfloat16" else "32-true",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    return lambda: trainer.predict(module, datamodule=data, return_predictions=False)


def huggingface(args: argparse.Namespace, folder: Path, data: FixedLengths) -> Callable[[], None]:
    """Make a call that answers all rows with transformers."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder, dtype=getattr(torch, args.dtype)).eval()
    model.to(args.device).generation_config.eos_token_id = None
    data.setup("predict")

    @torch.inference_mode()
    def call() -> None:
        rows = data.predict_rows
        for start in range(0, len(rows), args.batch):
            batch = data.prompts(rows[start : start + args.batch])
            prompts = [p.tolist() for p in batch.tokens.tensor_split(batch.boundaries[1:-1])]
            longest = max(map(len, prompts))
            ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
            mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
            assert batch.max_new_tokens is not None
            new = int(batch.max_new_tokens.max())
            model.generate(
                ids.to(args.device),
                attention_mask=mask.to(args.device),
                do_sample=False,
                max_new_tokens=new,
                min_new_tokens=new,
                pad_token_id=0,
            )

    return call


def measure(args: argparse.Namespace, folder: Path, records: Path) -> dict[str, Any]:
    """Call once to warm up, then time the calls."""
    data = FixedLengths(
        predict_path=str(records), base_folder=str(folder), eval_batch_size=args.batch
    )
    data.new = args.new
    call = (ours if args.peer == "llama_lightning" else huggingface)(args, folder, data)
    walls, cpus = [], []
    for number in range(args.repeats + 1):
        if number == 0:  # a warm-up need not answer all rows
            few = records.with_name("few.json")
            few.write_text(json.dumps(json.loads(records.read_text())[: args.batch]))
            data.predict_path, data.new = str(few), "2"
        wall, cpu = time.perf_counter(), time.process_time()
        call()
        synchronize(args.device)
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
        if number == 0:
            data.predict_path, data.new = str(records), args.new
            data.setup("predict")
    rows = data.predict_rows
    new_tokens = sum(data.num_new(row) for row in rows)
    return {
        "peer": args.peer,
        "mode": "gen",
        "shape": args.shape,
        "data": args.records.name,
        "dtype": args.dtype,
        "batch": args.batch,
        "rows": len(rows),
        "new": args.new,
        "tag": os.environ.get("PEER_TAG", ""),
        "new_tok_s": round(new_tokens / statistics.median(walls[1:]), 2),
        "new_tok_s_cpu": round(new_tokens / statistics.median(cpus[1:]) * args.threads, 2),
        "call_s": [round(seconds, 3) for seconds in walls[1:]],
        "call_cpu_s": [round(seconds, 3) for seconds in cpus[1:]],
        "new_tokens": new_tokens,
        "prompt_tokens": len(data.prompts(rows).tokens),
        "machine": machine_name(args.device),
        "torch": torch.__version__,
        **memory(args.device),
    }


def compare(args: argparse.Namespace, rest: list[str]) -> None:
    """Run ours and transformers in turn, each in a process of its own; print lines and ratios."""
    lines: dict[tuple[Any, ...], dict[str, list[dict[str, Any]]]] = {}
    for _ in range(args.repeats):
        for rows, batch, new in PLAN:
            for peer in ("llama_lightning", "hf"):
                command = [sys.executable, "-m", "tests.benchmarks.generate", *rest]
                command += ["--peer", peer, "--rows", str(rows), "--batch", str(batch)]
                command += ["--new", new, "--repeats", "1"]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                line = json.loads(done.stdout.splitlines()[-1])
                print(json.dumps(line), flush=True)
                both = lines.setdefault((rows, batch, new), {})
                both.setdefault(peer, []).append(line)
    print("| rows | batch | new tokens | ours, tokens/s | hf | ratio | by CPU | RSS, ours / hf |")
    print("|---|---|---|---|---|---|---|---|")
    for size, both in lines.items():
        mine, theirs = (
            {
                key: statistics.median(line[key] for line in both[peer])
                for key in ("new_tok_s", "new_tok_s_cpu", "peak_rss_gib")
            }
            for peer in ("llama_lightning", "hf")
        )
        cells = [*size, mine["new_tok_s"], theirs["new_tok_s"]]
        cells += [f"{mine[key] / theirs[key]:.2f}" for key in ("new_tok_s", "new_tok_s_cpu")]
        cells.append(f"{mine['peak_rss_gib']} / {theirs['peak_rss_gib']} GiB")
        print(f"| {' | '.join(map(str, cells))} |")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.generate", description=__doc__
    )
    parser.add_argument("--peers", action="store_true", help="ours and transformers in turn")
    parser.add_argument("--peer", choices=["llama_lightning", "hf"], default="llama_lightning")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="1b-4l")
    parser.add_argument("--records", type=Path, default=SHARED / "instruction-data.json")
    parser.add_argument("--tokenizer", type=Path, default=SHARED / "llama3-tokenizer.model")
    parser.add_argument("--rows", type=int, default=16, help="prompts to answer")
    parser.add_argument("--batch", type=int, default=8, help="answered at a time")
    parser.add_argument("--new", default="64", help="tokens an answer, or: reference")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    if args.peers:
        compare(args, [argument for argument in sys.argv[1:] if argument != "--peers"])
        return
    torch.set_num_threads(args.threads)
    folder = kept_random_llama(args.shape, args.tokenizer)
    with tempfile.TemporaryDirectory() as scratch:
        records = Path(scratch) / "records.json"
        records.write_text(json.dumps(json.loads(args.records.read_text())[: args.rows]))
        print(json.dumps(measure(args, folder, records)), flush=True)


if __name__ == "__main__":
    main()
