"""The rate of each step, what decays, what 8-bit state is, and a fit that stops at NaN."""

import io
import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn

from llama_lightning.data.alpaca import AlpacaDataModule
from llama_lightning.errors import UserError
from llama_lightning.model.config import LlamaConfig
from llama_lightning.model.llama import Llama
from llama_lightning.model.lora import LoRAConfig, inject_lora
from llama_lightning.training.llama_module import LlamaModule
from llama_lightning.training.memory import MemoryReport
from llama_lightning.training.optim import (
    OptimizerConfig,
    build_optimizer,
    build_scheduler,
    learning_rate,
    parameter_groups,
    total_norm,
)
from llama_lightning.training.trainer import Trainer
from tests.small import write_byte_tokenizer, write_small_llama

SCHEDULE = OptimizerConfig(lr=1e-3, init_lr=1e-4, warmup=0.2, eta_min=1e-5)

# The schedule


def test_the_rate_at_the_corners():
    # 100 steps, 20 of them warmup: from init_lr to lr, then a cosine down to eta_min.
    rates = [learning_rate(step, 100, SCHEDULE) for step in range(100)]
    assert rates[0] == pytest.approx(1e-4, rel=1e-12)
    assert rates[10] == pytest.approx((1e-4 + 1e-3) / 2, rel=1e-12)
    assert rates[19] == pytest.approx(1e-4 + 0.95 * 9e-4, rel=1e-12)
    assert rates[20] == pytest.approx(1e-3, rel=1e-12)
    assert rates[99] == pytest.approx(1e-5, rel=1e-12)
    for step in range(20, 100):
        cosine = 0.5 * (1 + math.cos(math.pi * (step - 20) / 79))
        assert rates[step] == pytest.approx(1e-5 + (1e-3 - 1e-5) * cosine, rel=1e-12)
    assert rates[:21] == sorted(rates[:21])
    assert rates[20:] == sorted(rates[20:], reverse=True)


@pytest.mark.parametrize(
    ("warmup", "total", "first_full"),
    [(0.0, 10, 0), (0.1, 10, 1), (0.5, 10, 5), (0.03, 100, 3), (0.03, 10, 0), (0.26, 10, 3)],
)
def test_warmup_is_a_fraction_of_the_steps(warmup, total, first_full):
    config = OptimizerConfig(lr=1.0, init_lr=0.25, warmup=warmup)
    rates = [learning_rate(step, total, config) for step in range(total)]
    assert rates.index(1.0) == first_full
    assert rates[first_full:] == [1.0] * (total - first_full)
    assert rates[0] == (0.25 if first_full else 1.0)


def test_the_default_rate_stands_still():
    config = OptimizerConfig(lr=3e-4)
    assert {learning_rate(step, 50, config) for step in range(50)} == {3e-4}
    warm = OptimizerConfig(lr=3e-4, warmup=0.5)  # without init_lr there is nothing to warm up from
    assert all(learning_rate(s, 50, warm) == pytest.approx(3e-4) for s in range(50))


@pytest.mark.parametrize("total", [1, 2, 3])
@pytest.mark.parametrize("warmup", [0.0, 0.4, 0.99])
def test_short_runs_have_finite_rates(total, warmup):
    config = OptimizerConfig(lr=1.0, init_lr=0.0, warmup=warmup, eta_min=0.5)
    rates = [learning_rate(step, total, config) for step in range(total + 2)]
    assert all(0.0 <= rate <= 1.0 for rate in rates)


def test_the_scheduler_gives_every_group_the_rate():
    optimizer = build_optimizer(Llama(CONFIG), SCHEDULE)
    assert len(optimizer.param_groups) > 1
    scheduler = build_scheduler(optimizer, 10, SCHEDULE)
    for step in range(10):
        expected = learning_rate(step, 10, SCHEDULE)
        assert all(g["lr"] == pytest.approx(expected) for g in optimizer.param_groups)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(
    "wrong",
    [{"lr": 0.0}, {"lr": -1.0}, {"lr": math.inf}, {"lr": math.nan}, {"warmup": 1.0}]
    + [{"warmup": -0.1}, {"warmup": 5}, {"weight_decay": -0.1}],
)
def test_a_value_out_of_range_is_named(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"optimizer.{name} is "):
        OptimizerConfig(**wrong)


# Parameter groups

CONFIG = LlamaConfig(
    vocab_size=300,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    rope_scaling=None,
    qkv_bias=True,
)


