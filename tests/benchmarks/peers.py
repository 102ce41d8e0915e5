"""`python -m tests.benchmarks.peers`: our step beside transformers, TRL, LitGPT and torchtune.

Prints tokens a second, memory, and our ratios: of speed to the best peer of each group, by wall and
by CPU time, and of memory to transformers. The peers' script stands beside the checkout in
../shared/bench; peers without an environment (--trl, --litgpt, --torchtune) are left out.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tests.benchmarks.inputs import LONG, SHORT, TOKENIZER
from tests.benchmarks.interleaved import (
    DEFAULT_SHAPE,
    Job,
    Line,
    Part,
    Ratios,
    Runs,
    main,
    markdown,
    measurement,
    medians,
    peak_gib,
    peers_dtype,
    ratio,
    run,
    two_digits,
)

SHARING, APART = "ours", "ours, prefixes apart"
LIKE_PEERS = "ours in fp32"  # where they do not compute in bf16


class Group(NamedTuple):
    """What is compared: the same work, as each peer does it and as we do."""

    title: str
    records: str
    flags: list[str]  # of all
    peers: dict[str, list[str]]  # a name begins with the program's, up to a comma
    ours: list[str]
    apart: bool = True  # ours without shared beginnings too


PACKED = ["--data", "packed"]
# The first seed of their script whose three batches are like the file: in slots a token (1.75), in
# tokens a record (193) and in the part that has labels (0.75) within 5 %. Seed 0's have 1.59, 277
# and 0.83.
PADDED = ["--data", "padded", "--seed", "9"]
WIDE = [*PACKED, "--width", "1024"]
NINE, FOUR, TWO = (["--batch", number] for number in ("9", "4", "2"))
# Of few steps, lengths of 20 to 512 tokens would be others than theirs; and with instructions for
# bf16, the first steps of some number of rows take longer, which their packed rows always have.
MORE = ["--steps", "10"]
FULL, FULL_WIDE = (dict.fromkeys(("hf", "litgpt", "torchtune"), row) for row in (PACKED, WIDE))


def comparisons(shape: str) -> dict[str, Group]:
    """List the comparisons.

    A packed row of 512 holds some 9 short records, or 1 or 2 long ones; a row of 1,024 what two
    long ones can have.
    """
    lora, every = ["--shape", shape], ["--shape", shape, "--targets", "all"]
    full = ["--mode", "full", "--shape"]
    short, long = [*MORE, *NINE], MORE
    packed, both = {"hf": PACKED}, {"hf": WIDE, "hf, rows of 512": PACKED}
    trl = {"trl": PACKED}  # takes twice transformers' time: beside one comparison
    padded, four = {"hf": PADDED, "litgpt": PADDED}, [*lora, "--batch", "4"]
    return {
        "short": Group("LoRA q,k,v,o; short answers", SHORT, lora, packed | trl, short),
        "all": Group("LoRA all linears; short answers", SHORT, every, packed, short),
        "long": Group("LoRA q,k,v,o; long answers", LONG, lora, both, [*long, *TWO]),
        "padded": Group(
            "LoRA q,k,v,o; long answers, batch 4", LONG, four, padded, long, apart=False
        ),
        "full-llama": Group("full; short answers", SHORT, [*full, shape], FULL, short),
        "full": Group("full; dim 512, vocabulary 128,256", SHORT, [*full, "s512"], FULL, NINE),
        "full-long": Group(
            "full; dim 512, vocabulary 128,256; long answers",
            LONG,
            [*full, "s512"],
            FULL_WIDE,
            [*long, *FOUR],
        ),
        "full4k": Group("full; dim 512, vocabulary 4,096", SHORT, [*full, "s512v4k"], FULL, NINE),
    }


def kept_tokens(name: str, args: argparse.Namespace) -> Path:
    """Records as the peers' script wants them, made once and kept in the temporary folder."""
    path = Path(tempfile.gettempdir()) / "llama_lightning_benchmarks" / f"tokens-{name}"
    if path.is_file():
        return path
    path.parent.mkdir(exist_ok=True)
    beside = path.with_suffix(".tmp")
    data, ranks = args.data / name, args.data / TOKENIZER
    flags = ["--data-json", data, "--ranks", ranks, "--tokens", beside]
    line = run(Job("prep", [args.hf, str(args.script), "prep", *map(str, flags)]), args.threads)
    if "error" in line:
        sys.exit(f"{args.script} prep: {line['error']}")
    beside.rename(path)
    return path


