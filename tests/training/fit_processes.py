"""Real `fit` processes that are stopped at any moment, and what they leave."""

import os
import signal
import time
from pathlib import Path

import torch

from tests.verb_processes import running

STEPS_AN_EPOCH = 13  # 102 records left in training, 8 a step: the last step is partial
EPOCHS = 3


def fit_arguments(workplace: Path, run: Path, every: int) -> list[str]:
    # Dropout in the network and in LoRA, accumulation, a validation inside the epoch, a partial
    # last step: each has its own way to make a resumed run differ. Rank 64 makes matrices of more
    # than 4096 elements, below which bitsandbytes keeps 32-bit state.
    pairs = {
        "model.base_model": workplace / "base",
        "model.base_dtype": "float32",
        "model.dropout": 0.1,
        "model.lora.rank": 64,
        "model.lora.dropout": 0.1,
        "model.optimizer.name": "adamw8bit",
        "model.optimizer.lr": 0.003,
        "model.optimizer.init_lr": 0.0,
        "model.optimizer.warmup": 0.2,
        "model.optimizer.eta_min": 0.0003,
        "data.path": workplace / "data.json",
        "data.template": "plain",  # alpaca's words are most of a step to a tokenizer of bytes
        "data.batch_size": 8,
        "data.val_fraction": 0.07,
        "data.test_fraction": 0.07,
        "trainer.max_epochs": EPOCHS,
        "trainer.accumulate_grad_batches": 2,
        "trainer.gradient_clip_val": 1.0,
        "trainer.val_check_interval": 9,  # odd: every other validation falls inside a step
        "trainer.accelerator": "cpu",
        "trainer.default_root_dir": run,
        "checkpoint.dirpath": run,
        "checkpoint.every_n_train_steps": every,
    }
    return [f"--{key}={value}" for key, value in pairs.items()]


def weights_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    return torch.load(checkpoint, weights_only=True)["state_dict"]


def run_fit(
    arguments: list[str],
    run: Path,
    kill_after: float | None = None,
    signum: int = signal.SIGKILL,
) -> float | None:
    """Start fit; send it a signal so many seconds after its first checkpoint.

    Return the seconds from the first checkpoint to the end, or None if the signal ended it.
    """
    with running(["fit", *arguments], run / "log.txt") as process:
        while not (run / "last.ckpt").exists() and process.is_alive():
            time.sleep(0.002)
        start = time.monotonic()
        process.join(kill_after)
        ended_by = 0
        if process.is_alive():
            os.kill(process.pid, signum)
            process.join(60)
            ended_by = -signum if signum == signal.SIGKILL else 128 + signum
        log = (run / "log.txt").read_text()
        assert process.exitcode in (0, ended_by), f"exit code {process.exitcode}\n{log}"
        return time.monotonic() - start if process.exitcode == 0 else None


def assert_bitwise_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different, f"{len(different)} of {len(one)} tensors differ, e.g. {different[0]}"
