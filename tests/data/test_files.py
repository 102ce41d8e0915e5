"""Data files of every format: the same records, and a broken file in one line."""

import csv
import json
import random
import sys
import time
from pathlib import Path

import pytest

from llama_lightning.data.alpaca import AlpacaDataModule
from llama_lightning.data.files import read_records
from llama_lightning.data.rows import Row, read_rows
from llama_lightning.errors import DataError, UsageError
from tests.data.test_tokenizer import random_texts
from tests.small import write_byte_tokenizer

parquet = pytest.importorskip("pyarrow.parquet", reason="pip install -e '.[parquet]'")

RECORD = {"instruction": "i", "input": "n", "output": "o"}


def write(path: Path, records: list[dict]) -> Path:
    """Write records in the format that the path names."""
    if path.suffix == ".json":
        path.write_text(json.dumps(records, ensure_ascii=False, indent=1), encoding="utf-8")
    elif path.suffix == ".jsonl":
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        path.write_text("".join(lines), encoding="utf-8")
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, records[0].keys())
            writer.writeheader()
            writer.writerows(records)
    else:
        import pyarrow

        parquet.write_table(pyarrow.Table.from_pylist(records), path)
    return path


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet"])
def test_every_format_gives_the_same_rows(tmp_path, suffix):
    texts = [text.replace("\0", "") for text in random_texts(3000)]  # no CSV in Python 3.10 has it
    names = ("instruction", "input", "output")
    # A longest field of 200,000 characters: beyond the csv module's default limit.
    records = [
        dict(zip(names, fields, strict=True)) for fields in zip(*[iter(texts)] * 3, strict=True)
    ]
    records += [{**RECORD, "output": 'quote " comma , and\r\nlines\n' * 8000}]
    rows = list(read_rows(write(tmp_path / f"a{suffix}", records)))
    expected = [Row(i, *(record[name] for name in names)) for i, record in enumerate(records)]
    assert rows == expected


def test_a_long_json_list_is_read_in_pieces(tmp_path):
    """Records of all lengths lie across the ends of the pieces; blanks may be anywhere."""
    rng = random.Random(0)
    texts = random_texts(500)
    records = [{**RECORD, "output": rng.choice(texts) * rng.randint(0, 100)} for _ in range(1500)]
    blanks = [" \n" * rng.randint(0, 40) for _ in records]
    items = [
        json.dumps(record, ensure_ascii=bool(i % 2), indent=i % 3)
        for i, record in enumerate(records)
    ]
    text = "[" + ",".join(f"{b}{item}{b}" for b, item in zip(blanks, items, strict=True)) + "]\n"
    path = tmp_path / "a.json"
    path.write_text(text, encoding="utf-8-sig", newline="")
    print(f"{path.stat().st_size / 2**20:.1f} MiB, read by 1 Mi characters")
    assert path.stat().st_size > 4 * 2**20
    assert list(read_records(path)) == records == json.loads(text)
    # The place of an error behind several pieces.
    start = text.rindex('"output"')
    path.write_text(text[:start] + "!" + text[start:], encoding="utf-8", newline="")
    with pytest.raises(DataError) as caught:
        list(read_records(path))
    line = text[:start].count("\n") + 1
    column = start - text.rfind("\n", 0, start)
    assert f"line {line}, column {column}: not JSON" in str(caught.value)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_the_line_of_an_error_counts_line_feeds(tmp_path, end):
    path = tmp_path / "a.json"
    lines = ["[", *['{"instruction": "q", "output": "a"},'] * 50, "  {} !", "]", ""]
    for behind in (b"", b" " * 2**21 + b"\xff"):  # the second is not reached
        path.write_bytes(end.join(lines).encode() + behind)
        with pytest.raises(DataError, match="line 52, column 6: not JSON"):
            list(read_records(path))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"data": [%s]}', "a.json: a list of records is needed, not an object"),
        ('"%s"', "a.json: a list of records is needed, not a string"),
        ("[[%s", "a.json, line 1, column"),
    ],
)
def test_a_large_file_of_another_form_is_refused_soon(tmp_path, content, says):
    path = tmp_path / "a.json"
    path.write_text(content % ("1," * (6 * 2**20)))
    start = time.process_time()
    with pytest.raises(DataError, match=says):
        list(read_records(path))
    seconds = time.process_time() - start
    print(f"{path.stat().st_size / 2**20:.0f} MiB refused in {seconds:.2f} s of a core")
    assert seconds < (3 if "line" in says else 0.2)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_a_large_file_is_never_whole_in_memory(tmp_path, suffix):
    """The first record is there before the last has been read: a break at the end is met late."""
    path = write(tmp_path / f"a{suffix}", [RECORD] * 5000)
    records = read_records(path)
    assert next(records) == RECORD
    if suffix != ".parquet":  # whose table of contents stands at its end
        path.write_bytes(path.read_bytes() + b"\xff\n")
        with pytest.raises(DataError, match="row 5000: byte 0 of its line is not UTF-8"):
            list(read_records(path))


def test_a_csv_of_a_spreadsheet(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'\xef\xbb\xbfoutput,instruction\r\n"a ""b"",\r\nc",q\r\n\r\n,r\r\n')
    assert list(read_rows(path)) == [Row(0, "q", "", 'a "b",\r\nc'), Row(1, "r", "", "")]


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet"])
def test_prompts_need_no_answers(tmp_path, suffix):
    path = write(tmp_path / f"a{suffix}", [{"instruction": "p"}, {"instruction": "q"}])
    assert [row.instruction for row in read_rows(path, need_output=False)] == ["p", "q"]
    with pytest.raises(DataError, match="row 0: no column 'output'; it has 'instruction'"):
        list(read_rows(path))


