"""Grading through the command line, against real servers on 127.0.0.1.

Each test looks at what was asked (the server's record) and at what was left (files, words, code).
"""

import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from llama_lightning.cli import main
from llama_lightning.evaluation import asking, http_json
from llama_lightning.evaluation.grading import grade_file
from llama_lightning.evaluation.judge import JudgeConfig
from tests.fake_ollama import (
    Brain,
    FakeOllama,
    FakeOpenAI,
    FakeServer,
    Fault,
    Words,
    four,
    tokens_of,
)
from tests.verb_processes import forked, running, spawned

ROOT = Path(__file__).parents[2]
USAGE, BACKEND = 2, 3
FILE = "responses.jsonl"


class Run(NamedTuple):
    """What the verb left behind."""

    code: int
    output: str
    folder: Path

    @property
    def verdicts(self) -> list[dict[str, Any]]:
        return rows(self.folder / "verdicts.jsonl")

    @property
    def summary(self) -> dict[str, Any]:
        return json.loads((self.folder / "summary.json").read_text())

    @property
    def error(self) -> str:
        return next(line for line in self.output.splitlines() if line.startswith("error: "))


Runner = Callable[..., Run]


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def record(number: int, **changes: Any) -> dict[str, Any]:
    return {
        "id": number,
        "instruction": f"Say {number}.",
        "input": "",
        "reference": f"{number}",
        "response": f"Answer {number}",
        "num_tokens": 3,
        "finish_reason": "stop",
        **changes,
    }


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in records))
    return path


