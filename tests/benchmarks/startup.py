"""`python -m tests.benchmarks.startup`: from the start of a process to the end of its first step.

One LoRA step (q, k, v, o; rank 16) of a few records on a checkpoint that is there, by this project
and by transformers with PEFT, each in a process of its own and in turn; the time of `--help`; and
of a process that tokenises one text. Both read the same safetensors in bf16 and the same tokens.
`--peer` measures one: wall and CPU time since its process began, as a JSON line.
"""

import argparse
import contextlib
import io
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.benchmarks import interleaved
from tests.benchmarks.inputs import DATA, SHORT, TOKENIZER
from tests.benchmarks.interleaved import (
    Job,
    Line,
    Part,
    Ratios,
    Runs,
    markdown,
    measurement,
    medians,
    ratio,
    two_digits,
)
from tests.benchmarks.machine import machine_name, memory, seconds_since_start

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
OURS, HF, HELP, TEXT = "llama_lightning", "hf", "help", "text"
SECONDS = ("wall_s", "cpu_s")
HEAVY = ("torch", "lightning", "transformers", "bitsandbytes", "tensorboard")


def show(args: argparse.Namespace) -> None:
    """Print what has passed since the process began, and what heavy packages it has imported."""
    seconds = {"wall_s": round(seconds_since_start(), 2), "cpu_s": round(time.process_time(), 2)}
    imported = [name for name in HEAVY if name in sys.modules]
    line = {"peer": args.peer, "mode": "startup", "shape": args.shape, **seconds}
    line |= {"imported": imported, "machine": machine_name("cpu"), **memory("cpu")}
    print(json.dumps(line), flush=True)


def ours(args: argparse.Namespace, folder: Path, cache: Path) -> None:
    """Fit for one step."""
    # First, as in the command line.
    from llama_lightning import LlamaModule, LoRAConfig, Trainer

    # isort: split
    from lightning.pytorch import Callback

    from tests.benchmarks.folded import FoldedData

    class Show(Callback):
        def on_train_batch_end(self, *_, **__):
            show(args)

    module = LlamaModule(
        base_model=str(folder), lora=LoRAConfig(rank=16, alpha=32, target_modules=TARGETS)
    )
    data = FoldedData(
        str(args.records),
        val_fraction=0.0,
        test_fraction=0.0,
        base_folder=str(folder),
        batch_size=args.batch,
        cache_dir=str(cache),  # empty: the records are tokenised, as the other peer does
    )
    data.vocab_size = vocab_size(folder)
    trainer = Trainer(
        accelerator="cpu",
        precision="bf16-mixed",
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=[Show()],
    )
    trainer.fit(module, datamodule=data)


