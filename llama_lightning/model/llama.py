"""Llama 3.2, whole, from top to bottom.

Module names are Hugging Face's, so that a state dict IS the checkpoint of the hub. The network
knows nothing of LoRA, of losses, of checkpointing or of generation: it turns tokens into logits.
Source: The Llama 3 Herd of Models (arXiv 2407.21783).
Letters: B rows, T tokens, D hidden size, N heads, K kv heads, H head dimension, V vocabulary. A
flat batch has no B: its T tokens are rows laid end to end.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llama_lightning.model.attention import attention
from llama_lightning.model.config import LlamaConfig
from llama_lightning.model.embedding import Embedding
from llama_lightning.model.flat_batch import computed
from llama_lightning.model.kv_cache import KVCache, NewTokens
from llama_lightning.model.linear import Linear, fills_up_rows
from llama_lightning.model.ragged_rows import RaggedRows
from llama_lightning.model.rms_norm import RMSNorm
from llama_lightning.model.rope import apply_rope, inverse_frequencies, rope_tables
from llama_lightning.model.swiglu import swiglu
from llama_lightning.records import Prefixes


class Attention(nn.Module):
    """Grouped-query attention: N query heads share K heads of keys and values."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        width, kv_width = (
            heads * config.head_dim
            for heads in (config.num_attention_heads, config.num_key_value_heads)
        )
        self.q_proj = Linear(config.hidden_size, width, bias=config.qkv_bias)
        self.k_proj = Linear(config.hidden_size, kv_width, bias=config.qkv_bias)
        self.v_proj = Linear(config.hidden_size, kv_width, bias=config.qkv_bias)
        self.o_proj = Linear(width, config.hidden_size, bias=False)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        rows: RaggedRows | None,
        new: NewTokens | None,
        wanted: Tensor | None,
    ) -> Tensor:
        """Mix (..., T, D) over T; of a flat batch, return the wanted positions, by default all."""
        q, k, v = self.heads(x, rope)
        if new is not None:
            k, v = new.write(self.layer, k, v)
        return self.output(attention(q, k, v, rows=rows, new=new), wanted)

    def heads(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Make of (..., T, D) queries (..., T, N, H), and keys and values (..., T, K, H)."""
        q, k, v = (
            project(x).unflatten(-1, (-1, self.head_dim))
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        return apply_rope(q, *rope), apply_rope(k, *rope), v

    def output(self, mixed: Tensor, wanted: Tensor | None) -> Tensor:
        """Bring what each head mixed, (..., T, N, H), together into (..., T, D)."""
        mixed = mixed.flatten(-2)
        out: Tensor = self.o_proj(mixed if wanted is None else mixed.index_select(0, wanted))
        return out


class MLP(nn.Module):
    """SwiGLU: a gate times a projection, projected back."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Transform (..., D) position by position."""
        out: Tensor = self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))
        return out


class Block(nn.Module):
    """Attention, then MLP; each reads a normed copy of the residual stream and adds to it."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.dropout = config.dropout

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        rows: RaggedRows | None = None,
        new: NewTokens | None = None,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """Transform (..., T, D); of a flat batch, return the wanted positions, by default all."""
        mixed = self.self_attn(self.input_layernorm(x), rope, rows, new, wanted)
        return self.add(x, mixed, wanted)

    def add(self, x: Tensor, mixed: Tensor, wanted: Tensor | None) -> Tensor:
        """Add what attention mixed for the wanted positions, then the MLP."""
        x = x if wanted is None else x.index_select(0, wanted)
        x = x + F.dropout(mixed, self.dropout, self.training)
        return x + F.dropout(
            self.mlp(self.post_attention_layernorm(x)), self.dropout, self.training
        )


class Backbone(nn.Module):
    """Embedding, blocks and the last norm: tokens to hidden states."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        # block_runner.py has others, which compile a block or compute it again when it is needed.
        self.run_block: Callable[..., Tensor] = Block.__call__
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        boundaries: Tensor | None = None,
        prefixes: Prefixes | None = None,
        wanted: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Turn tokens into hidden states.

        Args:
            tokens: (B, T) dense, or (T,) flat with `boundaries`; int64.
            positions: like tokens; by default 0, 1, 2 ... in dense rows, or behind the cache.
            boundaries: (B + 1,) int64, where each row of a flat batch begins, and its end.
            prefixes: of a flat batch: what its rows share is computed once. Changes the cost, not
                the result; but dropout would draw one mask for what is shared.
            wanted: (W,) int64, index into a flat batch's tokens: the hidden states to return.
            cache: of as many rows, written at the new tokens and read at the old; the caller
                advances it.

        Returns:
            (..., T, D), or (W, D) with `wanted`.
        """
        new = rows = num_wanted = None
        if positions is None:
            positions = torch.arange(tokens.shape[-1], device=tokens.device)
        if cache is not None:
            if boundaries is None:
                new = cache.new_tokens(tokens.shape[-1])
            else:
                new = cache.new_flat_tokens(boundaries)
            positions = new.positions
        elif boundaries is not None:
            fills_up = fills_up_rows(self.embed_tokens.weight)
            tokens, positions, rows, wanted, num_wanted = computed(
                tokens, positions, boundaries, prefixes, wanted, fills_up=fills_up
            )
        # The frequencies are a function of the config alone: nothing to load, nothing to cast.
        rope = rope_tables(positions, inverse_frequencies(self.config, tokens.device))
        x = self.embed_tokens(tokens)
        for block in self.layers:
            # Behind the last attention, positions that are not wanted have no effect: not computing
            # them saves 18 % of a LoRA step on short answers at the 1B shape with 4 of its 16
            # layers (CPU time on 2 cores of an Intel Xeon).
            last = block is self.layers[-1]
            x = self.run_block(block, x, rope, rows, new, wanted if last else None)
        out: Tensor = self.norm(x)
        return out[:num_wanted]


class Llama(nn.Module):
    """The whole network. A tied head is the embedding's own Parameter, not a copy of it."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_head()

    def tie_head(self) -> None:
        """Make head and embedding one Parameter again, after the embedding was replaced."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draw fresh weights: matrices from N(0, 1 / hidden_size), norms 1, biases 0.

        The standard deviation is 0.022 for the 1B shape, where Hugging Face writes 0.02.
        """
        std = self.config.hidden_size**-0.5
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.ndim == 1:
                nn.init.ones_(parameter)
            else:
                nn.init.normal_(parameter, std=std, generator=generator)

    def forward(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        boundaries: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Turn tokens into logits, (..., T, V); arguments as in Backbone.forward."""
        hidden = self.model(tokens, positions=positions, boundaries=boundaries, cache=cache)
        logits: Tensor = self.lm_head(hidden)
        return logits
