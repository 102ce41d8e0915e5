"""Small networks with random weights, and the same weights in transformers and PEFT.

The weights are large on purpose. With the usual standard deviation of 0.02 the logits of a small
network are so flat that a wrong RoPE factor moves them by less than the tolerance of a comparison.
Letters: R records, T tokens, S longest record.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from llama_lightning.model.config import LlamaConfig, RopeScaling, config_to_huggingface
from llama_lightning.model.llama import Llama
from llama_lightning.model.lora import LLAMA_LINEARS, LoRAConfig
from llama_lightning.model.loss import supervised_positions
from llama_lightning.records import IGNORE_INDEX, Prefixes

SMALL = LlamaConfig(
    vocab_size=300,
    hidden_size=192,  # not heads * head_dim, so that mixing the two up cannot go unseen
    intermediate_size=320,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,  # Llama 3.2 1B's: only then do wavelengths reach into the scaled band
    rope_scaling=RopeScaling(),
)


def small_config(**changes: Any) -> LlamaConfig:
    """The small shape, with some fields changed."""
    return replace(SMALL, **changes)


def randomise(model: nn.Module, std: float = 0.2) -> None:
    """Draw matrices from N(0, std), norms near 1, and biases as wide as the matrices."""
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            parameter.normal_(std=std)
            if "norm" in name:
                parameter.mul_(0.1 / std).add_(1.0)


def small_llama(config: LlamaConfig = SMALL, std: float = 0.2) -> Llama:
    """A network with random weights, in eval mode."""
    model = Llama(config)
    randomise(model, std)
    return model.eval()


def huggingface_twin(model: Llama, *, attention: str = "sdpa") -> transformers.LlamaForCausalLM:
    """The same network in transformers: config through config_to_huggingface, same weights."""
    weight = model.model.embed_tokens.weight
    raw = config_to_huggingface(model.config, str(weight.dtype).removeprefix("torch."))
    config = transformers.LlamaConfig.from_dict(raw)
    config._attn_implementation = attention
    twin = transformers.LlamaForCausalLM(config).to(weight.dtype)
    twin.load_state_dict(model.state_dict())
    tied = twin.lm_head.weight is twin.model.embed_tokens.weight
    assert tied == model.config.tie_word_embeddings
    twin.generation_config.eos_token_id = None  # LlamaConfig's own default would stop at token 2
    return twin.eval()


def peft_twin(
    twin: transformers.LlamaForCausalLM,
    config: LoRAConfig,
    lora_tensors: dict[str, Tensor] | None = None,
) -> peft.PeftModel:
    """PEFT's LoRA around transformers' network, with our values of A and B where given."""
    wrapped = peft.get_peft_model(
        twin,
        peft.LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            target_modules=list(config.target_modules),
            bias="none",
        ),
    ).to(twin.dtype)
    if lora_tensors is not None:
        result = peft.set_peft_model_state_dict(
            wrapped, {f"base_model.model.{name}": t for name, t in lora_tensors.items()}
        )
        assert not result.unexpected_keys
    return wrapped


def lora_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """A and B of every wrapped layer under one name for ours and PEFT's."""
    return {
        name.removeprefix("base_model.model.").replace(".default.weight", ".weight"): parameter
        for name, parameter in model.named_parameters()
        if ".lora_" in name
    }


def randomise_lora(model: nn.Module) -> dict[str, Tensor]:
    """Draw A and B at random, for a B of zero would hide A's gradient. Returns copies."""
    parameters = lora_parameters(model)
    assert len(parameters) == 2 * len(LLAMA_LINEARS) * SMALL.num_hidden_layers
    for parameter in parameters.values():
        nn.init.normal_(parameter, std=0.05)
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def without_fp32_casts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let transformers' norm compute in the type it is given, as ours does in float64.

    LlamaRMSNorm goes through float32 whatever comes in, which would hide all below 1e-7.
    """

    def forward(self: LlamaRMSNorm, x: Tensor) -> Tensor:
        return self.weight * (
            x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        )

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)


class Record(NamedTuple):
    """Tokens of which the first `num_prompt` carry no loss."""

    tokens: Tensor  # (T,)
    num_prompt: int

    @property
    def labels(self) -> Tensor:
        """What should follow each token."""
        labels = self.tokens.roll(-1)
        labels[: self.num_prompt - 1] = IGNORE_INDEX
        labels[-1] = IGNORE_INDEX
        return labels


def random_records(
    lengths_and_prompts: Sequence[tuple[int, int]], vocab_size: int = SMALL.vocab_size
) -> list[Record]:
    """Records of the given (length, prompt length)."""
    return [Record(torch.randint(vocab_size, (n,)), prompt) for n, prompt in lengths_and_prompts]


class Flat(NamedTuple):
    """Records end to end, as our network takes them."""

    tokens: Tensor  # (T,)
    labels: Tensor  # (T,), shifted
    positions: Tensor  # (T,)
    boundaries: Tensor  # (R + 1,)


def flat_batch(records: Sequence[Record]) -> Flat:
    """Lay records end to end."""
    lengths = torch.tensor([len(r.tokens) for r in records])
    return Flat(
        torch.cat([r.tokens for r in records]),
        torch.cat([r.labels for r in records]),
        torch.cat([torch.arange(int(n)) for n in lengths]),
        F.pad(lengths.cumsum(0), (1, 0)),
    )


def supervised_hidden(model: Llama, batch: Flat, prefixes: Prefixes | None) -> Tensor:
    """Hidden states at the positions that carry loss."""
    hidden: Tensor = model.model(
        batch.tokens,
        positions=batch.positions,
        boundaries=batch.boundaries,
        prefixes=prefixes,
        wanted=supervised_positions(batch.labels),
    )
    return hidden


def padded_batch(records: Sequence[Record]) -> dict[str, Tensor]:
    """Records padded on the right, as transformers takes them: its labels are not shifted."""
    shape = len(records), max(len(r.tokens) for r in records)
    batch = {
        "input_ids": torch.zeros(shape, dtype=torch.int64),
        "attention_mask": torch.zeros(shape, dtype=torch.int64),
        "labels": torch.full(shape, IGNORE_INDEX),
    }
    for row, record in enumerate(records):
        length = len(record.tokens)
        batch["input_ids"][row, :length] = record.tokens
        batch["attention_mask"][row, :length] = 1
        batch["labels"][row, record.num_prompt : length] = record.tokens[record.num_prompt :]
    return batch


def max_difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest elementwise difference; NaN stays NaN, so that no bound holds for it."""
    assert ours.shape == theirs.shape
    return (ours.double() - theirs.double()).abs().max().item()


def relative_difference(ours: Tensor, theirs: Tensor) -> float:
    """The norm of the difference over the norm of the oracle's tensor."""
    assert ours.shape == theirs.shape
    return ((ours - theirs).double().norm() / theirs.double().norm()).item()
