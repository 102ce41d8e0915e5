"""The first step's loss is the plain path's, whichever lever is on or off.

The plain path takes each record by itself in a dense row and all of its logits at once. The other
is a `fit` of the real Trainer, with a micro-batch that holds all records.
"""

import json
import random
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llama_lightning.data.alpaca import AlpacaDataModule
from llama_lightning.model import flat_batch, linear, llama, loss, ragged_rows
from llama_lightning.model.llama import Backbone
from llama_lightning.model.lora import LoRAConfig, LoRALinear
from llama_lightning.model.ragged_rows import RaggedRows
from llama_lightning.model.rms_norm import RMSNorm
from llama_lightning.records import IGNORE_INDEX, Prefixes
from llama_lightning.training.llama_module import LlamaModule
from llama_lightning.training.trainer import Trainer
from llama_lightning.weights.huggingface import load_huggingface, save_huggingface
from tests.levers import WITHOUT, Put, plain_norm
from tests.small import write_byte_tokenizer, write_small_llama

Patch = pytest.MonkeyPatch
PRECISIONS = {
    ("lora", "float32"): "32-true",
    ("full", "float32"): "32-true",
    ("lora", "bfloat16"): "bf16-mixed",
    ("full", "bfloat16"): "bf16-true",
}
BOUNDS = {"float32": 1e-5, "bfloat16": 1e-2}
ANSWERS = [1, 90, 2, 40, 3, 60]  # bytes; one prompt is there twice


class Module(LlamaModule):
    """With a LoRA that has learnt something: a zero B would hide whatever is wrong with A."""

    def configure_model(self) -> None:
        super().configure_model()
        generator = torch.Generator().manual_seed(0)
        for layer in self.modules():
            if isinstance(layer, LoRALinear):
                for weight in (layer.lora_A.weight, layer.lora_B.weight):
                    nn.init.normal_(weight, std=0.1, generator=generator)


# Levers: without each, and the other way round


def _set(**names: Any) -> Callable[[Put], None]:
    """Give names of modules, written module__name, other values."""
    modules = {"linear": linear, "llama": llama, "loss": loss, "rows": ragged_rows}

    def switch(put: Put) -> None:
        for name, value in names.items():
            module, _, attribute = name.partition("__")
            put(modules[module], attribute, value)

    return switch


LEVERS: dict[str, Callable[[Put], None]] = {
    "as it is": _set(),
    **{f"without {name}": switch for name, switch in WITHOUT.items()},
    "own queries behind any shared beginning": _set(rows__MAX_OWN=1.0),
    "a grid a row": _set(rows__MIN_FILL=1.0),
    "logits one position at a time": _set(loss__CHUNK=1),
    "rows filled up": _set(
        llama__fills_up_rows=lambda weight: True, loss__fills_up_rows=lambda weight: True
    ),
    "bf16 products in fp32": _set(linear__CPU_HAS_BF16=False),
}
KEYS: dict[str, dict[str, Any]] = {
    "beginnings apart": {"share_prefixes": False},
    "checkpointing": {"gradient_checkpointing": True},
    "selective checkpointing": {"gradient_checkpointing": "selective"},
}


def _all_off(put: Put) -> None:
    for switch in WITHOUT.values():
        switch(put)


# Mistakes


def _neighbours(put: Put) -> None:
    """Let records see those before them."""
    right = ragged_rows.ragged_rows

    def merged(boundaries: Tensor, prefixes: Prefixes | None = None) -> RaggedRows:
        return right(boundaries[[0, -1]], prefixes)

    put(flat_batch, "ragged_rows", merged)


def _one_late(put: Put) -> None:
    """Ask for the hidden state behind the one that is wanted."""
    plain = Backbone.forward

    def forward(self: Backbone, tokens: Tensor, *, wanted: Tensor, **place: Any) -> Tensor:
        return plain(self, tokens, wanted=(wanted + 1).clamp(max=len(tokens) - 1), **place)

    put(Backbone, "forward", forward)


