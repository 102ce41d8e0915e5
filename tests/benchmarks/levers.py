"""`python -m tests.benchmarks.levers`: what each lever of a step, and of generation, saves.

A step takes each micro-batch as it is and without the lever, in one process; generation runs
as it is and then without. The gain is how often the one fits in the other. Memory is that of the
process, so of a step the larger of both: beside that of steps as they are, it is what is saved.
Freed gradients have a process without them: what one step keeps, the next would have to free.
Rows in multiples show nothing here: they save kernels, and what is timed has those already.
"""

import argparse
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tests.benchmarks.inputs import LONG, SHORT, TOKENIZER
from tests.benchmarks.interleaved import (
    Job,
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

WHOLE = "as it is"
SPEEDS = ("tok_s", "tok_s_cpu")
OF_ANSWERS = ("new_tok_s", "new_tok_s_cpu")


class Group(NamedTuple):
    """What is run, and the levers it can do without, by the names of its --without."""

    title: str
    program: str
    records: str
    flags: Mapping[str, object]
    levers: Sequence[str]


BACKWARD = ("a norm's own backward pass", "a gate's own backward pass")
ATTENTION = ("attention's own backward pass", "attention in fp32", "similar rows in a grid")
HEAD = ("logits only at labels", "logits chunk by chunk")
LAST = "a last layer only where it is wanted"
FREED = "freed gradients"
GROUPS = {
    "lora": Group(
        "LoRA q,k,v,o; short answers",
        "step",
        SHORT,
        {"mode": "lora", "batch": 9, "steps": 6},
        [
            *("equal beginnings once", "own queries", "padding-free rows", LAST, *HEAD),
            "frozen weights",
            *(*BACKWARD, *ATTENTION[:2]),
        ],
    ),
    "lora-long": Group(
        "LoRA all linears; long answers",
        "step",
        LONG,
        {"mode": "lora", "batch": 4, "targets": "all", "steps": 3},
        ["padding-free rows", *HEAD, "frozen weights", *BACKWARD, *ATTENTION],
    ),
    "full": Group(
        "full; short answers",
        "step",
        SHORT,
        {"mode": "full", "batch": 9, "steps": 3},
        [*HEAD, LAST, "an embedding's own backward pass", FREED, *BACKWARD],
    ),
    "answers": Group(
        "short answers as long as their references, 8 at a time",
        "generate",
        SHORT,
        {"batch": 8, "rows": 64, "new": "reference", "repeats": 1},
        ["copied beginnings", "logits only of a prompt's last token"],
    ),
}


def groups(args: argparse.Namespace) -> dict[str, list[Job]]:
    """Name the measurements."""
    found = {}
    for key, group in GROUPS.items():
        given: dict[str, object] = {
            **group.flags,
            "shape": args.shape,
            "records": args.data / group.records,
            "tokenizer": args.data / TOKENIZER,
            "threads": args.threads,
            "device": args.device,
        }
        flags = [word for name, value in given.items() for word in (f"--{name}", value)]
        jobs = found[key] = [Job(WHOLE, measurement(group.program, flags))]
        for lever in group.levers:
            without = ["--without", lever, *(["--throughout"] if lever == FREED else [])]
            jobs.append(Job(lever, measurement(group.program, [*flags, *without])))
    return found


def table(runs: Runs) -> list[str]:
    """Lay out medians."""
    rows: list[list[object]] = []
    for key, lines in runs.items():
        keys = ("gain", "gain_cpu", *SPEEDS, *OF_ANSWERS, "peak_rss_gib", "peak_cuda_gib")
        figures = medians(lines, keys)
        whole = figures.get(WHOLE, {})
        for name, values in figures.items():
            gains = [values.get("gain"), values.get("gain_cpu")]
            if whole and name != WHOLE and "gain" not in values:
                speeds = OF_ANSWERS if GROUPS[key].program == "generate" else SPEEDS
                gains = [ratio(whole[speed], values[speed]) for speed in speeds]
            row = [GROUPS[key].title, name if name == WHOLE else f"without {name}"]
            rows.append([*row, *map(two_digits, gains), f"{peak_gib(values):.2f}"])
    head = ["what", "how", "the lever's gain", "by CPU time", "peak GiB"]
    return markdown(head, rows)


PART = Part("levers", "What each lever saves", groups, table)

if __name__ == "__main__":
    main(PART, __doc__)
