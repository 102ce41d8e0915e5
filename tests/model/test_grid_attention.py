"""Attention over grids on a CPU gives autograd's gradients, and keeps what came in and went out."""

import pytest
import torch
from torch import Tensor

from llama_lightning.data.prefixes import find_prefixes
from llama_lightning.model import grid_attention, ragged_rows
from llama_lightning.model.grid_attention import by_autograd, over_grids
from llama_lightning.model.ragged_rows import RaggedRows
from tests.model.oracle import max_difference, relative_difference

HEADS, KV_HEADS, SIZE = 4, 2, 8
TOKENS = [[1, 2, 3, 4], [1, 2, 5, 6, 7, 8], [1, 2, 3], [9], [1, 2, 5, 6, 8]]

shares = pytest.mark.parametrize("own", [False, True], ids=["all queries", "own queries"])


def wide_by_autograd(q: Tensor, k: Tensor, v: Tensor, rows: RaggedRows) -> Tensor:
    """Attend in fp32 at least, as our kernel does."""
    wide = torch.promote_types(q.dtype, torch.float32)
    return by_autograd(q.to(wide), k.to(wide), v.to(wide), rows).to(q.dtype)


def _rows(own: bool, monkeypatch: pytest.MonkeyPatch) -> RaggedRows:
    monkeypatch.setattr(ragged_rows, "MAX_OWN", float(own))
    prefixes = find_prefixes(TOKENS)
    boundaries = torch.tensor([0, *map(len, TOKENS)]).cumsum(0)
    rows = ragged_rows.ragged_rows(boundaries, prefixes)
    assert any(grid.mask is not None for grid in rows.grids) == own
    assert len(rows.grids) > 1
    return rows


def _operands(rows: RaggedRows, dtype: torch.dtype) -> list[Tensor]:
    assert rows.prefixes is not None
    heads = HEADS, KV_HEADS, KV_HEADS
    num = len(rows.prefixes.distinct)
    return [torch.randn(num, n, SIZE).to(dtype).requires_grad_() for n in heads]


@shares
def test_gradients_are_those_of_finite_differences(
    own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = _rows(own, monkeypatch)
    q, k, v = _operands(rows, torch.float64)
    assert torch.autograd.gradcheck(lambda *qkv: over_grids(*qkv, rows), (q, k, v))
    assert torch.autograd.gradcheck(lambda q: over_grids(q, k.detach(), v.detach(), rows), (q,))


@shares
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_and_gradients_are_autograds(
    dtype: torch.dtype, own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = _rows(own, monkeypatch)
    operands = _operands(rows, dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        out, expected = over_grids(*operands, rows), wide_by_autograd(*operands, rows)
    assert out.dtype == dtype
    assert max_difference(out, expected) == 0.0
    gradient = torch.randn_like(out)
    found = torch.autograd.grad(out, operands, gradient)
    wanted = torch.autograd.grad(expected, operands, gradient)
    worst = max(map(relative_difference, found, wanted))
    print(f"{dtype}: worst relative difference of a gradient {worst:.1e}")
    # In 16 bits what went out is rounded, of which the backward pass takes a sum over each head.
    assert worst < (1e-6 if dtype == torch.float32 else 8e-3)
    assert [tensor.dtype for tensor in found] == [dtype] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_torch_without_groups_takes_autograds(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = _rows(True, monkeypatch)
    operands = _operands(rows, dtype)
    expected = over_grids(*operands, rows)
    monkeypatch.setattr(grid_attention, "CPU_HAS_GROUPS", False)
    found = over_grids(*operands, rows)
    assert "_Flash" in type(expected.grad_fn).__name__
    assert "_Flash" not in type(found.grad_fn).__name__
    assert torch.equal(found, expected)


@shares
def test_pads_of_a_batch_add_nothing(own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What fills a batch up stands for its first cell, whose gradient must not be lost."""
    rows = _rows(own, monkeypatch)
    q, k, v = _operands(rows, torch.float64)
    filled = rows._replace(from_queries=torch.nn.functional.pad(rows.from_queries, (0, 3)))
    gradient = torch.randn_like(q)
    wanted = torch.autograd.grad(over_grids(q, k, v, rows), (q, k, v), gradient)
    pads = [torch.cat([x, x[:1].expand(3, -1, -1)]) for x in (q, k, v)]
    out = over_grids(*pads, filled)
    assert out.shape == pads[0].shape
    found = torch.autograd.grad(out[: len(q)], (q, k, v), gradient)
    assert max(map(max_difference, found, wanted)) <= 1e-12


@shares
def test_what_came_in_and_went_out_is_kept(own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = _rows(own, monkeypatch)
    operands = _operands(rows, torch.bfloat16)

    def kept(attend) -> tuple[int, Tensor]:
        storages = {}

        def keep(tensor: Tensor) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = attend(*operands, rows)
        for tensor in operands:
            storages.pop(tensor.untyped_storage().data_ptr(), None)
        return sum(storages.values()), out

    ours, out = kept(over_grids)
    autograds, _ = kept(wide_by_autograd)
    sums = 4 * HEADS * len(rows.to_queries)
    print(f"{ours} bytes kept beside the operands, by autograd {autograds}")
    assert ours == out.nbytes + sums < autograds / 3
