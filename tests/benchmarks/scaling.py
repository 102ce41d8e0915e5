"""`python -m tests.benchmarks.scaling`: how time and memory of a step grow.

Trains a narrow shape in full and changes one thing at a time: records a step, words an answer,
vocabulary; the lengths of records, at the same tokens a step; and the processes that share a step.
Time a token should stand still, and memory grow with the tokens alone: where logits are in memory
a chunk at a time, as much at a large vocabulary as at a small one; and not with the steps that were
taken. Last, what checkpointing costs.
"""

import argparse
import json
import random
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.benchmarks.inputs import LONG, SHORT, TOKENIZER
from tests.benchmarks.interleaved import (
    DEFAULT_SHAPE,
    Job,
    Line,
    Part,
    Runs,
    main,
    markdown,
    measurement,
    medians,
    peak_gib,
    ratio,
    two_digits,
)

Flags = Mapping[str, object]
RECORDS = 32  # of the comparison of lengths: a step is the whole file
BASE: Flags = {"mode": "full", "shape": "s512v4k", "generated": 400, "batch": 8, "words": 60}
SIZES: dict[str, Flags] = {
    "8 records, 60 words an answer, vocabulary 4,096": {},
    "2 records": {"batch": 2},
    "32 records": {"batch": 32},
    "15 words": {"words": 15},
    "240 words": {"words": 240},
    "960 words": {"words": 960, "max-seq-len": 2048},
    "vocabulary 128,256": {"shape": "s512"},
    "vocabulary 128,256, 32 records": {"shape": "s512", "batch": 32},
}
SHAPES_OF = {"4,096": "s512v4k", "128,256": "s512"}
# More supervised positions than one chunk of logits has, in chunks of one size.
POSITIONS = {
    (vocabulary, records): f"{records} records of 240 words, vocabulary {vocabulary}"
    for vocabulary in SHAPES_OF
    for records in (8, 16)
}
# No two steps have as many rows, and oneDNN keeps kernels for some 1,000 numbers of them.
MANY = 100
STEPS: dict[str, Flags] = {
    "10 steps": {"steps": 10},
    f"{MANY} steps": {"steps": MANY},
    f"{MANY} steps of any number of rows": {
        "steps": MANY,
        "without": "rows in multiples",
        "throughout": "",
    },
}
CHECKPOINTING = {"none": "every activation kept", "selective": "selective", "full": "whole blocks"}
PROCESSES: dict[str, Flags] = {
    "1 process of 2 threads": {"batch": 32, "threads": 2},
    "2 processes of 1 thread": {"batch": 32, "threads": 1, "devices": 2},
    "1 process of 1 thread": {"batch": 32, "threads": 1},
}


def evened(sizes: Sequence[int]) -> list[int]:
    """As many sizes of the same sum, equal up to 1."""
    size, rest = divmod(sum(sizes), len(sizes))
    return [size + (number < rest) for number in range(len(sizes))]


def lengths(equal: bool) -> list[tuple[int, int]]:
    """Words of an instruction and of its answer, spread as in Alpaca or evened out."""
    rng = random.Random(0)
    words = [
        [min(400, 1 + round(rng.lognormvariate(*spread))) for _ in range(RECORDS)]
        for spread in ((2.3, 0.4), (3.6, 1.0))
    ]
    instructions, answers = map(evened, words) if equal else words
    return list(zip(instructions, answers, strict=True))


def write_records(path: Path, sizes: Sequence[tuple[int, int]]) -> Path:
    """Write records of words that are one token each, so that words count tokens."""
    rng = random.Random(0)
    some = ["the", "of", "a", "to", "in", "is", "for", "on", "with", "as", "by", "at", "from"]
    texts = [[" ".join(rng.choices(some, k=size)) for size in record] for record in sizes]
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps([{"instruction": i, "output": o} for i, o in texts]))
    return path


