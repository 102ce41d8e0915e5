"""`python -m tests.benchmarks.bars`: the figures a machine has kept, beside the bars set for them.

Measures nothing. Fails where a figure misses its bar, was not measured, or failed in one of its
runs. The bars are ratios of medians on a CPU, of tokens a second and of peak memory; with `--shape
1b` they are held to the measurements of that shape.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.benchmarks import generate, peers, scaling, startup, waiting
from tests.benchmarks.interleaved import DEFAULT_SHAPE, Part, Ratios, Runs, markdown, medians


class Step(NamedTuple):
    """What a fit step has to come to."""

    speed: float  # of the best peer, at least, by wall and by CPU time
    memory: float  # of transformers, at most
    apart: float | None = None  # speed where no beginnings are shared
    shaped: bool = True  # of the shape named, whichever that is


STEPS = {
    "short": Step(1.9, 0.75, apart=1.35),
    "all": Step(1.9, 0.75),
    "long": Step(1.2, 0.75),
    "padded": Step(1.9, 0.75),
    "full-llama": Step(1.7, 0.8, shaped=False),
    "full": Step(1.7, 0.8, shaped=False),
    "full4k": Step(1.05, 0.8, shaped=False),
}
GENERATION = {"batch1": 1.5, "batch8": 1.3, "batch32": 1.25, "set8": 2, "set32": 2.5}
FIRST_STEP = 0.6  # of transformers' time since the process began
EVEN = 0.95  # of the speed of equal lengths, where lengths are spread
REAL_ROWS = 0.97
WAIT = 0.01
FLAT = 1.1  # growth of memory with positions, at a large vocabulary to that at a small one
FIRST_LOSS = 1e-2  # in bf16, between shared beginnings and none


class Bar(NamedTuple):
    """A figure and its bound."""

    what: str
    figure: float | None  # none where it was not measured
    bound: float
    at_most: bool = False

    @property
    def is_met(self) -> bool:
        if self.figure is None:
            return False
        return self.figure <= self.bound if self.at_most else self.figure >= self.bound


def speeds(what: str, ratios: Ratios, bound: float, at_most: bool = False) -> Iterator[Bar]:
    """Hold both ratios of speed to one bound."""
    yield Bar(f"{what}; by wall", ratios.wall, bound, at_most)
    yield Bar(f"{what}; by CPU time", ratios.cpu, bound, at_most)


def kept(part: Part, args: argparse.Namespace) -> Runs:
    """Read what was measured; of a group in which a run failed, nothing."""
    file = part.file(args)
    groups = json.loads(file.read_text())["groups"] if file.is_file() else {}
    lines = {key: group["lines"] for key, group in groups.items()}
    return {key: some for key, some in lines.items() if not any("error" in one for one in some)}


def of_steps(runs: Runs, plain: bool) -> Iterator[Bar]:
    """Speed and memory beside the peers."""
    for key, (speed, memory, apart, shaped) in STEPS.items():
        if not plain and not shaped:
            continue
        title = f"step, {peers.comparisons(DEFAULT_SHAPE)[key].title}"
        ratios = peers.ratios(key, runs.get(key, []))
        shared, alone = (ratios.get(name, Ratios()) for name in (peers.SHARING, peers.APART))
        yield from speeds(title, shared, speed)
        if apart:
            yield from speeds(f"{title}, beginnings apart", alone, apart)
        yield Bar(f"{title}; memory", shared.memory, memory, at_most=True)
    moved = max(peers.first_losses(runs), default=None)
    yield Bar("first loss, moved by shared beginnings", moved, FIRST_LOSS, at_most=True)


def of_generation(runs: Runs) -> Iterator[Bar]:
    """Speed beside transformers."""
    for key, bound in GENERATION.items():
        entry = generate.PLAN[key]
        title = f"generation, {entry.title}, {entry.batch} at a time"
        yield from speeds(title, generate.ratios(runs.get(key, [])), bound)


def of_the_rest(args: argparse.Namespace) -> Iterator[Bar]:
    """Start-up, even cost and waiting, which have one shape."""
    first = startup.ratios(kept(startup.PART, args).get("step", []))
    yield from speeds("first step of a process", first, FIRST_STEP, at_most=True)
    for key, shape in (("lengths", ""), ("lengths-llama", "1B shape, ")):
        lines = map(scaling.with_rates, kept(scaling.PART, args).get(key, []))
        rates = medians(list(lines), ("tok_s", "ms_a_token", "rows_real"))
        equal, spread = (
            rates.get(f"{shape}records of {name} lengths") for name in ("equal", "Alpaca's")
        )
        even = (
            Ratios(spread["tok_s"] / equal["tok_s"], equal["ms_a_token"] / spread["ms_a_token"])
            if equal and spread
            else Ratios()
        )
        yield from speeds(f"{shape}records of Alpaca's lengths to equal ones", even, EVEN)
        real = spread["rows_real"] if spread else None
        yield Bar(f"{shape}rows that are real", real, REAL_ROWS)
    grown = scaling.growth(kept(scaling.PART, args).get("positions", []))
    yield Bar("memory of more positions, vocabulary 128,256 to 4,096", grown, FLAT, at_most=True)
    waits = medians(kept(waiting.PART, args).get("workers", []), ("wait",))
    for workers in ("0", "2"):
        wait = waits.get(workers, {}).get("wait")
        yield Bar(f"waiting for data, {workers} workers", wait, WAIT, at_most=True)


def bars(args: argparse.Namespace) -> list[Bar]:
    """Hold every figure of a shape to its bar."""
    plain = args.shape == DEFAULT_SHAPE
    found = [*of_steps(kept(peers.PART, args), plain), *of_generation(kept(generate.PART, args))]
    return found + (list(of_the_rest(args)) if plain else [])


def main() -> None:
    """Print the table; exit with 1 where a bar is not met."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.bars", description=__doc__)
    parser.add_argument("--shape", default=DEFAULT_SHAPE)
    parser.add_argument("--out", type=Path, help="folder of the results; by default the machine's")
    parser.set_defaults(device="cpu")
    found = bars(parser.parse_args())
    rows = [
        [
            bar.what,
            "not measured" if bar.figure is None else f"{bar.figure:.3f}",
            f"at {'most' if bar.at_most else 'least'} {bar.bound}",
            "yes" if bar.is_met else "NO",
        ]
        for bar in found
    ]
    print("\n".join(markdown(["figure", "measured", "bar", "met"], rows)))
    if missed := sum(not bar.is_met for bar in found):
        sys.exit(f"{missed} of {len(found)} bars are not met")
    print(f"\nAll {len(found)} bars are met.")


if __name__ == "__main__":
    main()
