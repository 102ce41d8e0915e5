"""One step of the same records is one gradient, however the records are split over slots and ranks.

Every run is a `fit` of the real Trainer over a small random Llama. The learning rate is so small
that the weights stand still: so the second, partial step has the same oracle as the first.
"""

import functools
import itertools
import json
import math
import multiprocessing
import os
import random
import sys
import traceback
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy
from torch.nn import functional as F

from llama_lightning.data.alpaca import AlpacaDataModule
from llama_lightning.model.lora import LoRAConfig
from llama_lightning.records import IGNORE_INDEX
from llama_lightning.training.llama_module import LlamaModule
from llama_lightning.training.optim import OptimizerConfig
from llama_lightning.training.trainer import Trainer
from llama_lightning.weights.huggingface import load_huggingface, save_huggingface
from tests.small import write_byte_tokenizer, write_small_llama

# Far above 1e-15 and 1e-7 times the square root of the terms summed, far below any real error.
TOLERANCE = {"64-true": 1e-9, "32-true": 1e-5}
CLIP = 0.05  # below every gradient's norm here, so that clipping bites
# Answers of one byte beside answers of hundreds: averaging averages goes furthest wrong there.
ANSWER_BYTES = [1, 380, 2, 150, 3, 1, 60, 250, 5, 2, 30]

Tensors = dict[str, torch.Tensor]


class Plan(NamedTuple):
    """One run."""

    precision: str
    lora: bool
    records: int
    batch_size: int
    accumulate: int
    world_size: int = 1

    def __str__(self) -> str:
        kind = "LoRA" if self.lora else "full"
        return (
            f"{self.precision} {kind}, {self.records} records by {self.batch_size}: "
            f"{self.accumulate} turns x {self.world_size} ranks"
        )


class Run(NamedTuple):
    """What a run did, step by step."""

    reduced: list[Tensors]  # gradients after accumulation and all-reduce
    consumed: list[Tensors]  # gradients the optimizer worked with: clipped
    losses: list[float]
    norms: list[float]
    sizes: list[int]  # records of each micro-batch, on this rank


class Module(LlamaModule):
    """LlamaModule with a LoRA that has learnt something: a zero B would hide all errors in A."""

    def configure_model(self) -> None:
        fresh = self.model is None
        super().configure_model()
        if fresh:
            generator = torch.Generator().manual_seed(0)
            for name, parameter in self.named_parameters():
                if "lora_" in name:
                    torch.nn.init.normal_(parameter, std=0.1, generator=generator)


class MeanOfMeans(Module):
    """What a LightningModule usually does: each micro-batch's mean, averaged by Lightning."""

    def training_step(self, batch, batch_idx):
        hidden, targets = self._supervised(batch)
        return F.cross_entropy(self.model.lm_head(hidden), targets)


class Recorder(Callback):
    def __init__(self) -> None:
        self.run = Run([], [], [], [], [])

    def on_train_start(self, trainer, pl_module):
        def consumed(optimizer, args, kwargs):
            self.run.consumed.append(gradients(pl_module))

        # Behind the step: before it, the closure that computes the gradients has not run.
        trainer.optimizers[0].register_step_post_hook(consumed)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.run.reduced.append(gradients(pl_module))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.run.sizes.append(len(batch.row_ids))
        if len(self.run.losses) < trainer.global_step:
            self.run.losses.append(float(trainer.callback_metrics["train/loss"]))
            self.run.norms.append(float(trainer.callback_metrics["train/gradient_norm"]))


def gradients(module: torch.nn.Module) -> Tensors:
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.requires_grad}


# Runs


def write_workplace(folder: Path) -> None:
    """Write a base model with weights large enough that every part of it matters."""
    config = write_small_llama(folder / "base", vocab_size=512)
    model = load_huggingface(folder / "base", config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter *= 3
    save_huggingface(model, folder / "base")
    write_byte_tokenizer(folder / "base")
    rng = random.Random(0)
    records = [
        {
            "instruction": "".join(rng.choices("abcdefgh ", k=rng.randint(1, 40))),
            "input": "",
            "output": "".join(rng.choices("ijklmnopqrstuvwxyz", k=size)),
        }
        for size in ANSWER_BYTES
    ]
    for count in {len(records), 9}:
        (folder / f"{count}.json").write_text(json.dumps(records[:count]))


def make_module(folder: Path, lora: bool, cls: type[LlamaModule] = Module) -> LlamaModule:
    return cls(
        base_model=str(folder / "base"),
        base_dtype="float32",
        lora=LoRAConfig(rank=4 if lora else 0),
        optimizer=OptimizerConfig(lr=1e-14, weight_decay=0.0),
    )


def make_data(folder: Path, records: int, **kwargs: Any) -> AlpacaDataModule:
    file = str(folder / f"{records}.json")
    return AlpacaDataModule(
        file,
        val_path=kwargs.pop("val_path", None),
        val_fraction=0.0,
        test_fraction=0.0,
        base_folder=str(folder / "base"),
        template="plain",
        **kwargs,
    )


def make_trainer(folder: Path, precision: str, world_size: int, **kwargs: Any) -> Trainer:
    # The process group is there already when there are two ranks.
    strategy = DDPStrategy(process_group_backend="gloo") if world_size > 1 else "auto"
    return Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy=strategy,
        precision=precision,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=folder,
        **kwargs,
    )


