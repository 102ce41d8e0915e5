"""Our token ids are transformers' token ids, from either file format, on any text."""

import base64
import json
import random
import shutil
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from llama_lightning.data.examples import encode_prompt
from llama_lightning.data.rows import Row
from llama_lightning.data.templates import TEMPLATES
from llama_lightning.data.tokenizer import LLAMA3_PATTERN, TOKENIZER_FILES, Tokenizer
from llama_lightning.errors import DataError
from tests.small import write_byte_tokenizer

SHARED = Path(__file__).parents[2] / ".." / "shared" / "data"
LLAMA3_RANKS = SHARED / "llama3-tokenizer.model"
needs_llama3 = pytest.mark.skipif(
    not LLAMA3_RANKS.is_file(), reason="the Llama 3 ranks are not beside this repository"
)

# As Meta's Llama 3.2 names them, by distance from the first special id.
NAMED = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    4: "<|finetune_right_pad_id|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    8: "<|eom_id|>",
    9: "<|eot_id|>",
    10: "<|python_tag|>",
}
RESERVED = [i for i in range(256) if i not in NAMED]
SPECIAL_NAMES = [
    NAMED.get(i) or f"<|reserved_special_token_{RESERVED.index(i)}|>" for i in range(256)
]


def random_texts(count: int) -> list[str]:
    """Draw texts in which every branch of the splitting pattern meets every other."""
    rng = random.Random(0)

    def of(*ranges: tuple[int, int]) -> list[str]:
        return [chr(c) for low, high in ranges for c in range(low, high + 1)]

    alphabets = [
        of((0x20, 0x7E)),
        of((0x00, 0x1F), (0x7F, 0x9F)),  # control characters, NUL among them
        of((0xA0, 0xFF)),
        of((0x4E00, 0x9FFF), (0x3040, 0x30FF), (0xAC00, 0xAEFF)),
        of((0x1F300, 0x1FAFF)) + ["\u200d", "\ufe0f", "\U0001f468\u200d\U0001f469\u200d\U0001f467"],
        of((0x300, 0x36F), (0x900, 0x97F), (0x610, 0x61A)),  # combining marks
        [
            " ",
            "  ",
            "   ",
            "\t",
            "\n",
            "\r",
            "\r\n",
            "\n\n",
            "\u00a0",
            "\u2003",
            "\u2028",
            "\u3000",
        ],
        list("0123456789") + of((0x660, 0x669), (0x2160, 0x2188), (0x1D7CE, 0x1D7FF)),
        ["'s", "'S", "'t", "'re", "'RE", "'ve", "'m", "'LL", "'d", "'", "\u2019s", "'\u017f"],
        of((0x370, 0x3FF), (0x400, 0x4FF), (0x5D0, 0x5EA), (0x620, 0x64A)),
        of((0x10300, 0x1034F), (0x20000, 0x20100), (0xE000, 0xE020), (0xF0000, 0xF0010))
        + of((0x10FFF0, 0x10FFFF), (0xFFF0, 0xFFFF), (0xD7F0, 0xD7FF)),
        [
            " the",
            " and",
            "Below",
            " instruction",
            "ing",
            "###",
            ":",
            ":\n",
            "e\u0301",
            "<|eot_id|>",
        ],
    ]
    texts = []
    for _ in range(count):
        mixed = rng.sample(alphabets, rng.randint(1, 4))
        pieces = []
        for _ in range(rng.randint(0, 20)):
            pieces += rng.choices(rng.choice(mixed), k=rng.randint(1, 4))
        texts.append("".join(pieces))
    return texts


def data_fields() -> list[str]:
    return [
        record[key]
        for file in sorted(SHARED.glob("*.json"))
        for record in json.loads(file.read_text(encoding="utf-8"))
        for key in ("instruction", "input", "output")
    ]


@pytest.fixture(scope="module")
def llama3() -> Tokenizer:
    return Tokenizer.from_path(LLAMA3_RANKS)


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    """transformers' own conversion of the ranks, and the tokenizer.json it saves."""
    backend = TikTokenConverter(
        # The pattern is the converter's own default, Llama 3's, and not ours.
        vocab_file=str(LLAMA3_RANKS),
        extra_special_tokens=SPECIAL_NAMES,
    ).converted()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=SPECIAL_NAMES[0], eos_token=SPECIAL_NAMES[1]
    )
    folder = tmp_path_factory.mktemp("huggingface")
    fast.save_pretrained(folder)
    return fast, folder / "tokenizer.json"


