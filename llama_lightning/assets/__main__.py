"""`python -m llama_lightning.assets`: make the embedded tiny model again, from a seed.

Run it in a checkout. It writes tokenizer, data and config into the package, the base corpus into
lightning_logs/tiny/, trains the base with this project's own `fit` and puts its weights beside the
rest: half an hour on 2 cores.
"""

import argparse
import itertools
import json
import subprocess
import sys
from pathlib import Path

import torch

from llama_lightning.assets import TINY, TINY_HELDOUT, TINY_TRAIN, bpe, world
from llama_lightning.data.templates import ALPACA
from llama_lightning.model.config import PRESETS, config_to_huggingface
from llama_lightning.model.llama import Llama
from llama_lightning.training.checkpoint_io import read_checkpoint
from llama_lightning.weights.huggingface import CONFIG_FILE, save_huggingface

BASE_RECORDS = 320_000
RUNNING_ON_RECORDS = 25_600
# Where the vocabulary's pieces are counted: enough records to meet every one.
TOKENIZER_RECORDS = 30_000


def write_data(folder: Path, seed: int) -> None:
    """Write the Alpaca set, the tokenizer, the config, and the base corpus in two files."""
    train, heldout = world.alpaca_records(seed)
    base = list(world.base_records(seed + 1, BASE_RECORDS))
    texts = [r[key] for r in base[:TOKENIZER_RECORDS] for key in ("instruction", "output")]
    # The words of all skills, so that asking fewer of them leaves the tokenizer as it is.
    for record in itertools.chain(*world.alpaca_records(seed, asked_only=False)):
        texts += [ALPACA.format(record["instruction"], record["input"])]
        texts += [record["output"]]
    TINY.mkdir(exist_ok=True)
    config = PRESETS["tiny"]
    tokens = bpe.train(texts, config.vocab_size)
    bpe.write_tokenizer(TINY, tokens, config.max_position_embeddings)
    for path, records in ((TINY_TRAIN, train), (TINY_HELDOUT, heldout)):
        lines = ",\n".join(json.dumps(record, ensure_ascii=False) for record in records)
        path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    raw = json.dumps(config_to_huggingface(config, "float32"), indent=2)
    (TINY / CONFIG_FILE).write_text(raw + "\n", encoding="utf-8")
    folder.mkdir(parents=True, exist_ok=True)
    running_on = world.base_records(seed + 2, RUNNING_ON_RECORDS, running_on=True)
    for name, records in {"base": base, "running_on": list(running_on)}.items():
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def write_weights(checkpoint: Path) -> None:
    """Put a checkpoint's weights into the package, in bf16 as the real models are."""
    model = Llama(PRESETS["tiny"])
    state = read_checkpoint(checkpoint)["state_dict"]
    model.load_state_dict({k.removeprefix("model."): v for k, v in state.items()}, strict=False)
    save_huggingface(model.to(torch.bfloat16), TINY)


def main() -> None:
    """Make everything, or one stage of it."""
    parser = argparse.ArgumentParser(prog="python -m llama_lightning.assets", description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", choices=["data", "base", "running_on"], help="one stage alone")
    arguments = parser.parse_args()
    folder = Path("lightning_logs/tiny")
    if arguments.only in (None, "data"):
        write_data(folder, arguments.seed)
    # First the notes; then, shortly, notes that run on.
    stages = {
        "base": [],
        "running_on": [
            "--model.from_scratch=false",
            "--model.optimizer.lr=1e-3",
            f"--data.path={folder / 'running_on.jsonl'}",
        ],
    }
    for stage, changes in stages.items():
        if arguments.only in (None, stage):
            fit = [
                "fit",
                "--config=configs/tiny_base.yaml",
                f"--checkpoint.dirpath={folder / stage}",
            ]
            command = [sys.executable, "-m", "llama_lightning", *fit, *changes]
            subprocess.run(command, check=True)
            write_weights(folder / stage / "last.ckpt")


if __name__ == "__main__":
    main()
