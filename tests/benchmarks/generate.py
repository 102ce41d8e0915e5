"""`python -m tests.benchmarks.generate`: speed and memory of generation, through the public path.

Answers the first rows of a file with random weights of a real shape, `--batch` at a time, and
prints one JSON line. Random weights never end, so each row's answer has `--new` tokens, or with
`--new reference` as many as its reference. With `--temperature` above 0 they are drawn: the logits
of random weights are flat, and a low one leaves as few likely tokens as training does. Each of our
calls lays the weights out anew (prepacking) and that is in its time. `--peer hf` does the same work
with transformers: static batches in file order, of whose tokens only those up to each row's own
length are counted. `decode_step_ms` is one step of decoding alone, from calls of two lengths;
`bandwidth` is the part of the memory's speed, measured in the same process, at which such a step
reads each weight once. `*_cpu` divides by CPU seconds a thread. `--peers` runs both in turn, at
several sizes, and prints the ratios as a table.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from llama_lightning.data.examples import encode_prompt
from llama_lightning.data.rows import Row, read_rows
from llama_lightning.data.templates import TEMPLATES
from llama_lightning.data.tokenizer import Tokenizer
from llama_lightning.model.llama import Llama
from tests.benchmarks import interleaved
from tests.benchmarks.inputs import DATA, LONG, SHORT, TOKENIZER, check_files, device
from tests.benchmarks.interleaved import (
    Job,
    Line,
    Part,
    Ratios,
    Runs,
    markdown,
    measurement,
    medians,
    peak_gib,
    ratio,
    two_digits,
)
from tests.benchmarks.machine import machine_name, memory, reading_ceiling, synchronize
from tests.random_llama import SHAPES, kept_random_llama

OURS, HF = "llama_lightning", "hf"

Call = Callable[[Path, str], None]  # answers the prompts of a file with so many tokens each


def num_new(row: Row, tokenizer: Tokenizer, new: str) -> int:
    """Tokens to generate, an end token included where they are the reference's."""
    return len(tokenizer.encode(row.output)) + 1 if new == "reference" else int(new)


def ours(args: argparse.Namespace, folder: Path, tokenizer: Tokenizer) -> Call:
    """Make a call of `predict`; the weights are read by the first."""
    # Here, because the other peer's environment need not have Lightning.
    from llama_lightning import GenerationConfig, LlamaModule, Trainer
    from tests.benchmarks.folded import FixedLengths

    generation = GenerationConfig(temperature=args.temperature, top_p=args.top_p)
    module = LlamaModule(base_model=str(folder), base_dtype=args.dtype, generation=generation)
    trainer = Trainer(
        accelerator=args.device,
        devices=1,
        precision="bf16-true" if args.dtype == "bfloat16" else "32-true",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )

    def call(records: Path, new: str) -> None:
        data = FixedLengths(
            predict_path=str(records), base_folder=str(folder), eval_batch_size=args.batch
        )
        data.tokenizer = tokenizer  # is read once, as the other peer does
        data.vocab_size = SHAPES[args.shape].vocab_size
        data.num_new = lambda row: num_new(row, tokenizer, new)
        trainer.predict(module, datamodule=data, return_predictions=False)

    return call


