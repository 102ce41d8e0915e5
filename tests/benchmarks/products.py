"""`python -m tests.benchmarks.products`: bf16 products on a CPU, the plain way beside ours.

Of the 1B shape, at several numbers of rows: one matrix, forward and backward to the input, by torch
and in fp32 (`model/linear.py` takes the faster: torch's where the processor has instructions for
bf16); a block's seven matrices as they are and as they are laid out while prompts are answered; the
head, laid out whole and screened; and a decode step of 4 layers with the blocks in both ways and
the head screened, where it is. Each way is measured in a process of its own and in turn. `--way`
measures one, as a JSON line of milliseconds.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F

from llama_lightning.model.decode_step import DecodeStep
from llama_lightning.model.kv_cache import KVCache
from llama_lightning.model.linear import CPU_HAS_BF16, Linear, product_in_fp32
from llama_lightning.model.llama import Llama
from llama_lightning.model.prepack import prepacked
from llama_lightning.model.screened_head import ScreenedHead, screened
from tests.benchmarks import interleaved
from tests.benchmarks.interleaved import Job, Part, Runs, ratio, two_digits
from tests.benchmarks.machine import machine_name
from tests.random_llama import SHAPES

TORCH, OURS = "torch", "in fp32"
PLAIN, LAID_OUT = "a block", "a block laid out"
WHOLE, SCREENED = "whole head", "screened head"
STEP, STEP_LAID_OUT = "a decode step", "a decode step laid out"
PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {TORCH: F.linear, OURS: product_in_fp32}
WAYS = {
    "products": (TORCH, OURS),
    "block": (PLAIN, LAID_OUT),
    "head": (WHOLE, SCREENED),
    "step": (STEP, STEP_LAID_OUT),
}
ROWS = {
    "products": (1, 4, 8, 32, 128, 512),
    "block": (1, 2, 4, 8, 16, 32, 128, 512),
    "head": (1, 2, 4, 8),
    "step": (1, 2, 8),
}
# Done once a run, for so many rows, and named like a pass.
ONCE = {
    "block": ["laying out 1", "giving back 1", "laying out 8", "giving back 8"],
    "head": ["laying out 1", "laying out 8"],
}
TOKENS, WIDTH, INNER = 128_256, 2048, 8192
# Inputs and outputs of q, k, v, o, gate, up and down.
BLOCK = [(WIDTH, WIDTH), (WIDTH, 512), (WIDTH, 512), (WIDTH, WIDTH)]
BLOCK += [(WIDTH, INNER), (WIDTH, INNER), (INNER, WIDTH)]
REPEATS, SECONDS = 3, 0.3  # a call is repeated so often and so long; the best time counts
SHAPE, PROMPT, STEPS = "1b-4l", 100, 64  # of decode steps: the network, tokens seen, and how many


def milliseconds(call: Callable[[], object]) -> float:
    """Time a call after one more."""
    call()
    times: list[float] = []
    while len(times) < REPEATS or sum(times) < SECONDS:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return round(1e3 * min(times), 3)


def of_a_matrix(way: str) -> dict[str, float]:
    """Time a product at each number of rows, forward and backward."""
    product, found = PRODUCTS[way], {}
    weight = torch.randn(WIDTH, WIDTH, dtype=torch.bfloat16)
    for rows in ROWS["products"]:
        x = torch.randn(rows, WIDTH, dtype=torch.bfloat16, requires_grad=True)
        out = product(x, weight)
        gradient = torch.randn_like(out)
        with torch.no_grad():
            found[f"forward {rows}"] = milliseconds(lambda x=x: product(x, weight))
        found[f"backward {rows}"] = milliseconds(
            lambda out=out, x=x, g=gradient: torch.autograd.grad(out, x, g, retain_graph=True)
        )
    return found


def _since(start: float) -> float:
    return round(1e3 * (time.perf_counter() - start), 6)


def _bf16(inputs: int, outputs: int) -> Linear:
    return Linear(inputs, outputs, bias=False, dtype=torch.bfloat16)


@torch.no_grad()
def of_a_block(way: str) -> dict[str, float]:
    """Time a block's products at each number of rows, and laying them out."""
    network, found = torch.nn.Sequential(*(_bf16(*sizes) for sizes in BLOCK)), {}
    for rows in ROWS["block"]:
        inputs = [torch.randn(rows, width, dtype=torch.bfloat16) for width, _ in BLOCK]
        start = time.perf_counter()
        with prepacked(network, rows) if way == LAID_OUT else nullcontext():
            found[f"laying out {rows}"] = _since(start)
            found[f"forward {rows}"] = milliseconds(
                lambda inputs=inputs: [linear(x) for linear, x in zip(network, inputs, strict=True)]
            )
            start = time.perf_counter()
        found[f"giving back {rows}"] = _since(start)
    shown = {*ONCE["block"], *(f"forward {rows}" for rows in ROWS["block"])}
    return {name: figure for name, figure in found.items() if name in shown}