def groups(args: argparse.Namespace) -> dict[str, list[Job]]:
    """Name the measurements; peers without an environment are left out."""
    if not args.script.is_file():
        sys.exit(f"{args.script}: no peers' script there; name it with --script")
    steps = ["--steps", str(args.steps), "--threads", str(args.threads), "--device", args.device]
    theirs = ["--dtype", {"bfloat16": "bf16", "float32": "fp32"}[peers_dtype(args)]]
    found: dict[str, list[Job]] = {}
    for key, group in comparisons(args.shape).items():
        jobs = found[key] = []
        for name, flags in group.peers.items():
            peer = name.partition(",")[0]
            if python := getattr(args, peer):
                tokens = ["--tokens", str(kept_tokens(group.records, args))]
                call = [python, str(args.script), peer, *group.flags, *flags, *steps, *tokens]
                jobs.append(Job(name, [*call, *theirs]))
        data = ["--records", args.data / group.records, "--tokenizer", args.data / TOKENIZER]
        ours = [*group.flags, *steps, *group.ours, *data]
        jobs.append(Job(SHARING, measurement("step", ours)))
        if group.apart:
            jobs.append(Job(APART, measurement("step", [*ours, "--no-prefix-sharing"])))
        if peers_dtype(args) == "float32":
            jobs.append(Job(LIKE_PEERS, measurement("step", [*ours, *theirs])))
    return found


def first_losses(runs: Runs) -> list[float]:
    """Compute how far the first step's loss moves when equal beginnings are computed once."""
    differences = []
    for lines in runs.values():
        first = {
            (line["name"], line["repeat"]): line["losses"][0] for line in lines if "losses" in line
        }
        differences += [
            abs(loss - first[APART, repeat])
            for (name, repeat), loss in first.items()
            if name == SHARING and (APART, repeat) in first
        ]
    return differences


def left_out(runs: Runs) -> list[str]:
    """Name the peers that had no environment, and where."""
    missing: dict[str, list[str]] = {}
    for key, lines in runs.items():
        there = {line["name"] for line in lines}
        for name in comparisons(DEFAULT_SHAPE)[key].peers:
            if name not in there:
                missing.setdefault(name, []).append(key)
    return [f"{name} ({', '.join(keys)})" for name, keys in missing.items()]


FIGURES = ("tok_s", "slot_s", "tok_s_cpu", "peak_rss_gib", "peak_cuda_gib")


def ratios(key: str, lines: Sequence[Line]) -> dict[str, Ratios]:
    """Divide medians of ours: speed by the best peer's, memory by transformers'."""
    figures, named = medians(lines, FIGURES), comparisons(DEFAULT_SHAPE)[key].peers
    peers = [values for name, values in figures.items() if name in named]
    wall, cpu = (max((p[k] for p in peers), default=None) for k in ("tok_s", "tok_s_cpu"))
    hf = peak_gib(figures["hf"]) if "hf" in figures else None
    return {
        name: Ratios(
            ratio(values["tok_s"], wall),
            ratio(values["tok_s_cpu"], cpu),
            ratio(peak_gib(values), hf),
        )
        for name, values in figures.items()
        if name not in named
    }


def table(runs: Runs) -> list[str]:
    """Lay out medians and our ratios, to the best peer and to transformers."""
    rows: list[list[object]] = []
    for key, lines in runs.items():
        title = comparisons(DEFAULT_SHAPE)[key].title
        steps = {
            line["name"]: line["tokens"] / len(line["step_s"]) for line in lines if "tok_s" in line
        }
        ours = ratios(key, lines)
        for name, values in medians(lines, FIGURES).items():
            wall, cpu, memory = map(two_digits, ours.get(name, Ratios()))
            slots = f"{values['slot_s']:.1f}" if "slot_s" in values else None
            row = [title, name, f"{steps[name]:.0f}", f"{values['tok_s']:.1f}", slots]
            row += [wall, f"{values['tok_s_cpu']:.1f}", cpu, f"{peak_gib(values):.2f}", memory]
            rows.append(row)
    head = ["what", "who", "tokens a step", "tok/s", "slots/s", "to the best peer"]
    head += ["tok/s by CPU time", "to the best peer", "peak GiB", "to hf"]
    lines = markdown(head, rows)
    if differences := first_losses(runs):
        lines += [
            "",
            "Step-1 losses, with and without shared beginnings: largest difference "
            f"{max(differences):.2g} in {len(differences)} pairs.",
        ]
    if missing := left_out(runs):
        lines += ["", f"Left out: {'; '.join(missing)}."]
    return lines


PART = Part("peers", "The step beside the peers", groups, table)

if __name__ == "__main__":
    main(PART, __doc__)
