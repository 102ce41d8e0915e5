"""`python -m tests.benchmarks.waiting`: the part of a step in which the loop waits for its data.

A narrow network, whose steps are short, trains in full on 52,000 generated records of Alpaca's
lengths, loaded in the training process and by two workers.
"""

import argparse

from tests.benchmarks.interleaved import Job, Part, Runs, main, markdown, measurement, medians

RECORDS = 52_000
STEPS = 10  # times --steps: a wait is short and seldom
FLAGS = ["--mode", "full", "--shape", "s512v4k", "--generated", RECORDS, "--warmup", 3]


def groups(args: argparse.Namespace) -> dict[str, list[Job]]:
    """Name the measurements."""
    flags = [*FLAGS, "--steps", STEPS * args.steps, "--threads", args.threads]
    return {
        str(batch): [
            Job(f"{workers}", measurement("step", [*flags, "--batch", batch, "--workers", workers]))
            for workers in (0, 2)
        ]
        for batch in (4, 32)
    }


def table(runs: Runs) -> list[str]:
    """Lay out the waits."""
    rows = [
        [batch, workers, f"{values['tok_s']:.0f}", f"{100 * values['wait']:.2f} %"]
        for batch, lines in runs.items()
        for workers, values in medians(lines, ("tok_s", "wait")).items()
    ]
    return markdown(["records a step", "workers", "tok/s", "waiting, of the time"], rows)


PART = Part("waiting", "Waiting for data, 52,000 records", groups, table, shaped=False)

if __name__ == "__main__":
    main(PART, __doc__)
