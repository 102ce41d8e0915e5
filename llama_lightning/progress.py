"""A bar with the time left, or plain lines at intervals where nobody can see a bar.

It knows no loop: training counts steps with it, the judge responses.
"""

import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

PLAIN_LINE_SECONDS = 15.0


class Bar:
    """How far something is.

    Args:
        what: one word for it.
        total: how many there are.
        done: how many are done already.
    """

    def __init__(self, what: str, total: int, done: int = 0) -> None:
        self._what, self._total = what, total
        self._said = done  # at the last plain line
        self._printed = time.monotonic()
        self._bar: Progress | None = None
        console = Console()
        if not console.is_terminal:
            return
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[metrics]}"),
            console=console,
            refresh_per_second=4,
        )
        self._task = self._bar.add_task(what, total=total, completed=done, metrics="")
        self._bar.start()

    def update(self, done: int, metrics: str = "") -> None:
        """Show how many are done, and a few words beside."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, metrics=metrics)
            return
        now = time.monotonic()
        if now - self._printed < PLAIN_LINE_SECONDS and done < self._total:
            return
        # By the pace since the line before: an average of the whole run would remember every pause.
        left = (now - self._printed) / max(1, done - self._said) * (self._total - done)
        self._printed, self._said = now, done
        minutes, seconds = divmod(round(left), 60)
        parts = (f"{self._what} {done}/{self._total}", metrics, f"{minutes}:{seconds:02d} left")
        print("  ".join(part for part in parts if part), flush=True)

    def stop(self) -> None:
        """Leave the bar as it is and free the terminal."""
        if self._bar is not None:
            self._bar.stop()
