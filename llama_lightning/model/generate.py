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


def _prefill(model: Llama, prompts: PromptBatch, cache: KVCache) -> Tensor:
    """Read the prompts into the cache and return the logits behind each, (B, V)."""
    lengths_B = prompts.boundaries.diff()
    tokens_BS = prompts.tokens[padded_grid(prompts.boundaries[:-1], lengths_B)]
    hidden = model.model(tokens_BS, cache=cache)
    cache.advance(lengths_B)  # pads stay behind the length: hidden, then overwritten
    last = hidden[torch.arange(len(lengths_B), device=hidden.device), lengths_B - 1]
    logits: Tensor = model.lm_head(last)
    return logits


@torch.inference_mode()
def generate(model: Llama, prompts: PromptBatch, config: GenerationConfig) -> Iterator[Generation]:
    """Generate a response to each prompt and yield it as soon as it is finished.

    Args:
        model: in eval mode.
        prompts: at least one, none empty.
        config: length and sampling.

    Yields:
        One Generation a row, shortest responses first.
    """
    lengths = prompts.boundaries.diff()
    cache = KVCache.allocate(
        model.config,
        len(prompts.row_ids),
        int(lengths.max()) + config.max_new_tokens,
        dtype=model.model.embed_tokens.weight.dtype,
        device=prompts.tokens.device,
    )
    row_ids = prompts.row_ids.tolist()
    generators = [row_generator(config.seed, row_id) for row_id in row_ids]
    responses: list[list[int]] = [[] for _ in row_ids]
    running = list(range(len(row_ids)))  # rows of the prompts that are rows of the cache
    stop_ids = prompts.stop_ids
    logits_BV = _prefill(model, prompts, cache)
    for step in range(config.max_new_tokens):
        tokens_B = next_tokens(logits_BV, config.temperature, [generators[r] for r in running])
        stopped = (tokens_B[:, None] == stop_ids).any(1)
        for row, token, stop in zip(running, tokens_B.tolist(), stopped.tolist(), strict=True):
            if stop:
                yield Generation(row_ids[row], responses[row], "stop")
                continue
            responses[row].append(token)
            if step == config.max_new_tokens - 1:
                yield Generation(row_ids[row], responses[row], "length")
        if stopped.any():
            going_on = (~stopped).nonzero().squeeze(1)
            cache.keep_rows(going_on)
            tokens_B, stop_ids = tokens_B[going_on], stop_ids[going_on]
            running = [running[i] for i in going_on.tolist()]
        if not running or step == config.max_new_tokens - 1:
            return
        logits_BV = model(tokens_B[:, None], cache=cache).squeeze(1)
        cache.advance(torch.ones_like(tokens_B))
