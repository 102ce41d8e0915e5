"""`python -m tests.benchmarks.products`: bf16 products of torch beside ours in fp32.

One matrix of the 1B shape at several numbers of rows, forward and backward to the input, each way
in a process of its own and in turn. `model/linear.py` takes the faster way: torch's where the
processor has instructions for bf16. `--way` measures one way, as a JSON line of milliseconds.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from llama_lightning.model.linear import CPU_HAS_BF16, product_in_fp32
from tests.benchmarks import interleaved
from tests.benchmarks.interleaved import Job, Part, Runs
from tests.benchmarks.machine import machine_name

TORCH, OURS = "torch", "in fp32"
WAYS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {TORCH: F.linear, OURS: product_in_fp32}
ROWS = (1, 4, 8, 32, 128, 512)
REPEATS = 3  # of which the best counts


def milliseconds(call: Callable[[], object]) -> float:
    """Time a call after one more."""
    times = []
    for _ in range(1 + REPEATS):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return round(min(times[1:]), 3)


def measure(way: str) -> dict[str, float]:
    """Time a way at each number of rows, forward and backward."""
    product, found = WAYS[way], {}
    weight = torch.randn(2048, 2048, dtype=torch.bfloat16)
    for rows in ROWS:
        x = torch.randn(rows, 2048, dtype=torch.bfloat16, requires_grad=True)
        out = product(x, weight)
        gradient = torch.randn_like(out)
        with torch.no_grad():
            found[f"forward {rows}"] = milliseconds(lambda x=x: product(x, weight))
        found[f"backward {rows}"] = milliseconds(
            lambda out=out, x=x, g=gradient: torch.autograd.grad(out, x, g, retain_graph=True)
        )
    return found


def groups(args: argparse.Namespace) -> dict[str, list[Job]]:
    """Name the measurements."""
    flags = ["--threads", args.threads, "--way"]
    return {"products": [Job(w, interleaved.measurement("products", [*flags, w])) for w in WAYS]}


def table(runs: Runs) -> list[str]:
    """Lay out medians, and how often ours fits in torch's."""
    rows: list[list[object]] = []
    for lines in runs.values():
        names = [f"{pass_} {rows}" for rows in ROWS for pass_ in ("forward", "backward")]
        figures = interleaved.medians(lines, names)
        for name in names:
            theirs, mine = (figures.get(way, {}).get(name) for way in WAYS)
            pass_, number = name.split()
            gain = interleaved.ratio(theirs, mine) if theirs and mine else None
            rows.append([number, pass_, theirs, mine, gain])
    return interleaved.markdown(["rows", "pass", "torch, ms", "in fp32, ms", "gain"], rows)


TITLE = "bf16 products on a CPU, a matrix of 2,048 by 2,048"
PART = Part("products", TITLE, groups, table, shaped=False, on_gpu=False)


def main() -> None:
    """Measure one way."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.products", description=__doc__
    )
    parser.add_argument("--way", choices=list(WAYS), required=True)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    told = {"machine": machine_name("cpu"), "torch": torch.__version__, "has_bf16": CPU_HAS_BF16}
    print(json.dumps({"way": args.way, **told, **measure(args.way)}), flush=True)


if __name__ == "__main__":
    if "--way" in sys.argv:
        main()
    else:
        interleaved.main(PART, __doc__)
