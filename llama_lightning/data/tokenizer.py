"""The Llama 3 tokenizer: tiktoken over the ranks of a `tokenizer.model` or `tokenizer.json`.

It encodes plain text only. Special-token text inside data ("<|eot_id|>") stays plain text; special
tokens are added by id, by whoever knows why.
Source: llama3/tokenizer.py of meta-llama/llama-models; tokenizer.json of meta-llama/Llama-3.2-1B.
"""

import base64
import binascii
import hashlib
import json
from array import array
from functools import cached_property
from pathlib import Path
from typing import Any

import tiktoken

from llama_lightning.errors import DataError

# Where a base model folder keeps its tokenizer: Meta's ranks first, they are the original.
TOKENIZER_FILES = ("tokenizer.model", "original/tokenizer.model", "tokenizer.json")

# How Llama 3 cuts text into pieces before merging bytes; the same in both files.
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

BEGIN_OF_TEXT = "<|begin_of_text|>"
END_OF_TEXT = "<|end_of_text|>"
PAD = "<|finetune_right_pad_id|>"
# As in generation_config.json of the Instruct models; the base models write the first only.
STOPS = (END_OF_TEXT, "<|eom_id|>", "<|eot_id|>")

# Words, numbers, spaces and other scripts: two tokenizers that agree on it agree on Alpaca.
PROBE = "The quick brown fox's 12,345.67 jumps\n\n  over naïve café — 東京 🙂 привет; x = f(y)\t#!"


def _llama3_special_tokens(first_id: int) -> dict[str, int]:
    """Name the 256 special tokens that stand behind Meta's ranks (Llama 3.1 and later)."""
    named = {
        0: BEGIN_OF_TEXT,
        1: END_OF_TEXT,
        4: PAD,
        6: "<|start_header_id|>",
        7: "<|end_header_id|>",
        8: "<|eom_id|>",
        9: "<|eot_id|>",
        10: "<|python_tag|>",
    }
    reserved = (f"<|reserved_special_token_{i}|>" for i in range(256 - len(named)))
    return {named.get(i) or next(reserved): first_id + i for i in range(256)}


