"""The embedding's gradient is autograd's, and beside a tied head's it takes no second matrix."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from llama_lightning.model.embedding import Embedding
from llama_lightning.model.loss import summed_cross_entropy
from tests.model.oracle import max_difference

VOCABULARY, SIZE = 50, 8

Lookup = Callable[[Tensor], Tensor]  # of tokens


def tied(dtype: torch.dtype, vocabulary: int = VOCABULARY) -> tuple[Embedding, nn.Linear]:
    torch.manual_seed(0)
    embedding = Embedding(vocabulary, SIZE, dtype=dtype)
    head = nn.Linear(SIZE, vocabulary, bias=False, device="meta")
    head.weight = embedding.weight
    return embedding, head


def some_tokens(*shape: int) -> Tensor:
    return torch.randint(VOCABULARY // 5, shape)  # several times each


def loss_of_head(lookup: Lookup, embedding: Embedding, head: nn.Linear) -> Tensor:
    x = lookup(some_tokens(20)).tanh()
    return summed_cross_entropy(x, some_tokens(20), head)


def loss_of_rows(lookup: Lookup, embedding: Embedding, head: nn.Linear) -> Tensor:
    return lookup(some_tokens(3, 7)).sin().sum()


def loss_of_two_passes(lookup: Lookup, embedding: Embedding, head: nn.Linear) -> Tensor:
    return sum((loss_of_head(lookup, embedding, head) for _ in range(2)), torch.zeros(()))


def loss_of_two_lookups(lookup: Lookup, embedding: Embedding, head: nn.Linear) -> Tensor:
    return (lookup(some_tokens(5)) * lookup(some_tokens(5))).sum()


def loss_beside_the_weight(lookup: Lookup, embedding: Embedding, head: nn.Linear) -> Tensor:
    return loss_of_rows(lookup, embedding, head) + embedding.weight.square().sum()


LOSSES = [
    loss_of_head,
    loss_of_rows,
    loss_of_two_passes,
    loss_of_two_lookups,
    loss_beside_the_weight,
]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_gradient_is_autograds(
    loss: Callable[[Lookup, Embedding, nn.Linear], Tensor], dtype: torch.dtype
) -> None:
    embedding, head = tied(dtype)

    def gradient(lookup: Lookup) -> Tensor:
        embedding.weight.grad = None
        torch.manual_seed(1)
        for _ in range(3):  # as micro-batches do
            loss(lookup, embedding, head).backward()
        (again,) = torch.autograd.grad(loss(lookup, embedding, head), [embedding.weight])
        assert embedding.weight.grad is not None
        return torch.stack([embedding.weight.grad, again])

    plain = gradient(lambda tokens: F.embedding(tokens, embedding.weight))
    worst = max_difference(gradient(embedding), plain)
    print(f"{loss.__name__}: {worst:.1e}")
    assert plain.abs().max() > 0.1
    assert worst < (1e-13 if dtype == torch.float64 else 5e-6)
    assert embedding.weight._backward_hooks is None or not embedding.weight._backward_hooks


def test_in_16_bits_the_rows_of_a_frequent_token_are_summed_in_32() -> None:
    embedding, _ = tied(torch.bfloat16)
    tokens, gradient = torch.zeros(1000, dtype=torch.int64), torch.rand(1000, SIZE).bfloat16()
    exact = gradient.double().sum(0)

    def error(x: Tensor) -> float:
        (found,) = torch.autograd.grad(x, [embedding.weight], gradient)
        return float(((found[0].double() - exact) / exact).abs().max())

    ours, plain = error(embedding(tokens)), error(F.embedding(tokens, embedding.weight))
    print(f"relative error {ours:.1e}, torch {plain:.1e}")
    assert ours < 2**-8 < plain


def test_beside_the_heads_gradient_there_is_no_second_matrix() -> None:
    vocabulary = 10_000
    embedding, head = tied(torch.float32, vocabulary)
    matrix = embedding.weight.nbytes

    def allocations(lookup: Lookup) -> list[int]:
        embedding.weight.grad = None
        loss = loss_of_head(lookup, embedding, head)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            loss.backward()
        sizes = [event.self_cpu_memory_usage for event in profiler.events()]
        return [size for size in sizes if size >= matrix // 2]

    assert len(allocations(lambda tokens: F.embedding(tokens, embedding.weight))) == 1
    assert allocations(embedding) == []


def test_a_frozen_embedding_gets_no_gradient() -> None:
    embedding, _ = tied(torch.float32)
    embedding.weight.requires_grad_(False)
    assert not embedding(some_tokens(4)).requires_grad
