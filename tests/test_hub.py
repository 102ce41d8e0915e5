"""What comes from the hub: fetched once, resumed, cached, and refused in one plain sentence.

A server on 127.0.0.1 answers as the hub does; nothing here can reach further.
"""

import csv
import io
import json
import logging
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import pyarrow
import pyarrow.parquet
import pytest

from llama_lightning.assets import TINY
from llama_lightning.cli import main
from llama_lightning.data.alpaca import AlpacaDataModule
from llama_lightning.errors import DataError
from llama_lightning.hub import fetch_data, parse_address, resolve_base
from tests.fake_hub import FakeHub
from tests.small import write_byte_tokenizer, write_small_llama

DATA = 3
RECORDS = [{"instruction": f"q{i}", "input": "", "output": "a"} for i in range(20)]
LARGE = 8 << 20
RUN = ["--trainer.max_steps=1", "--trainer.accelerator=cpu", "--trainer.precision=32-true"]
RUN += ["--data.batch_size=2", "--data.max_seq_len=256"]


@pytest.fixture(autouse=True)
def only_this_machine(monkeypatch):
    """Fail on every connection and every look-up that leaves 127.0.0.1."""

    def guarded(call: Callable, host: Callable) -> Callable:
        def checked(*arguments, **keywords):
            assert host(*arguments) in ("127.0.0.1", "localhost"), (
                f"{call.__name__}{arguments} leaves the machine"
            )
            return call(*arguments, **keywords)

        return checked

    connect = guarded(socket.socket.connect, lambda _, address: address[0])
    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", guarded(socket.getaddrinfo, lambda host, *_: host))


@pytest.fixture(autouse=True)
def environment_as_before():
    def current() -> dict[str, str]:
        return {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}

    before = current()
    yield
    assert current() == before


def csv_of(records: list[dict[str, str]]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, records[0].keys())
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue().encode()


def parquet_of(records: list[dict[str, str]]) -> bytes:
    content = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), content)
    return content.getvalue()


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Iterator[FakeHub]:
    """A hub with a small Llama and records, open and gated."""
    folder = tmp_path_factory.mktemp("llama")
    write_small_llama(folder, vocab_size=512)
    write_byte_tokenizer(folder)
    llama = {file.name: file.read_bytes() for file in folder.iterdir()}
    llama["original/consolidated.00.pth"] = b"a copy that no run needs"
    records = {
        "records.json": json.dumps(RECORDS).encode(),
        "records.csv": csv_of(RECORDS),
        "records.parquet": parquet_of(RECORDS),
        "deep/er/large.jsonl": (json.dumps(RECORDS[0]) + "\n").encode().ljust(LARGE, b"\n"),
    }
    hub = FakeHub()
    hub.repositories = {
        **dict.fromkeys(("fake/llama", "fake/gated", "fake/xet", "fake/ill"), llama),
        **dict.fromkeys(("datasets/fake/records", "datasets/fake/gated"), records),
        "datasets/fake/ill": records,
    }
    hub.gated = {"fake/gated", "datasets/fake/gated"}
    hub.tokens = {"good": set(hub.gated), "stranger": set(), "narrow": set()}
    hub.failing = {"fake/ill": 500, "datasets/fake/ill": 503}
    hub.stores = {"fake/xet": closed_address()}
    with hub.running():
        yield hub


