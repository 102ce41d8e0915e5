"""Two judged runs: figures by hand and by simulation, and what refuses to be compared."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llama_lightning.cli import main
from llama_lightning.evaluation import asking, report
from llama_lightning.evaluation.comparison import compare_differences, needed_pairs
from llama_lightning.evaluation.prometheus_prompts import build_prometheus_pair_prompt
from llama_lightning.evaluation.responses import read_responses
from tests.fake_ollama import FakeOllama, FakeOpenAI, Fault, Words

ROOT = Path(__file__).parents[2]
USAGE, FILES = 2, 3


# Figures


@pytest.mark.parametrize(("correlation", "known"), [(0, 638), (0.3, 447), (0.5, 319)])
def test_needed_pairs(correlation: float, known: int) -> None:
    spread = 1.15 * (2 * (1 - correlation)) ** 0.5
    needed = needed_pairs(3.41 - 3.23, spread)
    print(f"3.41 against 3.23 at correlation {correlation}: {needed} prompts, known {known}")
    assert needed == pytest.approx(known, rel=0.01)


def test_needed_pairs_do_show_it() -> None:
    generator = np.random.default_rng(0)
    needed = needed_pairs(0.2, 1.0)
    samples = generator.normal(0.2, 1.0, size=(4000, needed))
    errors = samples.std(axis=1, ddof=1) / needed**0.5
    seen = np.mean(np.abs(samples.mean(axis=1) / errors) > 1.96)
    print(f"{needed} pairs show a difference of a fifth of the spread in {seen:.1%} of 4,000 runs")
    assert seen == pytest.approx(0.8, abs=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("size", [100, 400])
def test_the_paired_interval_covers(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    # Fewer, 2,000 times; all with one seed, so that a tenth would be too few.
    monkeypatch.setattr(report, "RESAMPLES", 4000)
    chances = np.array([0.07, 0.14, 0.26, 0.38, 0.15])
    moves = np.array([0.15, 0.6, 0.25])  # B's grade is one lower, the same, one higher
    grades = np.arange(1, 6)
    moved = np.clip(grades[:, None] + [-1, 0, 1], 1, 5)
    truth = chances @ (moved @ moves - grades)
    generator = np.random.default_rng(0)
    a = generator.choice(5, size=(2000, size), p=chances)
    b = moved[a, generator.choice(3, size=(2000, size), p=moves)]
    intervals = [compare_differences(row).interval_95 for row in (b - grades[a]).tolist()]
    covered = np.mean([low <= truth <= high for low, high in intervals])
    print(f"95 % intervals of {size} pairs: {covered:.1%} of 2,000 hold the true difference")
    assert 0.93 <= covered <= 0.97


def test_by_hand() -> None:
    comparison = compare_differences([1] * 30 + [0] * 15 + [-1] * 5, missing=2, only_b=1)
    assert comparison.difference == 0.5
    assert (comparison.wins, comparison.ties, comparison.losses) == (30, 15, 5)
    assert comparison.more == 0
    low, high = comparison.interval_95  # 0.5 +- 1.96 * 0.678 / sqrt(50)
    assert (low, high) == pytest.approx((0.312, 0.688), abs=0.03)
    assert str(comparison) == (
        f"B - A: +0.50 [{low:+.2f}, {high:+.2f}], n=50 pairs (2 without a grade in both, "
        "1 only in B), 30 wins 15 ties 5 losses: settled"
    )


def test_not_settled() -> None:
    differences = [1] * 12 + [0] * 20 + [-1] * 8
    comparison = compare_differences(differences)
    needed = needed_pairs(0.1, float(np.std(differences, ddof=1)))
    assert comparison.more == needed - 40
    assert str(comparison).endswith(
        f"losses: not settled, about {needed - 40} more prompts would settle it"
    )


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ([0] * 30, "no difference"),
        ([1, -1] * 30, "not settled, the means are equal"),
        ([1], "not settled, about 19 more prompts would settle it"),
        ([1] * 19, "not settled, about 1 more prompts would settle it"),
        ([0.1, 0.2, -0.3], "not settled, the means are equal"),
        ([1] * 20, "settled"),
        ([-0.5] * 20, "settled"),
    ],
)
def test_verdicts(differences: list[float], verdict: str) -> None:
    assert compare_differences(differences).verdict == verdict


# On the command line

Say = Callable[..., tuple[int, str]]


def rows(count: int, **changes: Any) -> list[dict[str, Any]]:
    row = {"input": "", "reference": "one two three", "response": "one two three"}
    return [{"id": i, "instruction": f"Say {i}.", **row, **changes} for i in range(count)]


@pytest.fixture
def say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Say:
    """Run a verb in the test's folder; its code, and its words."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str]:
        code = main(arguments)
        captured = capfd.readouterr()
        assert "Traceback" not in captured.err
        assert len(captured.err.splitlines()) == (code != 0)
        return code, captured.out + captured.err

    return call