def fit(folder: Path, plan: Plan, cls: type[LlamaModule] = Module) -> Run:
    recorder = Recorder()
    trainer = make_trainer(
        folder,
        plan.precision,
        plan.world_size,
        accumulate_grad_batches=plan.accumulate,
        gradient_clip_val=CLIP,
        callbacks=[recorder],
    )
    trainer.fit(
        make_module(folder, plan.lora, cls),
        datamodule=make_data(folder, plan.records, batch_size=plan.batch_size),
    )
    return recorder.run


def validate(
    folder: Path,
    precision: str,
    eval_batch_size: int,
    world_size: int,
    cls: type[LlamaModule] = Module,
) -> dict[str, float]:
    path = folder / f"{len(ANSWER_BYTES)}.json"
    data = make_data(folder, 9, val_path=str(path), eval_batch_size=eval_batch_size)
    trainer = make_trainer(folder, precision, world_size)
    module = make_module(folder, lora=False, cls=cls)
    (metrics,) = trainer.validate(module, datamodule=data, verbose=False)
    return metrics


KINDS = list(itertools.product(TOLERANCE, (False, True)))
ONE_RANK = [
    Plan(precision, lora, len(ANSWER_BYTES), batch_size, accumulate)
    for precision, lora in KINDS
    for batch_size, accumulate in [(8, 2), (8, 4), (8, 8), (16, 16)]
]
TWO_RANKS = [
    Plan(precision, lora, records, batch_size, accumulate, world_size=2)
    for precision, lora in KINDS
    for records, batch_size, accumulate in [
        (len(ANSWER_BYTES), 8, 1),
        (len(ANSWER_BYTES), 8, 2),
        (len(ANSWER_BYTES), 8, 4),
        (len(ANSWER_BYTES), 16, 8),
        (9, 8, 2),  # the last step has one record: a whole rank is left with nothing
    ]
    # Every split in float64; in float32 those with empty slots, for the time they take.
    if precision == "64-true" or accumulate in (2, 8)
]
EVAL_SIZES = (1, 3, 8)