def differing(ours: Tokenizer, fast: PreTrainedTokenizerFast, texts: list[str]) -> list[str]:
    # split_special_tokens: the text "<|eot_id|>" inside data is text.
    theirs = fast(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return [text for text, ids in zip(texts, theirs, strict=True) if ours.encode(text) != list(ids)]


@needs_llama3
def test_ids_are_transformers_ids_from_both_files(llama3, oracle):
    fast, json_file = oracle
    from_json = Tokenizer.from_path(json_file)
    fields, texts = data_fields(), random_texts(10_000)
    assert len(fields) > 9000
    counts = {
        f"{file}, {kind}": len(differing(ours, fast, some))
        for file, ours in {"ranks": llama3, "json": from_json}.items()
        for kind, some in {"data fields": fields, "random texts": texts}.items()
    }
    print(f"texts with other ids, of {len(fields)} and {len(texts)}: {counts}")
    assert not any(counts.values()), counts
    assert from_json.special_ids == llama3.special_ids
    assert (from_json.bos_id, from_json.eos_id, from_json.size) == (128_000, 128_001, 128_256)


@needs_llama3
def test_a_pattern_of_another_model_would_be_found_out(oracle):
    # GPT-2 does not cut numbers into threes; the texts above must be able to tell.
    fast, json_file = oracle
    raw = json.loads(json_file.read_text(encoding="utf-8"))
    ours = Tokenizer._from_json(raw)
    other = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    ours._encoding = type(ours._encoding)(
        "other", pat_str=other, mergeable_ranks=ours._encoding._mergeable_ranks, special_tokens={}
    )
    found = len(differing(ours, fast, random_texts(500)))
    print(f"texts with other ids under GPT-2's pattern: {found} of 500")
    assert found > 100


@needs_llama3
def test_every_text_comes_back(llama3):
    texts = [*data_fields(), *random_texts(2_000)]
    lost = [text for text in texts if llama3.decode(llama3.encode(text)) != text]
    print(f"texts that do not come back: {len(lost)} of {len(texts)}")
    assert not lost


@needs_llama3
def test_all_special_tokens_have_llama_3_2s_names_and_ids(llama3, oracle):
    expected = {name: 128_000 + i for i, name in enumerate(SPECIAL_NAMES)}
    # A few by hand, for SPECIAL_NAMES is our own list.
    for name, token_id in {
        "<|begin_of_text|>": 128_000,
        "<|end_of_text|>": 128_001,
        "<|reserved_special_token_0|>": 128_002,
        "<|reserved_special_token_1|>": 128_003,
        "<|finetune_right_pad_id|>": 128_004,
        "<|reserved_special_token_2|>": 128_005,
        "<|start_header_id|>": 128_006,
        "<|end_header_id|>": 128_007,
        "<|eom_id|>": 128_008,
        "<|eot_id|>": 128_009,
        "<|python_tag|>": 128_010,
        "<|reserved_special_token_3|>": 128_011,
        "<|reserved_special_token_247|>": 128_255,
    }.items():
        assert expected[name] == token_id
    assert llama3.special_ids == expected
    assert llama3.size == 128_256
    assert {name: oracle[0].convert_tokens_to_ids(name) for name in SPECIAL_NAMES} == expected


@needs_llama3
@pytest.mark.parametrize("name", ["<|eot_id|>", "<|begin_of_text|>", "<|end_of_text|>"])
def test_special_token_text_in_data_stays_text(llama3, oracle, name):
    text = f"what does {name} mean?"
    ids = llama3.encode(text)
    assert max(ids) < 128_000
    assert llama3.decode(ids) == text
    # transformers, left to its default, would put the control token there.
    assert llama3.special_ids[name] in oracle[0](text, add_special_tokens=False)["input_ids"]


@needs_llama3
def test_the_beginning_token_stands_in_front_once(llama3):
    for template in (TEMPLATES["alpaca"], TEMPLATES["plain"]):
        for row in (Row(0, "say hello", "", ""), Row(0, "<|begin_of_text|>", "to me", "")):
            prompt = encode_prompt(row, llama3, template)
            assert prompt[0] == llama3.bos_id == 128_000
            assert prompt.count(llama3.bos_id) == 1
            assert llama3.decode(prompt) == template.format(row.instruction, row.input)


def test_decoding_leaves_out_special_tokens_and_unused_ids(tmp_path):
    write_byte_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_path(tmp_path)
    assert tokenizer.decode([256, 104, 105, 257, 265, 512, 99_999]) == "hi"
    assert tokenizer.decode([0xC3]) == "\ufffd"  # half a character: generation may stop there


def test_a_digest_tells_every_token_and_not_their_order():
    single = {bytes([b]): b for b in range(256)}
    special = {"<|begin_of_text|>": 300, "<|end_of_text|>": 301}

    def digest(ranks: dict[bytes, int], more: dict[str, int] | None = None) -> str:
        return Tokenizer(single | ranks, special | (more or {})).digest

    one = digest({b"ab": 256, b"abc": 257})
    assert digest({b"abc": 257, b"ab": 256}) == one
    others = [
        digest({b"ab": 256, b"abd": 257}),
        digest({b"aba": 256, b"bc": 257}),  # joined they are the same bytes
        digest({b"ab": 257, b"abc": 256}),
        digest({b"ab": 256, b"abc": 258}),
        digest({b"ab": 256}),
        digest({b"ab": 256, b"abc": 257}, {"<|eot_id|>": 302}),
    ]
    assert len({one, *others}) == 1 + len(others)


# Where the tokenizer is found.


def byte_lines(*, first: int = 0) -> list[str]:
    return [f"{base64.b64encode(bytes([b])).decode()} {first + b}" for b in range(256)]


def write_ranks(path: Path, marker: bytes) -> None:
    """A tokenizer of 256 bytes and one merge, by which a test knows it again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [*byte_lines(), f"{base64.b64encode(marker).decode()} 256"]
    path.write_text("\n".join(lines) + "\n")


def byte_json(merges: list[str], tokens: list[str]) -> dict:
    """A tokenizer.json of 256 bytes and merged ASCII tokens."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    letters = [chr(b) if b in printable else chr(next(others)) for b in range(256)]
    vocab = {token: i for i, token in enumerate([*letters, *tokens])}
    return {
        "added_tokens": [
            {"id": len(vocab), "content": "<|begin_of_text|>", "special": True},
            {"id": len(vocab) + 1, "content": "<|end_of_text|>", "special": True},
        ],
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": LLAMA3_PATTERN}, "behavior": "Isolated"},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        },
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
    }


def test_the_order_of_precedence(tmp_path):
    write_ranks(tmp_path / "tokenizer.model", b"aa")
    write_ranks(tmp_path / "original" / "tokenizer.model", b"bb")
    (tmp_path / "tokenizer.json").write_text(json.dumps(byte_json(["c c"], ["cc"])))
    assert TOKENIZER_FILES == ("tokenizer.model", "original/tokenizer.model", "tokenizer.json")
    for name, text in zip(TOKENIZER_FILES, ("aa", "bb", "cc"), strict=True):
        tokenizer = Tokenizer.from_path(tmp_path)
        assert tokenizer.encode(text) == [256]
        assert tokenizer.encode("dd") == [100, 100]
        assert Tokenizer.from_path(tmp_path / name).encode(text) == [256]
        (tmp_path / name).unlink()
    with pytest.raises(DataError) as caught:
        Tokenizer.from_path(tmp_path)
    assert all(part in str(caught.value) for part in (*TOKENIZER_FILES, str(tmp_path)))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.model does not exist"):
        Tokenizer.from_path(tmp_path / "nowhere.model")


def test_merges_are_read_as_strings_and_as_pairs(tmp_path):
    # tokenizers writes pairs since 0.20; the files on the hub hold strings.
    for merges in (["a b", "ab c"], [["a", "b"], ["ab", "c"]]):
        (tmp_path / "tokenizer.json").write_text(json.dumps(byte_json(merges, ["ab", "abc"])))
        assert Tokenizer.from_path(tmp_path).encode("abc ab") == [257, 32, 256]


BROKEN_RANKS = {
    "not base64": ["!!!! 0"],
    "not two columns": ["AA=="],
    "not a number": ["AA== zero"],
    "nothing": [],
    "cut short": byte_lines()[:100],
    "cut inside the last number": [*byte_lines(), "YWE= 256", "YmI= 25"],
    "a gap in the ranks": [*byte_lines(), "YWE= 300"],
    "does not begin at 0": byte_lines(first=1),
    "a byte is missing": [line for line in byte_lines() if not line.startswith("YQ==")]
    + ["YWE= 97"],
}


@pytest.mark.parametrize("lines", BROKEN_RANKS.values(), ids=BROKEN_RANKS.keys())
def test_broken_ranks_are_refused(tmp_path, lines):
    path = tmp_path / "tokenizer.model"
    path.write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"tokenizer\.model: not a Llama 3 tokenizer") as caught:
        Tokenizer.from_path(path)
    assert "\n" not in str(caught.value)


