"""Loss and LoRA gradients are those of transformers with PEFT, batched and one by one."""

import copy
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llama_lightning.model import loss as loss_module
from llama_lightning.model.linear import TILE
from llama_lightning.model.llama import Llama
from llama_lightning.model.lora import LoRAConfig, LoRALinear, inject_lora
from llama_lightning.model.loss import loss_and_hits, summed_cross_entropy, supervised_positions
from llama_lightning.records import IGNORE_INDEX
from tests.model.oracle import (
    SMALL,
    Flat,
    Record,
    flat_batch,
    huggingface_twin,
    lora_parameters,
    padded_batch,
    peft_twin,
    random_records,
    randomise_lora,
    relative_difference,
    small_config,
    small_llama,
    without_fp32_casts,
)

LORA = LoRAConfig(rank=8, alpha=16.0)
# float64 shows what rounding hides in fp32: an error of meaning is above both bounds.
BOUNDS = {torch.float32: 1e-5, torch.float64: 1e-9}
# (length, prompt): a long and a short one side by side, one without a prompt beyond its first
# token, and one whose last token alone carries loss.
SHAPES = [(40, 17), (5, 2), (64, 1), (23, 22), (31, 12)]


@pytest.fixture(params=list(BOUNDS), ids=["fp32", "float64"])
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    if request.param == torch.float64:
        without_fp32_casts(monkeypatch)
    return request.param


def _model(dtype: torch.dtype) -> Llama:
    model = small_llama(std=0.05).to(dtype)
    inject_lora(model, LORA, dtype=dtype)
    return model


