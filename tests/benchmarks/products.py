"""`python -m tests.benchmarks.products`: bf16 products on a CPU, the plain way beside ours.

Of the 1B shape, at several numbers of rows: one matrix, forward and backward to the input, by torch
and in fp32 (`model/linear.py` takes the faster: torch's where the processor has instructions for
bf16); and the head, whole, as it is laid out while prompts are answered, and screened. Each way is
measured in a process of its own and in turn. `--way` measures one, as a JSON line of milliseconds.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor
from torch.nn import functional as F

from llama_lightning.model.linear import CPU_HAS_BF16, Linear, product_in_fp32
from llama_lightning.model.prepack import prepacked
from llama_lightning.model.screened_head import ScreenedHead
from tests.benchmarks import interleaved
from tests.benchmarks.interleaved import Job, Part, Runs
from tests.benchmarks.machine import machine_name

TORCH, OURS, WHOLE, SCREENED = "torch", "in fp32", "whole head", "screened head"
PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {TORCH: F.linear, OURS: product_in_fp32}
WAYS = {"products": (TORCH, OURS), "head": (WHOLE, SCREENED)}
ROWS = {"products": (1, 4, 8, 32, 128, 512), "head": (1, 2, 4, 8, 16)}
TOKENS, WIDTH = 128_256, 2048
REPEATS = 3  # of which the best counts


def milliseconds(call: Callable[[], object]) -> float:
    """Time a call after one more."""
    times = []
    for _ in range(1 + REPEATS):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return round(min(times[1:]), 3)


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


@torch.inference_mode()
def of_a_head(way: str) -> dict[str, float]:
    """Time the likeliest tokens of each number of rows, and laying the head out for them."""
    network = torch.nn.Sequential(Linear(WIDTH, TOKENS, bias=False, dtype=torch.bfloat16))
    start = time.perf_counter()
    with ExitStack() as stack:
        if way == SCREENED:
            head: torch.nn.Module = ScreenedHead(network[0].weight)
        else:
            stack.enter_context(prepacked(network))
            head = network[0]
        found = {"layout 0": round(1e3 * (time.perf_counter() - start), 3)}
        for rows in ROWS["head"]:
            x = torch.randn(rows, WIDTH, dtype=torch.bfloat16)
            found[f"forward {rows}"] = milliseconds(lambda x=x: head(x).max(-1).indices)
    return found


def groups(args: argparse.Namespace) -> dict[str, list[Job]]:
    """Name the measurements."""
    flags = ["--threads", args.threads, "--way"]
    return {
        group: [Job(way, interleaved.measurement("products", [*flags, way])) for way in ways]
        for group, ways in WAYS.items()
    }


def table(runs: Runs) -> list[str]:
    """Lay out medians, and how often ours fits in the plain way."""
    rows: list[list[object]] = []
    for group, lines in runs.items():
        passes = ("forward", "backward") if group == "products" else ("forward",)
        names = [f"{pass_} {number}" for number in ROWS[group] for pass_ in passes]
        names += ["layout 0"] if group == "head" else []
        figures = interleaved.medians(lines, names)
        for name in names:
            theirs, mine = (figures.get(way, {}).get(name) for way in WAYS[group])
            pass_, number = name.split()
            laid_out = pass_ == "layout"  # once, before any row
            gain = interleaved.ratio(theirs, mine) if theirs and mine and not laid_out else None
            number = "" if laid_out else number
            rows.append([" / ".join(WAYS[group]), number, pass_, theirs, mine, gain])
    head = ["plain / ours", "rows", "pass", "plain, ms", "ours, ms", "gain"]
    return interleaved.markdown(head, rows)


TITLE = "bf16 products on a CPU: a matrix of 2,048 by 2,048, and a head of 128,256 tokens"
PART = Part("products", TITLE, groups, table, shaped=False, on_gpu=False, reads=False)


def main() -> None:
    """Measure one way."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.products", description=__doc__
    )
    parser.add_argument("--way", choices=[*PRODUCTS, WHOLE, SCREENED], required=True)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    told = {"machine": machine_name("cpu"), "torch": torch.__version__, "has_bf16": CPU_HAS_BF16}
    measured = of_a_matrix(args.way) if args.way in PRODUCTS else of_a_head(args.way)
    print(json.dumps({"way": args.way, **told, **measured}), flush=True)


if __name__ == "__main__":
    if "--way" in sys.argv:
        main()
    else:
        interleaved.main(PART, __doc__)
