"""Answer prompts over a fixed number of rows: a finished row makes room for the next prompt.

So a data set of uneven answers costs what its tokens cost, and memory is bounded by the rows. What
a prompt has in common with one that is in the cache already, e.g. the template, is not computed
again but copied. Neither changes a text: sampling is seeded by row and sample. 200 short answers of
uneven lengths at 8 rows take 0.46 of the time of transformers' static batches, where answers of one
length take 0.76 (1B shape with 4 layers, 2 cores of an Intel Xeon). Prompts are read end to end,
and the rows that run take their step along where attention sees few pads, so that the weights are
read once for both: those 200 take 324 passes at 8 rows and 109 at 32, where prompts by themselves
took 429 and 136; at 8 rows that is 0.9 of the time, at 32 it is no less (2 cores of an Intel Xeon
with AMX). Of a prompt the last token alone has logits: 64 short answers at 8 rows take 0.83 of the
time for it. What is copied saves them nothing, as their prompts are 50 tokens; it is there for long
templates, and for several samples of a prompt (the same Xeon).
Source: continuous batching, Orca (OSDI 2022); prefix reuse, SGLang (arXiv 2312.07104).
Letters: B running rows, G rows of a prefill, D hidden size, V vocabulary.
"""

from bisect import bisect, insort
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llama_lightning.model.decode_step import Capture, DecodeStep, cuda_graphs, no_graphs
from llama_lightning.model.kv_cache import KVCache
from llama_lightning.model.llama import Llama
from llama_lightning.model.sampling import GenerationConfig, next_tokens, row_generator
from llama_lightning.records import Generation, PromptBatch

# A further pass through the weights is worth as much as so many tokens that are copied for it, as
# so many pads a row, which only attention computes, and as so many of attention's cells, a query
# beside a slot: on 2 cores of an Intel Xeon those of a layer take as long as reading its weights.
PASS_TOKENS, MOST_PADS, MOST_CELLS = 16, 64, 2**17
# Tokens of one prefill, pads included: they are in memory with all that a block makes of them.
PREFILL_TOKENS = 8192
# Prompts come in when this part of the rows is free: few idle rows, and few passes of a shape of
# their own. 200 short answers at 32 rows take 106 passes with 1 / 32, 64 of them with prompts; with
# 1 / 8 109 and 38, with 3 / 16 112 and 28.
MIN_FREE = 1 / 8


class _Row(NamedTuple):
    """One response in the making."""

    row_id: int
    sample: int
    prompt: list[int]
    stop_ids: list[int]
    max_new_tokens: int
    generator: torch.Generator
    tokens: list[int]


