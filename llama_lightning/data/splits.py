"""One file to three parts: train, val (chooses checkpoints) and test (answered by predict).

It knows neither tokens nor files.
"""

import torch

from llama_lightning.data.examples import Row


def split_rows(
    rows: list[Row], *, val_fraction: float, test_fraction: float, seed: int
) -> tuple[list[Row], list[Row], list[Row]]:
    """Split rows into train, val and test; rows with the same prompt go to the same part.

    The split is a function of (rows, fractions, seed) alone. Each part keeps the file's order.
    """
    prompts: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        prompts.setdefault(row.prompt_key, []).append(row)
    groups = list(prompts.values())
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed)).tolist()
    parts: dict[str, list[Row]] = {"test": [], "val": [], "train": []}
    wanted = {"test": round(test_fraction * len(rows)), "val": round(val_fraction * len(rows))}
    for group in (groups[i] for i in order):
        part = next((p for p, n in wanted.items() if len(parts[p]) + len(group) <= n), "train")
        parts[part].extend(group)
    train, val, test = (
        sorted(parts[part], key=lambda row: row.id) for part in ("train", "val", "test")
    )
    return train, val, test
