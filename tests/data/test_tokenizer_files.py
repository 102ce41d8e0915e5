"""The tokenizer files of an export, read by transformers: the same tokens, the same prompts."""

import json
import random
import time
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from llama_lightning.assets import TINY, TINY_TRAIN
from llama_lightning.data.examples import Row, encode_prompt
from llama_lightning.data.templates import TEMPLATES
from llama_lightning.data.tokenizer import PROBE, Tokenizer
from llama_lightning.data.tokenizer_files import huggingface_files
from tests.small import write_byte_tokenizer

RANKS = Path(__file__).parents[3] / "shared" / "data" / "llama3-tokenizer.model"
TEXTS = [
    PROBE,
    "",
    "   \n\n\t x\r\n",
    "naïve café, 東京 🙂 Ω≈ç√∫˜µ≤ aaaaaaaaaaaaaaaa 1234567",
    "def f(x):\n    return x['key'] # it's 100%\n",
]


def _write(folder: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        (folder / name).write_text(content, encoding="utf-8")


def _random_texts(count: int) -> list[str]:
    generator = random.Random(0)
    letters = "etaoin shrdlu ETA\n 0123.,;'\"éüñ東京語🙂привет\t"
    return ["".join(generator.choices(letters, k=generator.randint(1, 60))) for _ in range(count)]


def _check_built(folder: Path, tokenizer: Tokenizer, texts: list[str]) -> None:
    """The files built from ranks alone, in transformers and read by ourselves."""
    _write(folder, huggingface_files(tokenizer, Path("none"), TEMPLATES["alpaca"].jinja))
    theirs = AutoTokenizer.from_pretrained(folder)
    ids = theirs(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    different = [t for t, found in zip(texts, ids, strict=True) if found != tokenizer.encode(t)]
    print(f"{len(texts) - len(different)} of {len(texts)} texts equal")
    assert not different
    assert theirs("x")["input_ids"] == [tokenizer.bos_id, *tokenizer.encode("x")]
    assert theirs.convert_tokens_to_ids(list(tokenizer.special_ids)) == [
        *tokenizer.special_ids.values()
    ]
    assert (theirs.bos_token_id, theirs.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)
    again = Tokenizer.from_path(folder)
    assert again.ranks == tokenizer.ranks
    assert again.special_ids == tokenizer.special_ids


@pytest.mark.parametrize("kind", ["bytes", "tiny"])
def test_files_built_from_ranks(kind, tmp_path):
    source = TINY
    if kind == "bytes":
        write_byte_tokenizer(tmp_path)
        source = tmp_path
    target = tmp_path / "export"
    target.mkdir()
    _check_built(target, Tokenizer.from_path(source), [*TEXTS, *_random_texts(1000)])


@pytest.mark.slow
def test_files_built_from_the_real_ranks(tmp_path):
    if not RANKS.is_file():
        pytest.skip("Meta's tokenizer.model is not here")
    tokenizer = Tokenizer.from_path(RANKS)
    start = time.process_time()
    files = huggingface_files(tokenizer, Path("none"), TEMPLATES["alpaca"].jinja)
    merges = len(json.loads(files["tokenizer.json"])["model"]["merges"])
    print(f"{merges:,} merges in {time.process_time() - start:.1f} s")
    assert merges == 280_147  # as in the tokenizer.json of meta-llama/Llama-3.2-1B
    _check_built(tmp_path, tokenizer, [*TEXTS, *_random_texts(5000)])


def test_a_tokenizer_json_is_copied_if_it_is_the_same_one(tmp_path):
    tokenizer = Tokenizer.from_path(TINY)
    files = huggingface_files(tokenizer, TINY, "")
    assert files["tokenizer.json"] == (TINY / "tokenizer.json").read_text()
    write_byte_tokenizer(tmp_path)  # which is found first
    (tmp_path / "tokenizer.json").write_text(files["tokenizer.json"])
    other = huggingface_files(Tokenizer.from_path(tmp_path), tmp_path, "")
    assert len(json.loads(other["tokenizer.json"])["model"]["vocab"]) == 256


def _messages(row: Row, template: str) -> list[dict[str, str]]:
    between = {"alpaca": "\n\n### Input:\n", "plain": "\n"}[template]
    content = row.instruction + (between + row.input if row.input else "")
    return [{"role": "user", "content": content}]


@pytest.mark.parametrize("template", ["alpaca", "plain"])
def test_the_chat_template_is_the_training(template, tmp_path):
    tokenizer = Tokenizer.from_path(TINY)
    _write(tmp_path, huggingface_files(tokenizer, TINY, TEMPLATES[template].jinja))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    records = json.loads(TINY_TRAIN.read_text())[:1000]
    rows = [Row(i, r["instruction"], r["input"], r["output"]) for i, r in enumerate(records)]
    rows += [Row(0, " naïve\n\n東京 ", "\t🙂 x\n", "привет"), Row(1, "### Input:", "", "{a}")]
    equal = 0
    for row in rows:
        prompt = _messages(row, template)
        given = theirs.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        whole = [*prompt, {"role": "assistant", "content": row.output}]
        text = theirs.apply_chat_template(whole, tokenize=False)
        ours = encode_prompt(row, tokenizer, TEMPLATES[template])
        shown = TEMPLATES[template].format(row.instruction, row.input)
        equal += given == ours and text == f"<|begin_of_text|>{shown}{row.output}<|end_of_text|>"
    with_input = sum(bool(row.input) for row in rows)
    print(f"{template}: {equal} of {len(rows)} prompts and whole texts equal, {with_input} inputs")
    assert equal == len(rows)
    assert with_input > 100