def huggingface(args: argparse.Namespace, folder: Path, tokenizer: Tokenizer) -> Call:
    """Make a call that answers all prompts with transformers."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder, dtype=getattr(torch, args.dtype)).eval()
    model.to(args.device).generation_config.eos_token_id = None
    drawn = {"temperature": args.temperature, "top_p": args.top_p, "top_k": 0}
    choice = {"do_sample": True, **drawn} if args.temperature else {"do_sample": False}

    @torch.inference_mode()
    def call(records: Path, new: str) -> None:
        rows = list(read_rows(records, need_output=False))
        for start in range(0, len(rows), args.batch):
            batch = rows[start : start + args.batch]
            prompts = [encode_prompt(row, tokenizer, TEMPLATES["alpaca"]) for row in batch]
            longest = max(map(len, prompts))
            ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
            mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
            most = max(num_new(row, tokenizer, new) for row in batch)
            model.generate(
                (ids % model.config.vocab_size).to(args.device),
                attention_mask=mask.to(args.device),
                **choice,
                max_new_tokens=most,
                min_new_tokens=most,
                pad_token_id=0,
            )

    return call


def measure(args: argparse.Namespace, folder: Path, records: Path) -> dict[str, Any]:
    """Call once to warm up, then time the calls."""
    tokenizer = Tokenizer.from_path(folder)
    call = (ours if args.peer == OURS else huggingface)(args, folder, tokenizer)

    def timed(file: Path, new: str) -> tuple[float, float]:
        wall, cpu = time.perf_counter(), time.process_time()
        call(file, new)
        synchronize(args.device)
        return time.perf_counter() - wall, time.process_time() - cpu

    few = records.with_name("few.json")  # a warm-up need not answer all rows
    few.write_text(json.dumps(json.loads(records.read_text())[: args.batch]))
    timed(few, "2")
    rows = list(read_rows(records, need_output=False))
    walls, cpus, decoding = [], [], []
    for _ in range(args.repeats):
        wall, cpu = timed(records, args.new)
        walls.append(wall)
        cpus.append(cpu)
        if args.new != "reference" and (fewer := int(args.new) // 8):
            steps = (int(args.new) - fewer) * -(-len(rows) // args.batch)
            decoding.append(1e3 * (wall - timed(records, str(fewer))[0]) / steps)
    new_tokens = sum(num_new(row, tokenizer, args.new) for row in rows)
    prompts = [encode_prompt(row, tokenizer, TEMPLATES["alpaca"]) for row in rows]
    peaks = memory(args.device)  # of the calls: what the ceiling reads is as much as a network
    steps: dict[str, float] = {}
    if decoding:
        with torch.device("meta"):
            model = Llama(SHAPES[args.shape]).to(getattr(torch, args.dtype))
        weights = sum(parameter.nbytes for parameter in model.parameters())
        step, ceiling = statistics.median(decoding), reading_ceiling(args.device)
        steps = {
            "decode_step_ms": round(step, 2),
            "reading_ceiling_gb_s": round(ceiling, 1),
            "bandwidth": round(1e-6 * weights / step / ceiling, 3),
        }
    return {
        "peer": args.peer,
        "mode": "gen",
        "shape": args.shape,
        "data": args.records.name,
        "dtype": args.dtype,
        "batch": args.batch,
        "rows": len(rows),
        "new": args.new,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "without": args.without or "",
        "tag": os.environ.get("PEER_TAG", ""),
        "new_tok_s": round(new_tokens / statistics.median(walls), 2),
        "new_tok_s_cpu": round(new_tokens / statistics.median(cpus) * args.threads, 2),
        **steps,
        "call_s": [round(seconds, 3) for seconds in walls],
        "call_cpu_s": [round(seconds, 3) for seconds in cpus],
        "new_tokens": new_tokens,
        "prompt_tokens": sum(map(len, prompts)),
        "waiting": {name: os.environ[name] for name in interleaved.WAITING if name in os.environ},
        "machine": machine_name(args.device),
        "torch": torch.__version__,
        **peaks,
    }


class Entry(NamedTuple):
    """What is answered: some rows of equal answers, or a data set of uneven ones."""

    title: str
    batch: int
    rows: int | None = None  # by default --set-rows
    new: str = "reference"
    records: str = SHORT
    drawn: bool = False  # at --temperature 0.05 --top-p 0.9, not the likeliest tokens


PLAN = {
    "batch1": Entry("64 tokens each", 1, 12, "64"),
    "batch8": Entry("64 tokens each", 8, 32, "64"),
    "batch32": Entry("64 tokens each", 32, 64, "64"),
    "drawn8": Entry("64 tokens each, drawn", 8, 32, "64", drawn=True),
    "drawn32": Entry("64 tokens each, drawn", 32, 64, "64", drawn=True),
    "set8": Entry("as long as the reference, short", 8),
    "set32": Entry("as long as the reference, short", 32),
    "long8": Entry("as long as the reference, long", 8, 32, records=LONG),
}


def groups(args: argparse.Namespace) -> dict[str, list[Job]]:
    """Name the measurements."""
    waiting = interleaved.waiting()
    dtype = interleaved.peers_dtype(args)
    found = {}
    for key, (_, batch, rows, new, records, drawn) in PLAN.items():
        flags = ["--shape", args.shape, "--records", args.data / records]
        flags += ["--tokenizer", args.data / TOKENIZER, "--rows", rows or args.set_rows]
        flags += ["--batch", batch, "--new", new, "--repeats", 1, "--threads", args.threads]
        flags += ["--temperature", 0.05, "--top-p", 0.9] if drawn else []
        command = measurement("generate", [*flags, "--device", args.device, "--peer"])
        found[key] = [
            Job(OURS, [*command, OURS], waiting),
            Job(HF, [args.hf, *command[1:], HF, "--dtype", dtype], waiting),
        ]
    return found


def medians_of_both(lines: Sequence[Line]) -> list[dict[str, float]]:
    """Take the medians of ours and of transformers; what failed has none."""
    keys = ("new_tok_s", "new_tok_s_cpu", "decode_step_ms", "rows")
    figures = medians(lines, (*keys, "peak_rss_gib", "peak_cuda_gib"))
    return [figures.get(peer, {}) for peer in (OURS, HF)]


def ratios(lines: Sequence[Line]) -> Ratios:
    """Divide ours by transformers'."""
    mine, theirs = medians_of_both(lines)
    if not mine or not theirs:
        return Ratios()
    speeds = (ratio(mine[name], theirs[name]) for name in ("new_tok_s", "new_tok_s_cpu"))
    return Ratios(*speeds, ratio(peak_gib(mine), peak_gib(theirs)))


