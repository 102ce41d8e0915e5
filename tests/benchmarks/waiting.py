"""`python -m tests.benchmarks.waiting`: the part of a step in which the loop waits for its data.

A narrow network and 4 records a step make the shortest step, which a wait hurts most: full training
on 52,000 generated records of Alpaca's lengths, loaded in the training process and by two workers.
"""

import argparse

from tests.benchmarks.inputs import TOKENIZER
from tests.benchmarks.interleaved import Job, Part, Runs, main, markdown, measurement, medians

RECORDS = 52_000
STEPS = 10  # times --steps: a wait is short and seldom
FLAGS = ["--mode", "full", "--shape", "s512v4k", "--batch", 4, "--generated", RECORDS]


def groups(args: argparse.Namespace) -> dict[str, list[Job]]:
    """Name the measurements."""
    flags = [*FLAGS, "--warmup", 3, "--steps", STEPS * args.steps, "--threads", args.threads]
    flags += ["--tokenizer", args.data / TOKENIZER, "--device", args.device]
    return {
        "workers": [
            Job(f"{workers}", measurement("step", [*flags, "--workers", workers]))
            for workers in (0, 2)
        ]
    }


def table(runs: Runs) -> list[str]:
    """Lay out the waits."""
    rows = [
        [workers, f"{values['tok_s']:.0f}", f"{100 * values['wait']:.2f} %"]
        for lines in runs.values()
        for workers, values in medians(lines, ("tok_s", "wait")).items()
    ]
    return markdown(["workers", "tok/s", "waiting, of the time"], rows)


PART = Part("waiting", "Waiting for data, 52,000 records", groups, table, shaped=False)

if __name__ == "__main__":
    main(PART, __doc__)
