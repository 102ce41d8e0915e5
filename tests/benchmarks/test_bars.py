"""A figure that misses its bar, and one that is not there, is told and fails the command."""

import argparse
import copy
import json
import sys
from pathlib import Path

import pytest

from tests.benchmarks import bars, generate, peers, scaling, startup
from tests.benchmarks.__main__ import PARTS
from tests.benchmarks.interleaved import DEFAULT_SHAPE, Line

SHAPES = {"lengths": "records of ", "lengths-llama": "1B shape, records of "}

Kept = dict[str, dict[str, list[Line]]]  # by part and group


def missed(folder: Path, kept: Kept, shape: str = DEFAULT_SHAPE) -> list[str]:
    """Write measurements as a machine keeps them, and name the bars that they do not meet."""
    for path in folder.iterdir():
        path.unlink()
    args = argparse.Namespace(shape=shape, out=folder, device="cpu")
    for name, groups in kept.items():
        several = {key: {"lines": lines} for key, lines in groups.items()}
        PARTS[name].file(args).write_text(json.dumps({"groups": several}))
    return [bar.what for bar in bars.bars(args) if not bar.is_met]


def step(name: str, speed: float, gib: float) -> Line:
    return {"name": name, "tok_s": speed, "tok_s_cpu": speed, "peak_rss_gib": gib}


def at_their_bars() -> Kept:
    """Make measurements of which each is what it has to be, and no more."""
    kept: Kept = {"peers": {}, "generate": {}}
    moved = {peers.SHARING: bars.FIRST_LOSS, peers.APART: 0.0}
    for key, (speed, memory, apart, _) in bars.STEPS.items():
        kept["peers"][key] = [
            step("hf", 64, 4),
            step("litgpt" if key == "padded" else "hf, rows of 512", 32, 2),
            step(peers.SHARING, 64 * speed, 4 * memory),
            step(peers.APART, 64 * (apart or 1), 9),
        ]
        for line in kept["peers"][key][2:]:
            line |= {"repeat": 0, "losses": [moved[line["name"]]]}
    for key, bound in bars.GENERATION.items():
        kept["generate"][key] = [
            {"name": who, "new_tok_s": tok_s, "new_tok_s_cpu": tok_s, "rows": 8, "peak_rss_gib": 1}
            for who, tok_s in ((generate.OURS, 64 * bound), (generate.HF, 64))
        ]
    seconds = ((startup.OURS, 10 * bars.FIRST_STEP), (startup.HF, 10))
    kept["startup"] = {"step": [{"name": n, "wall_s": s, "cpu_s": s} for n, s in seconds]}
    growth = {"4,096": 1, "128,256": bars.FLAT}
    whole = {"tokens": 1000, "step_s": [1], "rows_real": bars.REAL_ROWS}
    kept["scaling"] = {
        key: [
            {"name": f"{shape}equal lengths", "tok_s": 100, "step_cpu_s": [bars.EVEN], **whole},
            {"name": f"{shape}Alpaca's lengths", "tok_s": 95, "step_cpu_s": [1.0], **whole},
        ]
        for key, shape in SHAPES.items()
    }
    kept["scaling"]["positions"] = [
        {"name": name, "peak_rss_gib": 1 + (records == 16) * growth[vocabulary], **whole}
        for (vocabulary, records), name in scaling.POSITIONS.items()
    ]
    kept["waiting"] = {"workers": [{"name": n, "tok_s": 9, "wait": bars.WAIT} for n in ("0", "2")]}
    return kept


SPOILT = {"tok_s": 0.99, "tok_s_cpu": 0.99, "new_tok_s": 0.99, "new_tok_s_cpu": 0.99}
SPOILT |= {"peak_rss_gib": 1.01, "wall_s": 1.01, "cpu_s": 1.01, "rows_real": 0.99, "wait": 1.01}
JUDGED = (peers.SHARING, peers.APART, generate.OURS, startup.OURS, "0", "2")
JUDGED += tuple(f"{shape}Alpaca's lengths" for shape in SHAPES.values())
JUDGED += (scaling.POSITIONS["128,256", 16],)


def test_each_figure_is_held_to_its_bar(tmp_path: Path) -> None:
    good = at_their_bars()
    assert missed(tmp_path, good) == []
    told: set[str] = set()
    for part, groups in good.items():
        for key, lines in groups.items():
            for number, line in enumerate(lines):
                for figure in set(SPOILT) & set(line) if line["name"] in JUDGED else ():
                    worse = copy.deepcopy(good)
                    worse[part][key][number][figure] *= SPOILT[figure]
                    told.update(found := missed(tmp_path, worse))
                    assert len(found) <= 1, (part, key, line["name"], figure)
    by_cpu_time = copy.deepcopy(good)
    for lines in by_cpu_time["scaling"].values():
        lines[1]["step_cpu_s"] = [1.01]
    told.update(missed(tmp_path, by_cpu_time))
    moved = copy.deepcopy(good)
    moved["peers"]["short"][2]["losses"] = [1.01 * bars.FIRST_LOSS]
    told.update(missed(tmp_path, moved))
    assert told == set(missed(tmp_path, {}))
    print(len(told), "bars")


def test_a_group_with_a_failed_run_is_not_measured(tmp_path: Path) -> None:
    kept = at_their_bars()
    kept["generate"]["batch8"].append({"name": generate.HF, "error": "killed"})
    assert [what[:40] for what in missed(tmp_path, kept)] == [
        "generation, 64 tokens each, 8 at a time;"
    ] * 2


def test_another_shape_has_no_bars_of_what_has_a_shape_of_its_own(tmp_path: Path) -> None:
    kept = at_their_bars()
    both = {part: kept[part] for part in ("peers", "generate")}
    assert missed(tmp_path, both, "1b") == []
    of_one = set(missed(tmp_path, {})) - set(missed(tmp_path, {}, "1b"))
    assert {what for what in of_one if "step, full" not in what} == set(missed(tmp_path, both))
    assert len(of_one) == 20


def test_the_command_fails_where_a_bar_is_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = at_their_bars()
    assert missed(tmp_path, kept) == []
    monkeypatch.setattr(sys, "argv", ["", "--out", str(tmp_path)])
    bars.main()
    assert "| waiting for data, 2 workers | 0.010 | at most 0.01 | yes |" in capsys.readouterr().out
    kept["waiting"]["workers"].pop()
    missed(tmp_path, kept)
    with pytest.raises(SystemExit, match="1 of 45 bars are not met"):
        bars.main()
    row = "| waiting for data, 2 workers | not measured | at most 0.01 | NO |"
    assert row in capsys.readouterr().out
