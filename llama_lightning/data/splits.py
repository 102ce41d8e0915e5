"""One file to three parts: train, val (chooses checkpoints) and test (answered by predict).

It knows neither tokens nor files: rows are numbers here, and a prompt is whatever tells it from
another.
"""

from collections.abc import Hashable, Sequence

import torch


def split(
    prompts: Sequence[Hashable], *, val_fraction: float, test_fraction: float, seed: int
) -> tuple[list[int], list[int], list[int]]:
    """Split rows, given by their prompts, into train, val and test.

    Rows with the same prompt go to the same part. The split is a function of (prompts, fractions,
    seed) alone. Each part keeps the file's order.
    """
    rows_of: dict[Hashable, list[int]] = {}
    for row, prompt in enumerate(prompts):
        rows_of.setdefault(prompt, []).append(row)
    groups = list(rows_of.values())
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed)).tolist()
    parts: dict[str, list[int]] = {"test": [], "val": [], "train": []}
    wanted = {
        "test": round(test_fraction * len(prompts)),
        "val": round(val_fraction * len(prompts)),
    }
    for group in (groups[i] for i in order):
        part = next((p for p, n in wanted.items() if len(parts[p]) + len(group) <= n), "train")
        parts[part].extend(group)
    return sorted(parts["train"]), sorted(parts["val"]), sorted(parts["test"])


def weigh(rows: Sequence[int], weight: float, *, seed: int) -> list[int]:
    """Repeat rows: `weight` times each, a fraction by a seeded choice; `weight` x rows in all."""
    whole = int(weight)
    rest = round(weight * len(rows)) - whole * len(rows)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    return [*rows] * whole + sorted(rows[i] for i in order[:rest])
