"""From a file's record to tokens and labels, written out where they can be read."""

import json
from pathlib import Path

import pytest

from llama_lightning.data.examples import Dropped, encode_prompt, encode_row
from llama_lightning.data.rows import Row
from llama_lightning.data.rows import read_rows as rows_of
from llama_lightning.data.templates import TEMPLATES
from llama_lightning.data.tokenizer import Tokenizer
from llama_lightning.errors import DataError
from llama_lightning.records import IGNORE_INDEX
from tests.small import write_byte_tokenizer

SHARED = Path(__file__).parents[2] / ".." / "shared" / "data"
ALPACA, PLAIN = TEMPLATES["alpaca"], TEMPLATES["plain"]
BOS, EOS = 256, 257  # of the byte tokenizer


@pytest.fixture(scope="module")
def byte_tokenizer(tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("bytes")
    write_byte_tokenizer(folder)
    return Tokenizer.from_path(folder)


def read_rows(path: Path, **kwargs) -> list[Row]:
    return list(rows_of(path, **kwargs))


def encode_rows(rows, tokenizer, template, **kwargs):
    """Encode rows to the examples of those that are kept, and what became of the others."""
    encoded = [(row, encode_row(row, tokenizer, template, **kwargs)) for row in rows]
    examples = [tokens.example(row.id) for row, tokens in encoded if tokens.tokens]
    return examples, Dropped.of(tokens.fate for _, tokens in encoded)


def letters(ids: list[int]) -> str:
    """Show byte tokens as text, one character a token: B begin, E end, - no loss."""
    names = {BOS: "B", EOS: "E", IGNORE_INDEX: "-"}
    return "".join(names.get(i) or chr(i) for i in ids)


# Templates


def test_the_alpaca_text_with_input():
    assert ALPACA.format("Add the numbers.", "2 and 3") == (
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n"
        "\n"
        "### Instruction:\n"
        "Add the numbers.\n"
        "\n"
        "### Input:\n"
        "2 and 3\n"
        "\n"
        "### Response:\n"
    )


def test_the_alpaca_text_without_input():
    assert ALPACA.format("Say hello.", "") == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n"
        "\n"
        "### Instruction:\n"
        "Say hello.\n"
        "\n"
        "### Response:\n"
    )


@pytest.mark.parametrize("nothing", ["", "  \n", "<no input>", "<No Input>", " <noinput>\n"])
@pytest.mark.parametrize("template", [ALPACA, PLAIN], ids=["alpaca", "plain"])
def test_no_input_means_empty(template, nothing):
    assert template.format("Say hello.", nothing) == template.format("Say hello.", "")
    assert template.format("Say hello.", "no input") != template.format("Say hello.", "")


@pytest.mark.parametrize("template", [ALPACA, PLAIN], ids=["alpaca", "plain"])
def test_fields_enter_verbatim(template):
    fields = "{instruction} {0} {{x}} {", " \t}{input}%s $y\\n\n "
    prompt = template.format(*fields)
    assert prompt.count(fields[0]) == 1
    assert prompt.count(fields[1]) == 1
    assert fields[0] in template.format(fields[0], "")


def test_the_plain_template_has_no_words_of_its_own():
    assert PLAIN.format("one", "two") == "one\ntwo"
    assert PLAIN.format("one", "") == "one"


# The border between prompt and answer


