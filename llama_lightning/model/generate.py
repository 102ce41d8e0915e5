"""Answer a batch of ragged prompts: prefill once, then decode token by token over a cache.

Rows that finish leave the batch, so the last row does not drag the others along.
Letters: B rows still running, S longest prompt, V vocabulary.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from llama_lightning.model.attention import padded_grid
from llama_lightning.model.kv_cache import KVCache
from llama_lightning.model.llama import Llama
from llama_lightning.model.sampling import GenerationConfig, next_tokens, row_generator
from llama_lightning.records import Generation, PromptBatch


def _prefill(model: Llama, prompts: PromptBatch, cache: KVCache) -> tuple[Tensor, Tensor]:
    """Read the prompts into the cache; return the logits behind each, (B, V), and the grid read."""
    lengths_B = prompts.boundaries.diff()
    tokens_BS = prompts.tokens[padded_grid(prompts.boundaries[:-1], lengths_B)]
    hidden = model.model(tokens_BS, cache=cache)
    cache.advance(lengths_B)  # pads stay behind the length: hidden, then overwritten
    last = hidden[torch.arange(len(lengths_B), device=hidden.device), lengths_B - 1]
    return model.lm_head(last), tokens_BS


@torch.inference_mode()
def generate(model: Llama, prompts: PromptBatch, config: GenerationConfig) -> Iterator[Generation]:
    """Generate the responses to each prompt and yield each as soon as it is finished.

    Args:
        model: in eval mode.
        prompts: at least one, none empty.
        config: length and sampling.

    Yields:
        `num_samples` Generations a prompt, shortest responses first.
    """
    lengths = prompts.boundaries.diff()
    cache = KVCache.allocate(
        model.config,
        len(prompts.row_ids),
        int(lengths.max()) + config.max_new_tokens,
        dtype=model.model.embed_tokens.weight.dtype,
        device=prompts.tokens.device,
    )
    logits_BV, tokens_BS = _prefill(model, prompts, cache)
    # A prompt is read once; its samples begin as copies of its row.
    copies = torch.arange(len(prompts.row_ids), device=lengths.device)
    copies = copies.repeat_interleave(config.num_samples)
    if config.num_samples > 1:
        cache.select_rows(copies)
    logits_BV, stop_ids = logits_BV[copies], prompts.stop_ids[copies]
    seen_BV = None
    if config.repetition_penalty != 1.0:  # a pad of the grid repeats a token of its row
        seen_BV = torch.zeros_like(logits_BV, dtype=torch.bool).scatter_(1, tokens_BS[copies], True)

    keys = [
        (row, sample) for row in prompts.row_ids.tolist() for sample in range(config.num_samples)
    ]
    generators = [row_generator(config.seed, row, sample) for row, sample in keys]
    responses: list[list[int]] = [[] for _ in keys]
    running = list(range(len(keys)))  # the responses that are rows of the cache
    for step in range(config.max_new_tokens):
        tokens_B = next_tokens(logits_BV, config, [generators[r] for r in running], seen_BV)
        stopped = (tokens_B[:, None] == stop_ids).any(1)
        for number, token, stop in zip(running, tokens_B.tolist(), stopped.tolist(), strict=True):
            if stop:
                yield Generation(*keys[number], responses[number], "stop")
                continue
            responses[number].append(token)
            if step == config.max_new_tokens - 1:
                yield Generation(*keys[number], responses[number], "length")
        if seen_BV is not None:
            seen_BV.scatter_(1, tokens_B[:, None], True)
        if stopped.any():
            going_on = (~stopped).nonzero().squeeze(1)
            cache.select_rows(going_on)
            tokens_B, stop_ids = tokens_B[going_on], stop_ids[going_on]
            seen_BV = None if seen_BV is None else seen_BV[going_on]
            running = [running[i] for i in going_on.tolist()]
        if not running or step == config.max_new_tokens - 1:
            return
        logits_BV = model(tokens_B[:, None], cache=cache).squeeze(1)
        cache.advance(torch.ones_like(tokens_B))
