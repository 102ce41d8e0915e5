"""The records that travel between the layers, in the order in which data meets them.

They are NamedTuples because Lightning moves a NamedTuple to a device, and not a frozen dataclass.
Letters: T tokens of a flat batch, R records (or prompts) in it.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

IGNORE_INDEX = -100  # a label without loss, as in torch.nn.functional.cross_entropy


class Example(NamedTuple):
    """One training record as tokens. `labels[t]` is the token that should follow `tokens[t]`."""

    row_id: int  # zero-based row number in its file
    tokens: list[int]
    labels: list[int]  # IGNORE_INDEX where there is no loss

    @property
    def num_targets(self) -> int:
        """How many positions carry loss."""
        return sum(label != IGNORE_INDEX for label in self.labels)


class Prefixes(NamedTuple):
    """Which tokens of a flat batch begin alike: they and all before them, to their record's start.

    A causal network computes the same for each of those, so the first can stand for all. Of each
    record, the distinct ones are the last, as what it shares is its beginning.
    """

    distinct: Tensor  # (U,) int64, ascending: index into the T tokens, which stand for all
    representative: Tensor  # (T,) int64: index into `distinct`, which of them stands for a token


class Batch(NamedTuple):
    """One micro-batch of training records, laid end to end without padding.

    An empty batch (R = 0, T = 0) stands for a slot of the step that no record fell into.
    """

    tokens: Tensor  # (T,) int64
    labels: Tensor  # (T,) int64, already shifted
    positions: Tensor  # (T,) int64, restarting at 0 with each record
    boundaries: Tensor  # (R + 1,) int64: record r is tokens[boundaries[r]:boundaries[r + 1]]
    num_step_targets: Tensor  # () int64: target tokens of the WHOLE optimizer step, on all ranks
    row_ids: Tensor  # (R,) int64
    prefixes: Prefixes  # of its records

    def __reduce__(self) -> tuple[Any, ...]:
        # A loader's worker hands it on as plain numbers: torch would open a file and a connection
        # for each tensor, and the loop would wait five times as long (2 cores of an Intel Xeon).
        if self.tokens.device.type != "cpu":
            return Batch._make, (tuple(self),)
        *tensors, prefixes = self
        return _batch, ([t.numpy() for t in tensors], [t.numpy() for t in prefixes])


def _batch(arrays: list[Any], of_prefixes: list[Any]) -> Batch:
    prefixes = Prefixes._make(map(torch.from_numpy, of_prefixes))
    return Batch._make([*map(torch.from_numpy, arrays), prefixes])


class PromptBatch(NamedTuple):
    """Prompts to answer, laid end to end without padding."""

    tokens: Tensor  # (T,) int64
    boundaries: Tensor  # (R + 1,) int64
    row_ids: Tensor  # (R,) int64
    stop_ids: Tensor  # (R, any) int64: the tokens that end each row's response; -1 is none
    # (R,) int64, 1 or more: each row's own limit, instead of the generation's max_new_tokens.
    max_new_tokens: Tensor | None = None


class Generation(NamedTuple):
    """One answer to one prompt, as tokens."""

    row_id: int
    sample: int  # 0, 1 ... where a prompt has several answers
    tokens: list[int]  # without the stop token
    finish_reason: str  # "stop": the model ended it; "length": it was cut


class Response(NamedTuple):
    """One row of responses.jsonl."""

    id: int | str  # a row number in what predict writes; other files may have names
    instruction: str
    input: str
    reference: str
    response: str
    num_tokens: int
    finish_reason: str
    sample: int = 0  # written only where a prompt has several responses


class Verdict(NamedTuple):
    """One row of verdicts.jsonl: what a judge says of one response, or of two."""

    key: str  # a hash of all that decides the verdict: judge, prompt, parameters, sample
    judge: str
    id: int | str
    sample: int
    status: str  # "graded", or in one word why there is no score
    score: int | None  # from 1 to 5; of two responses -1, 0 or 1: B's is worse, as good, better
    reason: str  # empty where there is a score
    text: str  # the judge's last reply, as it came
    first: str = ""  # of two responses: whose was shown first, A or B


class TextSide(NamedTuple):
    """What other programs need, besides weights, to read and write text as in training."""

    files: dict[str, str]  # name to content: tokenizer.json and the others of transformers
    bos_id: int
    stop_ids: list[int]
    stops: list[str]  # the text of each
    ollama_template: str