@pytest.mark.skipif(not SHARED.is_dir(), reason="the data folder is not beside this repository")
def test_training_begins_with_the_tokens_of_prediction():
    """In Llama 3 ":\\n" is one token and ":\\n\\n" another: joined text is cut elsewhere."""
    tokenizer = Tokenizer.from_path(SHARED / "llama3-tokenizer.model")
    rows = read_rows(SHARED / "alpaca_en_demo.json")
    examples, dropped = encode_rows(
        rows, tokenizer, ALPACA, max_seq_len=100_000, train_on_prompt=False
    )
    assert len(examples) + dropped.empty_output == len(rows) == 999
    ours, joined, without_newline, unmasked = 0, 0, 0, 0
    for example in examples:
        row = rows[example.row_id]
        prompt = encode_prompt(row, tokenizer, ALPACA)
        answer = tokenizer.encode(row.output)
        ours += example.tokens != [*prompt, *answer]
        unmasked += example.labels != [IGNORE_INDEX] * (len(prompt) - 1) + [*answer, 128_001]
        # What a careless project does: tokenise the joined text, and mask as many tokens as the
        # prompt alone has. Worst where the prompt ends in ":" and the line break is the answer's.
        text = ALPACA.format(row.instruction, row.input)
        whole = [tokenizer.bos_id, *tokenizer.encode(text + row.output)]
        joined += whole[: len(prompt)] != prompt
        bare = [tokenizer.bos_id, *tokenizer.encode(text[:-1])]
        without_newline += whole[: len(bare)] != bare
    print(
        f"prompts cut otherwise in training, of {len(examples)}: ours {ours}, masks {unmasked}; "
        f"joined text {joined}; joined, line break in the answer {without_newline}"
    )
    assert ours == unmasked == 0
    assert without_newline == len(examples)
    # An answer that begins with a line break is where even the prompt with its "\n" goes wrong.
    row = Row(0, "List two.", "", "\n1. a\n2. b")
    prompt = encode_prompt(row, tokenizer, ALPACA)
    text = ALPACA.format(row.instruction, row.input)
    whole = [tokenizer.bos_id, *tokenizer.encode(text + row.output)]
    assert whole[: len(prompt)] != prompt
    (example,), _ = encode_rows([row], tokenizer, ALPACA, max_seq_len=512, train_on_prompt=False)
    assert example.tokens[: len(prompt)] == prompt


# Mask and shift


def encode(tokenizer: Tokenizer, row: Row, *, max_seq_len: int = 99, train_on_prompt: bool = False):
    settings = {"max_seq_len": max_seq_len, "train_on_prompt": train_on_prompt}
    examples, dropped = encode_rows([row], tokenizer, PLAIN, **settings)
    return (*examples, None)[0], dropped


def test_mask_and_shift_written_out(byte_tokenizer):
    example, dropped = encode(byte_tokenizer, Row(7, "pq", "", "abc"))
    assert example.row_id == 7
    assert example.tokens == [256, 112, 113, 97, 98, 99]  # B p q a b c
    assert example.labels == [-100, -100, 97, 98, 99, 257]  # - - a b c E
    assert example.num_targets == 4
    assert dropped == Dropped()
    assert str(dropped) == ""


def test_the_prompt_is_learnt_when_asked(byte_tokenizer):
    example, _ = encode(byte_tokenizer, Row(0, "pq", "", "abc"), train_on_prompt=True)
    assert example.tokens == [256, 112, 113, 97, 98, 99]
    assert example.labels == [112, 113, 97, 98, 99, 257]


def test_the_input_is_part_of_the_prompt(byte_tokenizer):
    example, _ = encode(byte_tokenizer, Row(0, "p", "i", "ab"))
    assert letters(example.tokens) == "Bp\niab"
    assert letters(example.labels) == "---abE"


def test_an_answer_keeps_its_spaces(byte_tokenizer):
    example, _ = encode(byte_tokenizer, Row(0, "p", "", " a \n"))
    assert letters(example.tokens) == "Bp a \n"
    assert letters(example.labels) == "- a \nE"


@pytest.mark.parametrize(
    ("max_seq_len", "tokens", "labels", "cut"),
    [
        (8, "Bpqabcd", "--abcdE", 0),
        (7, "Bpqabc", "--abcd", 1),  # all of the answer, and not its end
        (6, "Bpqab", "--abc", 1),
        (4, "Bpq", "--a", 1),  # room for a single answer token
    ],
)
def test_the_end_is_learnt_exactly_when_the_answer_is_whole(
    byte_tokenizer, max_seq_len, tokens, labels, cut
):
    example, dropped = encode(byte_tokenizer, Row(0, "pq", "", "abcd"), max_seq_len=max_seq_len)
    assert letters(example.tokens) == tokens
    assert letters(example.labels) == labels
    assert dropped == Dropped(cut=cut)


