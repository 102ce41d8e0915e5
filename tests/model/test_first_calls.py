"""The first pass of a process computes what every later one computes, bit for bit.

Each try is a process of its own, forked from one that has imported the package and computed
nothing: two threads then call a function of MKL for the first time at once. Without the call in
rope.py, 16 and 39 of 500 differed (2 cores of an Intel Xeon with AMX, otherwise idle).
"""

import os
import subprocess
import sys

import pytest

TRIES = 500

_PROGRAM = """
import os, sys
import torch
import llama_lightning.model.loss
from llama_lightning.model.rope import rope_tables

torch.set_num_threads(2)


def compute():
    cos, sin = rope_tables(torch.arange(448), torch.linspace(0.0, 1.0, 32))
    return cos, sin, torch.linspace(-9.0, 0.0, 48_000).exp_()  # which loss.py takes in place


def differs():
    first, _, later = (compute() for _ in range(3))
    return any(not torch.equal(a, b) for a, b in zip(first, later))


found = 0
for _ in range(int(sys.argv[1])):
    child = os.fork()
    if child == 0:
        os._exit(differs())
    found += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
print(found)
"""


@pytest.mark.slow  # 500 processes
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_first_pass_is_every_pass() -> None:
    command = [sys.executable, "-c", _PROGRAM, str(TRIES)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=100)
    print(f"of {TRIES} processes, the first pass was another in {int(done.stdout)}")
    assert int(done.stdout) == 0
