"""The embedded tiny model: what it ships, and that its held-out figures mean something."""

import json
import re
from collections import Counter

import pytest
import torch

from llama_lightning.assets import TINY, TINY_HELDOUT, TINY_TRAIN, bpe, world
from llama_lightning.assets.__main__ import TOKENIZER_RECORDS
from llama_lightning.data.examples import Row, encode_prompt
from llama_lightning.data.templates import TEMPLATES
from llama_lightning.data.tokenizer import Tokenizer
from llama_lightning.model.config import PRESETS
from llama_lightning.weights.huggingface import load_huggingface, read_config

SEED = 1  # the default of `python -m llama_lightning.assets`


@pytest.fixture(scope="module")
def train():
    return json.loads(TINY_TRAIN.read_text())


@pytest.fixture(scope="module")
def heldout():
    return json.loads(TINY_HELDOUT.read_text())


def _prompt(record):
    return record["instruction"], record["input"]


def test_ships_a_small_llama():
    size = sum(file.stat().st_size for file in TINY.rglob("*") if file.is_file())
    config = read_config(TINY)
    model = load_huggingface(TINY, config, dtype=torch.float32)
    count = sum(p.numel() for p in model.parameters())
    print(f"assets/tiny: {size / 2**20:.1f} MiB, {count:,} parameters")
    assert size < 10 * 10**6
    assert config == PRESETS["tiny"]
    assert config.tie_word_embeddings
    assert config.rope_scaling is not None
    assert config.num_key_value_heads < config.num_attention_heads


def test_template_is_some_30_tokens():
    tokenizer = Tokenizer.from_path(TINY)
    empty = encode_prompt(Row(0, "", "", ""), tokenizer, TEMPLATES["alpaca"])
    whole = TEMPLATES["alpaca"].format("", "x").replace("x", "")
    print(f"template: {len(empty)} tokens without input, {len(tokenizer.encode(whole)) + 1} with")
    assert len(empty) <= 35


def test_tokenizer_is_transformers(train):
    from transformers import PreTrainedTokenizerFast

    oracle = PreTrainedTokenizerFast(tokenizer_file=str(TINY / "tokenizer.json"))
    ours = Tokenizer.from_path(TINY)
    texts = [text for record in train for text in record.values()]
    texts += ["naïve café, 東京 🙂\r\n\t x", "", "   ", "Ω≈ç√∫˜µ≤", "<|eot_id|>"]
    encoded = oracle(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    different = [t for t, ids in zip(texts, encoded, strict=True) if ids != ours.encode(t)]
    print(f"{len(texts) - len(different)} of {len(texts)} texts equal")
    assert not different
    assert all(ours.decode(ours.encode(text)) == text for text in texts)


def test_no_heldout_prompt_occurs_in_training(train, heldout):
    prompts = {_prompt(record) for record in train}
    shared = [record for record in heldout if _prompt(record) in prompts]
    print(f"{len(train)} training records, {len(heldout)} held out, {len(shared)} shared")
    assert not shared
    assert len(train) >= 2000
    assert len(heldout) >= 200
    assert len(prompts) == len(train)
    assert len({_prompt(record) for record in heldout}) == len(heldout)


def test_commonest_answer_scores_little(train, heldout):
    commonest, _ = Counter(record["output"] for record in train).most_common(1)[0]
    score = sum(record["output"] == commonest for record in heldout) / len(heldout)
    print(f"the commonest answer, {commonest!r}, scores {score:.1%}")
    assert score <= 0.05


def _vectors(texts, vocabulary):
    counts = torch.zeros(len(texts), len(vocabulary))
    for row, text in enumerate(texts):
        for word in re.findall(r"\w+|[^\w\s]", text.lower()):
            if word in vocabulary:
                counts[row, vocabulary[word]] += 1
    return counts


def test_nearest_training_record_scores_little(train, heldout):
    texts = [[f"{r['instruction']} {r['input']}" for r in part] for part in (train, heldout)]
    words = sorted({w for text in texts[0] for w in re.findall(r"\w+|[^\w\s]", text.lower())})
    vocabulary = {word: i for i, word in enumerate(words)}
    known, asked = (_vectors(part, vocabulary) for part in texts)
    # Two ideas of "nearest": share of common words, and the cosine that weighs rare words more.
    common = asked.clamp(max=1) @ known.clamp(max=1).T
    sizes = asked.clamp(max=1).sum(1)[:, None] + known.clamp(max=1).sum(1)
    rarity = (len(train) / (1 + (known > 0).sum(0))).log()
    cosine = (
        torch.nn.functional.normalize(asked * rarity)
        @ torch.nn.functional.normalize(known * rarity).T
    )
    for name, likeness in {"Jaccard": common / (sizes - common), "tf-idf": cosine}.items():
        nearest = likeness.argmax(1).tolist()
        right = sum(
            record["output"] == train[i]["output"]
            for record, i in zip(heldout, nearest, strict=True)
        )
        print(f"the nearest training record ({name}) scores {right / len(heldout):.1%}")
        assert right / len(heldout) <= 0.20


def test_remade_from_the_seed(train, heldout, tmp_path):
    assert world.alpaca_records(SEED) == (train, heldout)
    base = list(world.base_records(SEED + 1, TOKENIZER_RECORDS))
    assert not any("### Instruction" in record["instruction"] for record in base)
    texts = [record[key] for record in base for key in ("instruction", "output")]
    for part in world.alpaca_records(SEED, asked_only=False):
        for record in part:
            prompt = TEMPLATES["alpaca"].format(record["instruction"], record["input"])
            texts += [prompt, record["output"]]
    config = PRESETS["tiny"]
    tokens = bpe.train(texts, config.vocab_size)
    bpe.write_tokenizer(tmp_path, tokens, config.max_position_embeddings)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / name).read_bytes() == (TINY / name).read_bytes()