@pytest.mark.parametrize("train_on_prompt", [False, True])
@pytest.mark.parametrize("max_seq_len", [3, 2])
def test_a_prompt_without_room_for_an_answer_is_left_out(
    byte_tokenizer, max_seq_len, train_on_prompt
):
    example, dropped = encode(
        byte_tokenizer,
        Row(0, "pq", "", "abcd"),
        max_seq_len=max_seq_len,
        train_on_prompt=train_on_prompt,
    )
    assert example is None
    assert dropped == Dropped(too_long=1)


@pytest.mark.parametrize("output", ["", " \n\t"])
def test_an_empty_answer_is_left_out(byte_tokenizer, output):
    example, dropped = encode(byte_tokenizer, Row(0, "pq", "", output))
    assert example is None
    assert dropped == Dropped(empty_output=1)


def test_what_is_left_out_is_counted_and_said(byte_tokenizer):
    outputs = ["ab", "", "abcdefgh", "", "a"]
    rows = [Row(i, "pq", "", output) for i, output in enumerate(outputs)]
    rows.append(Row(5, "p" * 20, "", "a"))
    examples, dropped = encode_rows(
        rows, byte_tokenizer, PLAIN, max_seq_len=8, train_on_prompt=False
    )
    assert [e.row_id for e in examples] == [0, 2, 4]
    assert dropped == Dropped(empty_output=2, too_long=1, cut=1)
    assert str(dropped) == (
        "2 left out, empty output; 1 left out, prompt longer than data.max_seq_len; "
        "1 cut at data.max_seq_len (their end is not learnt)"
    )


@pytest.mark.skipif(not SHARED.is_dir(), reason="the data folder is not beside this repository")
@pytest.mark.parametrize("max_seq_len", [2, 60, 128, 512])
def test_real_records_end_in_the_end_token_or_are_counted_as_cut(max_seq_len):
    tokenizer = Tokenizer.from_path(SHARED / "llama3-tokenizer.model")
    rows = read_rows(SHARED / "alpaca_en_demo.json")
    examples, dropped = encode_rows(
        rows, tokenizer, ALPACA, max_seq_len=max_seq_len, train_on_prompt=False
    )
    ended = sum(e.labels[-1] == tokenizer.eos_id for e in examples)
    longest = max((len(e.tokens) + 1 for e in examples), default=0)
    print(f"at {max_seq_len}: {len(examples)} records, {ended} with their end, longest {longest}")
    assert all(e.num_targets > 0 for e in examples)
    assert all(tokenizer.eos_id not in e.labels[:-1] for e in examples)
    assert all(tokenizer.eos_id not in e.tokens for e in examples)
    assert longest <= max_seq_len
    assert len(examples) == ended + dropped.cut
    assert len(rows) == len(examples) + dropped.too_long + dropped.empty_output


# Files


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


RECORD = {"instruction": "i", "input": "n", "output": "o"}


def test_both_formats_give_the_same_rows(tmp_path):
    records = [RECORD, {"instruction": "k", "output": "p"}, {**RECORD, "input": None, "text": "x"}]
    as_list = write(tmp_path / "a.json", json.dumps(records, indent=2))
    lines = "\r\n".join(map(json.dumps, records)) + "\n\n"
    as_lines = write(tmp_path / "a.jsonl", lines)
    expected = [Row(0, "i", "n", "o"), Row(1, "k", "", "p"), Row(2, "i", "", "o")]
    assert read_rows(as_list) == read_rows(as_lines) == expected


def test_a_row_of_jsonl_is_a_record_and_not_a_line(tmp_path):
    path = write(tmp_path / "a.jsonl", f"{json.dumps(RECORD)}\n\n{json.dumps(RECORD)}\n")
    assert [row.id for row in read_rows(path)] == [0, 1]


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_a_byte_order_mark_is_accepted(tmp_path, suffix):
    text = json.dumps([RECORD]) if suffix == ".json" else json.dumps(RECORD)
    assert len(read_rows(write(tmp_path / f"a{suffix}", text.encode("utf-8-sig")))) == 1


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\u00a0"])
def test_unicode_line_separators_do_not_cut_a_line(tmp_path, separator):
    text = f"one{separator}two"
    record = json.dumps({**RECORD, "output": text}, ensure_ascii=False)
    rows = read_rows(write(tmp_path / "a.jsonl", f"{record}\n{record}\n"))
    assert [row.output for row in rows] == [text, text]


