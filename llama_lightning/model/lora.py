"""Low-rank adaptation: a frozen matrix W and a trained update B A of low rank beside it.

The update is put around the network from outside; llama.py never mentions it. Meaning and names of
every field are PEFT's, so that our keys are PEFT's keys without their prefix.
Source: LoRA (arXiv 2106.09685).
Letters: I inputs, O outputs, R rank.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from llama_lightning.model.linear import Linear
from llama_lightning.model.llama import Llama

LLAMA_LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class LoRAConfig:
    """Which matrices get an update, and of what size.

    Attributes:
        rank: columns of A and rows of B; 0 means full fine-tuning, without LoRA.
        alpha: the update is scaled by alpha / rank.
        dropout: on the update's input, while training.
        target_modules: last names of the linear layers to adapt.
    """

    rank: int = 0
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: list[str] = field(default_factory=lambda: list(LLAMA_LINEARS))

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ValueError(f"lora.rank is {self.rank}; use 0 (full fine-tuning) or more")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"lora.dropout is {self.dropout}; use a value in [0, 1)")
        if self.rank and not self.target_modules:
            raise ValueError("lora.target_modules is empty: name at least one linear layer")


class LoRALinear(nn.Module):
    """`base_layer(x) + lora_B(lora_A(dropout(x))) * alpha / rank` around any nn.Linear.

    B starts at zero, so that the wrapped network starts as the base. A and B are fp32 unless
    `dtype` says otherwise, even around a 16-bit base: small updates vanish in 16-bit weights.
    """

    def __init__(self, base_layer: nn.Linear, config: LoRAConfig, dtype: torch.dtype) -> None:
        super().__init__()
        device = base_layer.weight.device
        self.base_layer = base_layer
        self.lora_A = Linear(
            base_layer.in_features, config.rank, bias=False, dtype=dtype, device=device
        )
        self.lora_B = Linear(
            config.rank, base_layer.out_features, bias=False, dtype=dtype, device=device
        )
        self.dropout = nn.Dropout(config.dropout)
        self.scale = config.alpha / config.rank
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., I) to (..., O)."""
        out: Tensor = self.base_layer(x)
        if not torch.is_autocast_enabled(x.device.type):  # autocast picks the type by itself
            x = x.to(self.lora_A.weight.dtype)
        update = self.lora_B(self.lora_A(self.dropout(x))) * self.scale
        adapted: Tensor = out + update.to(out.dtype)
        return adapted

    def merged_weight(self) -> Tensor:
        """Add the update to the matrix, (O, I), in fp32 at least."""
        parts = (self.base_layer.weight, self.lora_A.weight, self.lora_B.weight)
        wide = torch.promote_types(self.base_layer.weight.dtype, torch.float32)
        base, down, up = (part.detach().to(wide) for part in parts)
        return base + (up @ down) * self.scale


def inject_lora(model: nn.Module, config: LoRAConfig, *, dtype: torch.dtype) -> None:
    """Freeze the model and wrap the linear layers that the config names, in place.

    Args:
        model: any module; its weights must be there already, for A is drawn on their device.
        config: a rank above 0.
        dtype: type of A and B.

    Raises:
        ValueError: a target matches no linear layer, or is a head tied to the embedding.
    """
    linears = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)
    }
    last_names = sorted({name.rpartition(".")[2] for name in linears})
    if unknown := [t for t in config.target_modules if t not in last_names]:
        raise ValueError(
            f"lora.target_modules: {', '.join(unknown)} matches no linear layer; "
            f"there are {', '.join(last_names)}"
        )
    tied = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    # Without gradients of frozen weights a step on short answers at the 1B shape with 4 layers
    # takes half of the time, and 1.7 instead of 2.6 GiB (2 cores of an Intel Xeon with AMX).
    model.requires_grad_(False)
    for name, linear in linears.items():
        parent, _, last_name = name.rpartition(".")
        if last_name not in config.target_modules:
            continue
        if id(linear.weight) in tied:
            # Merged, the update would land in the embedding too.
            raise ValueError(f"lora.target_modules: {last_name} is tied to the embedding; drop it")
        setattr(model.get_submodule(parent), last_name, LoRALinear(linear, config, dtype))


def merge_lora(model: Llama, *, dtype: torch.dtype) -> Llama:
    """Add the updates to their matrices, in fp32 at least, then cast; a network without LoRA.

    The model given stays as it is. What is neither updated nor cast is shared with it.

    Args:
        model: with LoRA or without.
        dtype: type of all weights of the result, which is on the CPU.

    Raises:
        ValueError: a weight that is not finite in this type.
    """
    weights: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():  # a tied head is listed once
        if ".lora_" in name:
            continue
        weight = parameter.detach()
        if name.endswith(".base_layer.weight"):
            adapted = model.get_submodule(name.removesuffix(".base_layer.weight"))
            assert isinstance(adapted, LoRALinear)
            weight = adapted.merged_weight()
        weight = weight.to("cpu", dtype)
        name = name.replace(".base_layer.", ".")
        if not all(bound.isfinite() for bound in weight.aminmax()):  # NaN goes through both
            raise ValueError(f"{name} holds NaN or infinity in {dtype}".replace("torch.", ""))
        weights[name] = weight
    with torch.device("meta"):
        merged = Llama(model.config)
    merged.load_state_dict(weights, strict=False, assign=True)  # lacks a tied head
    merged.tie_head()
    return merged.eval()