def test_sentencepiece_is_refused(tmp_path):
    # How Llama 2's and Mistral's tokenizer.model begins.
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02\n\x0c\n\x03<s>\x15\x00\x00")
    with pytest.raises(DataError, match=r"tokenizer\.model: not a Llama 3 tokenizer") as caught:
        Tokenizer.from_path(tmp_path)
    assert "\n" not in str(caught.value)


@needs_llama3
def test_a_download_that_was_cut_is_refused(tmp_path):
    # Cut in the middle of a line, at places where what is left still looks like ranks.
    raw = LLAMA3_RANKS.read_bytes()
    lines = raw.splitlines(keepends=True)
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"".join(lines[:50_000]) + lines[50_000][:-2])
    with pytest.raises(DataError, match="not a Llama 3 tokenizer"):
        Tokenizer.from_path(path)


def _broken(change) -> dict:
    raw = byte_json(["a b", "ab c"], ["ab", "abc"])
    change(raw)
    return raw


BROKEN_JSON = {
    "not BPE": (lambda raw: raw["model"].update(type="Unigram"), "not BPE"),
    "another pre-tokenizer": (
        lambda raw: raw["pre_tokenizer"]["pretokenizers"].pop(0),
        "pre_tokenizer is not Llama 3's",
    ),
    "no pre-tokenizer, as in Llama 2": (
        lambda raw: raw.update(pre_tokenizer=None),
        "pre_tokenizer is not Llama 3's",
    ),
    "merges out of order": (
        lambda raw: raw["model"]["merges"].reverse(),
        "merges are not in the order of their ids",
    ),
    "no special tokens": (lambda raw: raw["added_tokens"].clear(), "begin_of_text"),
    "no end token": (lambda raw: raw["added_tokens"].pop(), "end_of_text"),
    "no model": (lambda raw: raw.pop("model"), "model"),
    "two tokens of one id": (lambda raw: raw["model"]["vocab"].update(abc=256), "same id"),
    "not byte-level": (lambda raw: raw["model"]["vocab"].update({"\u2581the": 999}), "\u2581"),
}


@pytest.mark.parametrize(("change", "says"), BROKEN_JSON.values(), ids=BROKEN_JSON.keys())
def test_broken_json_is_refused(tmp_path, change, says):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(_broken(change)))
    with pytest.raises(DataError, match="not a Llama 3 tokenizer") as caught:
        Tokenizer.from_path(path)
    assert says in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "{", "null", "\x00"])
def test_json_of_another_kind_is_refused(tmp_path, text):
    path = tmp_path / "tokenizer.json"
    path.write_text(text)
    with pytest.raises(DataError, match="not a Llama 3 tokenizer"):
        Tokenizer.from_path(path)


@needs_llama3
def test_a_renamed_copy_of_the_ranks_loads(tmp_path):
    # Only the suffix tells the formats apart.
    shutil.copy(LLAMA3_RANKS, tmp_path / "llama3.tiktoken")
    assert Tokenizer.from_path(tmp_path / "llama3.tiktoken").size == 128_256
