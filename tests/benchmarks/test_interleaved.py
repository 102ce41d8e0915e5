"""The tables are those of the measurements, and a run that is killed keeps what it measured."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.benchmarks import (
    generate,
    interleaved,
    levers,
    peers,
    products,
    scaling,
    startup,
    waiting,
)
from tests.benchmarks.__main__ import PARTS
from tests.benchmarks.inputs import LONG, SHORT
from tests.benchmarks.interleaved import Job, Part, Runs
from tests.benchmarks.machine import machine_name
from tests.levers import ANSWERING_WITHOUT, WITHOUT
from tests.model.oracle import small_config

ECHO = "import json, sys; print('noise'); print(json.dumps({'tok_s': float(sys.argv[1])}))"


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip("|").split("|")]


def part_of(*jobs: tuple[str, str, str]) -> Part:
    """Make a part of one group, "g", whose jobs have a name, a program and its argument."""

    def groups(args: object) -> dict[str, list[Job]]:
        return {"g": [Job(name, [sys.executable, "-c", code, word]) for name, code, word in jobs]}

    def table(runs: Runs) -> list[str]:
        figures = interleaved.medians(runs["g"], ("tok_s",))
        return interleaved.markdown(["who", "tok/s"], [[n, v["tok_s"]] for n, v in figures.items()])

    return Part("some", "Some", groups, table)


def test_jobs_run_in_turn_and_failures_are_named(tmp_path: Path) -> None:
    part = part_of(("one", ECHO, "1"), ("two", ECHO, "2"), ("bad", "raise SystemExit('oh')", ""))
    args = interleaved.options("", "").parse_args(["--repeats", "2", "--out", str(tmp_path)])
    interleaved.measure(part, args)
    kept = json.loads((tmp_path / "some.json").read_text())
    lines = kept["groups"]["g"]["lines"]
    assert [(line["repeat"], line["name"]) for line in lines] == [
        (repeat, name) for repeat in (0, 1) for name in ("one", "two", "bad")
    ]
    assert lines[2]["error"] == "oh"
    text = interleaved.printed([part], args)
    print(text)
    assert machine_name("cpu") in text
    assert "Medians; repeats: 2." in text
    assert "torch 2" in text
    assert "| two | 2.0 |" in text
    assert "| bad" not in text
    assert text.endswith("Failed: g, bad.")


@pytest.mark.slow
def test_a_killed_run_keeps_what_it_measured(tmp_path: Path) -> None:
    program = f"""