def closed_address() -> str:
    """Find an address of this machine at which nobody answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def _hub_modules() -> dict[str, object]:
    return {n: m for n, m in sys.modules.items() if n.partition(".")[0] == "huggingface_hub"}


@contextmanager
def process(hub: FakeHub, home: Path, **environment: str) -> Iterator[None]:
    """Import huggingface_hub anew under an environment, as a process of its own would.

    It reads its environment once, when it is imported, and afterwards nothing of it may remain.
    """
    before, logger = _hub_modules(), logging.getLogger("huggingface_hub")
    handlers, real_sleep = list(logger.handlers), time.sleep
    ours = {"HF_ENDPOINT": hub.address, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
    ours |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "5", "HF_HUB_ETAG_TIMEOUT": "5"}
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ))
        # Between its attempts the package waits for seconds.
        stack.enter_context(mock.patch("time.sleep", lambda s: real_sleep(min(s, 0.01))))
        for name in list(os.environ):
            if name.upper().startswith(("HF_", "HUGGING")) or name.lower().endswith("_proxy"):
                del os.environ[name]
        os.environ.update(ours | environment)
        for name in before:
            del sys.modules[name]
        logger.handlers.clear()
        try:
            yield
        finally:
            for name in _hub_modules():
                del sys.modules[name]
            sys.modules.update(before)  # type: ignore[arg-type]
            logger.handlers[:] = handlers


@pytest.fixture
def working_directory(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


# Fetched once


def test_a_run_with_model_and_data_from_the_hub(hub, tmp_path, working_directory, capfd):
    hub.served.clear()
    hub.requests.clear()
    (working_directory / "run.yaml").write_text(
        "model:\n  base_model: fake/llama\n  lora: {rank: 4}\n"
        "data:\n  path: hf://datasets/fake/records/records.json\n"
    )
    fit = ["fit", "--config=run.yaml", *RUN]
    with process(hub, tmp_path / "home"):
        assert main(["fit", "--help"]) == 0
        with pytest.raises(SystemExit, match="0"):
            main([*fit, "--print_config"])
        assert hub.requests == []
        capfd.readouterr()
        assert main(fit) == 0, capfd.readouterr().err
    assert (working_directory / "lightning_logs/version_0/checkpoints/last.ckpt").is_file()
    once = dict(hub.served)
    assert once == {
        file: len(hub.repositories[name][file])
        for name, files in {
            "fake/llama": ("config.json", "model.safetensors", "tokenizer.model"),
            "datasets/fake/records": ("records.json",),
        }.items()
        for file in files
    }
    with process(hub, tmp_path / "home"):
        resolve_base("fake/llama")
        fetch_data(f"hf://{RECORDS_FILE}")
    asked = len(hub.requests)
    with process(hub, tmp_path / "home", HF_ENDPOINT=closed_address()):
        resolve_base("fake/llama")
        fetch_data(f"hf://{RECORDS_FILE}")
    with process(hub, tmp_path / "home", HF_HUB_OFFLINE="1"):
        assert main(fit) == 0
    assert len(hub.requests) == asked
    assert dict(hub.served) == once
    print(f"used online, without a hub and offline: {sum(once.values()):,} bytes fetched, once")


def test_a_cut_download_is_resumed_and_then_cached(hub, tmp_path):
    hub.served.clear()
    hub.cuts["deep/er/large.jsonl"] = 1
    address = "hf://datasets/fake/records/deep/er/large.jsonl"
    chunk = 1 << 18
    with process(hub, tmp_path / "home"):
        # What is in the package's buffer when the connection breaks is lost: 10 MB otherwise.
        with mock.patch("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", chunk):
            try:
                file = fetch_data(address)
            except DataError:  # before huggingface_hub 2 it is the next run that goes on from here
                file = fetch_data(address)
        assert file.read_bytes() == hub.repositories["datasets/fake/records"]["deep/er/large.jsonl"]
        assert hub.cuts["deep/er/large.jsonl"] == 0
        served = hub.served["deep/er/large.jsonl"]
        assert LARGE <= served <= LARGE + chunk
        assert fetch_data(address) == file
        assert hub.served["deep/er/large.jsonl"] == served
    print(f"cut half-way and resumed: {served:,} bytes served of {LARGE:,}; then 0 from the cache")


def test_a_gated_repository_opens_to_a_token(hub, tmp_path):
    with process(hub, tmp_path, HF_TOKEN="good"):
        assert (resolve_base("fake/gated") / "config.json").is_file()
        assert fetch_data("hf://datasets/fake/gated/records.json").is_file()


def test_every_data_path_may_be_an_address_and_is_fetched_when_read(
    hub, tmp_path, working_directory
):
    address = "hf://datasets/fake/records/records.json"
    hub.requests.clear()
    with process(hub, tmp_path / "home"):
        data = AlpacaDataModule(
            path=address, val_path=address, test_path=address, predict_path=address
        )
        assert hub.requests == []
        data.setup("predict")
        assert len(data.predict_rows) == len(RECORDS)
        data.setup("test")
        assert len(data.test_examples) == len(RECORDS)
        with pytest.raises(DataError, match="the train part is empty"):
            data.setup("fit")  # its prompts are all held out


@pytest.mark.parametrize("name", ["records.csv", "records.parquet"])
def test_other_formats_come_from_the_hub_too(hub, tmp_path, working_directory, name):
    with process(hub, tmp_path / "home"):
        data = AlpacaDataModule(predict_path=f"hf://datasets/fake/records/{name}")
        data.setup("predict")
    fields = [(row.instruction, row.input, row.output) for row in data.predict_rows]
    assert fields == [tuple(record.values()) for record in RECORDS]


def test_a_file_of_the_same_name_in_data_is_taken_instead(hub, tmp_path, working_directory, caplog):
    address = "hf://datasets/fake/records/deep/er/records.json"
    (working_directory / "data").mkdir()
    (working_directory / "data" / "records.json").write_text(json.dumps(RECORDS[:3]))
    hub.requests.clear()
    with process(hub, tmp_path / "home"), caplog.at_level(logging.INFO):
        data = AlpacaDataModule(predict_path=address)
        data.setup("predict")
    assert len(data.predict_rows) == 3
    assert hub.requests == []
    assert f"data: data/records.json is here and taken instead of {address}" in caplog.messages


def test_the_package_of_the_hub_is_imported_only_for_a_hub_name():
    code = (
        "import sys; from llama_lightning import hub; hub.resolve_base('tiny'); "
        "hub.parse_address('hf://datasets/a/b/c'); sys.exit('huggingface_hub' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_address_has_a_file_in_any_folder():
    assert parse_address("hf://datasets/a/b/c/d/e.json") == ("a/b", "c/d/e.json")
    assert resolve_base("tiny") == TINY


# Refused in one sentence


@dataclass(frozen=True)
class Failure:
    """What is asked of `fit`, under which circumstances, and the sentence that must come."""

    key: str  # of the command line
    value: str
    said: str  # {hub}, {cache} and {closed} are filled in, ... is anything
    environment: dict[str, str] = field(default_factory=dict)
    circumstance: str = ""


def _model(name: str, said: str, circumstance: str = "", **environment: str) -> Failure:
    said = f"model.base_model {name}: {said}"
    return Failure("model.base_model", name, said, environment, circumstance)


def _data(address: str, said: str, circumstance: str = "", **environment: str) -> Failure:
    address = f"hf://{address}"
    return Failure("data.path", address, f"{address}: {said}", environment, circumstance)


LICENCE = "then set HF_TOKEN or run `hf auth login`"
OFFLINE = "not in the cache {cache}, and HF_HUB_OFFLINE is set; unset it to fetch it"
NOT_FOUND = "at {hub}, or it is private: set HF_TOKEN if you may see it"
CACHE = "make room there, or set HF_HOME to another folder"
FORM = "not an address on the hub; it has the form hf://datasets/OWNER/NAME/FILE"
RECORDS_FILE = "datasets/fake/records/records.json"
LARGE_FILE = "datasets/fake/records/deep/er/large.jsonl"

FAILURES = {
    "gated model, no token": _model(
        "fake/gated", "gated; accept its licence at {hub}/fake/gated, " + LICENCE
    ),
    "gated data, no token": _data(
        "datasets/fake/gated/records.json",
        "gated; accept its licence at {hub}/datasets/fake/gated, " + LICENCE,
    ),
    "gated model, token without access": _model(
        "fake/gated",
        "gated, and the account of HF_TOKEN has no access yet; ask for it at {hub}/fake/gated",
        HF_TOKEN="stranger",
    ),
    "gated model, token that may not read gated ones": _model(
        "fake/gated",
        "{hub} answers 403; Please enable access to public gated repositories",
        HF_TOKEN="narrow",
    ),
    "model, wrong token": _model(
        "fake/llama",
        "HF_TOKEN is wrong or expired; make a new one at {hub}/settings/tokens",
        HF_TOKEN="wrong",
    ),
    "data, wrong saved token": _data(
        RECORDS_FILE,
        "the token of `hf auth login` is wrong or expired; make a new one at {hub}/settings/tokens",
        "saved token",
    ),
    "model that is not there, no token": _model(
        "other/thing", "there is no such model " + NOT_FOUND
    ),
    "model that is not there, with a token": _model(
        "other/thing",
        "there is no such model at {hub}, or it is private: HF_TOKEN may not see it",
        HF_TOKEN="good",
    ),
    "data set that is not there": _data(
        "datasets/fake/absent/records.json", "there is no such data set " + NOT_FOUND
    ),
    "file that is not in the data set": _data(
        "datasets/fake/records/recrods.json",
        "there is no such file in it; its files are listed at "
        "{hub}/datasets/fake/records/tree/main",
    ),
    "model offline": _model("fake/llama", OFFLINE, HF_HUB_OFFLINE="1"),
    "data offline": _data(RECORDS_FILE, OFFLINE, HF_HUB_OFFLINE="1"),
    "model, hub unreachable": _model(
        "fake/llama",
        "{closed} cannot be reached (Connection refused); check the network and HF_ENDPOINT",
        "unreachable",
    ),
    "data, hub unreachable": _data(
        RECORDS_FILE,
        "{closed} cannot be reached (Connection refused); check the network and HF_ENDPOINT",
        "unreachable",
    ),
    "model, a web page instead of the hub": _model(
        "fake/llama",
        "{hub}/portal does not answer as the hub does (...); check the network and HF_ENDPOINT",
        "web page",
    ),
    "data, a web page instead of the hub": _data(
        RECORDS_FILE, "{hub}/portal ... (...); check the network and HF_ENDPOINT", "web page"
    ),
    "model, server error": _model(
        "fake/ill", "{hub} answers 500, a fault of the server; try again later"
    ),
    "data, server error": _data(
        "datasets/fake/ill/records.json",
        "{hub} answers 503, a fault of the server; try again later",
    ),
    "model, cut for good": _model(
        "fake/llama",
        "the download from {hub} broke off (...); run it again, finished files are kept",
        "model.safetensors is cut",
    ),
    "data, cut for good": _data(
        LARGE_FILE,
        "the download from {hub} broke off (...); run it again, finished files are kept",
        "deep/er/large.jsonl is cut",
    ),
    "model, large file store unreachable": _model(
        "fake/xet",
        "the download from {hub} broke off (...); run it again, finished files are kept",
        HF_HUB_DISABLE_XET="0",
        HF_XET_CLIENT_RETRY_MAX_ATTEMPTS="1",
        HF_XET_CLIENT_RETRY_BASE_DELAY="10ms",
        HF_XET_TELEMETRY_ENABLED="0",
    ),
    "no space for the cache": _data(
        LARGE_FILE,
        "cannot be written to the cache {cache} (No space left on device); " + CACHE,
        "full disk",
    ),
    "a file where the cache should be": _data(
        RECORDS_FILE,
        "cannot be written to the cache {cache} (Not a directory); " + CACHE,
        "cache is a file",
    ),
    "typo in a model's name, the right one is cached": _model(
        "fake/lama",
        "there is no such model " + NOT_FOUND + "; did you mean fake/llama?",
        "cached",
    ),
    "typo offline, the right one is cached": _model(
        "Fake/Lama", OFFLINE + "; did you mean fake/llama?", "cached", HF_HUB_OFFLINE="1"
    ),
    "typo in a data set's name, the right one is cached": _data(
        "datasets/fake/record/records.json",
        "there is no such data set " + NOT_FOUND + "; did you mean fake/records?",
        "cached",
    ),
    "neither folder nor hub name, near to tiny": Failure(
        "model.base_model",
        "tny",
        "model.base_model: tny is not a folder here, nor a hub name (OWNER/NAME), nor 'tiny'; "
        "did you mean tiny?",
    ),
    "neither folder nor hub name, near to a cached one": Failure(
        "model.base_model",
        "llama",
        "model.base_model: llama is not a folder here, nor a hub name (OWNER/NAME), nor 'tiny'; "
        "did you mean fake/llama?",
        circumstance="cached",
    ),
    "not a possible name": _model(
        "fake/lla ma",
        "not a possible hub name; it is OWNER/NAME, of letters, digits, '-', '_' and '.'",
    ),
    "address without a file": _data("datasets/fake/records", FORM),
    "address of a model": _data("fake/llama/config.json", FORM),
}


@contextmanager
def arranged(hub: FakeHub, home: Path, circumstance: str) -> Iterator[dict[str, str]]:
    """Bring about what a failure needs; give the environment that belongs to it."""
    home.mkdir()
    if circumstance == "unreachable":
        yield {"HF_ENDPOINT": closed_address()}
    elif circumstance == "web page":
        yield {"HF_ENDPOINT": f"{hub.address}/portal"}
    elif circumstance == "saved token":
        (home / "token").write_text("wrong")
        yield {}
    elif circumstance == "cached":
        with process(hub, home):
            resolve_base("fake/llama")
            fetch_data(f"hf://{RECORDS_FILE}")
        yield {}
    elif circumstance == "cache is a file":
        (home / "hub").touch()
        yield {}
    elif circumstance == "full disk":
        mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(home)]
        made = subprocess.run(mount, capture_output=True, text=True, check=False)
        if made.returncode:
            pytest.skip(f"no small disk can be made here: {made.stderr.strip()}")
        try:
            yield {}
        finally:
            subprocess.run(["umount", str(home)], check=True)
    elif circumstance.endswith(" is cut"):
        file = circumstance.removesuffix(" is cut")
        hub.cuts[file] = 1000
        yield {}
        del hub.cuts[file]
    else:
        yield {}


@pytest.fixture(scope="module")
def answer(hub, tmp_path_factory) -> Callable[[str], tuple[str, str]]:
    """Run `fit` into a failure, once, and return the sentence that came and its pattern."""
    answers: dict[str, tuple[str, str]] = {}

    def answer(name: str) -> tuple[str, str]:
        if name in answers:
            return answers[name]
        failure, folder = FAILURES[name], tmp_path_factory.mktemp("failure")
        home, stderr = folder / "home", io.StringIO()
        with ExitStack() as stack:
            more = stack.enter_context(arranged(hub, home, failure.circumstance))
            stack.enter_context(process(hub, home, **failure.environment, **more))
            stack.enter_context(redirect_stderr(stderr))
            base = ["--model.base_model=tiny"]
            code = main(["fit", *base, f"--{failure.key}={failure.value}", *RUN])
        *_, last = stderr.getvalue().splitlines()
        assert "Traceback" not in stderr.getvalue()
        assert code == DATA, last
        said = failure.said.replace("{hub}", hub.address).replace("{cache}", str(home / "hub"))
        said = said.replace("{closed}", more.get("HF_ENDPOINT", ""))
        answers[name] = last, ".*".join(re.escape(part) for part in f"error: {said}".split("..."))
        return answers[name]

    return answer


@pytest.mark.parametrize("name", FAILURES)
def test_failure(answer, name, working_directory):
    came, expected = answer(name)
    print(came)
    assert re.fullmatch(expected, came), expected


def test_all_failures(answer, working_directory):
    right = tried = 0
    for name in FAILURES:
        try:
            came, expected = answer(name)
        except pytest.skip.Exception:
            continue
        tried += 1
        right += bool(re.fullmatch(expected, came))
    print(f"{right} of {tried} failure answers give the right sentence")
    assert right == tried >= 10
