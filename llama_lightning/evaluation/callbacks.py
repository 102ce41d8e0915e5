"""Responses as they finish: to a file in predict, to scores in test, to the log during fit."""

import gc
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from llama_lightning.errors import UsageError
from llama_lightning.evaluation.grading import check_excluded, grade_file, open_judge
from llama_lightning.evaluation.judge import JudgeConfig
from llama_lightning.evaluation.scores import TextScores
from llama_lightning.evaluation.self_preference import model_path
from llama_lightning.evaluation.verdicts import write_whole
from llama_lightning.records import Generation, Response


def to_response(
    generation: Generation, rows: Mapping[int, Any], decode: Callable[[list[int]], str]
) -> Response:
    """Put a generation beside the record it answers.

    Args:
        generation: the tokens.
        rows: records by id, each with instruction, input and output.
        decode: tokens to text.
    """
    row = rows[generation.row_id]
    return Response(
        id=generation.row_id,
        instruction=row.instruction,
        input=row.input,
        reference=row.output,
        response=decode(generation.tokens),
        num_tokens=len(generation.tokens),
        finish_reason=generation.finish_reason,
        sample=generation.sample,
    )


def _forget(listener: Callable[[Generation], None], module: LightningModule) -> None:
    """Have a stopped run's listener out of the way of the next run's."""
    listeners: Any = module.on_generation
    if listener in listeners:
        listeners.remove(listener)


class ResponseWriter(Callback):
    """Write responses.jsonl during predict and report exact match and ROUGE-L at its end.

    Rows are written the moment they finish and sorted by id at the end; a killed predict keeps what
    it had. Several ranks write a file each, which the first one joins.

    Args:
        path: the file; by default responses.jsonl in the run's folder.
    """

    def __init__(self, path: str | None = None) -> None:
        self.path = Path(path) if path else None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find out early that the file cannot be written."""
        if stage != "predict":
            return
        if self.path is None and not trainer.loggers:
            raise UsageError(
                "trainer.logger false leaves the run without a folder; set responses.path"
            )
        target = self.path or Path(trainer.log_dir or ".") / "responses.jsonl"
        self.target = Path(trainer.strategy.broadcast(target))
        self._ranks = trainer.world_size
        if self.target.is_dir():
            raise UsageError(f"responses.path: {self.target} is a folder; name a file in it")
        try:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self._part(trainer.global_rank).touch()
        except OSError as error:
            raise UsageError(
                f"responses.path: {self.target} cannot be written ({error})"
            ) from error

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Listen no more, and leave no empty file where there was no answer."""
        _forget(self._write, pl_module)
        target = getattr(self, "target", None)
        if target is not None and target.is_file() and not target.stat().st_size:
            target.unlink()

    def _part(self, rank: int) -> Path:
        if self._ranks == 1:
            return self.target
        return self.target.with_name(f"{self.target.name}.rank{rank}")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen for finished rows."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        self._rows = {row.id: row for row in data.predict_rows}
        self._decode: Callable[[list[int]], str] = data.tokenizer.decode
        if self._ranks == 1 and self.target.stat().st_size:
            # The answers of an earlier run stay readable until this one is through, and after.
            self.target.replace(self.target.with_name(self.target.name + ".previous"))
        if trainer.is_global_zero:
            model_path(self.target).unlink(missing_ok=True)
        self._file: TextIO = self._part(trainer.global_rank).open("w", encoding="utf-8")
        self._several = pl_module.generation.num_samples > 1  # type: ignore[operator, union-attr]
        pl_module.on_generation.append(self._write)  # type: ignore[operator, union-attr]

    def _write(self, generation: Generation) -> None:
        response = to_response(generation, self._rows, self._decode)
        self._file.write(self._line(response))
        self._file.flush()

    def _line(self, response: Response) -> str:
        fields = response._asdict()
        if not self._several:
            del fields["sample"]
        return json.dumps(fields, ensure_ascii=False) + "\n"

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Join the ranks' files, sort by id, score."""
        self._file.close()
        pl_module.on_generation.remove(self._write)  # type: ignore[operator, union-attr]
        trainer.strategy.barrier()
        if not trainer.is_global_zero:
            return
        parts = [self._part(rank) for rank in range(self._ranks)]
        # A text file is read line by line at "\n" alone; splitlines would cut at U+2028 as well.
        responses = [Response(**json.loads(row)) for part in parts for row in part.open("rb")]
        responses.sort(key=lambda r: (r.id, r.sample))
        temporary = self.target.with_name(self.target.name + ".tmp")
        temporary.write_text("".join(map(self._line, responses)), encoding="utf-8")
        temporary.replace(self.target)
        if self.path is not None:  # else the run's config.yaml is beside it
            write_whole(model_path(self.target), f"{pl_module.base_model}\n")
        if self._ranks > 1:
            for part in parts:
                part.unlink()
        self._report(trainer, responses)

    def _report(self, trainer: Trainer, responses: list[Response]) -> None:
        scores = TextScores()
        for response in responses:
            scores.add(response)
        print(f"{len(responses)} responses in {self.target}\n{scores}")
        for logger in trainer.loggers:
            logger.log_metrics(scores.metrics("predict"), step=trainer.global_step)
            if hasattr(logger, "log_artifact"):
                logger.log_artifact("responses.jsonl", self.target)
            logger.save()


