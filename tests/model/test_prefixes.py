"""Computing equal beginnings of records once changes the cost and no number."""

import pytest
import torch
from torch import Tensor

from llama_lightning.data.prefixes import find_prefixes
from llama_lightning.model import linear, llama
from llama_lightning.model.block_runner import BlockRunner
from llama_lightning.model.linear import ROW_MULTIPLE
from llama_lightning.model.llama import Llama
from llama_lightning.model.lora import LoRAConfig, inject_lora
from llama_lightning.model.loss import summed_cross_entropy, supervised_positions
from llama_lightning.records import Prefixes
from tests.model.oracle import (
    SMALL,
    Flat,
    Record,
    flat_batch,
    max_difference,
    randomise_lora,
    relative_difference,
    small_llama,
)

BOUNDS = {torch.float32: 1e-5, torch.float64: 1e-9}


def _records() -> list[Record]:
    """Two templates with their own beginnings behind one they share, and the rare cases."""

    def tokens(n: int) -> Tensor:
        return torch.randint(SMALL.vocab_size, (n,))

    header, one, other = tokens(9), tokens(12), tokens(5)
    records = [
        Record(torch.cat([header, template, tokens(n)]), len(header) + len(template) + 1)
        for template, n in [(one, 7), (other, 3), (one, 20), (one, 2), (other, 11)]
    ]
    records.append(records[0])  # the same record again
    records.append(Record(records[2].tokens[:30], 22))  # the beginning of another record
    # The prompt is learnt too: one token stands for others with labels of their own.
    records.append(Record(torch.cat([header[:6], tokens(4)]), 1))
    records.append(Record(tokens(8), 3))  # nothing shared
    return records


def _prefixes(batch: Flat) -> Prefixes:
    bounds = batch.boundaries.tolist()
    rows = [batch.tokens[a:b].tolist() for a, b in zip(bounds, bounds[1:], strict=False)]
    return find_prefixes(rows)


def _step(model: Llama, batch: Flat, prefixes: Prefixes | None) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    learnt = supervised_positions(batch.labels)
    hidden = model.model(
        batch.tokens,
        positions=batch.positions,
        boundaries=batch.boundaries,
        prefixes=prefixes,
        wanted=learnt,
    )
    loss = summed_cross_entropy(hidden, batch.labels[learnt], model.lm_head)
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert len(gradients) == sum(p.requires_grad for p in model.parameters())
    return loss.detach(), gradients


def _difference(model: Llama, batch: Flat, prefixes: Prefixes) -> tuple[float, float]:
    """Relative differences of the loss and of the worst gradient to the plain path."""
    loss, gradients = _step(model, batch, prefixes)
    plain_loss, plain = _step(model, batch, None)
    worst = max(relative_difference(gradients[name], plain[name]) for name in plain)
    return relative_difference(loss, plain_loss), worst


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_loss_and_gradients_are_those_of_each_record_apart(
    dtype: torch.dtype, kind: str, checkpointing: bool
) -> None:
    model = small_llama(std=0.05).to(dtype)
    if kind == "lora":
        inject_lora(model, LoRAConfig(rank=8), dtype=dtype)
        randomise_lora(model)
    model.model.run_block = BlockRunner(checkpointing)
    batch = flat_batch(_records())
    prefixes = _prefixes(batch)
    loss_error, worst = _difference(model, batch, prefixes)
    print(
        f"{dtype} {kind}: {len(prefixes.distinct)} of {len(batch.tokens)} tokens computed; loss "
        f"{loss_error:.1e}, worst gradient {worst:.1e} (bound {BOUNDS[dtype]:.0e})"
    )
    assert len(prefixes.distinct) < 0.6 * len(batch.tokens)
    assert loss_error <= BOUNDS[dtype]
    assert worst <= BOUNDS[dtype]


