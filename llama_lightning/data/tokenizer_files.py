"""The tokenizer as the files that transformers reads, the training's template among them.

It writes texts, no files. What it writes is a tokenizer.json of the kind that `Tokenizer` reads.
Source: tokenizer.json of meta-llama/Llama-3.2-1B; transformers, convert_slow_tokenizer.py.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama_lightning.data.templates import END_OF_TURN, Template
from llama_lightning.data.tokenizer import (
    BEGIN_OF_TEXT,
    END_OF_TEXT,
    LLAMA3_PATTERN,
    PAD,
    Tokenizer,
    byte_letters,
)
from llama_lightning.errors import DataError
from llama_lightning.records import TextSide


def _merges(ranks: Mapping[bytes, int], names: Mapping[bytes, str]) -> list[str]:
    """List the pairs that merge: as in tiktoken, two neighbours whenever their join is a token."""
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        splits = [(token[:at], token[at:]) for at in range(1, len(token))]
        known = [pair for pair in splits if pair[0] in ranks and pair[1] in ranks]
        known.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges += [f"{names[left]} {names[right]}" for left, right in known]
    return merges


def tokenizer_json(ranks: Mapping[bytes, int], special_ids: Mapping[str, int]) -> dict[str, Any]:
    """Write the dictionary of a tokenizer.json.

    Args:
        ranks: bytes of each token to its id, which is the order of merging too.
        special_ids: text of each special token to its id; the beginning one is put in front of
            every text.
    """
    letters = {byte: letter for letter, byte in byte_letters().items()}
    names = {token: "".join(letters[byte] for byte in token) for token in ranks}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [
        {"id": at, "content": text, **flags, "special": True} for text, at in special_ids.items()
    ]
    begin = {"SpecialToken": {"id": BEGIN_OF_TEXT, "type_id": 0}}
    template = {
        "type": "TemplateProcessing",
        "single": [begin, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [
            begin,
            {"Sequence": {"id": "A", "type_id": 0}},
            {"SpecialToken": {"id": BEGIN_OF_TEXT, "type_id": 1}},
            {"Sequence": {"id": "B", "type_id": 1}},
        ],
        "special_tokens": {
            BEGIN_OF_TEXT: {
                "id": BEGIN_OF_TEXT,
                "ids": [special_ids[BEGIN_OF_TEXT]],
                "tokens": [BEGIN_OF_TEXT],
            }
        },
    }
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    split = {"type": "Split", "pattern": {"Regex": LLAMA3_PATTERN}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                split | {"behavior": "Isolated", "invert": False},
                byte_level | {"use_regex": False},
            ],
        },
        "post_processor": {
            "type": "Sequence",
            "processors": [byte_level | {"use_regex": True}, template],
        },
        "decoder": byte_level | {"use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": {names[token]: rank for token, rank in ranks.items()},
            "merges": _merges(ranks, names),
        },
    }


def huggingface_files(tokenizer: Tokenizer, path: Path, chat_template: str) -> dict[str, str]:
    """Write what AutoTokenizer loads and how `generate` ends, as name to text.

    Args:
        tokenizer: the training's.
        path: the file or folder it came from; a tokenizer.json there is taken as it is.
        chat_template: jinja.
    """
    special = {"bos_token": BEGIN_OF_TEXT, "eos_token": END_OF_TEXT}
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.stop_ids}
    if PAD in tokenizer.special_ids:
        special["pad_token"] = PAD
        ids["pad_token_id"] = tokenizer.special_ids[PAD]
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "chat_template": chat_template,
    }

    def text(content: Any) -> str:
        return json.dumps(content, ensure_ascii=False, indent=1) + "\n"

    return {
        "tokenizer.json": _own_json(tokenizer, path)
        or text(tokenizer_json(tokenizer.ranks, tokenizer.special_ids)),
        "tokenizer_config.json": text(config),
        "special_tokens_map.json": text(special),
        "generation_config.json": text(ids | {"do_sample": False}),
    }


def _own_json(tokenizer: Tokenizer, path: Path) -> str | None:
    """Read the tokenizer.json beside a tokenizer, if it is the same one."""
    own = (path if path.is_dir() else path.parent) / "tokenizer.json"
    try:
        theirs = Tokenizer.from_path(own) if own.is_file() else None
    except DataError:
        return None
    if theirs is None or theirs.ranks != tokenizer.ranks:
        return None
    same = theirs.special_ids == tokenizer.special_ids
    return own.read_text(encoding="utf-8") if same else None


def text_side(tokenizer: Tokenizer, path: Path, template: Template) -> TextSide:
    """Collect what an export needs to read and write text as the training did.

    Args:
        tokenizer: the training's.
        path: the file or folder it came from.
        template: the training's.
    """
    texts = {token: text for text, token in tokenizer.special_ids.items()}
    return TextSide(
        files=huggingface_files(tokenizer, path, template.jinja),
        bos_id=tokenizer.bos_id,
        stop_ids=tokenizer.stop_ids,
        stops=[texts[token] for token in tokenizer.stop_ids],
        ollama_template=template.ollama,
    )


def ends_turns(folder: Path, tokenizer: Tokenizer) -> bool:
    """Say whether a base has learnt to end its turn; one whose folder does not tell is believed.

    Base models have the chat tokens too, untrained: generation_config.json stops at another.
    """
    try:
        path = folder / "generation_config.json"
        stops = json.loads(path.read_text(encoding="utf-8"))["eos_token_id"]
    except (OSError, ValueError, KeyError, TypeError):
        return True
    return tokenizer.special_ids.get(END_OF_TURN) in (stops if isinstance(stops, list) else [stops])