def table(runs: Runs) -> list[str]:
    """Lay out medians and ratios to transformers; of steps' times how often ours fits in theirs."""
    rows: list[list[object]] = []
    for key, lines in runs.items():
        (mine, theirs), entry = medians_of_both(lines), PLAN[key]
        if not mine:
            continue
        wall, cpu, memory = map(two_digits, ratios(lines))
        row = [key, entry.title, entry.batch, f"{mine['rows']:.0f}"]
        row += [mine["new_tok_s"], theirs.get("new_tok_s"), wall]
        row += [mine["new_tok_s_cpu"], theirs.get("new_tok_s_cpu"), cpu]
        step, other = mine.get("decode_step_ms"), theirs.get("decode_step_ms")
        row += [step, other, two_digits(ratio(other, step)) if step and other else None]
        rows.append([*row, *(peak_gib(one) if one else None for one in (mine, theirs)), memory])
    head = ["what", "answers", "batch", "rows", "tok/s", "hf", "ratio"]
    head += ["by CPU time", "hf", "ratio", "decode step, ms", "hf", "gain"]
    return markdown(head + ["peak GiB", "hf", "ratio"], rows)


PART = Part("generate", "Generation beside transformers", groups, table)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.generate", description=__doc__
    )
    parser.add_argument("--peers", action="store_true", help="ours and transformers in turn")
    parser.add_argument("--peer", choices=[OURS, HF], default=OURS)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="1b-4l")
    parser.add_argument("--records", type=Path, default=DATA / SHORT)
    parser.add_argument("--tokenizer", type=Path, default=DATA / TOKENIZER)
    parser.add_argument("--rows", type=int, default=16, help="prompts to answer")
    parser.add_argument("--batch", type=int, default=8, help="answered at a time")
    parser.add_argument("--new", default="64", help="tokens an answer, or: reference")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--without", metavar="LEVER", help="one of levers.py's, of generation")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--device", type=device, choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    check_files(parser, args.tokenizer, args.records)
    torch.set_num_threads(args.threads)
    if args.without:
        # Here, because the other peer's environment need not have Lightning.
        from tests.levers import ANSWERING_WITHOUT

        ANSWERING_WITHOUT[args.without](setattr)
    folder = kept_random_llama(args.shape, args.tokenizer)
    with tempfile.TemporaryDirectory() as scratch:
        records = Path(scratch) / "records.json"
        records.write_text(json.dumps(json.loads(args.records.read_text())[: args.rows]))
        print(json.dumps(measure(args, folder, records)), flush=True)


if __name__ == "__main__":
    if "--peers" in sys.argv:
        sys.argv.remove("--peers")
        interleaved.main(PART, __doc__)
    else:
        main()