@pytest.fixture
def judged(say: Say) -> Callable[..., None]:
    """Write responses into a folder and have them judged."""

    def call(folder: str, records: list[dict[str, Any]], *arguments: str) -> None:
        Path(folder).mkdir(exist_ok=True)
        path = Path(folder, "responses.jsonl")
        path.write_text("".join(json.dumps(row) + "\n" for row in records))
        code, said = say("judge", "--judge.backend=exact", f"--responses.path={path}", *arguments)
        assert code == 0, said

    return call


def test_two_files_of_responses(say: Say, judged: Callable[..., None]) -> None:
    worse = rows(40)
    for row in worse[:30]:
        row["response"] = "one"
    judged("a", worse)
    judged("b", rows(45, num_tokens=3))
    code, said = say("compare", "a", "b/verdicts.jsonl")
    print(said)
    assert code == 0
    assert "n=40 pairs (5 only in B), 30 wins 10 ties 0 losses: settled" in said
    assert said.endswith("responses to each prompt: b/compare.html\n")
    assert '"Response of B"' in Path("b/compare.html").read_text()
    code, said = say("compare", "b", "a", "--output", "deep/er")
    assert "0 wins 10 ties 30 losses" in said
    assert Path("deep/er/compare.html").is_file()
    code, said = say("compare", "a", "a")
    assert code == 0
    assert "+0.00 [+0.00, +0.00], n=40 pairs, 0 wins 40 ties 0 losses: no difference" in said


def test_equal_responses_share_a_verdict(say: Say, judged: Callable[..., None]) -> None:
    judged("a", rows(30, instruction="Say it."))
    assert len(Path("a/verdicts.jsonl").read_text().splitlines()) == 1
    assert "n=30 pairs" in say("compare", "a", "a")[1]


def test_samples_of_one_prompt_are_one_pair(say: Say, judged: Callable[..., None]) -> None:
    several = [{**row, "sample": sample} for row in rows(25) for sample in range(3)]
    judged("a", several)
    for row in several:
        row["response"] = ["one two three", "one", " "][row["sample"]]
    judged("b", several[:-1], "--judge.max_excluded_fraction=0.4")
    code, said = say("compare", "a", "b")
    assert code == 0
    # Of three samples one is as good, one is 2 lower (ROUGE-L is a half), one has no grade.
    assert "B - A: -1.00 [-1.00, -1.00], n=25 pairs, 0 wins 0 ties 25 losses: settled" in said


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (["--judge.seed=1"], "seed is 0 in a and 1 in b"),
        (["--judge.temperature=0.5"], "temperature is 0.0 in a and 0.5 in b"),
        (["--judge.max_new_tokens=9"], "max_new_tokens is 1024 in a and 9 in b"),
    ],
)
def test_judged_differently(
    say: Say, judged: Callable[..., None], arguments: list[str], field: str
) -> None:
    judged("a", rows(3))
    judged("b", rows(3), *arguments)
    code, said = say("compare", "a", "b")
    assert code == USAGE
    assert f"A and B were judged differently: {field}; judge both in the same way" in said


