"""Whether two runs meet the same records in the same order.

A checkpoint holds a position in the data. It means something only where the data, and all that
decides their order, are what they were.
"""

import hashlib
from array import array
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from llama_lightning.errors import CheckpointError

# What no single key tells: which records are left in training once other files are taken out.
TRAINING_PART = "the training part (data.path without data.val_path and data.test_path)"


def digest(examples: Iterable[tuple[int, npt.NDArray[np.int64]]]) -> str:
    """Tell one list of tokenised records, given as (row number, tokens), from another."""
    digest = hashlib.sha256()
    for row_id, tokens in examples:
        digest.update(array("q", (row_id, len(tokens))))
        digest.update(tokens.data)
    return digest.hexdigest()[:16]


def check_identity(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Compare what decides the order of records, ours and a checkpoint's, by our keys.

    Raises:
        CheckpointError: something differs; both values are shown.
    """
    differing = [key for key in ours if ours[key] != theirs.get(key)]
    if len(differing) > 1:  # then another key says why the training part differs
        differing = [key for key in differing if key != TRAINING_PART]
    if differing:
        shown = "; ".join(f"{key} is {ours[key]}, was {theirs.get(key)}" for key in differing)
        raise CheckpointError(
            f"the run differs from the checkpoint's: {shown}. Set them as they were, or start "
            "a new run without --ckpt_path"
        )
