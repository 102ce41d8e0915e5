"""Measurements run in turn, one process at a time, and the table of their medians.

A part of the benchmark is groups of named commands, each of which prints one JSON line. They run
1, 2, 3, 1, 2, 3 ..., so that what else the machine does meets all alike. Every line is in the
part's file before the next command starts. A group that is measured again replaces what the file
has of it, once each of its commands has run; the other groups of the part stay.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from tests.benchmarks.inputs import DATA, SHARED, check, device
from tests.benchmarks.machine import machine_name

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"
DEFAULT_SHAPE = "1b-4l"
PACKAGES = ("torch", "lightning", "transformers", "peft", "trl", "litgpt", "torchtune")
WAITING = {"OMP_WAIT_POLICY": "", "GOMP_SPINCOUNT": "10000"}
VERSIONS = """
import json, sys
from importlib import metadata
found = {}
for name in sys.argv[1:]:
    try:
        found[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
        pass
print(json.dumps(found))
"""

Line = dict[str, Any]  # what one process measured
Runs = Mapping[str, Sequence[Line]]  # of each group


class Job(NamedTuple):
    """One process, one measurement."""

    name: str
    command: list[str]
    environment: dict[str, str] = {}


class Part(NamedTuple):
    """What one table is made of."""

    name: str
    title: str
    groups: Callable[[argparse.Namespace], dict[str, list[Job]]]
    table: Callable[[Runs], list[str]]  # Markdown, of whatever there is so far
    shaped: bool = True  # another --shape makes another file
    on_gpu: bool = True  # or on a CPU only
    reads: bool = True  # records and a tokenizer of --data

    def file(self, args: argparse.Namespace) -> Path:
        """Where its measurements are kept, by default in a folder of the machine's."""
        plain = args.shape == DEFAULT_SHAPE or not self.shaped
        name = f"{self.name}.json" if plain else f"{self.name}-{args.shape}.json"
        return (args.out or results_of(machine_name(args.device))) / name


def measurement(program: str, flags: Iterable[object]) -> list[str]:
    """Make the command of one of this project's measurements, in this environment."""
    return [sys.executable, "-m", f"tests.benchmarks.{program}", *map(str, flags)]


def waiting() -> dict[str, str]:
    """Say how OpenMP's threads wait: as the command line has it, unless the user has another way.

    Where a region takes less than a millisecond, waking a thread for it counts.
    """
    asked = {name: os.environ.get(name, "") for name in WAITING}
    return asked if any(asked.values()) else WAITING


def run(job: Job, threads: int) -> Line:
    """Run one measurement; its JSON line, or one with its `error`."""
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",  # CPU time is then work, not waiting
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
        **job.environment,
    }
    # An empty variable stands for none.
    environment = {name: text for name, text in environment.items() if text}
    process = subprocess.run(job.command, cwd=ROOT, env=environment, capture_output=True, text=True)
    lines = [line for line in process.stdout.splitlines() if line.startswith("{")]
    if process.returncode or not lines:
        return {"error": (process.stderr.strip() or "no result")[-600:]}
    line: Line = json.loads(lines[-1])
    return line


def medians(lines: Sequence[Line], keys: Iterable[str]) -> dict[str, dict[str, float]]:
    """Take the median of each key over the repeats of each name; failed ones do not count."""
    by_name: dict[str, list[Line]] = {}
    for line in lines:
        if "error" not in line:
            by_name.setdefault(line["name"], []).append(line)
    return {
        name: {
            key: statistics.median(line[key] for line in several)
            for key in keys
            if key in several[0]
        }
        for name, several in by_name.items()
    }