def names_by_decay(model: nn.Module) -> dict[float, set[str]]:
    names = {id(p): name for name, p in model.named_parameters(remove_duplicate=False)}
    by_decay: dict[float, set[str]] = {}
    for group in parameter_groups(model, weight_decay=0.1):
        by_decay.setdefault(group["weight_decay"], set()).update(
            names[id(p)] for p in group["params"]
        )
    return by_decay


def grouped(model: nn.Module) -> Counter[int]:
    return Counter(id(p) for g in parameter_groups(model, 0.1) for p in g["params"])


def test_matrices_decay_and_nothing_else():
    decay = names_by_decay(Llama(CONFIG))
    assert decay.keys() == {0.1, 0.0}
    assert {name.split(".")[-2] for name in decay[0.1]} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    assert all(name.endswith("_proj.weight") for name in decay[0.1])
    assert len(decay[0.1]) == 7 * 2
    # The tied head's name is the embedding's second one.
    kept = {name for name in decay[0.0] if not name.endswith(("norm.weight", "_proj.bias"))}
    assert kept == {"lm_head.weight"}
    assert len(decay[0.0]) == 1 + (2 * 2 + 1) + 3 * 2


def test_a_tied_head_is_counted_once():
    model = Llama(CONFIG)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    counts = grouped(model)
    assert set(counts.values()) == {1}
    assert set(counts) == {id(p) for p in model.parameters()}
    assert counts[id(model.lm_head.weight)] == 1


def test_an_untied_head_is_a_matrix():
    untied = LlamaConfig(**{**vars(CONFIG), "tie_word_embeddings": False})
    decay = names_by_decay(Llama(untied))
    assert "lm_head.weight" in decay[0.1]
    assert "model.embed_tokens.weight" in decay[0.0]


def test_lora_trains_its_matrices_alone():
    model = Llama(CONFIG)
    inject_lora(model, LoRAConfig(rank=4), dtype=torch.float32)
    decay = names_by_decay(model)
    assert decay.keys() == {0.1}
    assert len(decay[0.1]) == 2 * 7 * 2
    assert all("lora_" in name for name in decay[0.1])


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_decay_moves_what_has_no_gradient_to_speak_of(name):
    model = Llama(CONFIG)
    model.init_weights()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = build_optimizer(model, OptimizerConfig(name=name, lr=0.1, weight_decay=0.5))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for n, parameter in model.named_parameters():
        factor = 1 - 0.1 * 0.5 if n.endswith("_proj.weight") else 1.0
        assert torch.allclose(parameter, before[n] * factor, rtol=1e-6, atol=0.0), n


def test_the_norm_is_over_all_gradients_together():
    weights = [
        nn.Parameter(torch.zeros(2)),
        nn.Parameter(torch.zeros(1)),
        nn.Parameter(torch.zeros(3)),
    ]
    weights[0].grad, weights[1].grad = torch.tensor([2.0, 3.0]), torch.tensor([6.0])
    assert float(total_norm(weights)) == pytest.approx(7.0)


def test_the_norm_of_a_large_gradient_in_16_bits_is_exact():
    weights = [
        nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16)) for shape in ((32768, 512), 9)
    ]
    for seed, weight in enumerate(weights):
        generator = torch.Generator().manual_seed(seed)
        weight.grad = torch.randn(weight.shape, generator=generator).bfloat16()
    exact = torch.stack([weight.grad.double().norm() for weight in weights]).norm()
    norm = total_norm(weights)
    print(f"{norm:.6f}, exact {exact:.6f}, torch {weights[0].grad.norm():.6f}")
    assert norm.dtype == torch.float32
    assert float(norm) == pytest.approx(float(exact), rel=1e-4)


# 8-bit state


