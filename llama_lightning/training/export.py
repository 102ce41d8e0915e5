"""What a run leaves for other programs: an adapter, a Hugging Face folder, or a GGUF file.

By the verb `export`, and at the end of fit by a callback. It knows no tokenizer: the data module
gives what other programs need of it, as values.
"""

from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from llama_lightning.errors import UsageError, WeightsError
from llama_lightning.model.lora import merge_lora
from llama_lightning.training.llama_module import LlamaModule
from llama_lightning.training.model_card import model_card
from llama_lightning.weights.gguf import FileType, check_gguf_package, save_gguf
from llama_lightning.weights.huggingface import save_huggingface
from llama_lightning.weights.new_folder import check_target, new_folder
from llama_lightning.weights.peft import save_peft

Format = Literal["auto", "peft", "hf", "gguf"]
StoredType = Literal["auto", "float32", "float16", "bfloat16", "q8_0"]
TOLERANCE = 1e-3  # by which merging and casting may change the validation loss unremarked


@dataclass(frozen=True)
class Export:
    """What to write, and where.

    Attributes:
        output: the folder.
        format: `auto` is the adapter of a LoRA run and the Hugging Face folder of a full one.
        dtype: type of the weights; `auto` is the one in which the run computes its products.
        overwrite: an earlier export may be there.
    """

    output: Path
    format: Format = "auto"
    dtype: StoredType = "auto"
    overwrite: bool = False

    def kind(self, module: LlamaModule) -> str:
        """Name the format, whatever `auto` stands for."""
        if self.format != "auto":
            return self.format
        return "peft" if module.lora.rank else "hf"

    def check(self, module: LlamaModule) -> None:
        """Refuse what cannot be written, before weights are read.

        Raises:
            UsageError: a format that cannot hold it, or a folder that holds something else.
        """
        kind = self.kind(module)
        if kind == "peft" and not module.lora.rank:
            raise UsageError(
                "format peft: there is no adapter, as model.lora.rank is 0 and every weight is "
                "trained; use hf or gguf"
            )
        if kind == "peft" and self.dtype != "auto":
            raise UsageError(f"dtype {self.dtype}: an adapter keeps the type it was trained in")
        if kind == "hf" and self.dtype == "q8_0":
            raise UsageError("dtype q8_0 is for format gguf")
        if kind != "peft" and module.llama_config.qkv_bias:
            raise UsageError(
                f"format {kind}: the biases of model.qkv_bias are in no Llama of other programs, "
                "and would be lost"
            )
        if kind == "gguf":
            check_gguf_package()
        if self.output.resolve() == module.folder.resolve():
            raise UsageError(f"output {self.output}: the base model itself; name another folder")
        check_target(self.output, overwrite=self.overwrite)


def export(
    trainer: pl.Trainer, module: LlamaModule, data: Any, what: Export, *, steps: int
) -> None:
    """Write a folder, say where, and what merging has changed. The module is left as it was.

    Args:
        trainer: knows device, precision and ranks; every rank calls, the first one writes.
        module: with its weights.
        data: a data module that has been set up.
        what: passed its check.
        steps: how many optimizer steps the module was trained for.

    Raises:
        WeightsError: a weight that the type cannot hold, or a disk that is full.
    """
    kind = what.kind(module)
    fitting = trainer.state.fn == TrainerFn.FITTING
    measured = {"optimizer steps": str(steps)}
    if fitting:  # what fit has logged stands there for nothing
        logged = sorted(trainer.callback_metrics.items())
        measured |= {f"{name}, as last logged": f"{float(value):.4f}" for name, value in logged}
    if kind != "peft":
        _export_merged(trainer, module, data, what, measured)
    else:
        if not fitting:
            measured["validation loss"] = _shown(_validation_loss(trainer, module, data))
        if trainer.is_global_zero:
            with new_folder(what.output, overwrite=what.overwrite) as folder:
                assert module.model is not None
                save_peft(module.model, module.lora, folder, base_model=_base_name(module))
                _write_card(folder, "peft", trainer, module, data, measured)
    if trainer.is_global_zero:
        print(f"exported: {what.output} ({kind})")
    trainer.strategy.barrier()


def _export_merged(
    trainer: pl.Trainer, module: LlamaModule, data: Any, what: Export, measured: dict[str, str]
) -> None:
    """Merge and cast, measure before and after, write the Hugging Face folder or the GGUF file."""
    computed: FileType = "bfloat16" if "bf16" in str(trainer.precision) else "float32"
    file_type = what.dtype if what.dtype != "auto" else computed
    in_memory = computed if file_type == "q8_0" else file_type
    dtype: torch.dtype = getattr(torch, in_memory)
    trained, device = module.model, module.device
    assert trained is not None
    try:
        merged = merge_lora(trained, dtype=dtype)
    except ValueError as error:
        raise WeightsError(f"export: {error}; use another dtype") from error
    trained_dtype = trained.model.embed_tokens.weight.dtype
    changed = module.lora.rank > 0 or dtype != trained_dtype
    if changed or trainer.state.fn != TrainerFn.FITTING:
        before = _validation_loss(trainer, module, data)
        measured["validation loss as trained"] = _shown(before)
    if changed:
        trained.to("cpu")  # a device has room for one of the two
        # In the arithmetic of before, where it is the finer one: rounded are the weights alone.
        module.model = merged.to(device, torch.promote_types(dtype, trained_dtype))
        try:
            after = _validation_loss(trainer, module, data)
        finally:
            merged.to("cpu", dtype)
            module.model = trained.to(device)
        measured[f"validation loss merged, in {in_memory}"] = _shown(after)
        if trainer.is_global_zero and before is not None and after is not None:
            remark = "" if abs(after - before) <= TOLERANCE else f": MORE THAN {TOLERANCE}"
            rounded = "; not measured: its rounding to q8_0" if file_type == "q8_0" else ""
            print(
                f"validation loss {before:.5f} as trained, {after:.5f} merged in {in_memory} "
                f"(difference {after - before:+.1e}{remark}){rounded}"
            )
    if not trainer.is_global_zero:
        return
    text = data.text_side()
    with new_folder(what.output, overwrite=what.overwrite) as folder:
        if what.kind(module) == "gguf":
            save_gguf(
                merged,
                folder,
                file_type=file_type,
                files=text.files,
                template=text.ollama_template,
                stops=text.stops,
                name=what.output.name,
            )
        else:
            save_huggingface(merged, folder, bos_id=text.bos_id, stop_ids=text.stop_ids)
            for file, content in text.files.items():
                (folder / file).write_text(content, encoding="utf-8")
            _write_card(folder, "hf", trainer, module, data, measured)


