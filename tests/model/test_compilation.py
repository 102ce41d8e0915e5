"""Compiled blocks compute what the others do, and few compilations serve all batches."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from llama_lightning.data.prefixes import find_prefixes
from llama_lightning.model import linear
from llama_lightning.model.block_runner import BlockRunner
from llama_lightning.model.compilation import compiled, missing_compiler
from llama_lightning.model.generate import generate
from llama_lightning.model.llama import Llama
from llama_lightning.model.lora import LoRAConfig, inject_lora
from llama_lightning.model.loss import summed_cross_entropy, supervised_positions
from llama_lightning.model.sampling import GenerationConfig
from llama_lightning.records import Prefixes, PromptBatch
from tests.model.oracle import (
    Flat,
    Record,
    flat_batch,
    random_records,
    randomise_lora,
    relative_difference,
    small_llama,
    supervised_hidden,
)

BOUND = 1e-5
NUM_RECORDS = (6, 2, 5, 1, 4, 3)


@pytest.fixture(autouse=True)
def _afresh() -> Iterator[None]:
    """No compilation of another test."""
    for forget in (torch._dynamo.reset, compiled.cache_clear, counters.clear):
        forget()
    yield
    torch._dynamo.reset()
    compiled.cache_clear()


def _without_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Capture graphs as ever, but run them as they are: the compiler proper takes a minute."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))


def _graphs() -> int:
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


def _model(kind: str) -> Llama:
    model = small_llama(std=0.05).train()
    if kind == "lora":
        inject_lora(model, LoRAConfig(rank=4), dtype=torch.float32)
        randomise_lora(model)
    return model


def _batches() -> list[tuple[Flat, Prefixes]]:
    """Six batches of different lengths, whose records begin alike."""
    begun = random_records([(12, 1)])[0].tokens
    lengths = [(7, 1), (20, 1), (2, 1), (31, 1), (11, 1), (9, 1)]
    records = [Record(torch.cat([begun, r.tokens]), 13) for r in random_records(lengths)]
    return [
        (flat_batch(some), find_prefixes([r.tokens.tolist() for r in some]))
        for some in (records[:n] for n in NUM_RECORDS)
    ]


def _steps(model: Llama, batches: list[tuple[Flat, Prefixes]]) -> list[Tensor]:
    """Losses and gradients of all batches."""
    found = []
    for batch, prefixes in batches:
        hidden = supervised_hidden(model, batch, prefixes)
        targets = batch.labels[supervised_positions(batch.labels)]
        loss = summed_cross_entropy(hidden, targets, model.lm_head)
        loss.backward()
        found += [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
        model.zero_grad()
    return found


def _worst(ours: list[Tensor], theirs: list[Tensor]) -> float:
    return max(relative_difference(a, b) for a, b in zip(ours, theirs, strict=True))


def _compare(kind: str) -> None:
    """Train and evaluate with and without compilation, in the same few graphs."""
    model, batches = _model(kind), _batches()
    names = list(model.state_dict())
    plain = _steps(model, batches)
    assert _graphs() == 0
    model.model.run_block = BlockRunner(compile=True)
    _steps(model, batches[:1])
    first = _graphs()
    modes: list[Any] = [False, "selective", True]
    for mode in modes:
        model.model.run_block = BlockRunner(mode, compile=True)
        worst = _worst(_steps(model, batches), plain)
        print(f"{kind}, {mode}: {_graphs()} graphs; worst of {len(plain)} {worst:.1e} ({BOUND})")
        assert worst <= BOUND
    # Of what is before attention and of what is behind: the first block, whose input has no
    # gradient beside LoRA, those between, and the last, of which some positions are wanted.
    assert 0 < first == _graphs() <= 5
    assert list(model.state_dict()) == names
    with torch.inference_mode():
        states = [supervised_hidden(model.eval(), batch, None) for batch, _ in batches]
        evaluation = _graphs() - first
        model.model.run_block = BlockRunner()
        worst = _worst(states, [supervised_hidden(model, batch, None) for batch, _ in batches])
    print(f"evaluation: {evaluation} graphs more, worst {worst:.1e}")
    assert evaluation <= 4
    assert worst <= BOUND


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_few_graphs_serve_all_layers_and_lengths(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _without_code(monkeypatch)
    _compare(kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_so_do_they_with_bf16_products_in_fp32(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "CPU_HAS_BF16", False)
    _without_code(monkeypatch)
    with torch.autocast("cpu", torch.bfloat16):
        _compare(kind)


@pytest.mark.slow  # a minute of compilation
@pytest.mark.skipif(missing_compiler("cpu") is not None, reason="no C++ compiler")
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_compiled_code_computes_the_same(kind: str) -> None:
    _compare(kind)


def test_answering_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    _without_code(monkeypatch)
    model = small_llama()
    prompts = PromptBatch(
        tokens=torch.tensor([1, 2, 3, 4, 5]),
        boundaries=torch.tensor([0, 3, 5]),
        row_ids=torch.arange(2),
        stop_ids=torch.full((2, 1), -1),
    )
    config = GenerationConfig(max_new_tokens=4)
    plain = list(generate(model, prompts, config))
    model.model.run_block = BlockRunner(compile=True)
    assert list(generate(model, prompts, config)) == plain
    assert _graphs() == 0
    model(torch.tensor([[1, 2, 3]]))
    assert _graphs() > 0


def test_a_compiler_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("CC", "sh")
    assert missing_compiler("cpu") == "no-such-compiler"
    assert missing_compiler("cuda") is None
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", "")
    assert missing_compiler("cuda") == "gcc or clang"
