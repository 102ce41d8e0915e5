"""Memory by part is counted from the tensors that are there."""

import pytest
import torch
from torch import nn

from llama_lightning.training.memory import gradients_gib, memory_parts
from llama_lightning.training.optim import OptimizerConfig, build_optimizer

GIB = 2**30


def _step(name: str) -> dict[str, float]:
    model = nn.Sequential(nn.Linear(256, 512, bias=False), nn.Linear(512, 256, bias=False))
    model[0].requires_grad_(False)
    optimizer = build_optimizer(model, OptimizerConfig(name=name))
    model(torch.randn(4, 256)).sum().backward()
    gradients = gradients_gib(model)
    optimizer.step()
    return memory_parts(model, optimizer, gradients)


@pytest.mark.parametrize(
    ("name", "bytes_a_weight"), [("adamw", 8), ("adamw8bit", 2), ("paged_adamw8bit", 2)]
)
def test_parts_by_hand(name: str, bytes_a_weight: int) -> None:
    weights = 256 * 512
    parts = _step(name)
    assert parts["frozen_weights"] * GIB == weights * 4
    assert parts["trained_weights"] * GIB == weights * 4
    assert parts["gradients"] * GIB == weights * 4
    state = parts["optimizer_state"] * GIB / weights
    print(f"{name}: {state:.2f} bytes of optimizer state a weight")
    # Besides the moments: a step count, or 8-bit blocks' scales and tables.
    assert bytes_a_weight <= state < bytes_a_weight + 0.1