from pathlib import Path
from tests.benchmarks import interleaved, test_interleaved
part = test_interleaved.part_of(
    ("one", test_interleaved.ECHO, "1"), ("long", "import time; time.sleep(60)", "")
)
args = interleaved.options("", "").parse_args(["--out", {str(tmp_path)!r}])
interleaved.measure(part, args)
"""
    file = tmp_path / "some.json"
    process = subprocess.Popen([sys.executable, "-c", program], start_new_session=True)
    try:
        deadline = time.monotonic() + 60
        while not file.is_file() and time.monotonic() < deadline:
            time.sleep(0.1)
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # with its child, which sleeps
        process.wait()
    kept = json.loads(file.read_text())
    assert [line["tok_s"] for line in kept["groups"]["g"]["lines"]] == [1.0]
    assert kept["table"][2:] == ["| one | 1.0 |"]
    assert list(tmp_path.iterdir()) == [file]


def test_half_a_group_does_not_replace_a_whole_one(tmp_path: Path) -> None:
    seen = []

    def table(runs: Runs) -> list[str]:
        seen.append([line["tok_s"] for line in runs["g"]])
        return []

    for word in ("1", "2"):
        part = part_of(("one", ECHO, word), ("two", ECHO, word))._replace(table=table)
        flags = ["--out", str(tmp_path), "--repeats", "2"]
        interleaved.measure(part, interleaved.options("", "").parse_args(flags))
    assert seen[:4] == [[1], [1, 1], [1, 1, 1], [1, 1, 1, 1]]
    assert seen[4:] == [[1, 1, 1, 1], [2, 2], [2, 2, 2], [2, 2, 2, 2]]


def test_a_group_measured_again_replaces_the_earlier_and_leaves_the_others(tmp_path: Path) -> None:
    def measured(first: str, second: str, *flags: str, chosen: Sequence[str] = ()) -> list[float]:
        args = interleaved.options("", "").parse_args(["--out", str(tmp_path), *flags])
        groups = {
            key: part_of(("one", ECHO, word), ("two", ECHO, word)).groups(args)["g"]
            for key, word in (("g", first), ("h", second))
        }
        part = Part("some", "Some", lambda _: groups, lambda runs: [str(list(runs))], shaped=False)
        interleaved.measure(part, args, chosen)
        kept = json.loads((tmp_path / "some.json").read_text())
        assert kept["table"] == [str(list(kept["groups"]))]
        return [line["tok_s"] for group in kept["groups"].values() for line in group["lines"]]

    assert measured("1", "2", "--repeats", "1", chosen=["h"]) == [2, 2]
    assert measured("3", "4", "--repeats", "1", "--threads", "1", chosen=["g"]) == [3, 3, 2, 2]
    assert measured("5", "6", "--repeats", "2", chosen=["h"]) == [3, 3, 6, 6, 6, 6]
    *_, g, h = interleaved.document([tmp_path / "some.json"]).split("\n")
    assert g.startswith("- g: Medians; repeats: 1. ")
    assert ", 1 threads; here: torch" in g
    assert h.startswith("- h: Medians; repeats: 2. ")
    assert f", {os.cpu_count()} threads; here: torch" in h


def test_each_machine_has_a_folder_of_its_own(tmp_path: Path) -> None:
    folder = interleaved.results_of("2 cores of Intel Xeon Processor, 2.1 GHz")
    assert folder == interleaved.RESULTS / "2_cores_of_intel_xeon_processor_2_1_ghz"
    mine = interleaved.options("", "").parse_args([])
    assert peers.PART.file(mine).parent == interleaved.results_of(machine_name("cpu"))
    args = interleaved.options("", "").parse_args(["--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="has no startup.json; there are .*2_cores_of_amd_epyc"):
        interleaved.printed([startup.PART], args)


@pytest.mark.parametrize("name", PARTS)
def test_kept_tables_are_those_of_kept_measurements(name: str) -> None:
    files = list(interleaved.RESULTS.glob(f"*/{name}*.json"))
    assert files
    for file in files:
        kept = json.loads(file.read_text())
        runs = {key: group["lines"] for key, group in kept["groups"].items()}
        assert PARTS[name].table(runs) == kept["table"], file


def test_the_whole_1b_shape_has_files_of_its_own(tmp_path: Path) -> None:
    def names(*flags: str) -> list[str]:
        args = interleaved.options("", "").parse_args(list(flags))
        return [part.file(args).name for part in PARTS.values()]

    assert names() == [f"{name}.json" for name in PARTS]
    assert names("--shape", "1b") == [
        *(f"{name}-1b.json" for name in ("peers", "levers", "generate", "startup")),
        "waiting.json",
        "scaling.json",
        "products.json",
    ]


def test_all_shapes_are_printed_unless_one_is_named(tmp_path: Path) -> None:
    part = Part("some", "Some", lambda _: {}, lambda _: [])

    def printed(*flags: str) -> list[str]:
        args = interleaved.options("", "").parse_args(["--out", str(tmp_path), *flags])
        text = interleaved.printed([part], args)
        return [line for line in text.split("\n") if line.startswith("## ")]

    for name in ("some", "some-1b", "other-1b"):
        report = {"title": name, "table": [], "groups": {}}
        interleaved.write(tmp_path / f"{name}.json", report)
    assert printed() == ["## some", "## some-1b"]
    assert printed("--shape", "1b") == ["## some-1b"]


def test_the_variables_of_openmp_are_the_same_for_both_peers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    show = "import json, os; print(json.dumps({k: os.environ.get(k) for k in %r}))"
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")

    def seen(policy: str | None) -> list[dict[str, str | None]]:
        monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
        monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
        if policy:
            monkeypatch.setenv("OMP_WAIT_POLICY", policy)
        jobs = generate.groups(interleaved.options("", "").parse_args([]))["batch1"]
        command = [sys.executable, "-c", show % (names,)]
        return [interleaved.run(job._replace(command=command), 1) for job in jobs]

    ours = {"OMP_WAIT_POLICY": None, "GOMP_SPINCOUNT": "10000"}
    users = {"OMP_WAIT_POLICY": "ACTIVE", "GOMP_SPINCOUNT": None}
    assert seen(None) == [ours, ours]
    assert seen("ACTIVE") == [users, users]


def test_ratios_are_those_of_medians_to_the_best_peer() -> None:
    def one(name: str, tok_s: float, cpu: float, gib: float = 1.0, repeat: int = 0) -> dict:
        line = {"name": name, "repeat": repeat, "tok_s": tok_s, "tok_s_cpu": cpu}
        return line | {"peak_rss_gib": gib, "tokens": 900, "step_s": [1, 1, 1]}

    runs = [one("hf", 10, 30, 2.0) | {"slot_s": 12.0}, one("litgpt", 20, 20), one("ours", 30, 60)]
    runs += [one("hf", 12, 30, 2.0) | {"slot_s": 14.0}, one("litgpt", 20, 20), one("ours", 50, 60)]
    runs += [one("ours", 40, 60), {"name": "torchtune", "repeat": 0, "error": "no"}]
    rows = peers.table({"full": runs})
    assert [cells(row)[1:] for row in rows[2:]] == [
        ["hf", "300", "11.0", "13.0", "", "30.0", "", "2.00", ""],
        ["litgpt", "300", "20.0", "", "", "20.0", "", "1.00", ""],
        ["ours", "300", "40.0", "", "2.00", "60.0", "2.00", "1.00", "0.50"],
    ]


def test_first_losses_are_compared_within_a_repeat() -> None:
    def one(name: str, repeat: int, loss: float) -> dict:
        return {"name": name, "repeat": repeat, "losses": [loss, 0.0]}

    short = [one(peers.SHARING, 0, 12.5), one(peers.APART, 0, 12.25)]
    long = [one(peers.SHARING, 1, 3.0), one(peers.APART, 1, 3.125), one(peers.SHARING, 2, 9.0)]
    assert peers.first_losses({"short": short}) == [0.25]
    assert peers.first_losses({"short": short, "long": long}) == [0.25, 0.125]
    assert peers.first_losses({"short": short[:1]}) == []
    told = "Step-1 losses, with and without shared beginnings: largest difference 0.25 in 2 pairs."
    step = {"tok_s": 1.0, "tok_s_cpu": 1.0, "peak_rss_gib": 1.0, "tokens": 1, "step_s": [1]}
    runs = {key: [line | step for line in one] for key, one in (("short", short), ("long", long))}
    assert told in peers.table(runs)


def test_peers_that_were_left_out_are_named() -> None:
    def lines(*names: str) -> list[dict]:
        return [{"name": name, "repeat": 0, "error": "killed"} for name in names]

    runs = {"short": lines("hf", "ours"), "full": lines("hf", "litgpt", "ours")}
    assert peers.table(runs)[-1] == "Left out: trl (short); torchtune (full)."
    whole = {"short": lines("hf", "trl", "ours")}
    assert not any("Left out" in line for line in peers.table(whole))


def test_generation_is_compared_with_transformers() -> None:
    def one(name: str, tok_s: float, step: float, gib: float) -> dict:
        line = {"name": name, "new_tok_s": tok_s, "new_tok_s_cpu": 2 * tok_s, "rows": 16}
        return line | {"decode_step_ms": step, "peak_rss_gib": gib}

    uneven = [one(name, tok_s, 0, 2) for name, tok_s in ((generate.OURS, 60), (generate.HF, 20))]
    for line in uneven:
        del line["decode_step_ms"]
    rows = generate.table(
        {
            "batch8": [one(generate.OURS, 30, 100, 1.5), one(generate.HF, 20, 150, 3)],
            "set8": uneven,
            "long8": [{"name": generate.OURS, "error": "no"}],
        }
    )
    found = [cells(row) for row in rows[2:]]
    assert [row[0] for row in found] == ["batch8", "set8"]
    assert found[0][4:] == [
        *("30", "20", "1.50", "60", "40", "1.50"),
        *("100", "150", "1.50", "1.5", "3", "0.50"),
    ]
    assert found[1][4:] == ["60", "20", "3.00", "120", "40", "3.00", "", "", "", "2", "2", "1.00"]


def test_startup_is_compared_with_transformers() -> None:
    def one(name: str, wall: float, imported: list[str]) -> dict:
        return {"name": name, "wall_s": wall, "cpu_s": wall / 2, "imported": imported}

    runs = {
        "step": [one(startup.OURS, 3, ["torch"]), one(startup.HF, 6, ["transformers"])],
        "light": [one(startup.HELP, 0.1, []), one(startup.TEXT, 0.5, [])],
    }
    assert [cells(row)[1:] for row in startup.table(runs)[2:]] == [
        ["3.00", "0.50", "1.50", "0.50", "torch"],
        ["6.00", "", "3.00", "", "transformers"],
        ["0.10", "", "0.05", "", "none of them"],
        ["0.50", "", "0.25", "", "none of them"],
    ]


def test_a_levers_gain_is_that_of_pairs_or_to_the_whole() -> None:
    def answers(name: str, tok_s: float, cpu: float) -> dict:
        return {"name": name, "new_tok_s": tok_s, "new_tok_s_cpu": cpu, "peak_rss_gib": 1.0}

    pairs = {"name": levers.LAST, "tok_s": 9, "gain": 1.5, "gain_cpu": 1.25, "peak_rss_gib": 2.0}
    steps = [{"name": levers.WHOLE, "tok_s": 9, "peak_rss_gib": 1.5}, pairs]
    two = [answers(levers.WHOLE, 90, 99), answers("copied beginnings", 60, 90)]
    freed = {"name": levers.FREED, "tok_s": 8, "tok_s_cpu": 6, "peak_rss_gib": 2.5}
    whole = {"name": levers.WHOLE, "tok_s": 12, "tok_s_cpu": 15, "peak_rss_gib": 1.5}
    full = [whole, pairs, freed]
    rows = levers.table({"lora": steps, "answers": two, "full": full, "lora-long": full[1:]})
    assert [cells(row)[1:] for row in rows[2:]] == [
        ["as it is", "", "", "1.50"],
        [f"without {levers.LAST}", "1.50", "1.25", "2.00"],
        ["as it is", "", "", "1.00"],
        ["without copied beginnings", "1.50", "1.10", "1.00"],
        ["as it is", "", "", "1.50"],
        [f"without {levers.LAST}", "1.50", "1.25", "2.00"],
        [f"without {levers.FREED}", "1.50", "2.50", "2.50"],
        [f"without {levers.LAST}", "1.50", "1.25", "2.00"],
        [f"without {levers.FREED}", "", "", "2.50"],
    ]
    args = interleaved.options("", "").parse_args([])
    jobs = [job for several in levers.groups(args).values() for job in several]
    assert [job.name for job in jobs if "--throughout" in job.command] == [levers.FREED]
    named = {job.name for job in jobs}
    assert named | {"rows in multiples"} == {levers.WHOLE, *WITHOUT, *ANSWERING_WITHOUT}


def test_growth_is_compared_with_the_first_of_its_kind() -> None:
    def one(name: str, tok_s: float, cpu: float) -> dict:
        line = {"name": name, "tok_s": tok_s, "tokens": 1000, "step_s": [1, 1]}
        line |= {"step_cpu_s": [cpu, cpu], "peak_rss_gib": 1.0}
        return line | {"rows_real": 1.0, "cells_real": 0.875}

    rows = scaling.table({"lengths": [one("equal", 200, 1), one("spread", 190, 1.1)], "size": []})
    assert [cells(row) for row in rows[2:]] == [
        ["equal", "500", "200", "", "2.00", "", "100.0 %", "87.5 %", "1.00"],
        ["spread", "500", "190", "0.95", "2.20", "1.10", "100.0 %", "87.5 %", "1.00"],
    ]
    waits = waiting.table({"workers": [{"name": "0", "tok_s": 10, "wait": 0.0025}]})
    assert cells(waits[2]) == ["0", "10", "0.25 %"]


def test_peers_compute_in_fp32_where_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("tests.random_llama.kept_random_llama", lambda *_: tmp_path)
    script = tmp_path / "peers.py"
    script.touch()
    (tmp_path / "llama_lightning_benchmarks").mkdir()
    for name in (SHORT, LONG):
        (tmp_path / "llama_lightning_benchmarks" / f"tokens-{name}").touch()

    def jobs(dtype: str) -> dict[str, str]:
        flags = ["--script", str(script), "--peers-dtype", dtype]
        args = interleaved.options("", "").parse_args(flags)
        short = peers.groups(args)["short"]
        assert ("peers in fp32" in interleaved.setting(short, args)) == (dtype == "float32")
        commands = {job.name: " ".join(job.command) for job in short} | {
            f"generate {job.name}": " ".join(job.command) for job in generate.groups(args)["batch8"]
        }
        commands |= {
            f"startup {job.name}": " ".join(job.command) for job in startup.groups(args)["step"]
        }
        return commands

    plain, wide = jobs("bfloat16"), jobs("float32")
    assert set(wide) - set(plain) == {peers.LIKE_PEERS}
    assert wide["hf"].endswith("--dtype fp32")
    assert plain["hf"].endswith("--dtype bf16")
    assert wide["generate hf"].endswith("--dtype float32")
    assert wide["startup hf"].endswith("--dtype float32")
    assert plain["startup hf"].endswith("--dtype bfloat16")
    ours = (peers.SHARING, peers.APART, f"generate {generate.OURS}", f"startup {startup.OURS}")
    assert all(wide[name] == plain[name] for name in ours)
    assert wide[peers.LIKE_PEERS] == f"{wide[peers.SHARING]} --dtype fp32"


def test_on_a_gpu_every_process_measures_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(interleaved, "machine_name", lambda device: f"some {device}")
    (tmp_path / "llama_lightning_benchmarks").mkdir()
    for name in (SHORT, LONG):
        (tmp_path / "llama_lightning_benchmarks" / f"tokens-{name}").touch()
    script = tmp_path / "peers.py"
    script.touch()
    flags = ["--device", "cuda", "--script", str(script), "--repeats", "1"]
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        interleaved.options("", "").parse_args(flags)
    assert "torch finds no CUDA device here" in capsys.readouterr().err
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    args = interleaved.options("", "").parse_args(flags)
    assert interleaved.peers_dtype(args) == "bfloat16"
    seen = 0
    for part in (peers.PART, levers.PART, generate.PART, waiting.PART, scaling.PART):
        assert part.file(args).parent == interleaved.RESULTS / "some_cuda"
        for jobs in part.groups(args).values():
            for job in jobs:
                assert "--device cuda" in " ".join(job.command), job
                seen += 1
    assert seen > 20
    for part in (startup.PART, products.PART):
        interleaved.measure(part, args)
        monkeypatch.setattr(sys, "argv", ["", "--device", "cuda"])
        with pytest.raises(SystemExit):
            interleaved.main(part, "")
        assert f"{part.name} is measured on a CPU only" in capsys.readouterr().err
    assert not (interleaved.RESULTS / "some_cuda").exists()


def test_memory_is_the_gpus_where_there_is_one() -> None:
    line = {"tok_s": 1, "tok_s_cpu": 1, "tokens": 9, "step_s": [1], "peak_rss_gib": 4.0}
    runs = [line | {"name": "hf", "peak_cuda_gib": 2.0}, line | {"name": "ours"}]
    runs[1]["peak_cuda_gib"] = 1.5
    rows = peers.table({"all": [{"repeat": 0, **one} for one in runs]})
    assert [cells(row)[-2:] for row in rows[2:]] == [["2.00", ""], ["1.50", "0.75"]]


def test_ways_of_a_product_are_compared() -> None:
    def one(way: str, forward: float) -> dict:
        return {"name": way, "forward 8": forward, "backward 8": 2 * forward}

    heads = [
        {"name": way, "forward 2": forward, "laying out 8": layout}
        for way, forward, layout in ((products.WHOLE, 9, 10), (products.SCREENED, 6, 40))
    ]
    lines = [one(products.TORCH, 6), one(products.OURS, 2)]
    rows = products.table({"products": lines, "head": heads})
    found = {tuple(cells(row)[:3]): cells(row)[3:] for row in rows[2:]}
    assert found["torch / in fp32", "8", "forward"] == ["6", "2", "3.00"]
    assert found["torch / in fp32", "8", "backward"] == ["12", "4", "3.00"]
    assert found["torch / in fp32", "1", "forward"] == ["", "", ""]
    assert found["whole head / screened head", "2", "forward"] == ["9", "6", "1.50"]
    assert found["whole head / screened head", "8", "laying out"] == ["10", "40", ""]


@pytest.mark.parametrize("group", ["block", "head", "step"])
@pytest.mark.parametrize("ours", [False, True])
def test_what_is_laid_out_is_measured(
    group: str, ours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "TOKENS", 512)
    monkeypatch.setattr(products, "WIDTH", 64)
    monkeypatch.setattr(products, "BLOCK", [(64, 64), (64, 128), (128, 64)])
    monkeypatch.setitem(products.SHAPES, products.SHAPE, small_config())
    found = products.MEASURES[group](products.WAYS[group][ours])
    rows = [f"forward {number}" for number in products.ROWS[group]]
    assert sorted(found) == sorted([*rows, *products.ONCE.get(group, [])])
    assert all(figure > 0 for figure in found.values())


def test_records_of_equal_and_of_spread_lengths_have_the_same_words(tmp_path: Path) -> None:
    counts = {}
    for equal in (True, False):
        path = scaling.write_records(tmp_path / "records.json", scaling.lengths(equal))
        records = json.loads(path.read_text())
        counts[equal] = [len(record["output"].split()) for record in records]
        assert len(records) == scaling.RECORDS
        assert max(counts[equal]) <= 400
        assert all(re.fullmatch(r"[a-z ]+", record["instruction"]) for record in records)
    print(counts[False])
    assert sum(counts[True]) == sum(counts[False])
    assert max(counts[True]) - min(counts[True]) <= 1
    assert max(counts[False]) > 10 * min(counts[False])


def test_light_paths_import_nothing_heavy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llama_lightning.assets import TINY

    monkeypatch.setenv("TMPDIR", str(tmp_path))
    (tmp_path / "llama_lightning_benchmarks").mkdir()
    (tmp_path / "llama_lightning_benchmarks" / "tiny").symlink_to(TINY)
    for peer in (startup.HELP, startup.TEXT):
        command = interleaved.measurement("startup", ["--shape", "tiny", "--peer", peer])
        line = interleaved.run(Job(peer, command), 1)
        print(line)
        assert line["imported"] == []
        assert 0 < line["cpu_s"] < 10
        assert line["wall_s"] > 0
