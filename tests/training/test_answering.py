"""predict keeps its rows filled from batch to batch, and gives the weights back as they were."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from llama_lightning.data.alpaca import AlpacaDataModule
from llama_lightning.evaluation.callbacks import ResponseWriter
from llama_lightning.model.lora import LoRAConfig
from llama_lightning.model.sampling import GenerationConfig
from llama_lightning.records import Generation
from llama_lightning.training.llama_module import LlamaModule
from llama_lightning.training.trainer import Trainer
from tests.small import write_byte_tokenizer, write_small_llama


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_small_llama(tmp_path, vocab_size=512)
    write_byte_tokenizer(tmp_path)
    records = [{"instruction": f"say {'x' * (i % 5)} {i}", "output": ""} for i in range(14)]
    (tmp_path / "prompts.json").write_text(json.dumps(records))
    return tmp_path


def _trainer(folder: Path, precision: str, *callbacks: Callback) -> Trainer:
    return Trainer(
        accelerator="cpu",
        precision=precision,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=str(folder),
        callbacks=list(callbacks),
    )


def _predict(
    folder: Path, size: int, precision: str, samples: int = 1, rank: int = 0
) -> tuple[LlamaModule, list]:
    module = LlamaModule(
        base_model=str(folder),
        lora=LoRAConfig(rank=rank),
        base_dtype="float32",  # as without LoRA
        generation=GenerationConfig(max_new_tokens=20, temperature=2.0, num_samples=samples),
    )
    data = AlpacaDataModule(
        predict_path=str(folder / "prompts.json"), base_folder=str(folder), eval_batch_size=size
    )
    trainer = _trainer(folder, precision)
    finished: list[Generation] = []
    module.on_generation.append(finished.append)
    returned = trainer.predict(module, datamodule=data)
    assert [g for batch in returned for g in batch] == finished
    assert [len(batch) for batch in returned] != [size * samples] * len(returned)
    return module, finished


@pytest.mark.parametrize("samples", [1, 3])
def test_predict_answers_the_same_whatever_its_batches(folder: Path, samples: int) -> None:
    by_size = {size: _predict(folder, size, "64-true", samples)[1] for size in (1, 4, 5)}
    lengths = {len(g.tokens) for g in by_size[1]}
    print(f"{len(by_size[1])} responses of {min(lengths)} to {max(lengths)} tokens")
    assert sorted(by_size[1]) == sorted(by_size[4]) == sorted(by_size[5])
    assert [(g.row_id, g.sample) for g in sorted(by_size[1])] == [
        (row, sample) for row in range(14) for sample in range(samples)
    ]


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_lora_that_changes_nothing_answers_as_its_base(folder: Path, precision: str) -> None:
    _, expected = _predict(folder, 4, precision)
    module, finished = _predict(folder, 4, precision, rank=4)
    print(f"{precision}, LoRA in {module.model.model.layers[0].mlp.up_proj.lora_A.weight.dtype}")
    assert sorted(finished) == sorted(expected)


def test_weights_come_back_from_predict_and_from_a_stopped_one(folder: Path) -> None:
    module, _ = _predict(folder, 4, "bf16-true")
    fresh = LlamaModule(base_model=str(folder))
    fresh.configure_model()
    ours, theirs = module.state_dict(), fresh.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name].bfloat16()) for name in ours)

    data = AlpacaDataModule(predict_path=str(folder / "prompts.json"), base_folder=str(folder))
    data.setup("predict")
    prompts = data.prompts(data.predict_rows[:4])
    expected = sorted(module.answer(prompts))

    def stop(generation: Generation) -> None:
        raise KeyboardInterrupt

    module.on_generation.append(stop)
    assert module.answer(prompts, drain=False) == []  # all in the network, none finished
    with pytest.raises(KeyboardInterrupt):
        module.answer(prompts)
    module.on_generation.remove(stop)
    assert all(torch.equal(module.state_dict()[name], tensor) for name, tensor in ours.items())
    assert sorted(module.answer(prompts)) == expected  # nothing of the stopped run is left
    module.model.requires_grad_(True)
    module.model(prompts.tokens[None]).float().logsumexp(-1).sum().backward()


class _Stop(Callback):
    def on_predict_batch_end(self, trainer: Any, module: Any, *given: Any) -> None:
        raise RuntimeError("stop")


def test_a_stop_between_two_batches_leaves_nothing(folder: Path) -> None:
    module, finished = _predict(folder, 4, "bf16-true")
    expected = sorted(finished)  # it listens on
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    data = AlpacaDataModule(
        predict_path=str(folder / "prompts.json"), base_folder=str(folder), eval_batch_size=4
    )
    writer, stop = ResponseWriter(str(folder / "responses.jsonl")), _Stop()
    trainer = _trainer(folder, "bf16-true", writer, stop)
    with pytest.raises(RuntimeError, match="stop"):
        trainer.predict(module, datamodule=data)
    after = module.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    trainer.callbacks.remove(stop)
    answers = trainer.predict(module, datamodule=data)
    assert sorted(g for batch in answers for g in batch) == expected
    assert len((folder / "responses.jsonl").read_text().splitlines()) == len(expected)
