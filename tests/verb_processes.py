"""Verbs in processes of their own, which tests can stop at any moment.

They are forked from a server that has imported everything, so that a run costs a second and not
eight.
"""

import multiprocessing
import os
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from llama_lightning.cli import main

IMPORTED = ["lightning.pytorch.cli", "llama_lightning.data.alpaca", "bitsandbytes"]
IMPORTED += ["llama_lightning.training.trainer", "torch.utils.tensorboard", __name__]


def _run(arguments: list[str], log: Path) -> None:
    """Run a verb in this process, which exists for nothing else."""
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    code = main(arguments)
    sys.stdout.flush()
    os._exit(code)


def start_verb(arguments: list[str], log: Path) -> BaseProcess:
    """Start a verb whose output goes to the end of a file."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    process = context.Process(target=_run, args=(arguments, log))
    process.start()
    return process
