"""model.share_prefixes in a fit: fewer tokens are computed, and the step is the same."""

import json
import logging
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from llama_lightning.data.alpaca import AlpacaDataModule
from llama_lightning.model.lora import LoRAConfig
from llama_lightning.training.llama_module import LlamaModule
from llama_lightning.training.trainer import Trainer
from tests.small import write_byte_tokenizer, write_small_llama

REMARK = "equal beginnings of prompts are computed for each record"


class Run(NamedTuple):
    """A fit of two steps of four records."""

    losses: list[float]
    trained: list[int]  # tokens computed in each step
    validated: list[int]
    total: int  # tokens of the training records
    val_total: int


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("share")
    write_small_llama(folder, vocab_size=512)
    write_byte_tokenizer(folder)
    records = [{"instruction": f"Say {i}.", "output": "ab" * (i + 1)} for i in range(8)]
    (folder / "data.json").write_text(json.dumps(records))
    return folder


class Recorder(LlamaModule):
    """LlamaModule that notes what its embedding sees and each step's loss."""

    def configure_model(self) -> None:
        fresh = self.model is None
        super().configure_model()
        if fresh:
            self.losses: list[float] = []
            self.seen: dict[bool, list[int]] = {True: [], False: []}
            self._llama.model.embed_tokens.register_forward_pre_hook(
                lambda _, args: self.seen[self.training].append(len(args[0]))
            )

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.losses.append(loss.item())
        return loss


def _fit(folder: Path, **arguments) -> Run:
    module = Recorder(str(folder), base_dtype="float32", **arguments)
    file = str(folder / "data.json")
    data = AlpacaDataModule(
        file,
        val_path=None,
        val_fraction=0.3,
        test_fraction=0.0,
        base_folder=str(folder),
        batch_size=3,
    )
    trainer = Trainer(
        accelerator="cpu",
        max_steps=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        num_sanity_val_steps=0,
        val_check_interval=2,
        check_val_every_n_epoch=None,
    )
    torch.manual_seed(3)
    trainer.fit(module, datamodule=data)
    total, val_total = (
        sum(len(e.tokens) for e in part) for part in (data.train_examples, data.val_examples)
    )
    return Run(module.losses, module.seen[True], module.seen[False], total, val_total)


@pytest.mark.parametrize("rank", [0, 4], ids=["full", "lora"])
def test_the_key_changes_what_is_computed_and_not_the_step(folder: Path, rank: int) -> None:
    shared, apart = (
        _fit(folder, lora=LoRAConfig(rank=rank), share_prefixes=share) for share in (True, False)
    )
    print(
        f"tokens computed {shared.trained}, apart {apart.trained}; "
        f"losses {shared.losses}, {apart.losses}"
    )
    assert sum(apart.trained) == apart.total
    assert sum(shared.trained) < 0.6 * sum(apart.trained)
    assert sum(apart.validated) == apart.val_total
    assert sum(shared.validated) < 0.8 * apart.val_total
    assert shared.losses == pytest.approx(apart.losses, rel=1e-5)


@pytest.mark.parametrize(
    "dropout", [{"dropout": 0.1}, {"lora": LoRAConfig(rank=4, dropout=0.1)}], ids=["model", "lora"]
)
def test_dropout_draws_a_mask_for_each_record_and_this_is_said_once(
    folder: Path, dropout: dict, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        run = _fit(folder, **dropout)
    assert sum(run.trained) == run.total
    assert sum(run.validated) < 0.8 * run.val_total  # evaluation drops nothing and shares
    assert sum(REMARK in record.message for record in caplog.records) == 1


def test_nothing_is_said_without_dropout(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        _fit(folder)
    assert not any(REMARK in record.message for record in caplog.records)