def markdown(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Lay out a table; None is an empty cell."""

    def cell(x: object) -> str:
        if isinstance(x, float):
            x = round(x, 9)  # the mean of two numbers need not be a short one
        return "" if x is None else str(x)

    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(map(cell, line))} |" for line in lines]


class Ratios(NamedTuple):
    """Ours by theirs, where both were measured."""

    wall: float | None = None
    cpu: float | None = None
    memory: float | None = None


def ratio(mine: float, theirs: float | None) -> float | None:
    """Divide; by nothing there is no ratio."""
    return mine / theirs if theirs else None


def two_digits(figure: float | None) -> str | None:
    """Round a ratio for a cell; none is an empty cell."""
    return None if figure is None else f"{figure:.2f}"


def peak_gib(figures: Mapping[str, float]) -> float:
    """Choose the memory that is short: the GPU's where there is one."""
    return figures.get("peak_cuda_gib", figures["peak_rss_gib"])


def peers_dtype(args: argparse.Namespace) -> str:
    """Say what peers compute in: in bf16 a step takes them hours without instructions for it."""
    from llama_lightning.model.linear import CPU_HAS_BF16  # torch: not where a start is timed

    fast = args.device == "cuda" or CPU_HAS_BF16
    return args.peers_dtype or ("bfloat16" if fast else "float32")


@cache
def versions(python: str) -> str:
    """Say what is installed in an environment."""
    command = [python, "-c", VERSIONS, *PACKAGES]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return ", ".join(f"{package} {there}" for package, there in json.loads(done.stdout).items())


def setting(jobs: Sequence[Job], args: argparse.Namespace) -> str:
    """Say on what, with what and how some jobs run."""
    words = {word for job in jobs for word in job.command}
    how = [f"{machine_name(args.device)}, {args.threads} threads"]
    pythons = {"here": sys.executable, "hf": args.hf}
    pythons |= {name: getattr(args, name) for name in ("trl", "litgpt", "torchtune")}
    told: set[str] = set()  # peers may share an environment, and be in this one
    for name, python in pythons.items():
        if python and shutil.which(python) is None:
            sys.exit(f"--{name} {python}: no such program; name the python of its environment")
        if python in words and python not in told:
            how.append(f"{name}: {versions(python)}")
            told.add(python)
    how += ["peers in fp32"] if words & {"fp32", "float32"} else []
    return "; ".join(how)


def write(file: Path, report: Mapping[str, Any]) -> None:
    """Write beside and rename: a run that is killed leaves a whole file."""
    beside = file.with_suffix(".tmp")
    beside.write_text(json.dumps(report, indent=1) + "\n")
    beside.replace(file)


def measure(part: Part, args: argparse.Namespace, chosen: Sequence[str] = ()) -> None:
    """Run a part, or the groups chosen of it, and keep every line as soon as it is there."""
    if args.device != "cpu" and not part.on_gpu:
        return
    groups = part.groups(args)
    found: dict[str, Any] = {
        key: {"setting": setting(jobs, args), "lines": []}
        for key, jobs in groups.items()
        if not chosen or key in chosen
    }
    file = part.file(args)
    file.parent.mkdir(parents=True, exist_ok=True)
    kept = json.loads(file.read_text())["groups"] if file.is_file() else {}
    for repeat in range(args.repeats):
        for key, group in found.items():
            for job in groups[key]:
                start = time.monotonic()
                line = {"name": job.name, "repeat": repeat, **run(job, args.threads)}
                line["took_s"] = round(time.monotonic() - start)
                group["lines"].append(line)
                if key not in kept or len(group["lines"]) >= len(groups[key]):
                    kept[key] = group
                runs = {key: kept[key]["lines"] for key in groups if key in kept}
                report = {"title": title(part, args), "table": part.table(runs)}
                write(file, {**report, "groups": {key: kept[key] for key in runs}})
                done = f"{part.name} {key}, {job.name}, {line['took_s']} s"
                print(f"{done}: {brief(line)}", file=sys.stderr, flush=True)


def title(part: Part, args: argparse.Namespace) -> str:
    """Say what is measured; beside peers, with which networks too."""
    return f"{part.title}, {args.shape}" if part.shaped else part.title


def brief(line: Line) -> str:
    """What a reader who waits wants to see of a measurement."""
    if "error" in line:
        return f"failed\n{line['error']}"
    figures = ("tok_s", "tok_s_cpu", "new_tok_s", "new_tok_s_cpu", "wall_s", "cpu_s", "wait")
    return ", ".join(f"{key} {line[key]}" for key in figures if key in line)


def document(files: Iterable[Path]) -> str:
    """Make one Markdown text of the parts' files that are there."""
    lines = ["# Benchmarks"]
    for report in (json.loads(file.read_text()) for file in files if file.is_file()):
        lines += ["", f"## {report['title']}", "", *report["table"], ""]
        told: dict[str, list[str]] = {}  # how it was measured, and which groups were
        failed: dict[str, None] = {}
        for key, group in report["groups"].items():
            repeats = 1 + max(line["repeat"] for line in group["lines"])
            told.setdefault(f"Medians; repeats: {repeats}. {group['setting']}.", []).append(key)
            failed |= {f"{key}, {line['name']}": None for line in group["lines"] if "error" in line}
        lines += [
            how if len(told) == 1 else f"- {', '.join(keys)}: {how}" for how, keys in told.items()
        ]
        lines += ["", f"Failed: {'; '.join(failed)}."] if failed else []
    return "\n".join(lines)


def results_of(machine: str) -> Path:
    """Name the folder in which a machine's measurements are kept."""
    return RESULTS / re.sub("[^a-z0-9]+", "_", machine.lower())


def printed(parts: Iterable[Part], args: argparse.Namespace) -> str:
    """Make the document of what has been measured of some parts, of other shapes too.

    With --shape of that shape alone.
    """
    files = [part.file(args) for part in parts]
    if args.shape == DEFAULT_SHAPE:
        beside = (sorted(file.parent.glob(f"{file.stem}-*.json")) for file in files)
        files = [one for file, others in zip(files, beside, strict=True) for one in (file, *others)]
    if not any(file.is_file() for file in files):
        names, folder = ", ".join(file.name for file in files), files[0].parent
        there = ", ".join(sorted(str(folder) for folder in RESULTS.iterdir() if folder.is_dir()))
        sys.exit(f"{folder} has no {names}; there are {there}, which --out can name")
    return document(files)


def options(program: str, text: str | None) -> argparse.ArgumentParser:
    """Make the options, which are the same for every part and for all of them."""
    parser = argparse.ArgumentParser(prog=f"python -m tests.benchmarks{program}", description=text)
    parser.add_argument("names", nargs="*", help="what to run; by default all")
    parser.add_argument("--shape", default=DEFAULT_SHAPE, help="of the networks beside the peers")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a fit")
    parser.add_argument("--set-rows", type=int, default=200, help="short records of a data set")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", type=device, choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--peers-dtype",
        choices=["bfloat16", "float32"],
        help="what peers compute in; by default bf16, on a CPU without instructions for it fp32",
    )
    parser.add_argument("--hf", default=sys.executable, help="python with transformers and peft")
    parser.add_argument("--trl", help="python with trl, which may be that of --hf")
    parser.add_argument("--litgpt", help="python with litgpt")
    parser.add_argument("--torchtune", help="python with torchtune")
    parser.add_argument(
        "--script", type=Path, default=SHARED / "bench" / "peers.py", help="runs the peers' steps"
    )
    parser.add_argument("--data", type=Path, default=DATA, help="folder of records and tokenizer")
    parser.add_argument("--out", type=Path, help="folder of the results; by default the machine's")
    parser.add_argument("--print", action="store_true", help="print what has been measured before")
    return parser


def check_names(
    parser: argparse.ArgumentParser, given: Sequence[str], known: Iterable[str]
) -> None:
    """Refuse a name that is none."""
    if unknown := set(given) - set(known):
        parser.error(f"no {', '.join(sorted(unknown))}; there are {', '.join(known)}")


def main(part: Part, text: str | None) -> None:
    """Run one part from the command line, and print its table."""
    parser = options(f".{part.name}", text)
    args = parser.parse_args()
    if args.device != "cpu" and not part.on_gpu:
        parser.error(f"{part.name} is measured on a CPU only")
    if args.print and args.names:
        parser.error("--print shows the whole part; it takes no names")
    if not args.print:
        if part.reads:
            check(args.data)
        check_names(parser, args.names, part.groups(args))
        measure(part, args, args.names)
    print(printed([part], args))