def _another_eps(put: Put) -> None:
    put(RMSNorm, "forward", lambda norm, x: plain_norm(x, norm.weight, 1e3 * norm.eps))


# Both paths


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("first")
    config = write_small_llama(folder, vocab_size=512)
    model = load_huggingface(folder, config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter *= 3  # so that a loss depends on every part of what comes before
    save_huggingface(model, folder)
    write_byte_tokenizer(folder)
    rng = random.Random(0)
    records = [
        {
            "instruction": f"say {'ab'[size == 90]} {'often ' * (size % 7)}",
            "output": "".join(rng.choices("ijklmnopqrstuvwxyz", k=size)),
        }
        for size in ANSWERS
    ]
    (folder / "records.json").write_text(json.dumps([*records, records[0]]))
    return folder


def _module(folder: Path, kind: str, dtype: str, **keys: Any) -> Module:
    rank = 4 if kind == "lora" else 0
    return Module(base_model=str(folder), base_dtype=dtype, lora=LoRAConfig(rank=rank), **keys)


def _data(folder: Path) -> AlpacaDataModule:
    records = str(folder / "records.json")
    data = AlpacaDataModule(records, val_fraction=0.0, test_fraction=0.0, base_folder=str(folder))
    data.batch_size = len(ANSWERS) + 1
    return data


def _fit(folder: Path, kind: str, dtype: str, **keys: Any) -> float:
    trainer = Trainer(
        accelerator="cpu",
        precision=PRECISIONS[kind, dtype],
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(_module(folder, kind, dtype, **keys), datamodule=_data(folder))
    return float(trainer.callback_metrics["train/loss"])


@torch.no_grad()
def _plain(folder: Path, kind: str, dtype: str) -> float:
    module, data = _module(folder, kind, dtype), _data(folder)
    module.configure_model()
    data.setup("fit")
    mixed = PRECISIONS[kind, dtype] == "bf16-mixed"
    with torch.autocast("cpu", torch.bfloat16) if mixed else nullcontext():
        parts = [
            (module.model(torch.tensor([example.tokens]))[0], torch.tensor(example.labels))
            for example in data.train_examples
        ]
    losses = [
        F.cross_entropy(logits.float(), labels, reduction="sum", ignore_index=IGNORE_INDEX)
        for logits, labels in parts
    ]
    targets = sum(int((labels != IGNORE_INDEX).sum()) for _, labels in parts)
    return float(torch.stack(losses).sum()) / targets


@pytest.fixture(scope="module", params=PRECISIONS, ids="-".join)
def run(request: pytest.FixtureRequest, folder: Path) -> Iterator[tuple[str, str, float]]:
    kind, dtype = request.param
    return kind, dtype, _plain(folder, kind, dtype)


@pytest.mark.parametrize("lever", [*LEVERS, *KEYS, "all off"])
def test_the_first_loss_is_the_plain_paths(
    folder: Path, run: tuple[str, str, float], lever: str, monkeypatch: Patch
) -> None:
    kind, dtype, plain = run
    LEVERS.get(lever, _all_off if lever == "all off" else _set())(monkeypatch.setattr)
    keys = {"share_prefixes": False} if lever == "all off" else KEYS.get(lever, {})
    difference = abs(_fit(folder, kind, dtype, **keys) - plain)
    print(f"{kind}, {dtype}, {lever}: {difference:.1e} of {plain:.3f} (bound {BOUNDS[dtype]:.0e})")
    assert difference <= BOUNDS[dtype]


@pytest.mark.parametrize("mistake", [_neighbours, _one_late, _another_eps])
def test_a_mistake_is_found_out(
    folder: Path, run: tuple[str, str, float], mistake: Callable[[Put], None], monkeypatch: Patch
) -> None:
    kind, dtype, plain = run
    mistake(monkeypatch.setattr)
    difference = abs(_fit(folder, kind, dtype) - plain)
    print(f"{kind}, {dtype}, {mistake.__name__}: {difference:.1e} (bound {BOUNDS[dtype]:.0e})")
    assert difference > BOUNDS[dtype]
