"""Choose the next token: logits in, tokens out.

Every filter has transformers' meaning and stands in transformers' order: repetition penalty,
temperature, top-k, top-p, min-p.
Source: transformers/generation/logits_process.py; min-p arXiv 2407.01082; penalty 1909.05858.
Letters: B rows, V vocabulary; P parts of it, S tokens of a part.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PART = 256  # tokens of a part of the vocabulary; a power of two
SORTED = 1024  # of its likeliest tokens, first


@dataclass(frozen=True)
class GenerationConfig:
    """How responses are generated.

    Attributes:
        max_new_tokens: a response is cut after so many tokens.
        temperature: 0 takes the likeliest token; above 0 logits are divided by it and sampled.
        top_k: sample among so many likeliest tokens; 0 among all.
        top_p: sample among the fewest likeliest tokens that hold this probability; 1 among all.
        min_p: sample among tokens with this fraction of the likeliest one's probability; 0 among
            all.
        repetition_penalty: above 1 makes tokens of the prompt and the response so far less likely.
        num_samples: responses a prompt.
        seed: with a row's number and a sample's it fixes what is sampled there, in any batch.
        cuda_graphs: on a GPU, replay decode steps as CUDA graphs. Written for speed at few rows,
            and not yet run on a GPU.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    num_samples: int = 1
    seed: int = 0
    cuda_graphs: bool = False

    def __post_init__(self) -> None:
        for name, fits, cure in (
            ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
            ("temperature", 0.0 <= self.temperature < float("inf"), "0 (greedy) or more"),
            ("top_k", self.top_k >= 0, "0 (all tokens) or more"),
            ("top_p", 0.0 < self.top_p <= 1.0, "a value above 0 and up to 1 (all tokens)"),
            ("min_p", 0.0 <= self.min_p <= 1.0, "a value from 0 (all tokens) to 1"),
            (
                "repetition_penalty",
                0.0 < self.repetition_penalty < float("inf"),
                "1 (none) or more",
            ),
            ("num_samples", self.num_samples >= 1, "1 or more"),
        ):
            if not fits:
                raise ValueError(f"generation.{name} is {getattr(self, name)}; use {cure}")
        if self.num_samples > 1 and self.temperature == 0:
            raise ValueError(
                f"generation.num_samples is {self.num_samples} at temperature 0, where all samples "
                "are the same; set generation.temperature, e.g. to 0.7"
            )

    @property
    def takes_likeliest(self) -> bool:
        """Whether nothing is asked of logits but where the largest is."""
        return self.temperature == 0 and self.repetition_penalty == 1


def row_generator(seed: int, row_id: int, sample: int = 0) -> torch.Generator:
    """Make a response's own source of randomness, so that it does not depend on its batch."""
    # Odd multipliers spread neighbouring triples over the seeds, of which the CPU's generator reads
    # the low 32 bits.
    mixed = seed * 0x9E3779B97F4A7C15 + row_id * 0xBF58476D1CE4E5B9 + sample * 0x94D049BB133111EB
    return torch.Generator().manual_seed((mixed + 1) % (1 << 63))


def penalise_repetition(logits_BV: Tensor, seen_BV: Tensor, penalty: float) -> Tensor:
    """Make tokens that have been seen less likely: divide logits above 0, multiply those below."""
    penalised_BV = torch.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty)
    return torch.where(seen_BV, penalised_BV, logits_BV)


