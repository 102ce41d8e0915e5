"""Weights that stay in their file: the same numbers, which can be written to, and the file not."""

import json
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor

from llama_lightning import AlpacaDataModule, LlamaModule, LoRAConfig, Trainer
from llama_lightning.model.llama import Llama
from llama_lightning.weights.base import load_base, read_config
from llama_lightning.weights.huggingface import WEIGHTS_FILE, save_huggingface
from tests.model.oracle import small_llama
from tests.small import write_byte_tokenizer, write_small_llama
from tests.weights.meta_reference import random_weights, write_meta

MAPS = Path("/proc/self/maps")

pytestmark = pytest.mark.skipif(not MAPS.is_file(), reason="needs Linux's list of mappings")


def _file_of(tensor: Tensor) -> str:
    """Name the file in whose mapping a tensor begins; empty if it is none's."""
    for line in MAPS.read_text().splitlines():
        addresses, *_, path = [*line.split(maxsplit=5), ""][:6]
        first, end = (int(address, 16) for address in addresses.split("-"))
        if first <= tensor.data_ptr() < end:
            return Path(path).name if path.startswith("/") else ""
    raise AssertionError("a tensor outside all mappings")


def _load(folder: Path, dtype: torch.dtype, *, mapped: bool) -> Llama:
    return load_base(folder, read_config(folder), dtype=dtype, mapped=mapped)


def test_weights_of_the_files_type_stay_in_it(tmp_path: Path) -> None:
    save_huggingface(small_llama().to(torch.bfloat16), tmp_path)
    raw = (tmp_path / WEIGHTS_FILE).read_bytes()
    model = _load(tmp_path, torch.bfloat16, mapped=True)
    copy = dict(_load(tmp_path, torch.bfloat16, mapped=False).named_parameters())
    for name, parameter in model.named_parameters():
        assert _file_of(parameter) == WEIGHTS_FILE
        assert _file_of(copy[name]) == ""
        assert torch.equal(parameter, copy[name])
        with torch.no_grad():
            parameter.zero_()
    assert (tmp_path / WEIGHTS_FILE).read_bytes() == raw
    (tmp_path / WEIGHTS_FILE).unlink()  # what is mapped lives on
    assert not any(parameter.any() for parameter in model.parameters())


def test_weights_of_another_type_are_copies(tmp_path: Path) -> None:
    save_huggingface(small_llama(), tmp_path)
    model = _load(tmp_path, torch.bfloat16, mapped=True)
    assert {_file_of(parameter) for parameter in model.parameters()} == {""}


def test_metas_weights_are_copies(tmp_path: Path) -> None:
    write_meta(tmp_path, [random_weights(head="equal")])
    model = _load(tmp_path, torch.float32, mapped=True)
    assert {_file_of(parameter) for parameter in model.parameters()} == {""}


@pytest.mark.parametrize(
    ("rank", "verb", "stays"),
    [(4, "fit", True), (4, "predict", False), (0, "fit", False)],
    ids=["frozen", "answering", "trained"],
)
def test_a_frozen_base_stays_in_its_file_while_it_is_trained_on(
    rank: int, verb: Literal["fit", "predict"], stays: bool, tmp_path: Path
) -> None:
    write_small_llama(tmp_path, vocab_size=512)  # in fp32
    write_byte_tokenizer(tmp_path)
    records = [{"instruction": f"say {i}", "output": f"{i}"} for i in range(4)]
    (tmp_path / "records.json").write_text(json.dumps(records))
    raw = (tmp_path / WEIGHTS_FILE).read_bytes()
    module = LlamaModule(base_model=str(tmp_path), lora=LoRAConfig(rank=rank), base_dtype="float32")
    data = AlpacaDataModule(
        path=str(tmp_path / "records.json"),
        val_fraction=0.0,
        test_fraction=0.0,
        predict_path=str(tmp_path / "records.json"),
        base_folder=str(tmp_path),
        batch_size=4,
        cache_dir=str(tmp_path / "cache"),
    )
    trainer = Trainer(
        accelerator="cpu",
        max_steps=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=str(tmp_path),
    )
    getattr(trainer, verb)(module, datamodule=data)
    frozen = [p for p in module.parameters() if not p.requires_grad] or [*module.parameters()]
    assert {_file_of(p) for p in frozen} == {WEIGHTS_FILE if stays else ""}
    assert (tmp_path / WEIGHTS_FILE).read_bytes() == raw
