"""The cache of tokenised rows: made once for a content, made again when damaged, never half."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llama_lightning.assets import TINY, TINY_TRAIN
from llama_lightning.data import corpus
from llama_lightning.data.alpaca import AlpacaDataModule
from llama_lightning.data.corpus import default_cache
from llama_lightning.data.examples import Dropped, encode_row
from llama_lightning.data.rows import read_rows
from llama_lightning.data.templates import TEMPLATES
from llama_lightning.data.token_file import DAY_S, TokenFile
from llama_lightning.data.tokenizer import Tokenizer
from llama_lightning.errors import DataError

# Digests of the training part by the code that read everything into lists, before there was a
# cache: checkpoints of that time resume only where they are the same.
DIGESTS = [
    ({}, "ba61c7318fe407f9", "b1791f82b68acbb1", [17, 69, 79, 90, 103]),
    (
        {"val_fraction": 0.1, "seed": 3, "train_on_prompt": True, "max_seq_len": 40},
        "ba61c7318fe407f9",
        "c34b9dcd7a84200e",
        [5, 7, 24, 26, 28],
    ),
]


@pytest.mark.parametrize(("settings", "file", "part", "val"), DIGESTS, ids=["default", "changed"])
def test_old_checkpoints_still_fit(settings, file, part, val):
    data = AlpacaDataModule(**settings)
    data.setup("fit")
    identity = data.state_dict()["identity"]
    assert identity["data.path"] == file
    assert list(identity.values())[-1] == part
    assert [example.row_id for example in data.val_examples[:5]] == val


@pytest.fixture
def encoded(monkeypatch) -> list[int]:
    """Collect the numbers of the rows that are tokenised."""
    rows = []

    def counted(row, *args, **kwargs):
        rows.append(row.id)
        return encode_row(row, *args, **kwargs)

    monkeypatch.setattr(corpus, "encode_row", counted)
    return rows


def write(path: Path, count: int) -> Path:
    records = [{"instruction": f"question {i}", "output": "a" * (i % 7)} for i in range(count)]
    path.write_text(json.dumps(records))
    return path


def fitted(path: Path, cache: Path, **settings) -> AlpacaDataModule:
    data = AlpacaDataModule(path=str(path), cache_dir=str(cache), **settings)
    data.setup("fit")
    return data


def test_examples_of_the_map_are_those_of_the_rows(tmp_path):
    tokenizer = Tokenizer.from_path(TINY)
    settings = {"max_seq_len": 40, "train_on_prompt": False}
    rows = list(read_rows(TINY_TRAIN))[:500]
    pairs = [(row, encode_row(row, tokenizer, TEMPLATES["alpaca"], **settings)) for row in rows]
    expected = {row.id: tokens.example(row.id) for row, tokens in pairs if tokens.tokens}
    records = json.loads(TINY_TRAIN.read_text())[:500]
    (tmp_path / "a.json").write_text(json.dumps(records))
    data = fitted(tmp_path / "a.json", tmp_path, val_fraction=0, test_fraction=0, max_seq_len=40)
    examples = data.train_examples
    assert list(examples) == list(expected.values())
    assert examples.lengths.tolist() == [len(e.tokens) for e in expected.values()]
    assert examples.num_targets.tolist() == [e.num_targets for e in expected.values()]
    assert Dropped.of(examples.fates) == Dropped.of(tokens.fate for _, tokens in pairs)
    assert 0 < len(examples) < 500


def test_rows_are_tokenised_once(tmp_path, encoded):
    path, cache = write(tmp_path / "a.json", 50), tmp_path / "cache"
    first = fitted(path, cache)
    assert encoded == list(range(50))
    again = fitted(path.rename(tmp_path / "b.json"), cache)  # the content counts, not the name
    assert len(encoded) == 50
    assert list(again.train_examples) == list(first.train_examples)
    again.setup("test")
    assert len(encoded) == 50
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize(
    "settings",
    [
        {"max_seq_len": 100},
        {"train_on_prompt": True},
        {"train_on_turns": "last"},
        {"template": "plain"},
        {"columns": {"output": "instruction"}},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_another_content_is_another_file(tmp_path, encoded, settings):
    path = write(tmp_path / "a.json", 50)
    fitted(path, tmp_path / "cache")
    fitted(path, tmp_path / "cache", **settings)
    assert len(encoded) == 100
    fitted(path, tmp_path / "cache", seed=1, batch_size=2, val_fraction=0.5)  # decide no token
    assert len(encoded) == 100


def test_another_tokenizer_is_another_file(tmp_path, encoded):
    """Even one that agrees on the words by which a checkpoint knows its tokenizer."""
    path = write(tmp_path / "a.json", 50)
    first = fitted(path, tmp_path / "cache")
    raw = json.loads((TINY / "tokenizer.json").read_text())
    raw["added_tokens"].append({"id": 1472, "content": "<|another|>", "special": True})
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    other = fitted(path, tmp_path / "cache", tokenizer=str(tmp_path / "tokenizer.json"))
    assert other.tokenizer.fingerprint == first.tokenizer.fingerprint
    assert len(encoded) == 100


def test_another_data_file_is_another_file(tmp_path, encoded):
    fitted(write(tmp_path / "a.json", 50), tmp_path / "cache")
    fitted(write(tmp_path / "a.json", 51), tmp_path / "cache")
    assert len(encoded) == 101


DAMAGES = {
    "empty": lambda content: b"",
    "cut": lambda content: content[:-100],
    "a bit of a token": lambda content: content[:40] + bytes([content[40] ^ 1]) + content[41:],
    "a bit of the checksum": lambda content: content[:-1] + bytes([content[-1] ^ 1]),
    "longer": lambda content: content + b"\0" * 48,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_file_is_made_again(tmp_path, encoded, damage):
    path, cache = write(tmp_path / "a.json", 50), tmp_path / "cache"
    expected = list(fitted(path, cache).train_examples)
    (file,) = cache.iterdir()
    good = file.read_bytes()
    file.write_bytes(damage(good))
    with pytest.raises(OSError, match="cut off|damaged"):
        TokenFile(file)
    assert list(fitted(path, cache).train_examples) == expected
    assert len(encoded) == 100
    assert file.read_bytes() == good


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    path, cache = write(tmp_path / "a.json", 500), tmp_path / "cache"
    limits, before = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then the write says that it fails
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        with pytest.raises(DataError) as caught:
            fitted(path, cache)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert "tokenised data cannot be written (File too large)" in str(caught.value)
    assert "set data.cache_dir to another folder" in str(caught.value)
    assert list(cache.iterdir()) == []


def test_two_writers_of_one_file(tmp_path):
    """One that begins and ends while another, of the same process id, is at work."""
    (tmp_path / "a.json").write_text(TINY_TRAIN.read_text())
    data = AlpacaDataModule(path=str(tmp_path / "a.json"), cache_dir=str(tmp_path / "cache"))
    pairs = list(data.encoding._encoded(tmp_path / "a.json"))[:200]
    path = tmp_path / "a.tokens"

    def interrupted():
        yield from pairs[:100]
        TokenFile.write(path, pairs)
        yield from pairs[100:]

    TokenFile.write(path, interrupted())
    assert len(TokenFile(path).rows) == 200
    assert not list(tmp_path.glob("a.tokens.*"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")
def test_what_a_killed_writer_left_is_cleared_the_next_day(tmp_path):
    path, cache = write(tmp_path / "a.json", 50), tmp_path / "cache"
    cache.mkdir()
    data = AlpacaDataModule(path=str(path), cache_dir=str(cache))
    pairs = list(data.encoding._encoded(path))

    def killed():
        yield from pairs
        os.kill(os.getpid(), signal.SIGKILL)

    for name in ("one.tokens", "other.tokens"):
        if (child := os.fork()) == 0:
            TokenFile.write(cache / name, killed())
            os._exit(1)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
    old, young = cache.iterdir()
    now = time.time()
    os.utime(old, (now, now - DAY_S - 1))
    os.utime(young, (now, now - DAY_S + 60))  # its writer may be alive
    (cache / "own").write_text("")
    os.utime(cache / "own", (0, 0))
    data.setup("fit")
    assert not old.exists()
    left = {file.name for file in cache.iterdir() if file.suffix != ".tokens"}
    assert left == {young.name, "own"}
    os.utime(young, (0, 0))
    data.setup("fit")  # even if nothing has to be written
    assert not young.exists()
    assert len(list(cache.glob("*.tokens"))) == 1


def test_a_disk_that_loses_what_was_written(tmp_path, monkeypatch):
    written = TokenFile.write

    def lossy(path, encoded):
        written(path, encoded)
        path.write_bytes(path.read_bytes()[:-10])

    monkeypatch.setattr(TokenFile, "write", lossy)
    with pytest.raises(DataError, match=r"cannot be written \((cut off|damaged)\)"):
        fitted(write(tmp_path / "a.json", 50), tmp_path / "cache")


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="reads /proc/self/mem")
@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv"])
def test_a_data_file_that_cannot_be_read(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    path.symlink_to("/proc/self/mem")  # a regular file whose first byte is an error
    with pytest.raises(DataError) as caught:
        fitted(path, tmp_path / "cache")
    assert str(caught.value) == f"{path}: cannot be read (Input/output error); mend that"
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        fitted(write(tmp_path / "a.json", 50), tmp_path / "file" / "cache")


def test_the_cache_is_where_caches_are(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "llama_lightning"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache() == tmp_path / ".cache" / "llama_lightning"


# 52,000 records

SHARED = Path(__file__).parents[2] / ".." / "shared" / "data"
READY = """
import sys, time
from llama_lightning.data.alpaca import AlpacaDataModule
start, cpu = time.perf_counter(), time.process_time()
data = AlpacaDataModule(path=sys.argv[1], tokenizer=sys.argv[2], cache_dir=sys.argv[3])
data.setup("fit")
next(iter(data.train_dataloader()))
seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
status = open("/proc/self/status").read().split()
print(seconds, cpu, int(status[status.index("VmHWM:") + 1]) / 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="the data folder is not beside this repository")
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc/self/status")
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_52_000_records_are_ready_at_once(tmp_path, suffix):
    real = json.loads((SHARED / "alpaca_en_demo.json").read_text(encoding="utf-8"))

    def ready(count: int) -> tuple[float, float, float]:
        """Measure seconds on the clock, seconds of a core, and the peak memory in MiB."""
        path = tmp_path / f"{count}{suffix}"
        if not path.exists():
            records = ({**real[i % len(real)], "input": f"number {i}"} for i in range(count))
            lines = [json.dumps(record, ensure_ascii=False) for record in records]
            text = "\n".join(lines) if suffix == ".jsonl" else f"[{','.join(lines)}]"
            path.write_text(text, encoding="utf-8")
        arguments = [path, SHARED / "llama3-tokenizer.model", tmp_path / "cache"]
        command = [sys.executable, "-c", READY, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        seconds, cpu, mib = map(float, done.stdout.split())
        return seconds, cpu, mib

    few, first, again = ready(1000), ready(52_000), ready(52_000)
    print(
        f"{suffix}: ready in {first[0]:.1f} s ({first[1]:.1f} s of a core), then in {again[0]:.1f} "
        f"({again[1]:.2f}); peak memory of 1,000 records {few[2]:.0f} MiB, of 52,000 "
        f"{first[2]:.0f} MiB, then {again[2]:.0f} MiB"
    )
    # It is one thread's work: on a machine that others use too, the clock counts their time.
    assert first[1] < 20
    assert again[1] < 2
    assert max(first[2], again[2]) - few[2] < 200