@pytest.mark.parametrize(
    ("field", "value"), [("judge", "ollama x"), ("with_reference", False), ("prompt", "older")]
)
def test_another_judge_or_prompt(
    say: Say, judged: Callable[..., None], field: str, value: Any
) -> None:
    for folder in "ab":
        judged(folder, rows(3))
    path = Path("b/summary.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    code, said = say("compare", "a", "b")
    assert code == USAGE
    assert f"differently: {field} is " in said


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def text(name: str, words: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(words)


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (without("summary.json"), "b/summary.json: No such file or directory; name the folder"),
        (without("verdicts.jsonl"), "b/verdicts.jsonl: No such file or directory; `judge` writes"),
        (without("responses.jsonl"), "responses.jsonl: no such file"),
        (text("summary.json", "{"), "b/summary.json is not a summary of this version"),
        (text("summary.json", "[]"), "b/summary.json is not a summary of this version"),
        (text("verdicts.jsonl", "{}\n"), "b/verdicts.jsonl, line 1: not a verdict"),
        (text("verdicts.jsonl", ""), "b/verdicts.jsonl: no verdict on 4 of 4 responses"),
        (text("responses.jsonl", json.dumps(rows(3))), "b/responses.jsonl has only 3 by now"),
    ],
)
def test_broken_folders(
    say: Say, judged: Callable[..., None], break_it: Callable[[Path], None], said: str
) -> None:
    for folder in "ab":
        judged(folder, rows(4))
    break_it(Path("b"))
    code, words = say("compare", "a", "b")
    print(words)
    assert code == FILES
    assert said in words


def test_nothing_in_common(say: Say, judged: Callable[..., None]) -> None:
    judged("a", rows(3))
    judged("b", [{**row, "id": row["id"] + 3} for row in rows(3)])
    code, said = say("compare", "a", "b")
    assert (code, "a and b have no id in common" in said) == (FILES, True)
    judged("c", rows(3, input="other"))
    code, said = say("compare", "a", "c")
    assert (code, "id 0 has another input in a than in c" in said) == (FILES, True)
    code, said = say("compare", "nowhere", "a")
    assert (code, "nowhere/summary.json" in said) == (FILES, True)


@pytest.mark.parametrize("arguments", [[], ["a"], ["a", "b", "c"]])
def test_usage(say: Say, arguments: list[str]) -> None:
    code, said = say("compare", *arguments)
    assert code == USAGE
    assert said.endswith("use: compare A B\n")


def test_a_misspelt_key(say: Say) -> None:
    code, said = say("compare", "a", "b", "--ouput=x")
    assert code == USAGE
    assert "unknown key ouput in the command line; did you mean output?" in said


def test_an_output_that_cannot_be_written(say: Say, judged: Callable[..., None]) -> None:
    judged("a", rows(3))
    Path("file").write_text("")
    code, said = say("compare", "a", "a", "--output=file/deeper")
    assert code == USAGE
    assert "--output file/deeper cannot be written" in said