def test_prompts_to_answer_need_no_output(tmp_path):
    path = write(tmp_path / "a.json", json.dumps([{"instruction": "i"}]))
    assert read_rows(path, need_output=False) == [Row(0, "i", "", "")]
    with pytest.raises(DataError, match="no column 'output'"):
        read_rows(path)


GOOD = json.dumps(RECORD)
BAD_FILES = {
    "not JSON": ("a.json", '[\n  {"instruction": x}\n]', "a.json, line 2, column 19: not JSON"),
    "an empty .json": ("a.json", " ", "a.json: no records in it"),
    "a cut .json": ("a.json", f"[{GOOD},", "a.json, line 1, column "),
    "not JSON in a line": (
        "a.jsonl",
        f'{GOOD}\n\n{{"a": }}',
        "a.jsonl, line 3, column 7: not JSON",
    ),
    "a cut .jsonl": ("a.jsonl", f"{GOOD}\n{GOOD[:20]}", "a.jsonl, line 2, column "),
    "a .json named .jsonl": ("a.jsonl", f"[\n{GOOD}\n]", "a.jsonl, line 1, column "),
    "one record": ("a.json", GOOD, "a.json: a list of records is needed, not an object"),
    "a string": ("a.json", '"text"', "a list of records is needed, not a string"),
    "no records": ("a.json", "[]", "a.json: no records in it"),
    "an empty .jsonl": ("a.jsonl", "\n \n", "a.jsonl: no records in it"),
    "a list as record": ("a.json", f"[{GOOD}, [1]]", "a.json, row 1: a list instead of an object"),
    "null as record": ("a.jsonl", f"{GOOD}\nnull", "a.jsonl, row 1: null instead of an object"),
    "a missing column": (
        "a.json",
        f'[{GOOD}, {GOOD}, {{"instruction": "i", "response": "o"}}]',
        "a.json, row 2: no column 'output'; it has 'instruction', 'response'",
    ),
    "no instruction": ("a.json", '[{"output": "o"}]', "a.json, row 0: no column 'instruction'"),
    "a list of inputs": (
        "a.json",
        '[{"instruction": "i", "input": ["n"], "output": "o"}]',
        "a.json, row 0: 'input' is a list instead of a string",
    ),
    "a number": (
        "a.jsonl",
        '{"instruction": "i", "output": 3}',
        "a.jsonl, row 0: 'output' is a number instead of a string",
    ),
    # Zero, false and empty lists are no empty strings either.
    "zero": ("a.json", '[{"instruction": "i", "output": 0}]', "row 0: 'output' is a number"),
    "false": ("a.json", '[{"instruction": false, "output": "o"}]', "'instruction' is a boolean"),
    "an empty list": (
        "a.json",
        '[{"instruction": "i", "input": [], "output": "o"}]',
        "'input' is a list",
    ),
    "another suffix": ("a.txt", "x", "a.txt: unknown format '.txt'; use .json, .jsonl, .csv or"),
    "no suffix": ("alpaca", "[]", "alpaca: unknown format ''"),
    "not UTF-8": (
        "a.json",
        b'[{"instruction": "caf\xe9", "output": "o"}]',
        "a.json: byte 21 is not UTF-8; convert the file to UTF-8",
    ),
    "UTF-16": ("a.json", json.dumps([RECORD]).encode("utf-16"), "a.json: byte 0 is not UTF-8"),
}


@pytest.mark.parametrize(("name", "content", "says"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_a_bad_file_is_refused_in_one_line(tmp_path, name, content, says):
    with pytest.raises(DataError) as caught:
        read_rows(write(tmp_path / name, content))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "says"), [("nowhere.json", "no such data file"), (".", "a folder; give a .json")]
)
def test_a_file_that_is_not_there(tmp_path, name, says):
    with pytest.raises(DataError, match=says):
        read_rows(tmp_path / name)