def _common(a: list[int], b: list[int]) -> int:
    """Count the leading tokens that two prompts share, by halves that are compared as slices."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _nearest(prompt: list[int], others: list[tuple[list[int], int]]) -> tuple[int, int]:
    """Find how much a prompt shares with the nearest of others, which are sorted, and its number.

    In the order of their tokens, whoever shares most with a prompt stands next to its place.
    """
    place = bisect(others, (prompt,))
    beside = others[max(0, place - 1) : place + 1]
    return max(((_common(prompt, other), number) for other, number in beside), default=(0, 0))


class ContinuousBatch:
    """Prompts in, generations out, at most `size` of them in the network at a time.

    Running rows are the first rows of the cache. The rows behind them keep the prompts they held,
    to copy from, until something else is written there.

    Args:
        model: in eval mode.
        config: length and sampling.
        size: responses in the network at a time.
        new_capture: how decode steps are captured, for as long as the cache does not grow; by
            default as the config says.
    """

    def __init__(
        self,
        model: Llama,
        config: GenerationConfig,
        size: int,
        *,
        new_capture: Callable[[torch.device], Capture | None] | None = None,
    ) -> None:
        self.model, self.config, self.size = model, config, size
        weight = model.model.embed_tokens.weight
        self._device = weight.device
        self._cache = KVCache.allocate(
            model.config, size, 0, dtype=weight.dtype, device=weight.device
        )
        self._new_capture = new_capture or (cuda_graphs if config.cuda_graphs else no_graphs)
        self._decode: DecodeStep  # since the first prefill; anew when the cache has grown
        self._cached: list[list[int]] = [[] for _ in range(size)]  # the prompt in each cache row
        self._waiting: deque[_Row] = deque()
        self._running: list[_Row] = []
        # Behind the newest tokens of the last running rows. Those of the first are still unread.
        self._hidden_BD = weight.new_empty(0, model.config.hidden_size)
        self._seen_BV: Tensor | None = None
        if config.repetition_penalty != 1.0:
            shape = size, model.config.vocab_size
            self._seen_BV = torch.zeros(shape, dtype=torch.bool, device=weight.device)

    def add(self, prompts: PromptBatch) -> None:
        """Queue prompts, none of them empty; `run` answers them."""
        tokens, bounds = prompts.tokens.tolist(), prompts.boundaries.tolist()
        limits = [self.config.max_new_tokens] * len(prompts.row_ids)
        if prompts.max_new_tokens is not None:
            limits = prompts.max_new_tokens.tolist()
        rows = zip(prompts.row_ids.tolist(), prompts.stop_ids.tolist(), limits, strict=True)
        for number, (row_id, stop_ids, limit) in enumerate(rows):
            prompt = tokens[bounds[number] : bounds[number + 1]]
            for sample in range(self.config.num_samples):
                generator = row_generator(self.config.seed, row_id, sample)
                self._waiting.append(_Row(row_id, sample, prompt, stop_ids, limit, generator, []))

    @torch.inference_mode()
    def run(self, *, drain: bool = True) -> Iterator[Generation]:
        """Answer, yielding each generation as soon as it is finished.

        Args:
            drain: until all are finished; otherwise only until no prompt waits for a row.
        """
        while self._waiting or (drain and self._running):
            free = self.size - len(self._running)
            if self._waiting and free >= max(1, self.size * MIN_FREE):
                self._admit(free)
            if len(self._hidden_BD) < len(self._running):  # no prompts took them along
                self._step()
            finished, going_on = self._choose()
            self._keep(going_on)
            yield from finished

    def _step(self) -> None:
        """Read the newest tokens that are still to be read."""
        unread = self._running[: len(self._running) - len(self._hidden_BD)]
        tokens_B = self._index([row.tokens[-1] for row in unread])
        hidden_BD = self._decode(tokens_B, self._lengths())
        self._hidden_BD = torch.cat((hidden_BD, self._hidden_BD))

    def _lengths(self) -> list[int]:
        """Count the tokens in each row of the cache, the running rows' newest not among them."""
        running = [len(row.prompt) + max(0, len(row.tokens) - 1) for row in self._running]
        return running + [len(prompt) for prompt in self._cached[len(running) :]]

    def _admit(self, free: int) -> None:
        """Take waiting prompts into free rows, group by group."""
        arriving = [self._waiting.popleft() for _ in range(min(free, len(self._waiting)))]
        while arriving:
            group = self._next_group(arriving)
            self._prefill(group)
            taken = {id(row) for row, _, _ in group}
            arriving = [row for row in arriving if id(row) not in taken]

    def _next_group(self, arriving: list[_Row]) -> list[tuple[_Row, int, int]]:
        """Choose prompts to prefill together, each with the cache row to copy from and how much.

        One that can copy much from another of them waits until that is there. What is left of the
        others is of similar length, so that attention sees few pads, and together fits.
        """
        cached = sorted((prompt, number) for number, prompt in enumerate(self._cached))
        earlier: list[tuple[list[int], int]] = []
        ready = []
        for number, row in enumerate(arriving):
            most = len(row.prompt) - 1  # the last token is computed, for what follows it
            shared, source = _nearest(row.prompt, cached)
            coming, _ = _nearest(row.prompt, earlier)
            insort(earlier, (row.prompt, number))
            if min(coming, most) - shared < PASS_TOKENS:
                ready.append((row, source, min(shared, most)))
        left = [len(row.prompt) - shared for row, _, shared in ready]
        longest = max(left)
        group = [item for item, n in zip(ready, left, strict=True) if longest - n < MOST_PADS]
        return group[: max(1, PREFILL_TOKENS // longest)]

    def _prefill(self, group: list[tuple[_Row, int, int]]) -> None:
        """Read prompts into the rows behind the running ones, which may take their step along."""
        rows, sources, shared = zip(*group, strict=True)
        first, last = len(self._running), len(self._running) + len(rows)
        rests = [row.prompt[start:] for row, start in zip(rows, shared, strict=True)]
        # Attention has as many cells for the one token of a running row as for the longest rest. If
        # they are too many, or other prompts came in between, the step has a pass of its own.
        slots = max(len(row.prompt) + len(row.tokens) for row in (*self._running, *rows))
        few = last * max(map(len, rests)) * slots <= MOST_CELLS
        going = self._running if few and len(self._hidden_BD) == 0 else []
        reads = [row.tokens[-1:] for row in going] + rests
        if self._cache.reserve(max(len(row.prompt) + row.max_new_tokens for row in rows)):
            capture = self._new_capture(self._device)
            self._decode = DecodeStep(self.model.model, self._cache, capture)
        targets = torch.arange(first, last, device=self._device)
        self._cache.copy_rows(self._index(sources), targets, max(shared))
        self._cache.lengths_B[first:last] = self._index(shared)
        longest = max(len(row.prompt) + len(row.tokens) for row in (*going, *rows))
        view = self._cache.view(first - len(going), last, longest)
        boundaries = self._index(list(accumulate(map(len, reads), initial=0)))
        hidden_GD = self.model.model(
            self._index([token for read in reads for token in read]),
            boundaries=boundaries,
            wanted=boundaries[1:] - 1,
            cache=view,
        )
        view.advance(boundaries.diff())
        self._hidden_BD = torch.cat((self._hidden_BD, hidden_GD))
        self._running += rows
        for number, row in enumerate(rows, first):
            self._cached[number] = row.prompt
            if self._seen_BV is not None:
                self._seen_BV[number] = False
                self._seen_BV[number, self._index(row.prompt)] = True

    def _choose(self) -> tuple[list[Generation], list[int]]:
        """Choose a token for each row; return what is finished, and who goes on."""
        num = len(self._running)
        seen_BV = None if self._seen_BV is None else self._seen_BV[:num]
        generators = [row.generator for row in self._running]
        # The head is read once for those that go on and those that came in.
        logits_BV = self.model.lm_head(self._hidden_BD)
        self._hidden_BD = self._hidden_BD[:0]
        tokens_B = next_tokens(logits_BV, self.config, generators, seen_BV)
        if seen_BV is not None:
            seen_BV.scatter_(1, tokens_B[:, None], True)
        finished, going_on = [], []
        for number, (row, token) in enumerate(zip(self._running, tokens_B.tolist(), strict=True)):
            if token in row.stop_ids:
                finished.append(Generation(row.row_id, row.sample, row.tokens, "stop"))
                continue
            row.tokens.append(token)
            if len(row.tokens) == row.max_new_tokens:
                finished.append(Generation(row.row_id, row.sample, row.tokens, "length"))
            else:
                going_on.append(number)
        return finished, going_on

    def _keep(self, going_on: list[int]) -> None:
        """Keep some of the running rows as the first rows."""
        num, kept = len(self._running), len(going_on)
        if kept == num:
            return
        # The last rows fill the gaps: fewer moves than closing ranks.
        gaps = sorted(set(range(kept)) - set(going_on))
        movers = [number for number in going_on if number >= kept]
        if gaps:
            used = max(len(self._running[n].prompt) + len(self._running[n].tokens) for n in movers)
            self._cache.copy_rows(self._index(movers), self._index(gaps), used)
        order = list(range(kept))
        for gap, mover in zip(gaps, movers, strict=True):
            order[gap], self._cached[gap] = mover, self._cached[mover]
        self._running = [self._running[number] for number in order]
        self._cache.lengths_B[kept:num] = self._index([len(p) for p in self._cached[kept:num]])
        if self._seen_BV is not None:
            self._seen_BV[:kept] = self._seen_BV[self._index(order)]

    def _index(self, numbers: Sequence[Any]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=self._device)
