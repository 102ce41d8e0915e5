"""Byte-level BPE in plain Python: makes the embedded `tiny` model's Llama-3 kind of tokenizer.

Only whoever remakes the assets runs this. The vocabulary holds the 256 bytes, then as many
merges as there is room for, then every piece of the training texts that is not a token yet. Llama
3's tokenizer looks a whole piece up before it merges anything (`ignore_merges`), so each word of
a closed world is one token, and any other text still falls back to merges and bytes.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from llama_lightning.data.tokenizer import byte_letters
from llama_lightning.data.tokenizer_files import tokenizer_json

SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|finetune_right_pad_id|>",
    "<|eot_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
)
# The same pattern for the standard library, which has no \p: it differs only in letters and
# numbers that the world's texts do not hold.
_PIECES = re.compile(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|(?:[^\r\n\w]|_)?[^\W\d_]+|\d{1,3}"
    r"| ?(?:[^\s\w]|_)+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def pieces(texts: Iterable[str]) -> Counter[str]:
    """Count the pieces that Llama 3's pattern cuts texts into."""
    return Counter(piece for text in texts for piece in _PIECES.findall(text))


def train(texts: Iterable[str], size: int) -> list[bytes]:
    """Learn a vocabulary in which every piece of the texts is one token.

    Args:
        texts: all texts of the closed world.
        size: the vocabulary size wanted, special tokens included.

    Returns:
        The tokens in rank order, which is the order of their ids.

    Raises:
        ValueError: if the pieces alone are more than `size` has room for.
    """
    counts = Counter({piece.encode(): count for piece, count in pieces(texts).items()})
    tokens = [bytes([byte]) for byte in byte_letters().values()]
    room = size - len(SPECIAL_TOKENS)
    missing = {piece for piece in counts if len(piece) > 1}
    if len(tokens) + len(missing) > room:
        raise ValueError(f"{len(missing)} pieces need more than {size} tokens")
    split = {piece: [bytes([byte]) for byte in piece] for piece in counts}
    while len(tokens) + len(missing) < room:
        pairs: Counter[tuple[bytes, bytes]] = Counter()
        for piece, parts in split.items():
            for pair in zip(parts, parts[1:], strict=False):
                pairs[pair] += counts[piece]
        if not pairs:
            raise ValueError(f"the texts have too few pieces for {size} tokens")
        # Equal counts are settled by the bytes, so that the result never depends on hashing.
        left, right = max(pairs, key=lambda pair: (pairs[pair], pair))
        tokens.append(left + right)
        missing.discard(left + right)
        for parts in split.values():
            for at in range(len(parts) - 2, -1, -1):
                if parts[at : at + 2] == [left, right]:
                    parts[at : at + 2] = [left + right]
    return tokens + sorted(missing, key=lambda piece: (-counts[piece], piece))


def write_tokenizer(directory: Path, tokens: list[bytes], max_length: int) -> None:
    """Write tokenizer.json, tokenizer_config.json and generation_config.json.

    Args:
        directory: an existing folder.
        tokens: what `train` returned.
        max_length: the longest sequence the model was made for.
    """
    begin, end, pad = SPECIAL_TOKENS[:3]
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": begin,
        "eos_token": end,
        "pad_token": pad,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": max_length,
    }
    first = len(tokens)
    ranks = {token: rank for rank, token in enumerate(tokens)}
    special_ids = {text: first + at for at, text in enumerate(SPECIAL_TOKENS)}
    generation = {"bos_token_id": first, "eos_token_id": first + 1, "pad_token_id": first + 2}
    files = {
        "tokenizer.json": tokenizer_json(ranks, special_ids),
        "tokenizer_config.json": config,
        "generation_config.json": generation | {"do_sample": False},
    }
    for name, content in files.items():
        text = json.dumps(content, ensure_ascii=False, indent=1)
        (directory / name).write_text(text + "\n", encoding="utf-8")