def test_predict_twice_and_compare(say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [
        {"instruction": f"Give the capital city of {land}.", "output": f"the city of {land}"}
        for land in ("Norway", "France", "Spain", "Italy")
    ]
    Path("rows.json").write_text(json.dumps(records))
    shared = ["predict", f"--config={ROOT}/configs/tiny_lora.yaml", "--judge.backend=exact"]
    shared += ["--data.predict_path=rows.json", "--trainer.accelerator=cpu"]
    for folder, tokens in (("a", 4), ("b", 12)):
        code = main(
            [
                *shared,
                f"--responses.path={folder}/responses.jsonl",
                f"--model.generation.max_new_tokens={tokens}",
            ]
        )
        assert code == 0
        assert Path(folder, "report.html").is_file()
    assert main(["compare", "a", "b"]) == 0
    assert Path("b/compare.html").is_file()


# Both responses before one judge


def mixed(number: int) -> list[dict[str, Any]]:
    """B's rows for `rows`, where A's are "one two": better, worse and equal by turns."""
    said = ["one two three", "one", "one two"]
    return [{**row, "response": said[row["id"] % 3]} for row in rows(number)]


@pytest.fixture
def two_runs(judged: Callable[..., None]) -> None:
    judged("a", rows(30, response="one two"))
    judged("b", mixed(30))


def shown(body: dict[str, Any]) -> list[str]:
    """The two responses of a request, in their order."""
    user = body["messages"][1]["content"]
    return re.findall(r'<graded_response letter="[AB]">\n(.*)\n</graded_response>', user)


def longer_wins(body: dict[str, Any]) -> Words:
    one, other = map(len, shown(body))
    return Words(f"By length. [RESULT] {'A' if one > other else 'B'}")


def first_wins(body: dict[str, Any]) -> Words:
    return Words("The first. [RESULT] A")


def test_pairwise_without_a_server(say: Say, two_runs: None) -> None:
    code, said = say("compare", "a", "b", "--judge.backend=exact")
    print(said)
    assert code == 0
    assert "pairwise, B - A: +0.00 [" in said
    assert "n=30 pairs, 10 wins 10 ties 10 losses: not settled" in said
    assert "both orders agree on 20 of 20 pairs (100%)" in said
    assert len(Path("b/pairwise.jsonl").read_text().splitlines()) == 40
    code, said = say("compare", "a", "b", "--judge.backend=exact")
    assert "40 of 40 verdicts are in b/pairwise.jsonl already" in said


def test_pairwise_in_both_orders(say: Say, two_runs: None) -> None:
    with FakeOllama(longer_wins) as server:
        keys = ("--judge.backend=ollama", f"--judge.base_url={server.url}", "--output=c")
        code, said = say("compare", "a", "b", *keys)
        print(said)
        assert code == 0
        assert len(server.chats) == 2 * 20  # equal words are a tie, and nobody is asked
        assert shown(server.chats[0]) == shown(server.chats[1])[::-1]
        assert server.chats[0]["format"]["properties"]["result"]["enum"] == ["A", "B"]
        assert "n=30 pairs, 10 wins 10 ties 10 losses" in said
        assert "both orders agree on 20 of 20 pairs (100%)" in said
        rows_ = [json.loads(line) for line in Path("c/pairwise.jsonl").read_text().splitlines()]
        assert {(row["id"], row["first"], row["score"]) for row in rows_} == {
            (i, first, 1 if i % 3 == 0 else -1) for i in range(30) if i % 3 < 2 for first in "AB"
        }
        code, said = say("compare", "b", "a", *keys)
        assert code == USAGE
        assert "runs was ['../a', '../b'] and is ['../b', '../a']; name another folder" in said


def test_pairwise_by_a_prometheus(say: Say, two_runs: None) -> None:
    """It is asked as it was trained to be, and not held to another form."""

    def longer(body: dict[str, Any]) -> Words:
        user = body["messages"][0]["content"]
        one, other = (re.search(rf"###Response {letter}:\n(.*)", user)[1] for letter in ("A", "B"))
        return Words(f"By length. [RESULT] {'A' if len(one) > len(other) else 'B'}")

    with FakeOpenAI(longer) as server:
        keys = ("--judge.backend=prometheus", "--judge.model=judge")
        code, said = say("compare", "a", "b", *keys, f"--judge.base_url={server.url}")
    print(said)
    assert code == 0
    assert len(server.chats) == 2 * 20
    a, b = (read_responses(Path(run, "responses.jsonl"))[0] for run in "ab")
    for chat, (one, other) in zip(server.chats, [(a, b), (b, a)], strict=False):
        prompt = build_prometheus_pair_prompt(one, other, with_reference=True)
        assert chat["messages"] == [{"role": "user", "content": prompt.merged}]
        assert (chat["temperature"], chat["top_p"]) == (1.0, 0.9)
        assert "response_format" not in chat
    assert "n=30 pairs, 10 wins 10 ties 10 losses" in said
    settings = json.loads(Path("b/pairwise.settings.json").read_text())
    assert (settings["words"], settings["judge"]) == ("prometheus", "prometheus judge")
    assert "<dt>pairwise, judge</dt><dd>prometheus judge</dd>" in Path("b/compare.html").read_text()


def test_a_place_is_no_win(say: Say, two_runs: None) -> None:
    with FakeOllama(first_wins) as server:
        keys = ("--judge.backend=ollama", f"--judge.base_url={server.url}")
        code, said = say("compare", "a", "b", *keys)
    assert code == 0
    assert "pairwise, B - A: +0.00 [+0.00, +0.00], n=30 pairs, 0 wins 30 ties 0 losses" in said
    assert "both orders agree on 0 of 20 pairs (0%)" in said


def test_pairwise_goes_on(say: Say, two_runs: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "RETRY_DELAYS_S", (0.01,))

    def dies(body: dict[str, Any]) -> Words | Fault:
        return Fault(0) if len(server.chats) > 15 else longer_wins(body)

    with FakeOllama(dies) as server:
        keys = ("--judge.backend=ollama", f"--judge.base_url={server.url}")
        code, said = say("compare", "a", "b", *keys)
        assert code == FILES
        assert "the same command goes on from there" in said
        server.brain, before = longer_wins, len(server.chats)
        code, said = say("compare", "a", "b", *keys)
        assert code == 0
        print(f"{before} requests, then {len(server.chats) - before} for the rest of 40 verdicts")
        # The request that was on its way when the first run gave up may come again.
        assert len(server.chats) - before in (40 - 15, 40 - 15 + 1)
    assert "both orders agree on 20 of 20 pairs" in said


def test_pairs_without_a_choice(say: Say, judged: Callable[..., None]) -> None:
    judged("a", rows(3, response="one"))
    judged("b", [{**row, "response": f"two {row['id']}"} for row in rows(3)])
    with FakeOllama(lambda body: Words("Both are fine.")) as server:
        keys = ("--judge.backend=ollama", f"--judge.base_url={server.url}")
        code, said = say("compare", "a", "b", *keys)
    assert code == FILES
    assert "the judge chose between no pair: 3 unparsed" in said


def test_only_the_first_pairs_are_shown_to_a_judge(say: Say, two_runs: None) -> None:
    code, said = say("compare", "a", "b", "--judge.backend=exact", "--judge.limit=6")
    print(said)
    assert code == 0
    assert "n=30 pairs, 10 wins 20 ties 0 losses: settled" in said
    assert "n=6 pairs, 2 wins 2 ties 2 losses: not settled" in said
    assert len(Path("b/pairwise.jsonl").read_text().splitlines()) == 2 * 4


def test_too_many_pairs_without_a_choice(
    say: Say, two_runs: None, capfd: pytest.CaptureFixture[str]
) -> None:
    def often_vague(body: dict[str, Any]) -> Words:
        return Words("Fine.") if "Say 0." in body["messages"][1]["content"] else longer_wins(body)

    with FakeOllama(often_vague) as server:
        keys = ("--judge.backend=ollama", f"--judge.base_url={server.url}")
        assert say("compare", "a", "b", *keys)[0] == 0
        Path("b/compare.html").unlink()
        code = main(["compare", "a", "b", *keys, "--judge.max_excluded_fraction=0.03"])
    printed = capfd.readouterr()
    assert code == FILES
    assert "1 of 30 pairs have no choice (1 unparsed), more than" in printed.err
    assert Path("b/compare.html").is_file()
