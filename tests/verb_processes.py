"""Verbs in processes of their own, which tests can stop at any moment, and on two ranks.

Most are forked from a server that has imported what they need, so that a run costs a second and not
eight.
"""

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from llama_lightning.cli import main

IMPORTED = ["lightning.pytorch.cli", "llama_lightning.data.alpaca", "bitsandbytes", "pytest"]
IMPORTED += ["llama_lightning.training.trainer", "torch.utils.tensorboard"]
IMPORTED += ["llama_lightning.evaluation.grading", __name__]


def forked() -> BaseContext:
    """Choose processes that are forked from the one server of this process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    return context


def spawned() -> BaseContext:
    """Choose processes that import everything themselves, and end as Python ends."""
    return multiprocessing.get_context("spawn")


def on_two_ranks(arguments: list[str], timeout: int = 180) -> str:
    """Run a verb on two processes, which Lightning starts; what it prints."""
    command = [sys.executable, "-m", "llama_lightning", *arguments, "--trainer.devices=2"]
    root = Path(__file__).parents[1]
    # Whatever only one of two ranks waits for shows as a hang.
    result = subprocess.run(
        command, cwd=root, capture_output=True, text=True, check=False, timeout=timeout
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def _run(arguments: list[str], log: Path) -> None:
    """Run a verb in this process, which exists for nothing else."""
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    sys.exit(main(arguments))


@contextmanager
def running(
    arguments: list[str], log: Path, context: BaseContext | None = None
) -> Iterator[BaseProcess]:
    """Run a verb, its output at the end of a file, until it ends or the `with` does."""
    process = (context or forked()).Process(target=_run, args=(arguments, log))
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()
