"""Choose the next token: logits in, tokens out.

Every filter has transformers' meaning and stands in transformers' order: repetition penalty,
temperature, top-k, top-p, min-p.
Source: transformers/generation/logits_process.py; min-p arXiv 2407.01082; penalty 1909.05858.
Letters: B rows, V vocabulary, K tokens of it; P parts of it, S tokens of a part.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PART = 256  # tokens of a part of the vocabulary; a power of two
SORTED = (1024, 2**14)  # of its likeliest tokens, first and then


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


def _filtered(logits_BV: Tensor, config: GenerationConfig) -> tuple[Tensor, Tensor]:
    """Apply top-k and top-p: logits, (B, K) float64, -inf where dropped, and their tokens.

    Of equals, top-k keeps all and top-p the last ones that it needs.
    """
    vocab_size = logits_BV.shape[1]
    top_k = min(config.top_k or vocab_size, vocab_size)
    if top_k == vocab_size:
        total_B1 = (logits_BV.double() / config.temperature).logsumexp(-1, keepdim=True)
    # Few tokens are kept, and to sort all takes most of the time of sampling: with 1,024 sorted, a
    # row of 128,256 tokens is drawn in 2 instead of 10 ms, 32 in 50 instead of 250; where that is
    # not enough, 32 take 150, and 500 where flat logits leave more than 16,384 (2 cores of an Intel
    # Xeon with AMX).
    for size in (*SORTED, vocab_size):
        size = min(max(size, config.top_k), vocab_size)
        sorted_BK, tokens_BK = logits_BV.topk(size)
        sorted_BK = sorted_BK.double() / config.temperature
        kth_B1 = sorted_BK[:, min(top_k, size) - 1, None]
        kept_BK = sorted_BK >= kth_B1
        if top_k < vocab_size:
            total_B1 = sorted_BK.where(kept_BK, -torch.inf).logsumexp(-1, keepdim=True)
        if config.top_p < 1.0:
            probs_BK = (sorted_BK - total_B1).exp()
            kept_BK &= probs_BK.cumsum(-1) - probs_BK < config.top_p  # of what is likelier
        kept_BK[:, 0] = True
        num_kept_B1 = kept_BK.sum(-1, keepdim=True)
        last_B1 = sorted_BK.gather(1, num_kept_B1 - 1)
        least_B1 = kth_B1 if top_k < vocab_size else last_B1
        if size == vocab_size or (sorted_BK[:, -1:] < least_B1).all():
            break  # nothing is missing that is kept, or equal to it
    num_equals_B1 = num_kept_B1 - (sorted_BK > last_B1).sum(-1, keepdim=True)
    tokens_BK, order_BK = tokens_BK.sort()
    logits_BK = sorted_BK.gather(1, order_BK)
    equals_BK = logits_BK == last_B1
    place_BK = equals_BK.cumsum(-1)  # among equals
    kept_BK = equals_BK & (place_BK > place_BK[:, -1:] - num_equals_B1)
    return logits_BK.where(kept_BK | (logits_BK > last_B1), -torch.inf), tokens_BK


def candidates(logits_BV: Tensor, config: GenerationConfig) -> tuple[Tensor, Tensor]:
    """Compute what is sampled from; temperature above 0.

    Returns:
        Probabilities, (B, K) float64, each row summing to 1, and the tokens they are of, (B, K), in
        the vocabulary's order; K as may be. Tokens that are not among them have none.
    """
    vocab_size = logits_BV.shape[1]
    if 0 < config.top_k < vocab_size or config.top_p < 1.0:
        logits_BK, tokens_BK = _filtered(logits_BV, config)
    else:
        logits_BK = logits_BV.double() / config.temperature
        tokens_BK = torch.arange(vocab_size, device=logits_BV.device).expand_as(logits_BV)
    probs_BK = logits_BK.softmax(-1)
    if config.min_p > 0.0:
        unlikely_BK = probs_BK < config.min_p * probs_BK.amax(-1, keepdim=True)
        probs_BK = logits_BK.masked_fill(unlikely_BK, -torch.inf).softmax(-1)
    return probs_BK, tokens_BK


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
    probs_BK, tokens_BK = candidates(logits_BV.contiguous(), config)
    cumulative_BK = probs_BK.cumsum(-1)
    draws_B1 = torch.stack([torch.rand(1, generator=g, dtype=torch.float64) for g in generators])
    # The sum may end a rounding below 1: scale the draw instead of falling off the end.
    draws_B1 = draws_B1.to(logits_BV.device) * cumulative_BK[:, -1:]
    drawn_B1 = torch.searchsorted(cumulative_BK, draws_B1, right=True)
    return tokens_BK.gather(1, drawn_B1).squeeze(1)