def train_a_little(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def fresh(name: str = "adamw8bit") -> tuple[Llama, torch.optim.Optimizer]:
    model = Llama(CONFIG)
    model.init_weights(torch.Generator().manual_seed(0))
    return model, build_optimizer(model, OptimizerConfig(name=name, lr=1e-2))


def test_matrices_have_8_bit_state_and_the_embedding_has_not():
    model, optimizer = fresh()
    train_a_little(model, optimizer, range(1))
    kinds: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        types = {state[key].dtype for key in ("state1", "state2")}
        embedding = "embed_tokens" in name
        small = parameter.numel() < 4096  # bitsandbytes' own limit
        assert types == {torch.float32 if embedding or small else torch.uint8}, name
        kinds["embedding" if embedding else "small" if small else "matrix"] += parameter.numel()
    print(f"elements with 8-bit state {kinds['matrix']:,}; 32-bit: {dict(kinds)}")
    # Or no limit would have been tried: k and v are 2048 elements, the embedding 19,200.
    assert min(kinds["embedding"], kinds["small"], kinds["matrix"]) > 0
    assert kinds["embedding"] >= 4096


def test_8_bit_state_survives_a_checkpoint_bit_for_bit():
    model, optimizer = fresh()
    train_a_little(model, optimizer, range(5))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    stored = torch.load(file, weights_only=True)

    resumed, resumed_optimizer = fresh()
    resumed.load_state_dict(stored["model"])
    resumed_optimizer.load_state_dict(stored["optimizer"])
    for one, other in zip(model.parameters(), resumed.parameters(), strict=True):
        state, loaded = optimizer.state[one], resumed_optimizer.state[other]
        assert state.keys() == loaded.keys()
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                assert value.dtype == loaded[key].dtype, key
                assert torch.equal(value, loaded[key]), key
            else:
                assert value == loaded[key], key
    train_a_little(model, optimizer, range(5, 10))
    train_a_little(resumed, resumed_optimizer, range(5, 10))
    pairs = list(zip(model.parameters(), resumed.parameters(), strict=True))
    print(f"tensors that differ after 5 more steps: {sum(not torch.equal(*p) for p in pairs)}")
    assert all(torch.equal(one, other) for one, other in pairs)

    # Teeth: without its state a run goes elsewhere.
    forgetful, fresh_optimizer = fresh()
    forgetful.load_state_dict(stored["model"])
    train_a_little(forgetful, fresh_optimizer, range(5, 10))
    assert not torch.equal(forgetful.lm_head.weight, model.lm_head.weight)


def test_8_bits_follow_32_bits():
    (model, optimizer), (exact, exact_optimizer) = fresh(), fresh("adamw")
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    train_a_little(model, optimizer, range(10))
    train_a_little(exact, exact_optimizer, range(10))
    errors = {}
    for (name, one), other in zip(model.named_parameters(), exact.parameters(), strict=True):
        errors[name] = float((one - other).norm() / (other - start[name]).norm())
    worst = max(errors, key=errors.get)
    print(f"largest difference of 10 updates: {errors[worst]:.2%} ({worst})")
    assert errors[worst] < 0.1
    assert errors["model.embed_tokens.weight"] < 1e-4  # 32-bit state
    assert errors["model.layers.0.mlp.up_proj.weight"] > 1e-4  # 8-bit state


# A real fit


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("optim")
    write_small_llama(folder / "base", vocab_size=512)
    write_byte_tokenizer(folder / "base")
    records = [{"instruction": f"say {i}", "output": "a" * (1 + i % 5)} for i in range(22)]
    (folder / "data.json").write_text(json.dumps(records))
    return folder


class Recorder(Callback):
    """Note rate and weights of each optimizer step, as the step is about to be taken."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.logged: list[float] = []
        self.weights: list[dict[str, torch.Tensor]] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        assert len({group["lr"] for group in optimizer.param_groups}) == 1
        self.rates.append(optimizer.param_groups[0]["lr"])
        self.weights.append(trained(pl_module))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.logged.append(float(trainer.callback_metrics["train/learning_rate"]))


def trained(module: LlamaModule) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in module.named_parameters() if p.requires_grad}


def start(workplace: Path, **kwargs) -> tuple[Trainer, AlpacaDataModule, Recorder]:
    recorder = Recorder()
    settings = {"accumulate_grad_batches": 4, "max_epochs": 2} | kwargs
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=workplace,
        callbacks=[recorder],
        **settings,
    )
    data = AlpacaDataModule(
        str(workplace / "data.json"),
        val_fraction=0.1,
        test_fraction=0.0,
        base_folder=str(workplace / "base"),
        template="plain",
        batch_size=8,
    )
    return trainer, data, recorder


def make_module(workplace: Path, cls: type[LlamaModule] = LlamaModule, **kwargs) -> LlamaModule:
    settings = {"base_dtype": "float32", "optimizer": OptimizerConfig(lr=1e-3)} | kwargs
    return cls(base_model=str(workplace / "base"), **settings)


@pytest.mark.parametrize("length", [{"max_epochs": 2}, {"max_epochs": None, "max_steps": 5}])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_the_schedule_moves_once_an_optimizer_step(workplace, accumulate, length):
    # 20 records, 8 a step: 3 steps an epoch, the last one partial.
    trainer, data, recorder = start(workplace, accumulate_grad_batches=accumulate, **length)
    trainer.fit(make_module(workplace, optimizer=SCHEDULE), datamodule=data)
    steps = length.get("max_steps", 6)
    expected = [learning_rate(step, steps, SCHEDULE) for step in range(steps)]
    print(f"rates with accumulation {accumulate}: {', '.join(f'{r:.2e}' for r in recorder.rates)}")
    assert trainer.global_step == steps
    assert recorder.rates == pytest.approx(expected, rel=1e-9)
    assert recorder.logged == pytest.approx(expected, rel=1e-6)
    assert recorder.rates[0] == pytest.approx(SCHEDULE.init_lr)
    assert recorder.rates[-1] == pytest.approx(SCHEDULE.eta_min)


class NotesGradients(LlamaModule):
    """Note before each micro-batch whether gradients are in memory."""

    def on_train_batch_start(self, batch, batch_idx):
        super().on_train_batch_start(batch, batch_idx)
        self.__dict__.setdefault("noted", []).append(
            any(p.grad is not None for p in self.parameters())
        )


def test_gradients_are_freed_by_the_step_and_kept_within_it(workplace):
    trainer, data, _ = start(workplace, accumulate_grad_batches=2)
    module = make_module(workplace, NotesGradients)
    trainer.fit(module, datamodule=data)
    print(f"gradients in memory before each micro-batch: {module.noted}")
    assert module.noted == [False, True] * 6


@pytest.mark.parametrize("rank", [0, 4])
def test_the_memory_of_gradients_is_that_of_the_trained_weights(workplace, rank):
    trainer, data, _ = start(workplace, log_every_n_steps=1)
    trainer.callbacks.append(MemoryReport(table=False))
    trainer.fit(make_module(workplace, lora=LoRAConfig(rank=rank)), datamodule=data)
    logged = trainer.callback_metrics
    gradients, trained = (
        float(logged[f"memory/{n}_gib"]) for n in ("gradients", "trained_weights")
    )
    print(f"rank {rank}: {gradients * 2**20:.1f} KiB of gradients")
    assert gradients == trained > 0


class BreaksInTheSecondStep(LlamaModule):
    """Multiply the loss of one micro-batch in the middle of the second step."""

    factor = math.nan

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if batch_idx == 5:
            self._step_loss = self._step_loss * self.factor
            return loss * self.factor
        return loss


class InfiniteInTheSecondStep(BreaksInTheSecondStep):
    factor = math.inf


class NaNGradientOfAFiniteLoss(LlamaModule):
    """The forward pass is sound and the backward pass is not, as with a square root at zero."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if batch_idx == 5:
            weight = next(p for p in self.parameters() if p.requires_grad)
            return loss + (weight * 0).square().sum().sqrt()
        return loss


@pytest.mark.parametrize("lora", [0, 4], ids=["full", "lora"])
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize(
    "cls", [BreaksInTheSecondStep, InfiniteInTheSecondStep, NaNGradientOfAFiniteLoss]
)
def test_a_step_that_is_not_finite_never_reaches_the_weights(workplace, cls, clip, lora):
    module = make_module(workplace, cls, lora=LoRAConfig(rank=lora))
    trainer, data, recorder = start(workplace, gradient_clip_val=clip)
    with pytest.raises(UserError, match="step 1: the gradient is not finite") as caught:
        trainer.fit(module, datamodule=data)
    assert "trainer.gradient_clip_val" in str(caught.value)
    assert "\n" not in str(caught.value)
    first, second = recorder.weights
    after = trained(module)
    moved = sum(not torch.equal(first[name], second[name]) for name in first)
    changed = sum(not torch.equal(second[name], after[name]) for name in second)
    print(f"{cls.__name__}: step 0 moved {moved} of {len(first)} tensors, step 1 {changed}")
    assert moved > 0  # the first step was taken
    assert changed == 0
    assert trainer.global_step == 1


def test_a_finite_fit_goes_on(workplace):
    module = make_module(workplace)
    trainer, data, recorder = start(workplace, gradient_clip_val=1.0)
    trainer.fit(module, datamodule=data)
    assert len(recorder.rates) == trainer.global_step == 6
