"""Gradient checkpointing changes no number, and keeps less the more it computes again."""

import weakref
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llama_lightning.data.prefixes import find_prefixes
from llama_lightning.model import attention, checkpointing, linear
from llama_lightning.model.block_runner import BlockRunner
from llama_lightning.model.llama import Block, Llama
from llama_lightning.model.lora import LLAMA_LINEARS, LoRAConfig, inject_lora
from llama_lightning.model.loss import summed_cross_entropy, supervised_positions
from llama_lightning.records import Prefixes
from tests.levers import autograds_gate, autograds_norm
from tests.model.oracle import (
    SMALL,
    Flat,
    Record,
    flat_batch,
    max_difference,
    random_records,
    small_config,
    small_llama,
    supervised_hidden,
)
from tests.model.test_grid_attention import wide_by_autograd

KINDS = ["full", "lora", "biases"]
MODES: list[Any] = ["selective", True]


def _model(kind: str, dropout: float = 0.0, targets: int = 7) -> Llama:
    model = small_llama(small_config(qkv_bias=kind == "biases"), std=0.05).train()
    for block in model.model.layers:
        block.dropout = dropout  # the second run has to drop the same elements
    if kind == "lora":
        # The embedding is frozen then: no input of the first block asks for a gradient.
        config = LoRAConfig(rank=4, dropout=dropout, target_modules=LLAMA_LINEARS[:targets])
        inject_lora(model, config, dtype=torch.float32)
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.05)
    return model


def _batch() -> tuple[Flat, Prefixes]:
    """Records with a common beginning, and one without."""
    begun = random_records([(12, 1)])[0].tokens
    records = [Record(torch.cat([begun, r.tokens]), 13) for r in random_records([(9, 1), (30, 1)])]
    records += random_records([(14, 5)])
    return flat_batch(records), find_prefixes([r.tokens.tolist() for r in records])


def _step(
    model: Llama, batch: Flat, prefixes: Prefixes | None, monkeypatch: pytest.MonkeyPatch
) -> tuple[Counter[int], dict[str, Tensor]]:
    """Count how often each block runs in one step; collect the loss and the gradients."""
    calls: Counter[int] = Counter()
    forward = Block.forward

    def spy(self: Block, *args: Any) -> Tensor:
        calls[self.self_attn.layer] += 1
        return forward(self, *args)

    torch.manual_seed(5)
    with monkeypatch.context() as patch:
        patch.setattr(Block, "forward", spy)
        hidden = supervised_hidden(model, batch, prefixes)
        targets = batch.labels[supervised_positions(batch.labels)]
        loss = summed_cross_entropy(hidden, targets, model.lm_head)
        loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert len(found) == sum(p.requires_grad for p in model.parameters())
    model.zero_grad()
    return calls, {"loss": loss.detach(), **found}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16 in fp32"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
