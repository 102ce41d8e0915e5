"""How the blocks of a network run: as they are, compiled, or computed again in the backward pass.

It is put into the network from outside; llama.py only says what a block computes.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from llama_lightning.model.attention import attention
from llama_lightning.model.checkpointing import checkpointed
from llama_lightning.model.compilation import compiled
from llama_lightning.model.kv_cache import NewTokens
from llama_lightning.model.llama import Block
from llama_lightning.model.ragged_rows import RaggedRows

Checkpointing = bool | Literal["selective"]


@dataclass(frozen=True)
class BlockRunner:
    """Runs a block with the arguments of Block.forward.

    Attributes:
        checkpointing: compute a block again in the backward pass, whole or but for its wide
            products and, on a GPU, its attention (`selective`). Compiled code keeps products and
            computes the rest again without being told to, so that `selective` adds nothing to
            `compile`.
        compile: in training and evaluation. Answering stays as it is: its cache grows, and its
            weights may be prepacked.
    """

    checkpointing: Checkpointing = False
    compile: bool = False

    def __call__(
        self,
        block: Block,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        rows: RaggedRows | None,
        new: NewTokens | None,
        wanted: Tensor | None,
    ) -> Tensor:
        """Transform (..., T, D) as the block does."""
        compile = self.compile and new is None
        run = _compiled_block if compile else Block.__call__
        selective = self.checkpointing == "selective"
        if self.checkpointing and torch.is_grad_enabled() and not (selective and compile):
            run = checkpointed(run, selective=selective)
        out: Tensor = run(block, x, rope, rows, new, wanted)
        return out


def _before(block: Block, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    return block.self_attn.heads(block.input_layernorm(x), rope)


def _behind(block: Block, x: Tensor, mixed: Tensor, wanted: Tensor | None) -> Tensor:
    return block.add(x, block.self_attn.output(mixed, wanted), wanted)


def _compiled_block(
    block: Block,
    x: Tensor,
    rope: tuple[Tensor, Tensor],
    rows: RaggedRows | None,
    new: NewTokens | None,
    wanted: Tensor | None,
) -> Tensor:
    """Block.forward without a cache, compiled but for attention, whose grids differ by batch."""
    assert new is None
    q, k, v = compiled(_before)(block, x, rope)
    out: Tensor = compiled(_behind)(block, x, attention(q, k, v, rows=rows), wanted)
    return out