def _nucleus(logits_BV: Tensor, top_p: float) -> Tensor:
    """Find the fewest likeliest tokens that hold `top_p`, (B, V) bool; of equals the last ones."""
    vocab_size = logits_BV.shape[1]
    total_B1 = logits_BV.logsumexp(-1, keepdim=True)
    # Few of them hold `top_p`, and to sort all takes most of the time of sampling: with 1,024
    # sorted, a row of 128,256 tokens is drawn in 3 instead of 10 ms, 32 in 90 instead of 250; where
    # that is not enough, in 1.2 times the time (2 cores of an Intel Xeon with AMX).
    for size in (min(SORTED, vocab_size), vocab_size):
        sorted_BK = logits_BV.topk(size).values
        probs_BK = (sorted_BK - total_B1).exp()
        needed_BK = probs_BK.cumsum(-1) - probs_BK < top_p  # what is likelier does not hold it
        if size == vocab_size or not needed_BK[:, -1].any():
            break
    num_kept_B1 = needed_BK.sum(-1, keepdim=True).clamp(min=1)
    last_B1 = sorted_BK.gather(1, num_kept_B1 - 1)
    num_equals_B1 = num_kept_B1 - (sorted_BK > last_B1).sum(-1, keepdim=True)
    equals_BV = logits_BV == last_B1
    place_BV = equals_BV.cumsum(-1)  # among equals
    return (logits_BV > last_B1) | (equals_BV & (place_BV > place_BV[:, -1:] - num_equals_B1))


def probabilities(logits_BV: Tensor, config: GenerationConfig) -> Tensor:
    """Compute what is sampled from: (B, V) float64, each row summing to 1; temperature above 0."""
    none = float("-inf")
    logits_BV = logits_BV.double() / config.temperature
    if 0 < config.top_k < logits_BV.shape[-1]:
        kth_B1 = logits_BV.topk(config.top_k).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < kth_B1, none)
    if config.top_p < 1.0:
        logits_BV = logits_BV.masked_fill(~_nucleus(logits_BV, config.top_p), none)
    probs_BV = logits_BV.softmax(-1)
    if config.min_p > 0.0:
        unlikely_BV = probs_BV < config.min_p * probs_BV.amax(-1, keepdim=True)
        probs_BV = logits_BV.masked_fill(unlikely_BV, none).softmax(-1)
    return probs_BV


def likeliest(logits_BV: Tensor) -> Tensor:
    """Find each row's likeliest token, the first of equals, (B,)."""
    # On a CPU, argmax goes from logit to logit, and max too where a product left the logits of one
    # token side by side (prepack.py). The larger of each two of many comes faster: where a part of
    # the vocabulary is halved until one is left, 32 rows take 1.6 instead of 7 ms of a decode step
    # of 95 (1B shape with 4 layers, 2 cores of an Intel Xeon with AMX).
    rows, vocab_size = logits_BV.shape
    part_size = 1 if logits_BV.is_cuda else math.gcd(vocab_size, PART)
    parts_BPS = logits_BV.view(rows, -1, part_size)
    best_BPS = parts_BPS
    while best_BPS.shape[2] > 1:
        best_BPS = torch.maximum(*best_BPS.chunk(2, dim=2))
    part_B11 = best_BPS.max(1, keepdim=True).indices
    part_BS = parts_BPS.gather(1, part_B11.expand(-1, -1, part_size)).squeeze(1)
    return part_B11.flatten() * part_size + part_BS.max(1).indices


def next_tokens(
    logits_BV: Tensor,
    config: GenerationConfig,
    generators: Sequence[torch.Generator],
    seen_BV: Tensor | None = None,
) -> Tensor:
    """Choose one token a row, (B,) int64.

    Sampling inverts the cumulative distribution at one uniform draw of the row's generator: one
    draw a token, on the CPU, so that the same seed gives the same text on every device.

    Args:
        logits_BV: of the next token.
        config: how to choose.
        generators: one a row.
        seen_BV: bool, tokens of the prompt and the response so far; with a penalty only.
    """
    if seen_BV is not None:
        logits_BV = penalise_repetition(logits_BV, seen_BV, config.repetition_penalty)
    if config.temperature == 0:
        return likeliest(logits_BV)
    cumulative_BV = probabilities(logits_BV.contiguous(), config).cumsum(-1)
    draws_B1 = torch.stack([torch.rand(1, generator=g, dtype=torch.float64) for g in generators])
    # The sum may end a rounding below 1: scale the draw instead of falling off the end.
    draws_B1 = draws_B1.to(logits_BV.device) * cumulative_BV[:, -1:]
    return torch.searchsorted(cumulative_BV, draws_B1, right=True).squeeze(1)