def groups(args: argparse.Namespace) -> dict[str, list[Job]]:
    """Name the measurements; what the others of a group are compared with is its first."""
    folder = Path(tempfile.gettempdir()) / "llama_lightning_benchmarks"
    spread: dict[str, Flags] = {
        f"records of {name} lengths": {
            "records": write_records(folder / f"lengths-{name}.json", lengths(name == "equal")),
            "generated": 0,
            "batch": RECORDS,
            "no-prefix-sharing": "",
        }
        for name in ("equal", "Alpaca's")
    }

    # Attention's work grows with the squares of lengths, and is less of a step of a wider network.
    wide = {
        f"1B shape, {name}": {**flags, "mode": "lora", "shape": DEFAULT_SHAPE}
        for name, flags in spread.items()
    }

    def job(name: str, change: Flags) -> Job:
        flags = {
            **BASE,
            "tokenizer": args.data / TOKENIZER,
            "threads": args.threads,
            "device": args.device,
            "steps": args.steps,
            **change,
        }
        words = [str(word) for key, value in flags.items() for word in (f"--{key}", value)]
        return Job(name, measurement("step", [word for word in words if word]))

    positions: dict[str, Flags] = {
        name: {"words": 240, "batch": records, "shape": SHAPES_OF[vocabulary]}
        for (vocabulary, records), name in POSITIONS.items()
    }
    short: Flags = {"records": args.data / SHORT, "generated": 0, "batch": 9, "shape": "s512"}
    steps = {name: {**short, **change} for name, change in STEPS.items()}
    long: Flags = {"records": args.data / LONG, "generated": 0, "batch": 4, "targets": "all"}
    checkpointing: dict[str, Flags] = {
        name: {**long, "mode": "lora", "shape": DEFAULT_SHAPE, "checkpointing": mode}
        for mode, name in CHECKPOINTING.items()
    }
    changes = {
        "size": SIZES,
        "positions": positions,
        "lengths": spread,
        "lengths-llama": wide,
        "steps": steps,
        "checkpointing": checkpointing,
    }
    if args.device == "cpu":  # whose cores they share
        changes["processes"] = PROCESSES
    return {key: [job(*change) for change in several.items()] for key, several in changes.items()}


def growth(lines: Sequence[Line]) -> float | None:
    """Divide the memory of as many positions more at the large vocabulary by that at the small."""
    figures = medians(lines, ("peak_rss_gib", "peak_cuda_gib"))
    if set(figures) != set(POSITIONS.values()):
        return None
    peaks = {key: peak_gib(figures[name]) for key, name in POSITIONS.items()}
    small, large = (peaks[vocabulary, 16] - peaks[vocabulary, 8] for vocabulary in SHAPES_OF)
    return ratio(large, small)


def with_rates(line: Line) -> Line:
    """Add what a measurement comes to by step and by token."""
    if "error" in line:
        return line
    milliseconds = 1e3 * sum(line["step_cpu_s"]) / line["tokens"]
    return line | {
        "tokens_a_step": line["tokens"] / len(line["step_s"]),
        "ms_a_token": milliseconds,
    }


def table(runs: Runs) -> list[str]:
    """Lay out medians, and the speed beside that of the group's first."""
    rows: list[list[object]] = []
    for lines in runs.values():
        keys = ("tokens_a_step", "ms_a_token", "tok_s", "rows_real", "cells_real")
        keys += ("peak_rss_gib", "peak_cuda_gib")
        figures = medians([with_rates(line) for line in lines], keys)
        first = figures.get(lines[0]["name"], {}) if lines else {}
        for name, values in figures.items():
            row: list[object] = [name, f"{values['tokens_a_step']:.0f}", f"{values['tok_s']:.0f}"]
            speed, cost = (
                None if values is first else two_digits(ratio(values[key], first.get(key)))
                for key in ("tok_s", "ms_a_token")
            )
            row += [speed, f"{values['ms_a_token']:.2f}", cost]
            row += [f"{100 * values[key]:.1f} %" for key in ("rows_real", "cells_real")]
            rows.append([*row, f"{peak_gib(values):.2f}"])
    head = ["change", "tokens a step", "tok/s", "to the first of its kind", "CPU ms a token"]
    head += ["to the first", "rows not pads", "attention's cells not pads", "peak GiB of a process"]
    return markdown(head, rows)


PART = Part("scaling", "How a step grows", groups, table, shaped=False)

if __name__ == "__main__":
    main(PART, __doc__)
