"""Whether a run reads the same text, and meets the same records in the same order, as another.

A checkpoint holds a position in the data. It means something only where the data, and all that
decides their order, are what they were. What a state holds is written by the data module.
"""

import hashlib
from array import array
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llama_lightning.errors import CheckpointError

# What no single key tells: which records are left in training once other files are taken out.
TRAINING_PART = "the training part (data.path without data.val_path and data.test_path)"

# The data's settings that decide which records of the same files are in which part, and those that
# decide in which order a run meets them too.
SPLIT = ["seed", "val_fraction", "test_fraction", "columns"]
ORDER = [*SPLIT, "batch_size", "max_seq_len", "train_on_prompt", "train_on_turns"]


def name_mix(weights: Sequence[float], hashes: Sequence[bytes]) -> str:
    """Name the training data by weights and contents; one file of weight 1 by its content alone."""
    digests = [file_hash.hex()[:16] for file_hash in hashes]
    if list(weights) == [1.0]:
        return digests[0]
    pairs = zip(weights, digests, strict=True)
    return " + ".join(f"{float(weight)} x {digest}" for weight, digest in pairs)


def _files(mix: str) -> list[str]:
    """Find the contents in a name of `name_mix`."""
    return [file.rpartition(" x ")[2] for file in mix.split(" + ")]


def digest(examples: Iterable[tuple[int, npt.NDArray[np.int64]]]) -> str:
    """Tell one list of tokenised records, given as (row number, tokens), from another."""
    digest = hashlib.sha256()
    for row_id, tokens in examples:
        digest.update(array("q", (row_id, len(tokens))))
        digest.update(tokens.data)
    return digest.hexdigest()[:16]


def _today(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Write the identity of an older checkpoint as it is written now."""
    mix = identity["data.path"]
    one = mix if " + " in mix else mix.removeprefix("1.0 x ")
    return {"data.train_on_turns": "all", "data.columns": None} | {**identity, "data.path": one}


def check_identity(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Compare what decides the order of records, ours and a checkpoint's, by our keys.

    Raises:
        CheckpointError: something differs; both values are shown.
    """
    theirs = _today(theirs)
    differing = [key for key in ours if ours[key] != theirs.get(key)]
    if len(differing) > 1:  # then another key says why the training part differs
        differing = [key for key in differing if key != TRAINING_PART]
    if differing:
        shown = "; ".join(f"{key} is {ours[key]}, was {theirs.get(key)}" for key in differing)
        raise CheckpointError(
            f"the run differs from the checkpoint's: {shown}. Set them as they were, or start "
            "a new run without --ckpt_path"
        )


def check_text(ours: Mapping[str, Any], theirs: Mapping[str, Any], *, tokenizer_path: Path) -> None:
    """Refuse a checkpoint whose model knows text in another form.

    Raises:
        CheckpointError: template or tokenizer differ from the checkpoint's.
    """
    if ours["template_text"] != theirs["template_text"]:
        raise CheckpointError(
            f"data.template is '{ours['template']}', but the checkpoint was trained with "
            f"'{theirs['template']}'; set data.template to that"
        )
    if ours["tokenizer"] != theirs["tokenizer"]:
        raise CheckpointError(
            f"data.tokenizer: {tokenizer_path} makes other tokens than the tokenizer that "
            "the checkpoint was trained with"
        )


def find_position(state: Mapping[str, Any], ours: Mapping[str, Any]) -> int:
    """Find how many micro-batches of its epoch a checkpoint's run has done.

    Raises:
        CheckpointError: its run is another, or it lies inside an optimizer step.
    """
    check_identity(ours, state["identity"])
    done, accumulate = int(state["micro_batches"]), ours["trainer.accumulate_grad_batches"]
    if done % accumulate:
        raise CheckpointError(
            f"the checkpoint was written by a validation inside an optimizer step (micro-batch "
            f"{done % accumulate} of {accumulate}), whose gradients are not in it; "
            "resume from last.ckpt. predict takes this one"
        )
    return done


def check_held_out(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Refuse parts that hold records the checkpoint was trained on; weights and batches may differ.

    Raises:
        CheckpointError: the same files split otherwise, or only some of the same files.
    """
    files, trained = (_files(identity["data.path"]) for identity in (ours, theirs))
    if set(files) & set(trained):
        keys = [f"data.{name}" for name in SPLIT] if files == trained else ["data.path"]
        check_identity({key: ours[key] for key in keys}, theirs)