@torch.no_grad()
def of_a_head(way: str) -> dict[str, float]:
    """Time the likeliest tokens of each number of rows, and laying the head out for them."""
    network, found = torch.nn.Sequential(_bf16(WIDTH, TOKENS)), {}
    for rows in ROWS["head"]:
        x = torch.randn(rows, WIDTH, dtype=torch.bfloat16)
        start = time.perf_counter()
        with nullcontext() if way == SCREENED else prepacked(network, rows):
            head = ScreenedHead(network[0].weight, rows) if way == SCREENED else network[0]
            found[f"laying out {rows}"] = _since(start)
            found[f"forward {rows}"] = milliseconds(lambda head=head, x=x: head(x).max(-1).indices)
    shown = {*ONCE["head"], *(f"forward {rows}" for rows in ROWS["head"])}
    return {name: figure for name, figure in found.items() if name in shown}


@torch.no_grad()
def of_a_step(way: str) -> dict[str, float]:
    """Time decode steps of each number of rows, with blocks as they are and laid out; medians."""
    torch.manual_seed(0)
    network = Llama(SHAPES[SHAPE]).bfloat16().eval()
    found = {}
    for rows in ROWS["step"]:
        slots = PROMPT + STEPS
        cache = KVCache.allocate(
            network.config, rows, slots, dtype=torch.bfloat16, device=torch.device("cpu")
        )
        cache.lengths_B += PROMPT  # of zeros, which take as long as any
        step, tokens, times = DecodeStep(network.model, cache, None), torch.arange(rows), []
        with ExitStack() as stack:
            stack.enter_context(screened(network, rows))
            if way == STEP_LAID_OUT:
                stack.enter_context(prepacked(network, rows))
            for number in range(STEPS):
                start = time.perf_counter()
                hidden = step(tokens, [PROMPT + number] * rows)
                tokens = network.lm_head(hidden).max(-1).indices
                times.append(_since(start))
        found[f"forward {rows}"] = round(statistics.median(times), 3)
    return found


MEASURES = {"products": of_a_matrix, "block": of_a_block, "head": of_a_head, "step": of_a_step}


def groups(args: argparse.Namespace) -> dict[str, list[Job]]:
    """Name the measurements."""
    flags, waiting = ["--threads", args.threads, "--way"], interleaved.waiting()
    return {
        group: [
            Job(way, interleaved.measurement("products", [*flags, way]), waiting) for way in ways
        ]
        for group, ways in WAYS.items()
    }


def table(runs: Runs) -> list[str]:
    """Lay out medians, and how often ours fits in the plain way."""
    rows: list[list[object]] = []
    for group, lines in runs.items():
        passes = ("forward", "backward") if group == "products" else ("forward",)
        names = [f"{pass_} {number}" for number in ROWS[group] for pass_ in passes]
        names += ONCE.get(group, [])
        figures = interleaved.medians(lines, names)
        for name in names:
            theirs, mine = (figures.get(way, {}).get(name) for way in WAYS[group])
            pass_, _, number = name.rpartition(" ")
            once = name in ONCE.get(group, [])
            if once and theirs is None and mine is None:  # measured before it was asked for
                continue
            gain = two_digits(ratio(theirs, mine)) if theirs and mine and not once else None
            rows.append([" / ".join(WAYS[group]), number, pass_, theirs, mine, gain])
    head = ["plain / ours", "rows", "pass", "plain, ms", "ours, ms", "gain"]
    return interleaved.markdown(head, rows)


TITLE = (
    "bf16 products on a CPU: a matrix of 2,048 by 2,048, a block, a head of 128,256 tokens, a step"
)
PART = Part("products", TITLE, groups, table, shaped=False, on_gpu=False, reads=False)


def main() -> None:
    """Measure one way."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.products", description=__doc__
    )
    measures = {way: MEASURES[group] for group, ways in WAYS.items() for way in ways}
    parser.add_argument("--way", choices=list(measures), required=True)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    told = {"machine": machine_name("cpu"), "torch": torch.__version__, "has_bf16": CPU_HAS_BF16}
    print(json.dumps({"way": args.way, **told, **measures[args.way](args.way)}), flush=True)


if __name__ == "__main__":
    if "--way" in sys.argv:
        main()
    else:
        interleaved.main(PART, __doc__)