def huggingface(args: argparse.Namespace, folder: Path, cache: Path) -> None:
    """The same by hand, with a padded batch."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    from llama_lightning.data.examples import encode_row
    from llama_lightning.data.rows import read_rows
    from llama_lightning.data.templates import TEMPLATES
    from llama_lightning.data.tokenizer import Tokenizer

    tokenizer, template = Tokenizer.from_path(folder), TEMPLATES["alpaca"]
    # The whole file, as ours does it too.
    encoded = [
        encode_row(row, tokenizer, template, max_seq_len=512) for row in read_rows(args.records)
    ]
    model = LlamaForCausalLM.from_pretrained(folder, dtype=getattr(torch, args.dtype))
    lora = LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = get_peft_model(model, lora).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    batch, size = encoded[: args.batch], vocab_size(folder)
    longest = max(len(e.tokens) for e in batch)
    ids, labels, mask = [], [], []
    for tokens, learnt, *_ in batch:
        pads = longest - len(tokens)
        folded = [token % size for token in tokens]
        ids.append(folded + [0] * pads)
        labels.append(
            [t if is_learnt else -100 for t, is_learnt in zip(folded, learnt, strict=True)]
        )
        labels[-1] += [-100] * pads
        mask.append([1] * len(tokens) + [0] * pads)
    model(
        input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask), labels=torch.tensor(labels)
    ).loss.backward()
    optimizer.step()
    show(args)


def print_help(args: argparse.Namespace, folder: Path, cache: Path) -> None:
    """Answer `python -m llama_lightning --help`."""
    from llama_lightning.cli import main

    with contextlib.redirect_stdout(io.StringIO()):
        main(["--help"])
    show(args)


def tokenize(args: argparse.Namespace, folder: Path, cache: Path) -> None:
    """Read the tokenizer and encode a text."""
    from llama_lightning.data.tokenizer import Tokenizer

    Tokenizer.from_path(folder).encode("The quick brown fox")
    show(args)


def vocab_size(folder: Path) -> int:
    """The shape's, which may be smaller than the tokenizer's."""
    return int(json.loads((folder / "config.json").read_text())["vocab_size"])


PEERS = {OURS: ours, HF: huggingface, HELP: print_help, TEXT: tokenize}


def groups(args: argparse.Namespace) -> dict[str, list[Job]]:
    """Name the measurements, and write the checkpoint that they read."""
    from tests.random_llama import kept_random_llama  # torch: not in the processes that are timed

    kept_random_llama(args.shape, args.data / TOKENIZER)
    flags = ["--shape", args.shape, "--records", args.data / SHORT, "--peer"]
    command = measurement("startup", flags)

    def job(peer: str) -> Job:
        if peer != HF:
            return Job(peer, [*command, peer])
        return Job(peer, [args.hf, *command[1:], peer, "--dtype", interleaved.peers_dtype(args)])

    return {"step": [job(OURS), job(HF)], "light": [job(HELP), job(TEXT)]}


def ratios(lines: Sequence[Line]) -> Ratios:
    """Divide our seconds by transformers'."""
    figures = medians(lines, SECONDS)
    if OURS not in figures or HF not in figures:
        return Ratios()
    return Ratios(*(ratio(figures[OURS][key], figures[HF][key]) for key in SECONDS))


def table(runs: Runs) -> list[str]:
    """Lay out medians and ratios to transformers."""
    titles = {
        OURS: "first LoRA step done",
        HF: "the same by transformers + PEFT",
        HELP: "`--help`",
        TEXT: "one text tokenised",
    }
    imported = {line["name"]: line.get("imported") for lines in runs.values() for line in lines}
    rows: list[list[object]] = []
    for lines in runs.values():
        for name, values in medians(lines, SECONDS).items():
            wall, cpu, _ = map(two_digits, ratios(lines) if name == OURS else Ratios())
            row = [titles[name], f"{values['wall_s']:.2f}", wall, f"{values['cpu_s']:.2f}", cpu]
            rows.append([*row, ", ".join(imported[name] or []) or "none of them"])
    head = ["what", "seconds", "to hf", "CPU seconds", "to hf", f"imports of {', '.join(HEAVY)}"]
    return markdown(head, rows)


PART = Part("startup", "Start-up", groups, table, on_gpu=False)


def main() -> None:
    """Measure one process, this one."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.startup", description=__doc__)
    parser.add_argument("--peer", choices=list(PEERS), required=True)
    parser.add_argument("--shape", default=interleaved.DEFAULT_SHAPE)
    parser.add_argument("--records", type=Path, default=DATA / SHORT)
    parser.add_argument("--batch", type=int, default=4, help="records in the step")
    parser.add_argument("--dtype", default="bfloat16", help="what transformers computes in")
    args = parser.parse_args()
    folder = Path(tempfile.gettempdir()) / "llama_lightning_benchmarks" / args.shape
    with tempfile.TemporaryDirectory() as cache:
        PEERS[args.peer](args, folder, Path(cache))


if __name__ == "__main__":
    if "--peer" in sys.argv:
        main()
    else:
        interleaved.main(PART, __doc__)
