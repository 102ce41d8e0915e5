"""Responses to a file, row by row, as they finish."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from lightning.pytorch import Callback, LightningModule, Trainer

from llama_lightning.errors import UsageError
from llama_lightning.evaluation.exact_match import exact_match
from llama_lightning.records import Generation, Response


class ResponseWriter(Callback):
    """Write responses.jsonl during predict and report exact match at its end.

    Rows are written the moment they finish and sorted by id at the end; a killed predict keeps what
    it had. Several ranks write a file each, which the first one joins.

    Args:
        path: the file; by default responses.jsonl in the run's version folder.
    """

    def __init__(self, path: str | None = None) -> None:
        self.path = Path(path) if path else None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find out early that the file cannot be written."""
        if stage != "predict":
            return
        target = self.path or Path(trainer.log_dir or ".") / "responses.jsonl"
        self._target = Path(trainer.strategy.broadcast(target))
        self._ranks = trainer.world_size
        try:
            self._target.parent.mkdir(parents=True, exist_ok=True)
            self._part(trainer.global_rank).touch()
        except OSError as error:
            raise UsageError(
                f"responses.path: {self._target} cannot be written ({error})"
            ) from error

    def _part(self, rank: int) -> Path:
        if self._ranks == 1:
            return self._target
        return self._target.with_name(f"{self._target.name}.rank{rank}")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen for finished rows."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        self._rows = {row.id: row for row in data.predict_rows}
        self._decode: Callable[[list[int]], str] = data.tokenizer.decode
        self._file: TextIO = self._part(trainer.global_rank).open("w", encoding="utf-8")
        pl_module.on_generation.append(self._write)  # type: ignore[operator, union-attr]

    def _write(self, generation: Generation) -> None:
        row = self._rows[generation.row_id]
        response = Response(
            id=row.id,
            instruction=row.instruction,
            input=row.input,
            reference=row.output,
            response=self._decode(generation.tokens),
            num_tokens=len(generation.tokens),
            finish_reason=generation.finish_reason,
        )
        self._file.write(json.dumps(response._asdict(), ensure_ascii=False) + "\n")
        self._file.flush()

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Join the ranks' files, sort by id, count exact matches."""
        self._file.close()
        pl_module.on_generation.remove(self._write)  # type: ignore[operator, union-attr]
        trainer.strategy.barrier()
        if not trainer.is_global_zero:
            return
        parts = [self._part(rank) for rank in range(self._ranks)]
        # A text file is read line by line at "\n" alone; splitlines would cut at U+2028 as well.
        responses = [Response(**json.loads(row)) for part in parts for row in part.open("rb")]
        responses.sort(key=lambda r: r.id)
        temporary = self._target.with_name(self._target.name + ".tmp")
        temporary.write_text(
            "".join(json.dumps(r._asdict(), ensure_ascii=False) + "\n" for r in responses),
            encoding="utf-8",
        )
        temporary.replace(self._target)
        if self._ranks > 1:
            for part in parts:
                part.unlink()
        self._report(trainer, responses)

    def _report(self, trainer: Trainer, responses: list[Response]) -> None:
        judged = [r for r in responses if r.reference]
        print(f"{len(responses)} responses in {self._target}")
        if not judged:
            return
        matches = sum(exact_match(r.response, r.reference) for r in judged)
        share = matches / len(judged)
        print(f"exact match {share:.1%} ({matches} of {len(judged)})")
        if trainer.logger is not None:
            trainer.logger.log_metrics({"predict/exact_match": share}, step=trainer.global_step)
            trainer.logger.save()
