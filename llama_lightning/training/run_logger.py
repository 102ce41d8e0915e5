"""Lightning's TensorBoard logger, so that the page explains itself.

Left out: the `epoch` that Lightning adds to every value and the constant `hp_metric`, which would
be the first two charts a person sees. Added: tables of text.
"""

from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only


class RunLogger(TensorBoardLogger):
    """Events of one run in `save_dir/name/version`; arguments are TensorBoardLogger's."""

    def __init__(self, save_dir: str, **kwargs: Any) -> None:
        super().__init__(save_dir, default_hp_metric=False, **kwargs)

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Log scalars by their grouped names, e.g. train/loss."""
        super().log_metrics({k: v for k, v in metrics.items() if k != "epoch"}, step)

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Write hparams.yaml, and what the HPARAMS page lists runs by."""
        super().log_hyperparams(params)
        from torch.utils.tensorboard.summary import hparams

        # The first of the three would fix the page's columns to those of one run; without it
        # TensorBoard gathers them from all runs.
        _, begin, end = hparams(dict(params), {})  # type: ignore[no-untyped-call]
        for summary in (begin, end):
            self.experiment._get_file_writer().add_summary(summary)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Close the files; a run that failed before it began leaves no folder behind."""
        super().finalize(status)
        folder = Path(self.log_dir)
        if status == "failed" and folder.is_dir():
            files = list(folder.iterdir())
            if all(file.name.startswith("events.") for file in files):
                self.experiment.close()
                for file in files:
                    file.unlink()
                folder.rmdir()

    @rank_zero_only
    def log_text(
        self, key: str, columns: list[str], data: list[list[str]], step: int | None = None
    ) -> None:
        """Log a table of text; Lightning's WandbLogger takes the same arguments."""
        lines = [columns, ["---"] * len(columns), *data]
        rows = (" | ".join(map(_cell, cells)) for cells in lines)
        self.experiment.add_text(key, "\n".join(f"| {row} |" for row in rows), step)


def _cell(text: str) -> str:
    """Keep a text inside its cell of a Markdown table, and its marks as they are."""
    for mark in "\\`*_<|":
        text = text.replace(mark, f"&#{ord(mark)};")
    return text.replace("\n", "<br>")
