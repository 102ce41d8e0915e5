"""Next-token cross-entropy at supervised positions only.

The head is the widest matrix of a Llama; logits of positions without a label are never computed.
Letters: T tokens, D hidden size, L supervised positions, V vocabulary.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llama_lightning.records import IGNORE_INDEX


def supervised_logits(hidden: Tensor, lm_head: nn.Module, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Apply the head where there is a label.

    Args:
        hidden: (..., T, D).
        lm_head: D to V.
        labels: (..., T) int64, already shifted, IGNORE_INDEX where there is no loss.

    Returns:
        logits (L, V), in fp32 at least, and targets (L,).
    """
    supervised = labels != IGNORE_INDEX
    logits_LV = lm_head(hidden[supervised])
    wide = torch.promote_types(logits_LV.dtype, torch.float32)
    return logits_LV.to(wide), labels[supervised]


def summed_cross_entropy(logits_LV: Tensor, targets_L: Tensor) -> Tensor:
    """Sum the losses over positions. The caller divides: it alone knows the step's token count."""
    return F.cross_entropy(logits_LV, targets_L, reduction="sum")
