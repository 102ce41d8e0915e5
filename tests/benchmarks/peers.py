"""`python -m tests.benchmarks.peers`: our step beside transformers, LitGPT and torchtune.

Runs one process at a time, ours and the peers' in turn (1, 2, 3, 1, 2, 3 ...), so that what else
the machine does meets all alike. Prints medians and our ratio to the best peer of each group, by
wall and by CPU time, and writes every run to a JSON file. The peers' script stands beside the
checkout in ../shared/bench; LitGPT and torchtune need environments of their own (--litgpt PYTHON).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from tests.benchmarks.machine import machine_name

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared"
OURS = "llama_lightning"
SHORT, LONG = "instruction-data.json", "alpaca_en_demo.json"  # answers of 13 and of 145 tokens


class Group(NamedTuple):
    """What is compared: the same work, as each peer does it and as we do."""

    title: str
    records: str
    flags: list[str]  # of all
    peers: dict[str, list[str]]
    ours: dict[str, list[str]]


PACKED = ["--data", "packed"]
ONE_ROW = {
    "ours": ["--batch", "9"],
    "ours, prefixes apart": ["--batch", "9", "--no-prefix-sharing"],
}
THREE = {"ours": ["--batch", "3"], "ours, prefixes apart": ["--batch", "3", "--no-prefix-sharing"]}
FULL = {"hf": PACKED, "litgpt": PACKED, "torchtune": PACKED}


def groups(shape: str) -> dict[str, Group]:
    """List the comparisons. A packed row of 512 holds some 9 short records, or 3 long ones."""
    lora, every = ["--shape", shape], ["--shape", shape, "--targets", "all"]
    full = ["--mode", "full", "--shape"]
    return {
        "short": Group(
            f"LoRA q,k,v,o, {shape}, short answers", SHORT, lora, {"hf": PACKED}, ONE_ROW
        ),
        "all": Group(
            f"LoRA all linears, {shape}, short answers", SHORT, every, {"hf": PACKED}, ONE_ROW
        ),
        "long": Group(f"LoRA q,k,v,o, {shape}, long answers", LONG, lora, {"hf": PACKED}, THREE),
        "padded": Group(
            f"LoRA q,k,v,o, {shape}, long answers, batch 4",
            LONG,
            [*lora, "--batch", "4"],
            {"hf": ["--data", "padded"], "litgpt": ["--data", "padded"]},
            {"ours": []},
        ),
        "full": Group("full, dim 512, vocabulary 128,256", SHORT, [*full, "s512"], FULL, ONE_ROW),
        "full4k": Group(
            "full, dim 512, vocabulary 4,096", SHORT, [*full, "s512v4k"], FULL, ONE_ROW
        ),
    }


def run(command: list[str], threads: int) -> dict[str, Any] | None:
    """Run one measurement; its JSON line, or None with its error printed."""
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",  # CPU time is then work, not waiting
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
    }
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    lines = [line for line in process.stdout.splitlines() if line.startswith("{")]
    if process.returncode or not lines:
        print(f"failed: {' '.join(command)}\n{process.stderr[-600:]}", file=sys.stderr)
        return None
    result: dict[str, Any] = json.loads(lines[-1])
    return result


def commands(group: Group, args: argparse.Namespace, tokens: Path) -> dict[str, list[str]]:
    """Name the measurements of a group; peers without an environment are left out."""
    steps = ["--steps", str(args.steps), "--threads", str(args.threads)]
    found = {}
    for peer, flags in group.peers.items():
        if python := getattr(args, peer):
            call = [python, str(args.script), peer, *group.flags, *flags, *steps]
            found[peer] = [*call, "--tokens", str(tokens)]
    data = ["--records", str(SHARED / "data" / group.records)]
    for name, flags in group.ours.items():
        call = [sys.executable, "-m", "tests.benchmarks.step", *group.flags, *flags, *steps, *data]
        found[name] = call
    return found


def table(group: Group, runs: list[dict[str, Any]]) -> list[str]:
    """Rows of medians and of our ratios to the best peer."""
    by_name: dict[str, list[dict[str, Any]]] = {}
    for one in runs:
        by_name.setdefault(one["name"], []).append(one)
    medians = {
        name: {
            key: statistics.median(one[key] for one in several)
            for key in ("tok_s", "tok_s_cpu", "peak_rss_gib")
        }
        for name, several in by_name.items()
    }
    peers = [values for name, values in medians.items() if name in group.peers]
    rows = []
    for name, values in medians.items():
        ratios = ["", ""]
        if peers and name not in group.peers:
            best = {key: max(p[key] for p in peers) for key in ("tok_s", "tok_s_cpu")}
            ratios = [f"{values[key] / best[key]:.2f}" for key in best]
        figures = [f"{values['tok_s']:.1f}", ratios[0], f"{values['tok_s_cpu']:.1f}", ratios[1]]
        rows.append(
            f"| {' | '.join([group.title, name, *figures])} | {values['peak_rss_gib']:.2f} |"
        )
    return rows


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.peers", description=__doc__)
    every = list(groups(""))
    parser.add_argument("groups", nargs="*", help=f"of {', '.join(every)}; by default all")
    parser.add_argument("--script", type=Path, default=SHARED / "bench" / "peers.py")
    parser.add_argument("--shape", default="1b-4l", help="of the LoRA comparisons")
    parser.add_argument("--hf", default=sys.executable, help="python with transformers and peft")
    parser.add_argument("--litgpt", help="python with litgpt")
    parser.add_argument("--torchtune", help="python with torchtune")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "peers.json"
    )
    args = parser.parse_args()
    if unknown := set(args.groups) - set(every):
        parser.error(f"no group {', '.join(unknown)}; there are {', '.join(every)}")
    args.groups = args.groups or every
    return args


def main() -> None:
    """Measure all groups in turn and print the table."""
    args = parse()
    if not args.script.is_file():
        sys.exit(f"{args.script}: no peers' script there; name it with --script")
    chosen = {key: group for key, group in groups(args.shape).items() if key in args.groups}
    measured: dict[str, list[dict[str, Any]]] = {key: [] for key in chosen}
    with tempfile.TemporaryDirectory() as scratch:
        tokens = {name: Path(scratch) / name for name in (SHORT, LONG)}
        for name, path in tokens.items():
            source, ranks = SHARED / "data" / name, SHARED / "data" / "llama3-tokenizer.model"
            prepare = [args.hf, str(args.script), "prep", "--data-json", str(source)]
            run([*prepare, "--ranks", str(ranks), "--tokens", str(path)], args.threads)
        for repeat in range(args.repeats):
            for key, group in chosen.items():
                for name, command in commands(group, args, tokens[group.records]).items():
                    if result := run(command, args.threads):
                        measured[key].append({"name": name, "repeat": repeat, **result})
                        figures = f"{result['tok_s']} tok/s, {result['tok_s_cpu']} by CPU time"
                        print(f"{key} {name}: {figures}", file=sys.stderr, flush=True)
    heading = "| what | who | tok/s | ratio | tok/s by CPU time | ratio | peak GiB |"
    rows = [heading, "|---|---|---|---|---|---|---|"]
    for key, group in chosen.items():
        rows += table(group, measured[key])
    report = {"machine": machine_name("cpu"), "repeats": args.repeats, "runs": measured}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({**report, "table": rows}, indent=1) + "\n")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