def _gradients(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    """Gradients of A and B; nothing else may have one."""
    model.zero_grad()
    loss.backward()
    parameters = lora_parameters(model)
    trained = {id(p) for p in parameters.values()}
    assert all(p.grad is None for p in model.parameters() if id(p) not in trained)
    gradients = {name: p.grad for name, p in parameters.items()}
    assert all(g is not None and g.abs().max() > 0 for g in gradients.values())
    return gradients


def _loss(model: Llama, batch: Flat) -> Tensor:
    learnt = supervised_positions(batch.labels)
    hidden = model.model(
        batch.tokens, positions=batch.positions, boundaries=batch.boundaries, wanted=learnt
    )
    return summed_cross_entropy(hidden, batch.labels[learnt], model.lm_head)


def _num_targets(records: Sequence[Record]) -> int:
    return sum(len(r.tokens) - r.num_prompt for r in records)


def _worst(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    return max(relative_difference(ours[name], theirs[name]) for name in ours)


def _oracle(
    model: Llama, lora: dict[str, Tensor], records: Sequence[Record]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean loss and gradients of transformers with PEFT on the padded batch."""
    base = small_llama(std=0.05).to(next(model.parameters()).dtype)
    base.load_state_dict(
        {k.replace("base_layer.", ""): v for k, v in model.state_dict().items() if k not in lora}
    )
    oracle = peft_twin(huggingface_twin(base), LORA, lora)
    batch = padded_batch(records)
    out = oracle(**batch, use_cache=False)
    loss = out.loss
    if out.logits.dtype == torch.float64:  # its own loss goes through float32
        loss = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    return loss, _gradients(loss, oracle)


def test_loss_and_lora_gradients_equal_peft(dtype: torch.dtype) -> None:
    model, records = _model(dtype), random_records(SHAPES)
    lora = randomise_lora(model)
    loss = _loss(model, flat_batch(records)) / _num_targets(records)
    ours = _gradients(loss, model)
    oracle_loss, theirs = _oracle(model, lora, records)
    loss_error = relative_difference(loss.detach(), oracle_loss.detach().to(dtype))
    worst = _worst(ours, theirs)
    print(
        f"{dtype}: loss {loss.item():.4f}, relative difference {loss_error:.1e}; worst of "
        f"{len(ours)} gradients {worst:.1e} (bound {BOUNDS[dtype]:.0e})"
    )
    assert loss_error <= BOUNDS[dtype]
    assert worst <= BOUNDS[dtype]


def test_a_batch_equals_its_records_one_by_one(dtype: torch.dtype) -> None:
    model, records = _model(dtype), random_records(SHAPES)
    randomise_lora(model)
    loss = _loss(model, flat_batch(records))
    together = _gradients(loss, model)
    single_loss = torch.stack([_loss(model, flat_batch([record])) for record in records]).sum()
    apart = _gradients(single_loss, model)
    loss_error = relative_difference(loss.detach(), single_loss.detach())
    worst = _worst(together, apart)
    print(f"{dtype}: loss {loss_error:.1e}, worst gradient {worst:.1e} (bound {BOUNDS[dtype]:.0e})")
    assert loss_error <= BOUNDS[dtype]
    assert worst <= BOUNDS[dtype]


def _no_boundaries(batch: Flat) -> Flat:
    return batch._replace(boundaries=torch.tensor([0, len(batch.tokens)]))


def _stretched(batch: Flat) -> Flat:
    # Positions that only failed to restart would not show: attention sees how far tokens are apart.
    return batch._replace(positions=batch.positions * 2)


def _unshifted(batch: Flat) -> Flat:
    return batch._replace(labels=batch.labels.roll(1))


def _across_records(batch: Flat) -> Flat:
    labels = batch.labels.clone()
    labels[batch.boundaries[1] - 1] = batch.tokens[batch.boundaries[1]]
    return batch._replace(labels=labels)


BROKEN = {
    "no boundaries": _no_boundaries,
    "stretched positions": _stretched,
    "labels not shifted": _unshifted,
    "a label across records": _across_records,
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_wrong_batch_fails_the_comparison(name: str) -> None:
    model, records = _model(torch.float32), random_records(SHAPES)
    lora = randomise_lora(model)
    _, theirs = _oracle(model, lora, records)
    loss = _loss(model, BROKEN[name](flat_batch(records))) / _num_targets(records)
    worst = _worst(_gradients(loss, model), theirs)
    print(f"{name}: worst gradient {worst:.1e} (bound {BOUNDS[torch.float32]:.0e})")
    assert worst > 100 * BOUNDS[torch.float32]


def _plain_loss(model: Llama, batch: Flat) -> Tensor:
    """Everything everywhere: all logits at once, and autograd's own gradient."""
    logits = model(batch.tokens, positions=batch.positions, boundaries=batch.boundaries)
    return F.cross_entropy(logits, batch.labels, ignore_index=IGNORE_INDEX, reduction="sum")


def test_a_frozen_heads_loss_in_chunks_has_the_plain_gradient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("llama_lightning.model.loss.CHUNK", 40)  # not a multiple of the rows
    head = nn.Linear(8, 50, bias=False, dtype=torch.float64).requires_grad_(False)
    hidden = torch.randn(300, 8, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(50, (300,))
    loss = summed_cross_entropy(hidden, targets, head)
    (loss / 7).backward()
    expected = F.cross_entropy(head(hidden), targets, reduction="sum")
    (gradient,) = torch.autograd.grad(expected / 7, hidden)
    errors = relative_difference(loss, expected), relative_difference(hidden.grad, gradient)
    print(f"loss {errors[0]:.1e}, gradient {errors[1]:.1e} (bound 1e-9)")
    assert max(errors) <= 1e-9


@pytest.mark.parametrize("chunk", [1, 7, 100, 10_000])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_loss_in_chunks_has_the_plain_gradient_in_full_fine_tuning(
    tied: bool, chunk: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llama_lightning.model.loss.CHUNK", chunk)
    model = small_llama(small_config(tie_word_embeddings=tied), std=0.05).to(dtype)
    batch = flat_batch(random_records(SHAPES))
    losses, gradients = [], []
    for compute in (_loss, _plain_loss):
        model.zero_grad()
        loss = compute(model, batch)
        (loss / 3).backward()  # the gradient formed at once has to be scaled afterwards
        losses.append(loss.detach())
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    loss_error, worst = relative_difference(*losses), _worst(*gradients)
    print(f"{dtype}, chunks of {chunk}: loss {loss_error:.1e}, worst gradient {worst:.1e}")
    assert loss_error <= BOUNDS[dtype]
    assert worst <= BOUNDS[dtype]


def test_the_loss_in_chunks_trains_a_head_with_lora_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama_lightning.model.loss.CHUNK", 128)
    head = LoRALinear(nn.Linear(8, 50, bias=False), LORA, torch.float32).double()
    head.base_layer.requires_grad_(False)
    nn.init.normal_(head.lora_B.weight)
    hidden = torch.randn(300, 8, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(50, (300,))
    summed_cross_entropy(hidden, targets, head).backward()
    trained = [hidden, head.lora_A.weight, head.lora_B.weight]
    found = [tensor.grad for tensor in trained]
    expected = torch.autograd.grad(F.cross_entropy(head(hidden), targets, reduction="sum"), trained)
    worst = max(relative_difference(*pair) for pair in zip(found, expected, strict=True))
    print(f"worst gradient {worst:.1e} (bound 1e-9)")
    assert head.base_layer.weight.grad is None
    assert worst <= 1e-9


def _rows_seen(module: nn.Module) -> list[int]:
    seen: list[int] = []
    module.register_forward_pre_hook(lambda _, args: seen.append(args[0].numel()))
    return seen


def test_only_supervised_positions_meet_the_head_and_the_last_mlp(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("llama_lightning.model.loss.CHUNK", 32)
    model, batch = small_llama(), flat_batch(random_records(SHAPES))
    num_targets = sum(length - prompt for length, prompt in SHAPES)
    head = _rows_seen(model.lm_head)
    blocks = [_rows_seen(block.mlp) for block in model.model.layers]
    output = _rows_seen(model.model.layers[-1].self_attn.o_proj)
    _loss(model, batch).backward()
    width = SMALL.hidden_size
    assert num_targets < len(batch.tokens)
    rows = [n // width for n in head]
    assert sum(rows) == num_targets
    assert len(rows) == math.ceil(num_targets / 32) > 1
    assert max(rows) - min(rows) <= 1
    assert blocks == [[len(batch.tokens) * width], [num_targets * width]]
    assert output == [num_targets * SMALL.num_attention_heads * SMALL.head_dim]


@pytest.mark.parametrize("count", [1, 15, 16, 17, 100])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_rows_that_are_filled_up_change_no_number(
    trained: bool, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llama_lightning.model.loss.CHUNK", 64)
    head = nn.Linear(8, 50, bias=False, dtype=torch.float64).requires_grad_(trained)
    states = torch.randn(count, 8, dtype=torch.float64)
    targets = torch.randint(50, (count,))
    rows, found = _rows_seen(head), []
    for fills_up in (False, True):
        monkeypatch.setattr(loss_module, "fills_up_rows", lambda weight, filled=fills_up: filled)
        head.zero_grad()
        hidden = states.clone().requires_grad_()
        loss = summed_cross_entropy(hidden, targets, head)
        loss.backward()
        evaluated, hits = loss_and_hits(states, targets, head)
        found.append([loss.detach(), hidden.grad, evaluated, hits.double()])
        found[-1] += [head.weight.grad.clone()] if trained else []
    plain, filled = (rows[: len(rows) // 2], rows[len(rows) // 2 :])
    assert sum(plain) == 2 * 8 * count
    assert [-(-n // (8 * TILE)) * 8 * TILE for n in plain] == filled
    worst = max(map(relative_difference, *found))
    print(f"{count} rows: worst difference {worst:.1e}")
    assert worst <= 1e-12


def test_evaluation_sums_the_loss_and_counts_hits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama_lightning.model.loss.CHUNK", 4)
    head = nn.Linear(8, 5, bias=False)
    hidden, targets = torch.randn(10, 8), torch.randint(5, (10,))
    loss, hits = loss_and_hits(hidden, targets, head)
    logits = head(hidden)
    expected = F.cross_entropy(logits, targets, reduction="sum").detach()
    assert relative_difference(loss, expected) <= 1e-6
    assert int(hits) == sum(
        int(row.argmax()) == int(t) for row, t in zip(logits, targets, strict=True)
    )


@pytest.mark.parametrize(
    ("stored", "computed"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_the_loss_is_fp32_at_least(stored: torch.dtype, computed: torch.dtype) -> None:
    head = nn.Linear(8, 5, bias=False, dtype=stored)
    hidden = torch.randn(3, 8, dtype=stored, requires_grad=True)
    loss = summed_cross_entropy(hidden, torch.tensor([1, 2, 3]), head)
    loss.backward()
    assert loss.dtype == computed
    assert hidden.grad is not None
    assert hidden.grad.dtype == stored


def test_chunks_hardly_round_a_16_bit_heads_gradient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    head = nn.Linear(64, 50, bias=False, dtype=torch.bfloat16)
    hidden = torch.randn(512, 64, dtype=torch.bfloat16)
    targets = torch.randint(50, (512,))
    exact = copy.deepcopy(head).double()
    summed_cross_entropy(hidden.double(), targets, exact).backward()
    errors = []
    for chunk in (512, 4):
        monkeypatch.setattr("llama_lightning.model.loss.CHUNK", chunk)
        head.zero_grad()
        summed_cross_entropy(hidden, targets, head).backward()
        errors.append(relative_difference(head.weight.grad.double(), exact.weight.grad))
    print(f"bf16 head: gradient {errors[0]:.1e} off at once, {errors[1]:.1e} in 128 chunks")
    assert errors[1] <= 1.5 * errors[0]


def test_no_label_at_all_is_a_loss_of_zero() -> None:
    model = _model(torch.float32)
    batch = flat_batch(random_records([(6, 3)]))
    loss = _loss(model, batch._replace(labels=torch.full_like(batch.labels, IGNORE_INDEX)))
    loss.backward()
    assert loss.item() == 0.0
    assert all((p.grad == 0).all() for p in lora_parameters(model).values())
