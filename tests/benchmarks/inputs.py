"""What is trained on and answered: two files of records and Llama 3's tokenizer, in one folder.

The folder stands beside the checkout, in ../shared/data, or is named by --data.
"""

import argparse
import sys
from pathlib import Path

SHARED = Path(__file__).parents[3] / "shared"
DATA = SHARED / "data"
SHORT, LONG = "instruction-data.json", "alpaca_en_demo.json"  # answers of 13 and of 145 tokens
TOKENIZER = "llama3-tokenizer.model"


def check(folder: Path) -> None:
    """Stop with a sentence where something is missing."""
    names = (SHORT, LONG, TOKENIZER)
    if missing := [name for name in names if not (folder / name).is_file()]:
        sys.exit(
            f"{folder}: no {', '.join(missing)}; name a folder by --data that holds records in "
            f"Alpaca's format as {SHORT} and {LONG}, and Meta's tokenizer.model as {TOKENIZER}"
        )


def check_files(parser: argparse.ArgumentParser, *paths: Path) -> None:
    """Refuse files that are not there."""
    for path in paths:
        if not path.is_file():
            parser.error(f"{path}: no such file; --records and --tokenizer name them")


def device(name: str) -> str:
    """Refuse a GPU where torch has none."""
    if name == "cuda":
        import torch  # not where a start is timed

        if not torch.cuda.is_available():
            raise argparse.ArgumentTypeError("torch finds no CUDA device here")
    return name