def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait less between tries, and no longer for the first reply than for others."""
    monkeypatch.setattr(asking, "RETRY_DELAYS_S", (0.01,) * 3)
    monkeypatch.setattr(asking, "BUSY_DELAYS_S", (0.01,) * 6)
    monkeypatch.setattr(http_json, "LOADING_S", 0.0)


@pytest.fixture
def responses(tmp_path: Path) -> Path:
    return write(tmp_path / "responses.jsonl", [record(i) for i in range(6)])


@pytest.fixture
def judge(
    responses: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Runner:
    """Run the verb in this process, without long waits between tries."""
    hurry(monkeypatch)

    def call(server: FakeServer | None = None, backend: str = "ollama", **keys: Any) -> Run:
        keys = {"backend": backend, **keys}
        if server is not None:
            keys["base_url"] = server.url
        arguments = [f"--judge.{key}={value}" for key, value in keys.items()]
        code = main(["judge", f"--responses.path={responses}", *arguments])
        captured = capfd.readouterr()
        assert "Traceback" not in captured.err
        return Run(code, captured.out + captured.err, responses.parent)

    return call


def graded_text(body: dict[str, Any]) -> str:
    user = body["messages"][1]["content"]
    return re.search(r"<graded_response>\n(.*)\n</graded_response>", user, re.DOTALL)[1]


def by_response(replies: dict[str, Words | Fault]) -> Brain:
    """Answer by the last word of what is graded."""
    return lambda body: replies[graded_text(body).split()[-1]]


# What is asked, and what is left


def test_ollama(judge: Runner) -> None:
    with FakeOllama() as server:
        done = judge(server, max_new_tokens=300, seed=7)
    assert done.code == 0
    assert server.paths == ["/api/tags", "/api/show", *["/api/chat"] * 6]
    body = server.chats[0]
    assert body["model"] == "llama3.1"
    assert body["options"] == {"num_ctx": 4096, "num_predict": 300, "seed": 7, "temperature": 0.0}
    assert body["keep_alive"] == "15m"
    assert body["stream"] is False
    system, user = body["messages"]
    assert (system["role"], user["role"]) == ("system", "user")
    assert "<task_instruction>\nSay 0.\n</task_instruction>" in user["content"]
    assert "<reference_answer>\n0\n</reference_answer>" in user["content"]
    assert "5: The response fully adheres to the instructions" in user["content"]
    assert "task_input" not in user["content"]
    assert [v["id"] for v in done.verdicts] == list(range(6))
    assert {v["score"] for v in done.verdicts} == {4}
    assert done.summary["judge"] == "ollama llama3.1 000000000000"
    assert (done.summary["mean"], done.summary["graded"], done.summary["total"]) == (4.0, 6, 6)
    assert "4.00 [4.00, 4.00], n=6 of 6\n" in done.output
    assert "| 4 | 6 | ███" in (done.folder / "report.md").read_text()
    assert "ollama llama3.1 000000000000" in (done.folder / "report.html").read_text()


def test_how_the_reply_is_drawn(judge: Runner) -> None:
    with FakeOllama() as server:
        assert judge(server, top_p=0.8, repetition_penalty=1.1, temperature=0.5).code == 0
        refused = judge(server, top_p=0.7, repetition_penalty=1.1, temperature=0.5)
    drawn = {"temperature": 0.5, "top_p": 0.8, "repeat_penalty": 1.1}
    assert drawn.items() <= server.chats[0]["options"].items()
    assert refused.code == USAGE
    assert "top_p was 0.8 and is 0.7" in refused.error


def test_verdicts_of_before_there_was_a_choice_of_words(judge: Runner, tmp_path: Path) -> None:
    """Their files lack the newer settings; nothing is asked again, and they compare."""
    with FakeOllama() as server:
        assert judge(server).code == 0
        for name in ("verdicts.settings.json", "summary.json"):
            values = json.loads((tmp_path / name).read_text())
            for newer in ("words", "top_p", "repetition_penalty"):
                del values[newer]
            (tmp_path / name).write_text(json.dumps(values))
        assert main(["compare", str(tmp_path), str(tmp_path)]) == 0
        assert judge(server).code == 0
    assert len(server.chats) == 6


def test_openai(judge: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", "secret")
    with FakeOpenAI(key="secret") as server:
        done = judge(server, "openai", model="judge", api_key_env="A_KEY")
        wrong = judge(server, "openai", model="jugde", api_key_env="A_KEY")
        without = judge(server, "openai", model="judge")
    unset = judge(server, "openai", model="judge", api_key_env="NO_KEY")
    assert done.code == 0
    assert server.chats[0]["max_tokens"] == 1024
    assert done.summary["mean"] == 4.0
    assert wrong.code == without.code == BACKEND
    assert "there are judge, other" in wrong.error
    assert "holds it in judge.api_key_env" in without.error
    assert unset.code == USAGE
    assert "NO_KEY is not set" in unset.error
    assert "secret" not in done.output + wrong.output + without.output


def test_openai_that_cuts_prompts(judge: Runner, responses: Path, tmp_path: Path) -> None:
    write(responses, [record(0), record(1, response="word " * 1500)])
    with FakeOpenAI() as server:
        server.window = 1024
        done = judge(server, "openai", model="judge", max_excluded_fraction=0.5)
        server.counts = False
        told_nothing = judge(server, "openai", model="judge", output=str(tmp_path / "other"))
    print(done.verdicts[1]["reason"])
    assert [v["status"] for v in done.verdicts] == ["graded", "too_long"]
    assert "the server read 1024 tokens of a prompt of" in done.verdicts[1]["reason"]
    assert told_nothing.code == 0


@pytest.mark.parametrize(
    ("message", "status"),
    [
        ("This model's maximum context length is 4096 tokens.", "too_long"),
        ("context_length_exceeded", "too_long"),
        ("the request exceeds the available context size", "too_long"),
        ("Requested tokens (9000) exceed context window of 2048", "too_long"),
        ("the prompt is too long", "too_long"),
        ("cannot create a CUDA context", "backend_error"),
        ("no context shift with this cache", "backend_error"),
    ],
)
def test_a_refusal_for_want_of_context(
    judge: Runner, tmp_path: Path, message: str, status: str
) -> None:
    for kind, backend in ((FakeOpenAI, "openai"), (FakeOllama, "ollama")):
        with kind(lambda body: Fault(400, message)) as server:
            judge(server, backend, model=server.models[0], limit=1, output=str(tmp_path / backend))
        (verdict,) = rows(tmp_path / backend / "verdicts.jsonl")
        assert verdict["status"] == status


def test_the_same_prompts_for_both_servers(judge: Runner, tmp_path: Path) -> None:
    with FakeOllama() as one, FakeOpenAI() as other:
        judge(one, output=tmp_path / "one")
        judge(other, "openai", model="judge", output=tmp_path / "other")
    assert [c["messages"] for c in one.chats] == [c["messages"] for c in other.chats]


def test_the_config_file_and_the_command_line(judge: Runner, tmp_path: Path) -> None:
    with FakeOllama() as server:
        text = "model: {base_model: nowhere}\ntrainer: {max_steps: 3}\n"
        text += f"judge: {{backend: ollama, base_url: '{server.url}', limit: 3}}\n"
        config = tmp_path / "run.yaml"
        config.write_text(text + f"responses: {{path: {tmp_path}/responses.jsonl}}\n")
        assert main(["judge", "--config", str(config), "--judge.limit", "2"]) == 0
        assert len(server.chats) == 2
        assert main(["judge", "--config", str(config)]) == 0
        assert len(server.chats) == 3


def test_long_prompts_get_a_larger_context(judge: Runner, responses: Path) -> None:
    texts = ("word " * 3000, "word " * 30000, "on " * 34000, "word " * 40000)
    write(responses, [record(i, response=text) for i, text in enumerate(texts)])
    with FakeOllama() as server:
        server.context_length = 33300
        done = judge(server, max_new_tokens=100)
    for verdict in done.verdicts:
        print(verdict["status"], verdict["reason"])
    # The third may fit, by its bytes, and the server's count tells that it does not.
    asked = [body["options"]["num_ctx"] for body in server.chats]
    assert asked == [16384, 33300, 33300, 33299]
    assert [v["status"] for v in done.verdicts] == ["graded", "graded", "too_long", "too_long"]
    assert "with room for 33299: it was cut" in done.verdicts[2]["reason"]
    assert "needs about 40" in done.verdicts[3]["reason"]


def test_a_reply_that_pushes_the_prompt_out(judge: Runner, responses: Path) -> None:
    write(responses, [record(0, response="word " * 3470)])
    with FakeOllama() as server:
        server.context_length = 4000
        judge(server, max_new_tokens=60, output=str(responses.parent / "room"))
    read = sum(tokens_of(message["content"]) for message in server.chats[0]["messages"])
    with FakeOllama() as server:
        server.context_length = read + 20  # of the 40 that are written
        done = judge(server, max_new_tokens=40)
    assert done.verdicts[0]["status"] == "too_long"


def test_a_list_of_records(judge: Runner, responses: Path) -> None:
    keep = ("instruction", "input", "response")
    listed = [{"output": "x", **{k: record(i)[k] for k in keep}} for i in range(3)]
    responses.write_text(json.dumps(listed))
    with FakeOllama() as server:
        done = judge(server)
    assert [v["id"] for v in done.verdicts] == [0, 1, 2]
    assert "<reference_answer>\nx\n" in server.chats[0]["messages"][1]["content"]


def test_names_of_rows(judge: Runner, responses: Path) -> None:
    write(responses, [record(i, id=name) for i, name in enumerate([None, "q", 7, "1"])])
    assert [v["id"] for v in judge(backend="exact").verdicts] == [0, "q", 7, "1"]


def test_equal_responses_are_graded_once(judge: Runner, responses: Path) -> None:
    write(responses, [record(i, instruction="Q", reference="a", response="b") for i in range(4)])
    with FakeOllama() as server:
        done = judge(server)
    assert len(server.chats) == 1
    assert done.summary["graded"] == 4


@pytest.mark.parametrize(
    ("use", "references", "shown"),
    [
        ("auto", ["a", "b"], True),
        ("auto", ["a", ""], False),
        ("never", ["a", "b"], False),
        ("always", ["a", "b"], True),
        ("always", ["a", ""], None),
    ],
)
def test_references(
    judge: Runner, responses: Path, use: str, references: list[str], shown: bool | None
) -> None:
    write(responses, [record(i, reference=text) for i, text in enumerate(references)])
    with FakeOllama() as server:
        done = judge(server, use_reference=use)
    if shown is None:
        assert done.code == USAGE
        assert "1 of 2 rows have no reference (the first has id 1)" in done.error
        return
    prompts = [chat["messages"][1]["content"] for chat in server.chats]
    assert {"<reference_answer>" in prompt for prompt in prompts} == {shown}
    assert done.summary["with_reference"] is shown


def test_exact(judge: Runner, responses: Path) -> None:
    texts = {" the cat sat\n": 5, "the cat": 3, "dog": 1, "The cat sat": 4}
    write(responses, [record(i, reference="the cat sat", response=t) for i, t in enumerate(texts)])
    done = judge(backend="exact")
    assert [v["score"] for v in done.verdicts] == list(texts.values())
    write(responses, [record(0, reference="")])
    missing = judge(backend="exact")
    assert missing.code == USAGE
    assert "1 of 1 rows have no reference" in missing.error


# What can go wrong with one response


def test_every_status(judge: Runner, responses: Path) -> None:
    replies = {
        "fine": Words("[RESULT] 4"),
        "vague": Words("Good."),
        "high": Words("[RESULT] 6"),
        "endless": Words("[RESULT] 4", cut=True),
        "long": Fault(400, "the request exceeds the available context size"),
        "broken": Fault(500, "llama runner process has terminated"),
    }
    texts = [*replies, " \n"]
    write(responses, [record(i, response=text) for i, text in enumerate(texts)])
    with FakeOllama(by_response(replies)) as server:
        done = judge(server, max_excluded_fraction=0.9)
    assert {text: v["status"] for text, v in zip(texts, done.verdicts, strict=True)} == {
        "fine": "graded",
        "vague": "unparsed",
        "high": "out_of_range",
        "endless": "truncated",
        "long": "too_long",
        "broken": "backend_error",
        " \n": "empty_response",
    }
    asked = {text: [] for text in texts}
    for chat in server.chats:
        asked[graded_text(chat)].append(chat["options"])
    tries = {text: len(options) for text, options in asked.items()}
    assert tries == {
        **{"fine": 1, "vague": 3, "high": 3, "endless": 2, "long": 1, "broken": 4, " \n": 0}
    }
    assert [(o["seed"], o["temperature"]) for o in asked["vague"]] == [(0, 0), (1, 0.7), (2, 0.7)]
    assert [o["num_predict"] for o in asked["endless"]] == [1024, 2048]
    assert done.code == 0
    assert done.summary["mean"] == 4.0
    assert done.summary["mean_if_excluded_were_1"] == pytest.approx((4 + 6) / 7)
    assert done.summary["mean_if_excluded_were_5"] == pytest.approx((4 + 30) / 7)
    assert sum(done.summary["excluded"].values()) == 6
    # Only the one that the server failed on is asked for again.
    with FakeOllama(four) as server:
        again = judge(server)
    assert [graded_text(chat) for chat in server.chats] == ["broken"]
    assert again.code == BACKEND  # 5 of 7 is more than a tenth
    assert again.summary["graded"] == 2
    assert "backend_error" not in again.summary["excluded"]


def flaky(faults: list[Fault]) -> Brain:
    """Answer with these first."""
    left = list(faults)
    return lambda body: left.pop(0) if left else Words("[RESULT] 4")


@pytest.mark.parametrize(
    "fault",
    [
        Fault(503, "server busy, please try again"),
        Fault(429, "too many requests"),
        Fault(0),
        Fault(500, "no", delay_s=0.3),
    ],
    ids=["503", "429", "cut", "slow"],
)
def test_a_passing_fault_costs_nothing(judge: Runner, fault: Fault) -> None:
    with FakeOllama(flaky([fault, fault])) as server:
        done = judge(server, read_timeout_s=0.2)
    assert done.code == 0
    assert len(server.chats) == 6 + 2
    assert [v["status"] for v in done.verdicts] == ["graded"] * 6


def test_a_hosted_server_without_a_list_of_models(judge: Runner) -> None:
    class Unlisted(FakeOpenAI):
        def get(self, handler: BaseHTTPRequestHandler) -> None:
            self.send(handler, self.error("no cache"), 500)

    with Unlisted() as server:
        assert judge(server, "openai", model="anything").code == 0


def test_a_cut_reply_of_a_model_without_more_room(judge: Runner) -> None:
    with FakeOllama(lambda body: Words("[RESULT] 4", cut=True)) as server:
        server.context_length = 3500
        done = judge(server)
    assert done.summary["excluded"] == {"truncated": 6}
    assert {chat["options"]["num_ctx"] for chat in server.chats} == {3500}


def test_an_error_under_http_200(judge: Runner) -> None:
    with FakeOllama(flaky([Fault(200, "an error was encountered while running the model")])) as s:
        done = judge(s)
    assert done.summary["graded"] == 6


def test_a_better_second_reply_counts(judge: Runner) -> None:
    def brain(body: dict[str, Any]) -> Words:
        return Words("[RESULT] 2" if body["options"]["seed"] else "3 or 4")

    with FakeOllama(brain) as server:
        done = judge(server)
    assert [v["score"] for v in done.verdicts] == [2] * 6


def test_half_a_surrogate_pair(judge: Runner, responses: Path) -> None:
    write(responses, [record(0, response="a \ud800 b")])
    with FakeOllama(lambda body: Words("\udfff [RESULT] 4")) as server:
        done = judge(server)
    assert done.code == 0
    assert [v["text"] for v in done.verdicts] == ["\udfff [RESULT] 4"]


def test_nothing_graded(judge: Runner) -> None:
    with FakeOllama(lambda body: Words("Good.")) as server:
        done = judge(server)
    assert done.code == BACKEND
    assert done.summary["mean"] is None
    assert done.summary["interval_95"] is None
    assert "no grade, n=0 of 6 (6 unparsed)" in done.output
    assert "no response was graded: 6 unparsed" in done.error
    assert "| unparsed | 6 |" in (done.folder / "report.md").read_text()


# What can go wrong with the server


def test_no_server_is_known_at_once(responses: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "llama_lightning", "judge", "--judge.backend=ollama"]
    result = subprocess.run(
        [*command, "--judge.base_url=http://127.0.0.1:9", f"--responses.path={responses}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Not by the clock: the other tests' processes may have the cores.
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"exit {result.returncode} after {seconds:.1f} s of work: {result.stderr}")
    assert result.returncode == BACKEND
    assert seconds < 5
    for words in ("no Ollama at http://127.0.0.1:9", "`ollama serve`", "OLLAMA_HOST"):
        assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert responses.is_file()


def test_a_model_that_is_not_pulled(judge: Runner) -> None:
    with FakeOllama() as server:
        done = judge(server, model="qwen3")
    assert done.code == BACKEND
    assert "`ollama pull qwen3` (installed: llama3.1:latest, mistral:7b)" in done.error
    assert not server.chats


def test_something_else_on_that_port(judge: Runner) -> None:
    with FakeOpenAI() as server:
        done = judge(server)
    assert done.code == BACKEND
    assert "does not answer as Ollama does" in done.error


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("", "http://127.0.0.1:11434"),
        ("0.0.0.0", "http://127.0.0.1:11434"),
        ("box:8000", "http://box:8000"),
        ("https://ollama.box", "https://ollama.box"),
        (":8000", "http://127.0.0.1:8000"),
    ],
)
def test_ollama_host(monkeypatch: pytest.MonkeyPatch, host: str, url: str) -> None:
    from llama_lightning.evaluation.ollama import default_base_url

    monkeypatch.setenv("OLLAMA_HOST", host)
    assert default_base_url() == url


@pytest.mark.parametrize("host", ["127.0.0.1:abc", "http://[::1"])
def test_an_ollama_host_that_is_no_address(
    judge: Runner, monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    monkeypatch.setenv("OLLAMA_HOST", host)
    done = judge()
    assert done.code == USAGE
    assert f"OLLAMA_HOST is {host} (" in done.error
    assert "write it as 127.0.0.1:11434" in done.error


def test_a_server_that_dies(judge: Runner, tmp_path: Path) -> None:
    answered = []

    def brain(body: dict[str, Any]) -> Words | Fault:
        if len(answered) == 3:
            server.die()
            time.sleep(0.1)
            return Fault(0)
        answered.append(graded_text(body))
        return Words("[RESULT] 4")

    with FakeOllama(brain) as server:
        dead = judge(server)
        assert dead.code == BACKEND
        assert "does not answer any more" in dead.error
        assert "the same command goes on from there" in dead.error
        assert len(dead.verdicts) == 3
        assert not (tmp_path / "summary.json").exists()
    with FakeOllama() as server:
        done = judge(server)
    assert [graded_text(chat) for chat in server.chats] == [f"Answer {i}" for i in (3, 4, 5)]
    assert done.summary["graded"] == 6
    assert "3 of 6 verdicts are in" in done.output


def test_a_server_that_fails_each_time(judge: Runner) -> None:
    with FakeOllama(lambda body: Fault(500, "CUDA out of memory")) as server:
        done = judge(server)
    assert done.code == BACKEND
    assert "failed for 3 responses in a row (HTTP 500: CUDA out of memory)" in done.error
    assert 3 * 4 <= len(server.chats) <= 4 * 4  # the next was on its way


def test_responses_that_always_fail_do_not_hold_up_the_rest(judge: Runner, responses: Path) -> None:
    write(responses, [record(i, response="bad" if i < 4 else "good") for i in range(12)])

    def brain(body: dict[str, Any]) -> Words | Fault:
        return Fault(500, "no") if graded_text(body) == "bad" else Words("[RESULT] 4")

    with FakeOllama(brain) as server:
        first = judge(server)
        assert "failed for 3 responses in a row" in first.error
        second = judge(server, max_excluded_fraction=0.5)
        third = judge(server, max_excluded_fraction=0.5)  # of a run that is through
    for run in (second, third):
        assert run.code == 0
        assert (run.summary["graded"], run.summary["excluded"]) == (8, {"backend_error": 4})


def test_several_at_a_time(judge: Runner, responses: Path) -> None:
    write(responses, [record(i) for i in range(16)])
    barrier = threading.Barrier(4)

    def brain(body: dict[str, Any]) -> Words:
        barrier.wait(timeout=10)  # breaks unless four are asked at the same time
        return Words("[RESULT] 4")

    with FakeOllama(brain) as server:
        done = judge(server, concurrency=4)
    assert sorted(v["id"] for v in done.verdicts) == list(range(16))
    assert len(server.chats) == 16


# Stopped and resumed


def grade_slowly(url: str, path: Path) -> None:
    """What the killed processes run."""
    grade_file(JudgeConfig(backend="ollama", base_url=url, concurrency=2), path)


@pytest.mark.slow
def test_killed_at_ten_moments_and_resumed(responses: Path) -> None:
    count, kills = 60, 10
    write(responses, [record(i) for i in range(count)])

    def slow(body: dict[str, Any]) -> Words:
        time.sleep(0.05)
        return Words(f"[RESULT] {1 + int(graded_text(body).split()[-1]) % 5}")

    verdicts, moments = responses.parent / "verdicts.jsonl", random.Random(0)
    kept, grew = b"", 0
    with FakeOllama(slow) as server:
        for _ in range(kills):
            asked = len(server.chats)
            process = forked().Process(target=grade_slowly, args=(server.url, responses))
            process.start()
            while len(server.chats) == asked:
                assert process.is_alive()
                time.sleep(0.002)
            time.sleep(moments.uniform(0, 0.18))
            process.kill()
            process.join()
            now = verdicts.read_bytes()
            assert now.startswith(kept)  # nothing is lost
            grew += now.count(b"\n") > kept.count(b"\n")
            kept = now[: now.rfind(b"\n") + 1]
        left = count - kept.count(b"\n")
        summary = grade_file(JudgeConfig(backend="ollama", base_url=server.url), responses)
    print(
        f"{kills} kills, {grew} of them after new verdicts, {left} responses left for the end; "
        f"{len(server.chats)} requests for {count} responses"
    )
    assert summary.graded == count
    assert grew > 3
    assert left > 5
    assert sorted(v["id"] for v in rows(verdicts)) == list(range(count))  # nothing twice
    assert all(v["score"] == 1 + v["id"] % 5 for v in rows(verdicts))
    assert count <= len(server.chats) <= count + 2 * kills  # what was on its way


# Spawned for Ctrl-C, as its threads, which wait for a reply, must not hold up the end of Python.
@pytest.mark.parametrize("verb", ["judge", "predict"])
@pytest.mark.parametrize(
    ("signum", "code", "context"), [(signal.SIGINT, 130, spawned), (signal.SIGTERM, 143, forked)]
)
def test_a_signal_ends_it_at_once(
    responses: Path,
    prompts: Path,
    verb: str,
    signum: int,
    code: int,
    context: Callable[[], BaseContext],
) -> None:
    asked, log = threading.Event(), responses.with_name("log.txt")

    def stuck(body: dict[str, Any]) -> Words:
        if len(server.chats) > 2:
            asked.set()
            time.sleep(30)
        return Words("[RESULT] 3")

    with FakeOllama(stuck) as server:
        arguments = [verb, "--judge.backend=ollama", f"--judge.base_url={server.url}"]
        arguments += [f"--responses.path={responses}"]
        if verb == "predict":
            arguments += [f"--config={ROOT}/configs/tiny_lora.yaml"]
            arguments += [f"--data.predict_path={prompts}"]
            arguments += [f"--trainer.default_root_dir={responses.parent}"]
        with running(arguments, log, context()) as process:
            assert asked.wait(timeout=60), log.read_text()
            time.sleep(0.5)  # for the second verdict to reach the disk
            start = time.monotonic()
            os.kill(process.pid, signum)
            process.join(timeout=25)
            seconds = time.monotonic() - start
            assert process.exitcode == code, log.read_text()
    print(f"{verb} ended {seconds:.1f} s after signal {signum}; the reply would take 30 s")
    assert seconds < 15  # not by seconds: other tests' processes may have the cores
    assert "Traceback" not in log.read_text()
    assert [v["id"] for v in rows(responses.parent / "verdicts.jsonl")] == [0, 1]


def test_a_half_written_line(judge: Runner) -> None:
    with FakeOllama() as server:
        done = judge(server)
        path = done.folder / "verdicts.jsonl"
        whole = path.read_bytes()
        path.write_bytes(whole[:-25])
        again = judge(server)
    assert again.code == 0
    assert path.read_bytes() == whole
    assert len(server.chats) == 6 + 1


def test_a_damaged_line(judge: Runner) -> None:
    with FakeOllama() as server:
        path = judge(server).folder / "verdicts.jsonl"
        path.write_text("{}\n" + path.read_text())
        assert "line 1: not a verdict" in judge(server).error


def test_no_room_for_a_report(judge: Runner, tmp_path: Path) -> None:
    (tmp_path / "summary.json.tmp").symlink_to("/dev/full")
    full = judge(backend="exact")
    assert full.code == BACKEND
    assert "No space left on device; make room, what was written is kept" in full.error
    (tmp_path / "summary.json.tmp").unlink()
    again = judge(backend="exact")
    assert "6 of 6 verdicts are in" in again.output


def test_no_room_for_a_verdict(judge: Runner, tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))  # bytes in a file
    try:
        with FakeOllama() as server:
            full = judge(server)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert full.code == BACKEND
    assert "File too large; make room, what was written is kept" in full.error
    assert not (tmp_path / "summary.json").exists()
    with FakeOllama() as server:
        assert judge(server).summary["graded"] == 6
    print(f"{6 - len(server.chats)} of 6 verdicts were kept")
    assert 0 < len(server.chats) < 6


def test_verdicts_that_cannot_be_read(judge: Runner, tmp_path: Path) -> None:
    (tmp_path / "verdicts.jsonl").symlink_to("/proc/self/mem")
    done = judge(backend="exact")
    assert done.code == BACKEND
    assert "verdicts.jsonl: Input/output error; `judge` writes it" in done.error


def test_changed_responses_are_graded_anew(judge: Runner, responses: Path) -> None:
    with FakeOllama() as server:
        judge(server)
        write(responses, [record(i, **({"response": "New"} if i == 2 else {})) for i in range(6)])
        done = judge(server)
    assert [graded_text(chat) for chat in server.chats[6:]] == ["New"]
    assert "1 verdicts in" in done.output
    assert done.summary["total"] == 6


def test_two_judges_are_not_mixed(judge: Runner) -> None:
    with FakeOllama() as server:
        judge(server)
        done = judge(server, model="mistral:7b")
    assert done.code == USAGE
    assert "judge was ollama llama3.1 000000000000 and is ollama mistral:7b" in done.error
    assert "set judge.output" in done.error


# Bad input


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has no responses"),
        ("[]", "has no responses"),
        ("[1]", "row 0 is not a record"),
        ("[{]", "is not JSON"),
        ('{"instruction": "a", "response": "b"}\n{"instr', "line 2 is not JSON"),
        ('{"instruction": "a"}\n', "row 0: no text 'response'"),
        ('{"instruction": "a", "response": 3}\n', "row 0: no text 'response'"),
        ('{"instruction": "a", "response": "b", "id": true}\n', "row 0: id is True; use a whole"),
        ('{"instruction": "a", "response": "b", "id": 1.0}\n', "row 0: id is 1.0; use a whole"),
        ('{"instruction": "a", "response": "b", "id": [1]}\n', "row 0: id is [1]; use a whole"),
        ('{"instruction": "a", "response": "b", "sample": "x"}\n', "row 0: sample is 'x'; use a"),
        (
            '{"instruction": "a", "response": "b", "id": "q"}\n' * 2,
            "row 1 has the id 'q' and sample 0 of row 0; give each prompt an id of its own",
        ),
        (
            '[{"instruction": "a", "response": "b", "id": 1}, {"instruction": "", "response": ""}]',
            "row 1 has the id 1 and sample 0 of row 0",
        ),
    ],
)
def test_broken_responses(judge: Runner, responses: Path, text: str, said: str) -> None:
    responses.write_text(text)
    done = judge(backend="exact")
    assert done.code == 3
    assert said in done.error


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"backend": "foo"}, "judge.backend: expected one of 'none', 'prometheus'"),
        ({"modle": "x"}, "did you mean judge.model?"),
        ({"limit": 0}, "judge.limit is 0"),
        ({"concurrency": 0}, "judge.concurrency is 0"),
        ({"temperature": -1}, "judge.temperature is -1"),
        ({"read_timeout_s": 0}, "judge.read_timeout_s is 0"),
        ({"seed": "x"}, "judge.seed: expected a whole number, got x"),
        ({"base_url": "127.0.0.1:8000"}, "begin with http://"),
        ({"base_url": "http://[::1"}, "judge.base_url is http://[::1 (Invalid IPv6 URL); write"),
        ({"base_url": "http://a:b"}, "judge.base_url is http://a:b (Port could not be cast"),
        ({"top_p": 0}, "judge.top_p is 0.0; use a value above 0"),
        ({"repetition_penalty": 0}, "judge.repetition_penalty is 0"),
        ({"backend": "openai"}, "judge.base_url: not given"),
        ({"backend": "openai", "base_url": "http://127.0.0.1:9"}, "judge.model: not given"),
        ({"backend": "exact", "use_reference": "never"}, "judge.use_reference is never"),
    ],
)
def test_wrong_keys(judge: Runner, keys: dict[str, Any], said: str) -> None:
    done = judge(**keys)
    assert done.code == USAGE
    assert said in done.error


def test_no_responses_given(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["judge", "--judge.backend=exact"]) == USAGE
    assert "responses.path: not given" in capfd.readouterr().err


# At the end of predict


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.json"
    path.write_text(json.dumps([record(i, output=f"{i}") for i in range(5)]))
    return path


@pytest.fixture
def predict(prompts: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., Run]:
    def call(*arguments: str) -> Run:
        code = main(
            [
                *("predict", f"--config={ROOT}/configs/tiny_lora.yaml"),
                f"--data.predict_path={prompts}",
                f"--trainer.default_root_dir={tmp_path}",
                "--model.generation.max_new_tokens=8",
                *arguments,
            ]
        )
        captured = capfd.readouterr()
        folder = tmp_path / "lightning_logs" / "version_0"
        return Run(code, captured.out + captured.err, folder)

    return call


def test_predict_is_judged_at_its_end(predict: Callable[..., Run]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    done = predict("--judge.backend=exact")
    assert done.code == 0
    assert [v["id"] for v in done.verdicts] == [r["id"] for r in rows(done.folder / FILE)]
    events = EventAccumulator(str(done.folder))
    events.Reload()
    assert [e.value for e in events.Scalars("judge/graded")] == [5]
    assert events.Scalars("judge/mean")[0].value == pytest.approx(done.summary["mean"])
    drawn = events.Histograms("judge/score")[0].histogram_value
    assert (drawn.num, drawn.sum / drawn.num) == (5, pytest.approx(done.summary["mean"]))


def test_predict_is_judged_when_the_model_has_left(
    predict: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    from llama_lightning.evaluation import callbacks

    order = []
    grade = callbacks.grade_file

    def at_end(self: Any) -> None:
        order.append("strategy.teardown")
        teardown(self)

    from lightning.pytorch.strategies import SingleDeviceStrategy, Strategy

    teardown = Strategy.teardown
    monkeypatch.setattr(SingleDeviceStrategy, "teardown", at_end)
    monkeypatch.setattr(
        callbacks, "grade_file", lambda *given: order.append("judge") or grade(*given)
    )
    assert predict("--judge.backend=exact").code == 0
    print(order)
    assert order[0] == "strategy.teardown"
    assert "judge" in order


def test_predict_without_a_server_answers_nothing(predict: Callable[..., Run]) -> None:
    done = predict("--judge.backend=ollama", "--judge.base_url=http://127.0.0.1:9")
    assert done.code == BACKEND
    assert "`ollama serve`" in done.error
    assert not (done.folder / FILE).exists()


@pytest.fixture
def unanswered(tmp_path: Path) -> Path:
    """Prompts, of which one has no reference."""
    path = tmp_path / "unanswered.json"
    path.write_text(json.dumps([record(i, output=f"{i}" if i else "") for i in range(5)]))
    return path


def test_predict_that_could_not_be_graded_answers_nothing(
    predict: Callable[..., Run], unanswered: Path
) -> None:
    done = predict("--judge.backend=exact", f"--data.predict_path={unanswered}")
    assert done.code == USAGE
    assert "1 of 5 rows have no reference (the first has id 0)" in done.error
    assert not (done.folder / FILE).exists()


def test_predict_into_a_folder_with_verdicts_of_another_judge(
    predict: Callable[..., Run], responses: Path
) -> None:
    grade_file(JudgeConfig(backend="exact"), responses)
    before = responses.read_bytes()
    with FakeOllama() as server:
        keys = ("--judge.backend=ollama", f"--judge.base_url={server.url}")
        done = predict(*keys, f"--responses.path={responses}")
    assert done.code == USAGE
    assert "judge was exact and is ollama llama3.1" in done.error
    assert responses.read_bytes() == before


def test_predict_knows_whose_responses_it_has_graded(
    predict: Callable[..., Run], tmp_path: Path
) -> None:
    done = predict("--judge.backend=exact", f"--responses.path={tmp_path}/else/{FILE}")
    assert json.loads((tmp_path / "else" / "summary.json").read_text())["graded_model"] == "tiny"
    assert main(["judge", "--judge.backend=exact", f"--responses.path={tmp_path}/else/{FILE}"]) == 0
    assert json.loads((tmp_path / "else" / "summary.json").read_text())["graded_model"] == "tiny"
    done = predict(f"--trainer.default_root_dir={tmp_path}/again")
    folder = tmp_path / "again" / "lightning_logs" / "version_0"
    assert main(["judge", "--judge.backend=exact", f"--responses.path={folder}/{FILE}"]) == 0
    assert json.loads((folder / "summary.json").read_text())["graded_model"] == "tiny"
    assert done.code == 0


def test_predict_keeps_its_responses_when_the_judge_dies(
    predict: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    hurry(monkeypatch)
    with FakeOllama(lambda body: Fault(503, "busy")) as server:
        done = predict("--judge.backend=ollama", f"--judge.base_url={server.url}")
    assert done.code == BACKEND
    assert "does not answer any more: HTTP 503: busy" in done.error
    assert len(rows(done.folder / FILE)) == 5