def byte_letters() -> dict[str, int]:
    """Map the printable stand-ins in a byte-level tokenizer.json to the bytes they stand for.

    Printable Latin-1 stands for itself; the other bytes are numbered from U+0100 on (GPT-2's
    table).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(0x100 + i): byte for i, byte in enumerate(others)}


class Tokenizer:
    """Text to token ids and back.

    Attributes:
        ranks: bytes of each other token to its id.
        special_ids: special token text to id.
        bos_id: the token every text begins with.
        eos_id: the token that ends a text.
        stop_ids: the tokens that end a response; Instruct models have more than one.
        size: one more than the largest id.
    """

    def __init__(self, ranks: dict[bytes, int], special_ids: dict[str, int]) -> None:
        # tiktoken answers both with a panic, which is no Exception: the second one not until a text
        # holds such a byte.
        ids = [*ranks.values(), *special_ids.values()]
        if len(set(ids)) < len(ids):
            raise ValueError("two tokens have the same id")
        if not ranks.keys() >= {bytes([byte]) for byte in range(256)}:
            raise ValueError("not every single byte is a token")
        self._encoding = tiktoken.Encoding(
            "llama3", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens=special_ids
        )
        self.ranks, self.special_ids = ranks, special_ids
        self.bos_id = special_ids[BEGIN_OF_TEXT]
        self.eos_id = special_ids[END_OF_TEXT]
        self.stop_ids = [special_ids[name] for name in STOPS if name in special_ids]
        self.size = self._encoding.n_vocab
        self._special = frozenset(special_ids.values())

    @classmethod
    def from_path(cls, path: Path) -> "Tokenizer":
        """Load a tokenizer file, or the first one found in a folder.

        Raises:
            DataError: no tokenizer there, or one that is not Llama 3's kind.
        """
        if path.is_dir():
            found = [path / name for name in TOKENIZER_FILES if (path / name).is_file()]
            if not found:
                raise DataError(
                    f"{path}: no tokenizer ({', '.join(TOKENIZER_FILES)}); put one there or set "
                    "data.tokenizer"
                )
            path = found[0]
        if not path.is_file():
            raise DataError(f"data.tokenizer: {path} does not exist")
        try:
            if path.suffix == ".json":
                return cls._from_json(json.loads(path.read_text(encoding="utf-8")))
            return cls._from_ranks(path.read_bytes())
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise DataError(f"{path}: not a Llama 3 tokenizer ({error!r})") from error

    @classmethod
    def _from_ranks(cls, raw: bytes) -> "Tokenizer":
        """Read Meta's tokenizer.model: a line per token, its bytes in base64 and its rank."""
        ranks: dict[bytes, int] = {}
        for line in raw.splitlines():
            token, rank = line.split()
            try:
                ranks[base64.b64decode(token, validate=True)] = int(rank)
            except binascii.Error as error:
                raise ValueError(f"line {len(ranks) + 1}: {error}") from error
        if sorted(ranks.values()) != list(range(len(ranks))):
            raise ValueError(f"its {len(ranks)} ranks are not 0, 1, 2 ... without a gap")
        return cls(ranks, _llama3_special_tokens(len(ranks)))

    @classmethod
    def _from_json(cls, raw: dict[str, Any]) -> "Tokenizer":
        """Read a Hugging Face tokenizer.json of the byte-level BPE kind."""
        model = raw["model"]
        if model["type"] != "BPE":
            raise ValueError(f"model type {model['type']}, not BPE")
        splits = [
            part.get("pattern", {}).get("Regex")
            for part in (raw["pre_tokenizer"] or {}).get("pretokenizers", [])  # null in Llama 2's
        ]
        if LLAMA3_PATTERN not in splits:
            raise ValueError("its pre_tokenizer is not Llama 3's")
        special_ids = {token["content"]: int(token["id"]) for token in raw["added_tokens"]}
        letters = byte_letters()
        ranks = {
            bytes(letters[letter] for letter in token): int(rank)
            for token, rank in model["vocab"].items()
            if token not in special_ids
        }
        # tiktoken merges the pair with the lowest id first; a file whose merges stand in another
        # order would be read as another tokenizer.
        pairs = (m if isinstance(m, list) else m.split(" ") for m in model["merges"])
        merged = [model["vocab"]["".join(pair)] for pair in pairs]
        if merged != sorted(merged):
            raise ValueError("its merges are not in the order of their ids")
        return cls(ranks, special_ids)

    @cached_property
    def fingerprint(self) -> str:
        """Tell one tokenizer from another, whatever file it came from."""
        ids = [*self.encode(PROBE), self.bos_id, self.eos_id]
        return hashlib.sha256(repr(ids).encode()).hexdigest()[:16]

    @cached_property
    def digest(self) -> str:
        """Tell one tokenizer from another by every token of it."""
        # By id, as a file's order does not matter; with lengths, as ab + c and a + bc differ.
        tokens = sorted(self.ranks, key=self.ranks.__getitem__)
        ids = array("q", map(self.ranks.__getitem__, tokens))
        digest = hashlib.sha256(repr(sorted(self.special_ids.items())).encode())
        digest.update(ids + array("q", map(len, tokens)))
        digest.update(b"".join(tokens))
        return digest.hexdigest()

    def encode(self, text: str) -> list[int]:
        """Encode plain text, without any special token."""
        return self._encoding.encode_ordinary(text)

    def decode(self, tokens: list[int]) -> str:
        """Decode tokens to text, leaving special tokens and unused ids out."""
        known = [t for t in tokens if t < self.size and t not in self._special]
        return self._encoding.decode_bytes(known).decode("utf-8", errors="replace")