class TestScores(Callback):
    """Score the answers to the test part, beside its loss: test/exact_match and test/rouge_l."""

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen for finished rows."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        self._rows = {row.id: row for row in data.test_rows}
        self._decode: Callable[[list[int]], str] = data.tokenizer.decode
        self._scores = TextScores()
        pl_module.on_generation.append(self._add)  # type: ignore[operator, union-attr]

    def _add(self, generation: Generation) -> None:
        self._scores.add(to_response(generation, self._rows, self._decode))

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Listen no more."""
        _forget(self._add, pl_module)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add up the ranks and log."""
        pl_module.on_generation.remove(self._add)  # type: ignore[operator, union-attr]
        ours = self._scores
        sums = torch.tensor([ours.count, ours.matches, ours.rouge_l], dtype=torch.float32)
        sums = trainer.strategy.reduce(sums.to(pl_module.device), reduce_op="sum")
        count, matches, rouge_l = sums.tolist()
        for name, value in TextScores(int(count), int(matches), rouge_l).metrics("test").items():
            pl_module.log(name, value, rank_zero_only=True)


class SampleResponses(Callback):
    """Answer the same few validation prompts again and again during fit, to read how it learns.

    The answers go, as a table, to every logger that takes tables of text: TensorBoard's TEXT page,
    ClearML, Weights and Biases.

    Args:
        every_n_steps: optimizer steps between two tables; 0 makes none.
        num_prompts: the first so many records of the validation part.
    """

    COLUMNS = ["instruction", "input", "reference", "response"]

    def __init__(self, every_n_steps: int = 0, num_prompts: int = 4) -> None:
        if every_n_steps < 0:
            raise UsageError(f"samples.every_n_steps is {every_n_steps}; use 0 (never) or more")
        if num_prompts < 1:
            raise UsageError(f"samples.num_prompts is {num_prompts}; use 1 or more")
        self.every_n_steps, self.num_prompts = every_n_steps, num_prompts

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the prompts, before weights are read.

        Raises:
            UsageError: there is no validation part.
        """
        if stage != "fit" or not self.every_n_steps:
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        self._rows = data.val_rows[: self.num_prompts]
        if not self._rows:
            raise UsageError(
                "samples.every_n_steps: the validation part is empty; set data.val_fraction or "
                "data.val_path, or samples.every_n_steps to 0"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show how the base answers."""
        if self.every_n_steps and trainer.global_step == 0:
            self._answer(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Answer at the end of every so many steps."""
        step_complete = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if self.every_n_steps and step_complete and trainer.global_step % self.every_n_steps == 0:
            self._answer(trainer, pl_module)

    def _answer(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        prompts = move_data_to_device(data.prompts(self._rows), pl_module.device)
        pl_module.eval()
        with trainer.precision_plugin.forward_context():
            generations = pl_module.answer(prompts)  # type: ignore[operator]
        pl_module.train()
        rows = {row.id: row for row in self._rows}
        table = []
        for generation in sorted(generations):
            response = to_response(generation, rows, data.tokenizer.decode)
            table.append([str(getattr(response, column)) for column in self.COLUMNS])
        for logger in trainer.loggers:
            if hasattr(logger, "log_text"):
                logger.log_text(
                    "samples/responses", columns=self.COLUMNS, data=table, step=trainer.global_step
                )


class JudgeCallback(Callback):
    """Have the responses of predict graded, once the model has left the device.

    Only one process may: under several ranks the others would wait hours for the judge.

    Args:
        **kwargs: the fields of JudgeConfig.
    """

    def __init__(self, **kwargs: Any) -> None:
        self.config = JudgeConfig(**kwargs)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find out before the first answer that it cannot be graded."""
        if stage != "predict" or self.config.backend == "none":
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        prompts = [
            Response(row.id, row.instruction, row.input, row.output, "", 0, "")
            for row in data.predict_rows
        ]
        if trainer.world_size == 1:
            open_judge(self.config, prompts[: self.config.limit], self._writer(trainer).target)

    def _writer(self, trainer: Trainer) -> ResponseWriter:
        return next(c for c in trainer.callbacks if isinstance(c, ResponseWriter))  # type: ignore[attr-defined]

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Grade, or say how; Lightning has just moved the model off the device."""
        if stage != "predict" or self.config.backend == "none":
            return
        # The run's own config has all settings of the judge. All ranks ask, as it is a broadcast.
        config = Path(trainer.log_dir or ".") / "config.yaml"
        if not trainer.is_global_zero:
            return
        writer = self._writer(trainer)
        if trainer.world_size > 1:
            how = f"--judge.backend {self.config.backend}"
            if config.is_file():
                how = f"--config {config}"
            print(f"next: python -m llama_lightning judge {how} --responses.path {writer.target}")
            return
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        summary = grade_file(self.config, writer.target, str(pl_module.base_model))
        for logger in trainer.loggers:
            logger.log_metrics(summary.metrics(), step=trainer.global_step)
            if isinstance(logger, TensorBoardLogger) and summary.graded:
                levels, counts = zip(*summary.histogram.items(), strict=True)
                scores = np.repeat(levels, counts)
                edges = np.arange(0.5, 6)  # a bar a grade
                logger.experiment.add_histogram("judge/score", scores, trainer.global_step, edges)
            logger.save()
        check_excluded(self.config, summary)