def _validation_loss(trainer: pl.Trainer, module: LlamaModule, data: Any) -> float | None:
    """Measure the validation loss, or None where there is nothing to measure it on.

    Lightning's own loop cannot run inside of fit.
    """
    loader, limit = data.val_dataloader(), trainer.limit_val_batches
    count = limit if isinstance(limit, int) else int(limit * len(loader))
    if not count or not len(loader):
        return None
    training = module.training
    module.eval()
    with torch.no_grad(), trainer.precision_plugin.forward_context():
        for number, batch in enumerate(islice(loader, count)):
            module.validation_step(move_data_to_device(batch, module.device), number)
    module.train(training)
    loss = float(module.eval_loss.compute())
    module.eval_loss.reset()
    module.eval_accuracy.reset()
    return loss


def _shown(loss: float | None) -> str:
    return "not measured, there is no validation part" if loss is None else f"{loss:.5f}"


def _base_name(module: LlamaModule) -> str:
    """Name the base as PEFT finds it: by its hub name, or its folder."""
    local = module.base_model == "tiny" or Path(module.base_model).is_dir()
    return str(module.folder.resolve()) if local else module.base_model


def _write_card(
    folder: Path,
    kind: str,
    trainer: pl.Trainer,
    module: LlamaModule,
    data: Any,
    measured: dict[str, str],
) -> None:
    names = ("precision", "accumulate_grad_batches", "gradient_clip_val")
    settings = {
        "model": module.arguments,
        "data": data.settings,
        "trainer": {name: getattr(trainer, name) for name in names},
    }
    card = model_card(kind, base_model=module.base_model, settings=settings, measured=measured)
    (folder / "README.md").write_text(card, encoding="utf-8")


def _own_folder(trainer: pl.Trainer) -> Path | None:
    """Name the run's folder, or None where runs share it or there is none."""
    folder = trainer.log_dir
    shared = folder is None or Path(folder).resolve() == Path(trainer.default_root_dir).resolve()
    return None if shared else Path(str(folder))


class ExportAtEnd(Callback):
    """Export what fit has trained, at its end.

    Args:
        format: `auto` is the adapter of a LoRA run and the Hugging Face folder of a full one;
            `peft`, `hf`, `gguf`, or `none`.
        output: the folder; by default export/ in the run's folder. The verb `export` has to be
            told.
        dtype: type of the weights; `auto` is the one in which the run computes its products;
            `q8_0` is for gguf.
        overwrite: an earlier export in `output` is replaced.
    """

    def __init__(
        self,
        format: Literal["auto", "none", "peft", "hf", "gguf"] = "auto",
        output: str | None = None,
        dtype: StoredType = "auto",
        overwrite: bool = False,
    ) -> None:
        self.format, self.output = format, output
        self.dtype, self.overwrite = dtype, overwrite
        self.what: Export | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Find out before the first step that it cannot be written.

        Raises:
            UsageError: see `Export.check`.
        """
        assert isinstance(pl_module, LlamaModule)
        dry = trainer.fast_dev_run  # type: ignore[attr-defined]
        run_folder = _own_folder(trainer)  # all ranks ask, as it is a broadcast
        if stage != "fit" or self.format == "none" or dry:
            return
        output = Path(self.output) if self.output else run_folder and run_folder / "export"
        if output is None:
            if self.format != "auto":
                raise UsageError(
                    "trainer.logger gives the run no folder of its own; set export.output"
                )
            rank_zero_info("export: the run has no folder of its own; set export.output")
            return
        full = not pl_module.lora.rank
        if self.format == "auto" and not self.output and full and pl_module.llama_config.qkv_bias:
            rank_zero_info("export: none, as no other program knows model.qkv_bias")
            return
        self.what = Export(output, self.format, self.dtype, self.overwrite)
        if trainer.is_global_zero:
            self.what.check(pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Export; last.ckpt is on the disk already."""
        assert isinstance(pl_module, LlamaModule)
        if self.what is None:
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        # Lightning has put it on the CPU already, where it would be measured slowly, and whose
        # numbers NCCL does not add up over ranks.
        pl_module.to(trainer.strategy.root_device)
        try:
            export(trainer, pl_module, data, self.what, steps=trainer.global_step)
        finally:
            pl_module.cpu()