# Columns


def test_columns_are_renamed(tmp_path):
    records = [{"prompt": "p", "context": "c", "answer": "a", "output": "not this"}]
    columns = {"instruction": "prompt", "input": "context", "output": "answer"}
    for suffix in (".json", ".csv", ".parquet"):
        path = write(tmp_path / f"a{suffix}", records)
        assert list(read_rows(path, columns=columns)) == [Row(0, "p", "c", "a")]
    chat = [{"talk": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "a"}]}]
    for suffix in (".jsonl", ".parquet"):
        path = write(tmp_path / f"b{suffix}", chat)
        assert list(read_rows(path, columns={"messages": "talk"})) == [Row(0, "p", "", "a")]


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"output": "answer"}, "no column 'answer' (data.columns: output)"),
        ({"instruction": "prompt"}, "no column 'prompt' (data.columns: instruction)"),
        ({"input": "context"}, "no column 'context' (data.columns: input)"),
        ({"messages": "talk", "instruction": "x"}, "no column 'talk' (data.columns: messages)"),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_a_column_map_that_misses(tmp_path, suffix, columns, says):
    path = write(tmp_path / f"a{suffix}", [RECORD])
    with pytest.raises(DataError) as caught:
        list(read_rows(path, columns=columns))
    assert str(caught.value) == (f"{path}, row 0: {says}; it has 'instruction', 'input', 'output'")


def test_a_column_map_the_wrong_way_round():
    with pytest.raises(UsageError, match="data.columns: 'prompt' is none of our columns, instr"):
        AlpacaDataModule(columns={"prompt": "instruction"})


# Broken files


def test_parquet_with_nulls(tmp_path):
    path = write(tmp_path / "a.parquet", [RECORD, {**RECORD, "input": None}])
    assert [row.input for row in read_rows(path)] == ["n", ""]
    for field in ("instruction", "output"):
        path = write(tmp_path / "a.parquet", [RECORD, RECORD, {**RECORD, field: None}])
        with pytest.raises(DataError) as caught:
            list(read_rows(path))
        assert str(caught.value) == f"{path}, row 2: '{field}' is null instead of a string"
    (row,) = read_rows(
        write(tmp_path / "a.parquet", [{**RECORD, "output": None}]), need_output=False
    )
    assert row.output == ""


GOOD = b"instruction,output\nq,a\n"
BROKEN = {
    "mixed encoding": (
        "a.csv",
        GOOD + "café,b\n".encode() + "café,b\n".encode("latin-1"),
        "a.csv, row 2: byte 3 of its line is not UTF-8; convert the file to UTF-8",
    ),
    "mixed encoding in a field of several lines": (
        "a.csv",
        GOOD + b'"one\ntwo\xe9\n",b\n',
        "a.csv, row 1: byte 3 of its line is not UTF-8",
    ),
    "mixed encoding, jsonl": (
        "a.jsonl",
        b'{"instruction": "q", "output": "a"}\n\n{"instruction": "caf\xe9"}\n',
        "a.jsonl, row 1: byte 20 of its line is not UTF-8",
    ),
    "a field more": ("a.csv", GOOD + b"q,a,x\n", "row 1: 3 fields, but the first line names 2"),
    "a field less": ("a.csv", GOOD + b"q\n", "row 1: 1 fields, but the first line names 2"),
    "an open quote": ("a.csv", GOOD + b'"q,a\n', "a.csv, row 1: not CSV (unexpected end of data)"),
    "text behind a quote": ("a.csv", GOOD + b'"q"x,a\n', "a.csv, row 1: not CSV ("),
    "semicolons": (
        "a.csv",
        b"instruction;output\nq;a\n",
        "a.csv, row 0: no column 'instruction'; it has 'instruction;output'",
    ),
    "only the names": ("a.csv", b"instruction,output\n", "a.csv: no records in it"),
    "an empty csv": ("a.csv", b"", "a.csv: no records in it"),
    "no parquet": ("a.parquet", b"PAR1 and no more", "a.parquet: not Parquet ("),
    "an empty parquet": ("a.parquet", b"", "a.parquet: not Parquet ("),
}


@pytest.fixture
def base(tmp_path) -> str:
    folder = tmp_path / "base"
    folder.mkdir()
    write_byte_tokenizer(folder)
    return str(folder)


@pytest.mark.parametrize(("name", "content", "says"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_file_is_refused_in_one_line(tmp_path, base, name, content, says):
    (tmp_path / name).write_bytes(content)
    cache = tmp_path / "cache"
    data = AlpacaDataModule(path=str(tmp_path / name), base_folder=base, cache_dir=str(cache))
    with pytest.raises(DataError) as caught:
        data.setup("fit")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(cache.iterdir()) == []  # nothing half-cached


def test_parquet_without_its_package(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", [RECORD])
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # as Python itself marks what is not there
    with pytest.raises(DataError, match=r"a.parquet: .parquet needs pip install -e '.\[parquet\]'"):
        list(read_rows(path))


def test_a_parquet_cut_in_the_middle(tmp_path):
    path = write(tmp_path / "a.parquet", [RECORD] * 100)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(DataError, match="not Parquet"):
        list(read_rows(path))