@pytest.mark.parametrize("shared", [False, True], ids=["apart", "shared"])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_rows_that_are_filled_up_change_no_number(
    kind: str, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_llama(std=0.05).double()
    if kind == "lora":
        inject_lora(model, LoRAConfig(rank=8), dtype=torch.float64)
        randomise_lora(model)
    batch = flat_batch(_records())
    prefixes = _prefixes(batch) if shared else None
    given = {"positions": batch.positions, "boundaries": batch.boundaries, "prefixes": prefixes}
    numbers: list[int] = []
    for layer in model.model.layers:
        layer.mlp.gate_proj.register_forward_hook(lambda _, args, out: numbers.append(len(out)))
    found = []
    for fills_up in (False, True):
        monkeypatch.setattr(llama, "fills_up_rows", lambda weight, filled=fills_up: filled)
        loss, gradients = _step(model, batch, prefixes)
        found.append({"loss": loss, "hidden": model.model(batch.tokens, **given), **gradients})
    half = len(numbers) // 2
    print(f"rows of each layer: {numbers[:half]}, filled up {numbers[half:]}")
    assert any(number % ROW_MULTIPLE for number in numbers[:half])
    assert not any(number % ROW_MULTIPLE for number in numbers[half:])
    plain, filled = found
    worst = max(relative_difference(filled[name], plain[name]) for name in plain)
    print(f"{kind}: worst difference {worst:.1e}")
    assert filled["hidden"].shape == plain["hidden"].shape == (len(batch.tokens), SMALL.hidden_size)
    assert worst <= 1e-12


def test_only_bf16_on_a_cpu_with_instructions_for_it_is_filled_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    narrow, wide, double = (torch.empty(1, dtype=d) for d in (torch.bfloat16, *BOUNDS))
    monkeypatch.setattr(linear, "CPU_HAS_BF16", True)
    assert linear.fills_up_rows(narrow)
    assert not linear.fills_up_rows(wide)
    assert not linear.fills_up_rows(narrow.to("meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear.fills_up_rows(wide)
        assert not linear.fills_up_rows(double)
    monkeypatch.setattr(linear, "CPU_HAS_BF16", False)
    assert not linear.fills_up_rows(narrow)


def _too_much(batch: Flat, prefixes: Prefixes) -> Prefixes:
    # The last token of the first template is taken for the other's, four tokens earlier.
    representative = prefixes.representative.clone()
    start = int(batch.boundaries[1])
    representative[start + 13] = representative[20]
    return prefixes._replace(representative=representative)


def _one_late(batch: Flat, prefixes: Prefixes) -> Prefixes:
    # Each stands for the token before it.
    return prefixes._replace(representative=(prefixes.representative - 1).clamp(min=0))


def _wrong_first(batch: Flat, prefixes: Prefixes) -> Prefixes:
    # A token with other tokens before it is computed in place of the first.
    distinct = prefixes.distinct.clone()
    distinct[10] = batch.boundaries[1] + 10
    return prefixes._replace(distinct=distinct)


@pytest.mark.parametrize("broken", [_too_much, _one_late, _wrong_first])
def test_sharing_what_differs_fails_the_comparison(broken) -> None:
    model, batch = small_llama(std=0.05), flat_batch(_records())
    loss_error, worst = _difference(model, batch, broken(batch, _prefixes(batch)))
    print(f"loss {loss_error:.1e}, worst gradient {worst:.1e} (bound {BOUNDS[torch.float32]:.0e})")
    assert worst > 100 * BOUNDS[torch.float32]


def test_hidden_states_come_back_for_every_token_or_for_the_wanted() -> None:
    model, batch = small_llama().double(), flat_batch(_records())
    place = {"positions": batch.positions, "boundaries": batch.boundaries}
    wanted = torch.tensor([3, 70, 3, len(batch.tokens) - 1])
    with torch.no_grad():
        plain = model.model(batch.tokens, **place)
        shared = model.model(batch.tokens, **place, prefixes=_prefixes(batch))
        some = model.model(batch.tokens, **place, wanted=wanted)
    difference = max(max_difference(shared, plain), max_difference(some, plain[wanted]))
    print(f"max |difference| {difference:.1e} (bound 1e-11)")
    assert difference <= 1e-11


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_gradients_of_the_wanted_are_those_of_the_whole_last_layer(kind: str) -> None:
    model, batch = small_llama(std=0.05).double(), flat_batch(_records())
    if kind == "lora":
        inject_lora(model, LoRAConfig(rank=8), dtype=torch.float64)
        randomise_lora(model)
    place = {"positions": batch.positions, "boundaries": batch.boundaries}
    wanted = torch.tensor([3, 70, 3, len(batch.tokens) - 1])
    weights = torch.randn(len(wanted), SMALL.hidden_size, dtype=torch.float64)
    found = []
    for hidden in (
        model.model(batch.tokens, **place)[wanted],
        model.model(batch.tokens, **place, wanted=wanted),
    ):
        model.zero_grad()
        (hidden * weights).sum().backward()
        found.append({n: p.grad for n, p in model.model.named_parameters() if p.requires_grad})
    whole, some = found
    worst = max(relative_difference(some[name], whole[name]) for name in whole)
    print(f"{kind}: worst relative difference of {len(whole)} gradients {worst:.1e} (bound 1e-12)")
    assert worst <= 1e-12