def test_each_block_runs_twice_and_no_bit_changes(
    mode: Any, kind: str, dropout: float, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _model(kind, dropout)
    batch, prefixes = _batch()
    shared = None if dropout else prefixes
    monkeypatch.setattr(linear, "CPU_HAS_BF16", precision == "bf16")
    with torch.autocast("cpu", torch.bfloat16, enabled=precision != "fp32"):
        once, plain = _step(model, batch, shared, monkeypatch)
        model.model.run_block = BlockRunner(mode)
        twice, checkpointed = _step(model, batch, shared, monkeypatch)
    layers = range(SMALL.num_hidden_layers)
    assert (once, twice) == (dict.fromkeys(layers, 1), dict.fromkeys(layers, 2))
    assert all(tensor.abs().max() > 0 for tensor in plain.values())
    worst = max(max_difference(checkpointed[name], plain[name]) for name in plain)
    print(f"{mode} {kind} {precision}: max |difference| of {len(plain)} tensors {worst:.1e}")
    assert worst == 0.0


class Alive(TorchDispatchMode):
    """Knows the memory of every result that is still held by someone; weights are no results."""

    def __init__(self, model: Llama) -> None:
        super().__init__()
        self.weights = {p.untyped_storage()._cdata for p in model.parameters()}
        self.storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.storages[storage._cdata] = weakref.ref(storage)
        return out

    def kib(self) -> float:
        held = (reference() for reference in self.storages.values())
        return (
            sum(s.nbytes() for s in held if s is not None and s._cdata not in self.weights) / 1024
        )


def _kept_kib(model: Llama, mode: Any) -> float:
    """What one forward pass leaves in memory for the backward pass."""
    model.model.run_block = BlockRunner(mode)
    batch, prefixes = _batch()
    with Alive(model) as alive, torch.autocast("cpu", torch.bfloat16):
        hidden = supervised_hidden(model, batch, prefixes)
        kib = alive.kib()
    hidden.sum().backward()
    return kib


# LoRA on the first 4 leaves the MLP frozen: then nobody keeps what goes into its matrices anyway.
@pytest.mark.parametrize(
    ("kind", "targets", "part"), [("full", 7, 0.75), ("lora", 7, 0.75), ("lora", 4, 0.87)]
)
def test_less_is_kept_the_more_is_computed_again(
    kind: str, targets: int, part: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _model(kind, targets=targets)
    model.bfloat16()
    none, selective, full = (_kept_kib(model, mode) for mode in (False, "selective", True))
    autograds_norm(monkeypatch.setattr)
    autograds_gate(monkeypatch.setattr)
    monkeypatch.setattr(attention, "over_grids", wide_by_autograd)
    autograds = _kept_kib(model, False)
    print(
        f"{kind}, {targets} targets: {none:.0f}, selective {selective:.0f}, full {full:.0f} KiB; "
        f"with autograd's backward passes of attention, norm and gate {autograds:.0f}"
    )
    assert selective < part * none
    assert selective < 0.6 * autograds
    assert none < 0.7 * autograds
    assert full < 0.5 * selective


@pytest.mark.parametrize("bf16", [False, True])
def test_selective_keeps_wide_products(bf16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is called dear is not computed twice; LoRA's product by B and attention are.

    Of the kernels of attention only a GPU's are called dear.
    """
    ran: Counter[str] = Counter()

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            common = {"aten.mm.default": 0, "llama_lightning.product_in_fp32.default": 1}
            dimension = common.get(str(func))
            narrow = dimension is not None and args[1].shape[dimension] < checkpointing.MIN_COMMON
            ran[f"{func}{' narrow' if narrow else ''}"] += 1
            return func(*args, **(kwargs or {}))

    monkeypatch.setattr(linear, "CPU_HAS_BF16", False)
    model = _model("lora", targets=4)
    batch, _ = _batch()

    def count(mode: Any) -> Counter[str]:
        model.model.run_block = BlockRunner(mode)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            hidden = supervised_hidden(model, batch, None)
            ran.clear()
            with Count():
                hidden.sum().backward()
        return ran.copy()

    none, selective, full = (count(mode) for mode in (False, "selective", True))
    flash = "aten._scaled_dot_product_flash_attention_for_cpu.default"
    product = "llama_lightning.product_in_fp32.default" if bf16 else "aten.mm.default"
    names = (product, f"{product} narrow", flash, "aten.rsqrt.default")
    for name in names:
        print(f"{name}: {none[name]}, selective {selective[name]}, full {full[name]} in backward")
    wide, narrow, flash, norm = names
    assert selective[wide] == none[wide] < full[wide]
    assert selective[flash] == full[flash] > none[flash] == 0
    for kernel in ("flash", "efficient", "cudnn"):
        packet = getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}_attention")
        assert checkpointing._is_dear(packet.default, ())
    assert selective[narrow] > none[narrow]
    assert selective[norm] == full[norm] == 2 * SMALL.num_hidden_layers > none[norm] == 0


def test_nothing_is_checkpointed_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("checkpointed without a gradient to compute")

    monkeypatch.setattr("llama_lightning.model.checkpointing.checkpoint", fail)
    model = small_llama()
    model.model.run_block = BlockRunner(True)
    with torch.no_grad():
        model(torch.randint(SMALL.vocab_size, (1, 4)))
    with pytest.raises(AssertionError, match="checkpointed"):
        model(torch.randint(SMALL.vocab_size, (1, 4)))
