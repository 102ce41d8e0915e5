"""The embedded default: a tiny trained Llama, its tokenizer and its data, and how they are made."""

from pathlib import Path

TINY = Path(__file__).parent / "tiny"
TINY_TRAIN = TINY / "train.json"
TINY_HELDOUT = TINY / "heldout.json"