def work(rank: int, folder: Path) -> None:
    """Run every plan of two ranks; executed in a process of its own, one a rank."""
    with (folder / f"log{rank}").open("w") as log:
        sys.stdout = sys.stderr = log
        try:
            torch.set_num_threads(1)
            # Lightning takes LOCAL_RANK as a sign that the processes have been started for it. The
            # group is made here, through a file, so that no port has to be free.
            os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": "2"}
            torch.distributed.init_process_group(
                "gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2
            )
            runs = {plan: tuple(fit(folder, plan)) for plan in TWO_RANKS}
            measured = {size: validate(folder, "32-true", size, 2) for size in EVAL_SIZES}
            torch.save((runs, measured), folder / f"rank{rank}.pt")
        except BaseException:
            traceback.print_exc()
            log.flush()
            os._exit(1)
    # Not by way of the interpreter's end: gloo's threads sometimes abort in it.
    os._exit(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exact")
    write_workplace(folder)
    return folder


@pytest.fixture(scope="module")
def one_rank(folder):
    return functools.cache(lambda plan: fit(folder, plan))


@pytest.fixture(scope="module")
def two_ranks(folder):
    """Both ranks' runs and measurements."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=work, args=(rank, folder)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=600)
    if [process.exitcode for process in processes] != [0, 0]:
        for process in processes:
            process.kill()  # a rank alone waits for ever
        logs = "\n".join((folder / f"log{rank}").read_text()[-3000:] for rank in range(2))
        pytest.fail(f"exit codes {[process.exitcode for process in processes]}\n{logs}")
    loaded = []
    for rank in range(2):
        runs, measured = torch.load(folder / f"rank{rank}.pt", weights_only=False)
        loaded.append(({plan: Run(*run) for plan, run in runs.items()}, measured))
    return loaded


# Oracles


def alone(module: LlamaModule, example: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and targets of one record by itself, in a dense row."""
    labels = torch.tensor(example.labels)
    learnt = labels != IGNORE_INDEX
    return module.model(torch.tensor([example.tokens]))[0][learnt], labels[learnt]


def by_hand(folder: Path, plan: Plan) -> list[tuple[float, Tensors]]:
    """Each step's loss and gradient in float64: record by record, without Lightning or batches."""
    module = make_module(folder, plan.lora)
    module.configure_model()
    module.double()
    data = make_data(folder, plan.records, batch_size=plan.batch_size)
    data.setup("fit")
    results = []
    for step in data.train_dataloader().sampler.steps():
        module.zero_grad()
        examples = [data.train_examples[i] for i in step]
        total = sum(example.num_targets for example in examples)
        loss = 0.0
        for example in examples:
            share = F.cross_entropy(*alone(module, example), reduction="sum") / total
            share.backward()
            loss += share.item()
        results.append((loss, gradients(module)))
    return results


def worst_error(ours: Tensors, reference: Tensors) -> float:
    """Compute the largest relative error, tensor by tensor, so that none hides behind another."""
    assert ours.keys() == reference.keys()
    return max(
        float((ours[name].double() - grad.double()).norm() / grad.double().norm())
        for name, grad in reference.items()
    )


def assert_same_steps(run: Run, reference: Run, precision: str) -> float:
    """Compare gradients before and after clipping, and the losses; return the worst error."""
    assert len(run.reduced) == len(run.consumed) == len(reference.reduced) == len(run.losses)
    errors = [
        worst_error(ours, theirs)
        for kind in ("reduced", "consumed")
        for ours, theirs in zip(getattr(run, kind), getattr(reference, kind), strict=True)
    ]
    assert max(errors) < TOLERANCE[precision], errors
    assert run.losses == pytest.approx(reference.losses, rel=1e-6)
    assert run.norms == pytest.approx(reference.norms, rel=1e-5)
    return max(errors)


def reference_of(plan: Plan) -> Plan:
    """The same step in one micro-batch on one rank."""
    return plan._replace(accumulate=1, world_size=1)


# Gradients


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("batch_size", [8, 16])
def test_the_reference_itself_is_the_mean_over_the_steps_tokens(
    folder, one_rank, batch_size, precision, lora
):
    plan = Plan(precision, lora, len(ANSWER_BYTES), batch_size, accumulate=1)
    run, expected = one_rank(plan), by_hand(folder, plan)
    assert run.sizes == ([8, 3] if batch_size == 8 else [11])
    errors = [
        worst_error(ours, grads) for ours, (_, grads) in zip(run.reduced, expected, strict=True)
    ]
    print(f"{plan}: worst relative error against records one by one {max(errors):.1e}")
    # In float32 this is the error of the arithmetic itself, not of a split.
    assert max(errors) < (1e-9 if precision == "64-true" else 1e-4)
    assert run.losses == pytest.approx([loss for loss, _ in expected], rel=1e-6)


@pytest.mark.parametrize("plan", ONE_RANK, ids=str)
def test_a_step_is_the_same_however_it_is_accumulated(one_rank, plan):
    run = one_rank(plan)
    error = assert_same_steps(run, one_rank(reference_of(plan)), plan.precision)
    print(f"{plan}: worst relative error {error:.1e}, empty micro-batches {run.sizes.count(0)}")
    assert sum(run.sizes) == plan.records
    # 3 records over 8 slots, or 11 over 16, leave 5 empty.
    assert run.sizes.count(0) == {2: 0, 4: 1, 8: 5, 16: 5}[plan.accumulate]


@pytest.mark.slow
@pytest.mark.parametrize("plan", TWO_RANKS, ids=str)
def test_a_step_is_the_same_on_two_ranks(one_rank, two_ranks, plan):
    runs = [measured[0][plan] for measured in two_ranks]
    reference = one_rank(reference_of(plan))
    error = max(assert_same_steps(run, reference, plan.precision) for run in runs)
    empty = [run.sizes.count(0) for run in runs]
    print(f"{plan}: worst relative error {error:.1e}, empty micro-batches {empty}")
    assert sum(sum(run.sizes) for run in runs) == plan.records
    for ours, theirs in zip(runs[0].consumed, runs[1].consumed, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert runs[0].losses == runs[1].losses
    if plan.records == 9:
        assert runs[1].sizes[-plan.accumulate :] == [0] * plan.accumulate


@pytest.mark.parametrize("plan", [p for p in ONE_RANK if p.accumulate == 4], ids=str)
def test_clipping_sees_the_whole_steps_gradient(one_rank, plan):
    run = one_rank(plan)
    for step, (before, after) in enumerate(zip(run.reduced, run.consumed, strict=True)):
        norm = math.sqrt(sum(float(grad.double().pow(2).sum()) for grad in before.values()))
        clipped = math.sqrt(sum(float(grad.double().pow(2).sum()) for grad in after.values()))
        print(f"{plan}, step {step}: norm {norm:.3f}, clipped to {clipped:.6f}")
        assert norm > 2 * CLIP
        assert clipped == pytest.approx(CLIP, rel=1e-4)  # clipping adds 1e-6 to the norm
        assert run.norms[step] == pytest.approx(norm, rel=1e-5)  # the norm logged is unclipped


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("accumulate", [2, 4, 8])
def test_lightnings_own_averaging_would_be_found_out(folder, one_rank, accumulate, lora):
    plan = Plan("64-true", lora, 8, 8, accumulate)
    path = folder / "8.json"
    records = json.loads((folder / f"{len(ANSWER_BYTES)}.json").read_text())[:8]
    path.write_text(json.dumps(records))
    reference = one_rank(reference_of(plan))
    run = fit(folder, plan, MeanOfMeans)
    error = worst_error(run.reduced[0], reference.reduced[0])
    print(f"{plan}: the mean of means is wrong by {error:.1%}")
    assert error > 0.02
    with pytest.raises(AssertionError):
        assert_same_steps(run, reference, plan.precision)
    # In one micro-batch the two agree: it is the averaging alone that is wrong.
    whole = fit(folder, reference_of(plan), MeanOfMeans)
    assert worst_error(whole.reduced[0], reference.reduced[0]) < 1e-9


# Validation


@pytest.fixture(scope="module")
def expected(folder) -> dict[str, float]:
    """Measure all validation records in float64, one by one."""
    module = make_module(folder, lora=False)
    module.configure_model()
    module.double()
    data = make_data(folder, len(ANSWER_BYTES))
    data.setup("fit")
    with torch.no_grad():
        pairs = [alone(module, example) for example in data.train_examples]
    losses = torch.cat([F.cross_entropy(*pair, reduction="none") for pair in pairs])
    right = torch.cat([logits.argmax(-1) == targets for logits, targets in pairs])
    assert len(losses) == sum(ANSWER_BYTES) + len(ANSWER_BYTES)
    means = [float(F.cross_entropy(*pair)) for pair in pairs]
    # Teeth: a mean over records is another number.
    assert abs(sum(means) / len(means) - float(losses.mean())) > 1e-3
    return {
        "val/loss": float(losses.mean()),
        "val/perplexity": math.exp(float(losses.mean())),
        "val/token_accuracy": float(right.double().mean()),
    }


def assert_measured(what: str, metrics: dict[str, float], expected: dict[str, float]) -> None:
    assert metrics.keys() == expected.keys()
    errors = {name: abs(metrics[name] / value - 1) for name, value in expected.items()}
    print(
        f"{what}: loss {metrics['val/loss']:.6f}, worst relative error {max(errors.values()):.1e}"
    )
    # The exponential makes an error of the loss one of loss times as much.
    bounds = {"val/perplexity": 1e-6 * max(1.0, expected["val/loss"])}
    assert all(error < bounds.get(name, 1e-6) for name, error in errors.items()), errors


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("eval_batch_size", EVAL_SIZES)
def test_validation_counts_every_token_the_same(folder, expected, eval_batch_size, precision):
    metrics = validate(folder, precision, eval_batch_size, 1)
    assert_measured(f"{precision}, {eval_batch_size} a batch", metrics, expected)


@pytest.mark.slow
@pytest.mark.parametrize("eval_batch_size", EVAL_SIZES)
def test_validation_on_two_ranks_counts_every_token_once(two_ranks, expected, eval_batch_size):
    for rank, (_, measured) in enumerate(two_ranks):
        what = f"rank {rank} of 2, {eval_batch_size} a batch"
        assert_measured(what, measured[eval_batch_size], expected)


def test_a_validation_loss_that_is_not_a_number_shows(folder):
    class OneBatchBroken(Module):
        def _supervised(self, batch):
            hidden, targets = super()._supervised(batch)
            return (hidden * math.nan if 3 in batch.row_ids else hidden), targets

    metrics = validate(folder, "32-true", 2, 1, OneBatchBroken)
    print(f"one of 6 batches is NaN: loss {metrics['val/loss']}")
    assert math.isnan(metrics["val/loss"])
    assert math.isnan(metrics["val/perplexity"])
