"""`python -m tests.benchmarks.scaling`: how time and memory of a step grow.

Trains a narrow shape in full on generated records and changes one thing at a time: records a step,
words an answer, vocabulary, threads. Prints a table; time a token should stand still and memory
grow with the tokens alone.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
BASE = {"mode": "full", "shape": "s512v4k", "generated": 400, "batch": 8, "words": 60, "steps": 3}
CHANGES: list[dict[str, str | int]] = [
    {},
    {"batch": 2},
    {"batch": 32},
    {"words": 15},
    {"words": 240},
    {"words": 960, "max-seq-len": 2048},
    {"shape": "s512"},
    {"shape": "s512", "batch": 32},
    {"threads": 1},
]


def main() -> None:
    """Measure each change in a process of its own and print a row for it."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.scaling", description=__doc__)
    parser.parse_args()
    print("| change | tokens a step | CPU ms a token | tok/s | peak GiB |\n|---|---|---|---|---|")
    for change in CHANGES:
        flags = [word for key, value in {**BASE, **change}.items() for word in (f"--{key}", value)]
        command = [sys.executable, "-m", "tests.benchmarks.step", *map(str, flags)]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE"}
        output = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
        ).stdout
        result = json.loads(output.strip().split("\n")[-1])
        milliseconds = 1e3 * sum(result["step_cpu_s"]) / result["tokens"]
        name = ", ".join(f"{key} {value}" for key, value in change.items()) or "none"
        print(
            f"| {name} | {result['tokens'] // BASE['steps']} | {milliseconds:.2f} "
            f"| {result['tok_s']:.0f} | {result['peak_rss_gib']:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
