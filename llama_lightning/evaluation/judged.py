"""A judged run on disk: its settings, and each of its responses beside its verdict.

It only reads, and asks no judge.
"""

import json
from pathlib import Path
from typing import NamedTuple

from llama_lightning.errors import JudgeError
from llama_lightning.evaluation.report import SUMMARY, Graded
from llama_lightning.evaluation.responses import read_responses
from llama_lightning.evaluation.settings import Settings
from llama_lightning.evaluation.verdicts import VERDICTS, read_verdicts


class JudgedRun(NamedTuple):
    """What `judge` left in a folder."""

    folder: Path
    settings: Settings
    responses: Path
    total: int  # how many of the responses were judged: the first so many

    def graded(self) -> list[Graded]:
        """Read the responses with their verdicts.

        Raises:
            UserError: a file is missing or broken, or they do not belong together.
        """
        path = self.folder / VERDICTS
        verdicts = read_verdicts(path)
        responses = read_responses(self.responses)[: self.total]
        if len(responses) < self.total:
            raise JudgeError(
                f"{path}: is on {self.total} responses, and {self.responses} has only "
                f"{len(responses)} by now: run judge again"
            )
        keys = [self.settings.key(response) for response in responses]
        if missing := sum(key not in verdicts for key in keys):
            raise JudgeError(
                f"{path}: no verdict on {missing} of {self.total} responses in {self.responses}; "
                "they have changed since, or the prompt has: run judge again"
            )
        return [Graded(r, verdicts[key]) for r, key in zip(responses, keys, strict=True)]


def open_run(path: Path) -> JudgedRun:
    """Find a judged run.

    Args:
        path: its folder, or the verdicts.jsonl in it.

    Raises:
        JudgeError: not one.
    """
    folder = path.parent if path.name == VERDICTS else path
    summary = folder / SUMMARY
    try:
        values = json.loads(summary.read_text(encoding="utf-8"))
        settings = Settings(**{name: values[name] for name in Settings._fields if name in values})
        return JudgedRun(folder, settings, folder / values["responses"], values["total"])
    except OSError as error:
        raise JudgeError(
            f"{summary}: {error.strerror}; name the folder of a run that judge has graded to its "
            "end"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise JudgeError(
            f"{summary} is not a summary of this version; run judge again, which asks for no "
            "verdict twice"
        ) from error
