"""What runs are started from, and the run that nobody stops."""

import json
import random

import pytest
import torch

from tests.small import write_byte_tokenizer, write_small_llama
from tests.training.fit_processes import (
    EPOCHS,
    STEPS_AN_EPOCH,
    fit_arguments,
    run_fit,
    weights_of,
)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A base model and 118 records of unequal length."""
    folder = tmp_path_factory.mktemp("resume")
    write_small_llama(folder / "base", vocab_size=512)
    write_byte_tokenizer(folder / "base")
    rng = random.Random(0)
    records = [
        {
            "instruction": f"question {i}",
            "input": "",
            "output": "".join(rng.choices("abcdef", k=rng.randint(1, 40))),
        }
        for i in range(118)
    ]
    (folder / "data.json").write_text(json.dumps(records))
    return folder


@pytest.fixture(scope="module")
def uninterrupted(workplace, tmp_path_factory):
    """Final weights of a run that nobody killed, and its seconds behind the first checkpoint."""
    run = tmp_path_factory.mktemp("uninterrupted")
    seconds = run_fit(fit_arguments(workplace, run, 1), run)
    checkpoint = torch.load(run / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == STEPS_AN_EPOCH * EPOCHS
    states = checkpoint["optimizer_states"][0]["state"].values()
    # bitsandbytes keeps its quantised moments in a dictionary of its own.
    moments = [s.get("__bnb_optimizer_quant_state__", s)["state1"].dtype for s in states]
    assert torch.uint8 in moments, f"no 8-bit state in this test: {set(moments)}"
    return weights_of(run / "last.ckpt"), seconds, run / "last.ckpt"
