"""The LightningModule: builds the network, takes the exact step, measures, generates.

It receives tokens and knows no tokenizer. Data and training meet in cli.py.
"""

from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torchmetrics import MeanMetric

from llama_lightning.errors import UsageError, UserError, WeightsError
from llama_lightning.hub import resolve_base
from llama_lightning.model.block_runner import BlockRunner, Checkpointing
from llama_lightning.model.compilation import missing_compiler
from llama_lightning.model.config import LlamaConfig
from llama_lightning.model.llama import Llama
from llama_lightning.model.lora import LoRAConfig, inject_lora
from llama_lightning.model.loss import (
    loss_and_hits,
    summed_cross_entropy,
    supervised_positions,
)
from llama_lightning.model.sampling import GenerationConfig
from llama_lightning.records import Batch, Generation, PromptBatch
from llama_lightning.training.answering import Answering
from llama_lightning.training.optim import (
    OptimizerConfig,
    build_optimizer,
    build_scheduler,
    total_norm,
)
from llama_lightning.training.provenance import fingerprint
from llama_lightning.training.stored_module import StoredModule
from llama_lightning.weights.base import check_files, load_base, read_config
from llama_lightning.weights.peft import agreed_lora, check_peft, load_peft


class LlamaModule(StoredModule):
    """A Llama to fine-tune, with LoRA or in full.

    Args:
        base_model: `tiny` (embedded), a folder in Hugging Face's or Meta's format, or a hub name.
        from_scratch: take only the shape of base_model and draw fresh weights.
        lora: low-rank adaptation; rank 0 trains every weight.
        adapter: folder of a PEFT adapter, to answer with or to train on. With lora.rank 0 its rank,
            alpha, dropout and targets are taken too. A checkpoint goes before it.
        optimizer: AdamW and its schedule.
        generation: how predict answers.
        gradient_checkpointing: true computes each block again in the backward pass, to save memory;
            `selective` keeps its wide products, and on a GPU its attention, and computes the rest
            again, as compiled blocks do without it.
        compile: compile the blocks for training and evaluation; answering stays as it is.
        share_prefixes: compute equal beginnings of a micro-batch's prompts once. Without effect on
            the result, and off by itself while dropout draws a mask for each record.
        dropout: on what attention and MLP add to the residual stream, in training.
        qkv_bias: biases on q, k and v; those the base does not have start at zero.
        base_dtype: type of the frozen weights beside LoRA. Trained weights are fp32 (bf16 under
            precision bf16-true). Frozen weights that have this type in base_model's files stay
            there from fit on: leave these files as they are while its process runs.
    """

    def __init__(
        self,
        base_model: str = "tiny",
        from_scratch: bool = False,
        lora: LoRAConfig = LoRAConfig(),  # noqa: B008 - frozen
        adapter: str | None = None,
        optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008 - frozen
        generation: GenerationConfig = GenerationConfig(),  # noqa: B008 - frozen
        gradient_checkpointing: Checkpointing = False,
        compile: bool = False,
        share_prefixes: bool = True,
        dropout: float = 0.0,
        qkv_bias: bool = False,
        base_dtype: Literal["bfloat16", "float32"] = "bfloat16",
    ) -> None:
        super().__init__()
        if from_scratch and (lora.rank or adapter):
            raise UsageError(
                "model.from_scratch trains every weight: set model.lora.rank to 0 and leave "
                "model.adapter out"
            )
        if not 0.0 <= dropout < 1.0:
            raise UsageError(f"model.dropout is {dropout}; use a value in [0, 1)")
        self.base_model, self.from_scratch = base_model, from_scratch
        self.adapter = Path(adapter) if adapter else None
        if self.adapter is not None:
            lora = agreed_lora(lora, self.adapter)
        self.lora, self.optimizer, self.generation = lora, optimizer, generation
        self.gradient_checkpointing = gradient_checkpointing
        self.compile_blocks = compile  # `compile` is a method of every module
        self.share_prefixes = share_prefixes
        self.dropout, self.qkv_bias = dropout, qkv_bias
        self.base_dtype: torch.dtype = getattr(torch, base_dtype)
        self.model: Llama | None = None
        self._answering = Answering()
        self._seed = 0
        self._step_loss = torch.tensor(0.0)  # of the accumulated micro-batches, on this rank
        # By default torchmetrics leaves NaN out of the mean, and a broken model looks sound.
        self.eval_loss = MeanMetric(nan_strategy=float("nan")).set_dtype(torch.float64)
        self.eval_accuracy = MeanMetric().set_dtype(torch.float64)

    # Building

    @cached_property
    def folder(self) -> Path:
        """The base model's folder on this machine; fetched from the hub at first use."""
        return resolve_base(self.base_model)

    @cached_property
    def llama_config(self) -> LlamaConfig:
        """The network's shape: config.json and what the run asks for."""
        config = read_config(self.folder)
        return replace(config, dropout=self.dropout, qkv_bias=self.qkv_bias or config.qkv_bias)

    def check_base(self) -> None:
        """Find what is wrong with the base model before any weight is read."""
        config = self.llama_config
        if not self.from_scratch:
            check_files(self.folder)
        if self.lora.rank:
            with torch.device("meta"):
                model = Llama(config)
            self._inject_lora(model, torch.float32)
            if self.adapter is not None:
                check_peft(model, self.adapter)

    def setup(self, stage: str) -> None:
        """Refuse to compile where that cannot be done.

        Raises:
            UsageError: no compiler on this machine.
        """
        if not self.compile_blocks or stage == "predict":
            return
        if missing := missing_compiler(self.trainer.strategy.root_device.type):
            raise UsageError(
                f"model.compile needs a compiler, and there is no {missing} on this machine: "
                "install one, or set model.compile to false"
            )

    def configure_model(self) -> None:
        """Build the network once: base weights, LoRA, an adapter, then what training needs."""
        if self.model is not None:
            return
        precision = self._trainer.precision if self._trainer else "32-true"
        trained_dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
        if self.from_scratch:
            model = Llama(self.llama_config)
            model.init_weights()
            model.to(trained_dtype)
        else:
            dtype = self.base_dtype if self.lora.rank else trained_dtype
            # A file's tensors begin anywhere, and products of few rows, which wait for memory, take
            # 1.2 times as long where lines of the cache do not begin with them. For training it
            # makes no difference, and the 1B shape with 4 layers is there in 0.15 instead of 0.45 s
            # (2 cores of an Intel Xeon with AMX).
            mapped = self.lora.rank > 0 and self._is_fitting
            model = load_base(self.folder, self.llama_config, dtype=dtype, mapped=mapped)
        self.base_fingerprint = fingerprint(model)
        if self.lora.rank:
            self._inject_lora(model, trained_dtype)
            if self.adapter is not None:
                load_peft(model, self.adapter)
            if self.qkv_bias:
                rank_zero_info("model: LoRA freezes the biases of q, k and v, new ones stay zero")
        model.model.run_block = BlockRunner(self.gradient_checkpointing, self.compile_blocks)
        self.model = model

    def _inject_lora(self, model: Llama, dtype: torch.dtype) -> None:
        try:
            inject_lora(model, self.lora, dtype=dtype)
        except ValueError as error:
            if self.adapter is not None:
                raise WeightsError(f"model.adapter {self.adapter}: {error}") from error
            raise UsageError(f"model.{error}") from error

    def configure_optimizers(self) -> Any:
        """AdamW over the trainable parameters; the schedule counts optimizer steps."""
        optimizer = build_optimizer(self._llama, self.optimizer)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = build_scheduler(optimizer, steps, self.optimizer)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    @property
    def _llama(self) -> Llama:
        assert self.model is not None, "configure_model has not run"
        return self.model

    # Training

    def on_fit_start(self) -> None:
        """Remember the run's seed before anything is drawn from it."""
        self._seed = torch.initial_seed()
        # On the device from the start: a rank may have no record in its first step.
        self._step_loss = torch.zeros((), device=self.device)
        if self.share_prefixes and self._has_dropout:
            rank_zero_info(
                "model: equal beginnings of prompts are computed for each record, since dropout "
                "draws a mask for each (model.share_prefixes)"
            )

    def on_train_start(self) -> None:
        """Refuse an epoch that would end inside a step.

        Raises:
            UsageError: trainer.limit_train_batches cuts a step.
        """
        batches, turns = self.trainer.num_training_batches, self.trainer.accumulate_grad_batches
        if batches % turns:
            raise UsageError(
                f"trainer.limit_train_batches leaves {batches} micro-batches an epoch, which are "
                f"no whole steps of {turns} (trainer.accumulate_grad_batches)"
            )

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Make the randomness of a micro-batch a function of (seed, rank, number), not of history.

        So a resumed run draws the dropout masks that the killed one would have drawn.
        """
        number = self.trainer.fit_loop.epoch_loop.total_batch_idx
        mixed = (self._seed * 1_000_003 + self.global_rank) * 1_000_003 + number
        torch.manual_seed(mixed % (1 << 63))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return this micro-batch's share of the step's mean loss.

        Lightning divides by the accumulation and DDP averages over ranks: both are undone here, so
        that the gradient is that of `sum of token losses / target tokens of the whole step`.
        """
        if len(batch.row_ids) == 0:
            # Every parameter takes part, or DDP would skip its all-reduce and hang or go wrong.
            sums = [p.sum() for p in self.parameters() if p.requires_grad]
            return 0.0 * torch.stack(sums).sum()
        hidden, targets = self._supervised(batch)
        loss = summed_cross_entropy(hidden, targets, self._llama.lm_head)
        share = loss / batch.num_step_targets
        self._step_loss = self._step_loss + share.detach()
        return share * (self.trainer.accumulate_grad_batches * self.trainer.world_size)

    @property
    def _has_dropout(self) -> bool:
        return self.dropout > 0.0 or (self.lora.rank > 0 and self.lora.dropout > 0.0)

    def _supervised(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Hidden states at the supervised positions, (L, D), and what should follow there."""
        share = self.share_prefixes and not (self.training and self._has_dropout)
        supervised = supervised_positions(batch.labels)
        hidden = self._llama.model(
            batch.tokens,
            positions=batch.positions,
            boundaries=batch.boundaries,
            prefixes=batch.prefixes if share else None,
            wanted=supervised,
        )
        return hidden, batch.labels[supervised]

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip once an optimizer step, and log what the step is about to do.

        Raises:
            UserError: a gradient that is not finite; nothing of the step is applied.
        """
        parameters = [p for p in self.parameters() if p.requires_grad]
        norm = total_norm(parameters)
        loss = self.trainer.strategy.reduce(self._step_loss, reduce_op="sum")
        self._step_loss = torch.zeros_like(self._step_loss)
        if not norm.isfinite():
            raise UserError(
                f"step {self.global_step}: the gradient is not finite (loss {float(loss):.4g}); "
                "nothing of this step was applied, and last.ckpt is sound. Lower "
                "model.optimizer.lr or clip with trainer.gradient_clip_val"
            )
        if gradient_clip_val:
            torch.nn.utils.clip_grads_with_norm_(parameters, gradient_clip_val, norm)
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/perplexity", loss.exp())
        self.log("train/gradient_norm", norm)
        self.log("train/learning_rate", optimizer.param_groups[0]["lr"])

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: torch.optim.Optimizer | LightningOptimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Take the step, then free the gradients.

        Lightning keeps them until the next backward pass: beside the next forward pass and its
        loss, where in full fine-tuning they are as large as the weights. At the 1B shape with 4
        layers a full step takes 4.4 instead of 5.0 GiB (2 cores of an Intel Xeon with AMX).
        """
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        optimizer.zero_grad()

    # Evaluation: every target token counts the same, however it was batched.

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch to the validation loss and token accuracy."""
        self._measure(batch)

    def test_step(
        self, batch: Batch | PromptBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Add a batch to the test loss and token accuracy, or answer one of prompts."""
        if isinstance(batch, PromptBatch):
            last = batch_idx + 1 == self.trainer.num_test_batches[dataloader_idx]
            self.answer(batch, drain=last)
        else:
            self._measure(batch)

    def _measure(self, batch: Batch) -> None:
        if len(batch.row_ids) == 0:
            return
        hidden, targets = self._supervised(batch)
        loss, hits = loss_and_hits(hidden, targets, self._llama.lm_head)
        self.eval_loss.update(loss / len(targets), len(targets))
        self.eval_accuracy.update(hits.double() / len(targets), len(targets))

    def on_validation_epoch_end(self) -> None:
        """Log loss, perplexity and token accuracy of the validation part."""
        self._log_measured("val")

    def on_test_epoch_end(self) -> None:
        """Log loss, perplexity and token accuracy of the test part."""
        self._log_measured("test")

    def _log_measured(self, part: str) -> None:
        loss, accuracy = self.eval_loss.compute(), self.eval_accuracy.compute()
        self.eval_loss.reset()
        self.eval_accuracy.reset()
        self.log(f"{part}/loss", loss.float(), prog_bar=True)
        self.log(f"{part}/perplexity", loss.exp().float())
        self.log(f"{part}/token_accuracy", accuracy.float())

    # Generation

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[Generation]:
        """Take a batch of prompts in; return what was finished meanwhile, in the end all."""
        last = batch_idx + 1 == self.trainer.num_predict_batches[0]
        return self.answer(batch, drain=last)

    def answer(self, batch: PromptBatch, *, drain: bool = True) -> list[Generation]:
        """Answer prompts, telling `on_generation` of each response as it finishes.

        Arguments and result as in Answering.answer.
        """
        return self._answering.answer(self._llama, self.generation, batch, drain=drain)

    @property
    def on_generation(self) -> list[Callable[[Generation], None]]:
        """Who is told of each response as it finishes, e.g. the file it is written to."""
        return self._answering.listeners

    def stop_answering(self) -> None:
        """Give the weights back as they were, and drop what is not answered."""
        self._answering.stop()

    def on_predict_start(self) -> None:
        """Begin anew."""
        self.stop_answering()

    def on_test_start(self) -> None:
        """Begin anew."""
        self.stop_answering()

    @property
    def arguments(self) -> dict[str, Any]:
        """As StoredModule says; a run's adapter and fresh weights are in the checkpoint."""
        return {
            "base_model": self.base_model,
            "lora": asdict(self.lora),
            "optimizer": asdict(self.optimizer),
            "generation": asdict(self.generation),
            "gradient_checkpointing": self.gradient_checkpointing,
            "compile": self.compile_blocks,
            "share_prefixes": self.share_prefixes,
            "dropout": self.dropout,
            "qkv_bias": self.llama_config.qkv_bias,
            "base_dtype": str(self.base_dtype).removeprefix("torch."),
        }
