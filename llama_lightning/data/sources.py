"""Where data comes from: what a user names, as files on this machine, each with its weight.

It knows neither what is in a file nor who reads it.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from llama_lightning.assets import TINY_TRAIN
from llama_lightning.errors import DataError, UsageError
from llama_lightning.hub import fetch_data, parse_address


class Source(NamedTuple):
    """One data file."""

    given: str  # the path or address that the user wrote
    path: Path
    weight: float = 1.0  # how often an epoch has each of its training records


def local_file(given: str, say: Callable[[str], None]) -> Path:
    """Find the file of a path or of an hf:// address, which is fetched unless it is in data/.

    Args:
        given: the path or address, or `tiny`.
        say: tells the user which file is taken instead.

    Raises:
        DataError: a malformed address, or a file that cannot be fetched.
    """
    if given == "tiny":
        return TINY_TRAIN
    if not given.startswith("hf://"):
        return Path(given)
    _, file = parse_address(given)
    own = Path("data", Path(file).name)
    if own.is_file():
        say(f"data: {own} is here and taken instead of {given}")
        return own
    return fetch_data(given)


def check_weights(weights: Mapping[str, float]) -> None:
    """Refuse a mix that means nothing, before any of its files is fetched.

    Raises:
        UsageError: no file, or a weight that is not above 0.
    """
    for given, weight in weights.items():
        if not 0.0 < weight < float("inf"):
            raise UsageError(f"data.path: the weight of {given} is {weight}; use one above 0")
    if not weights:
        raise UsageError("data.path: no file; give one, or several with their weights")


def check_distinct(sources: Sequence[Source]) -> None:
    """Refuse a mix that names a file twice, perhaps with two weights.

    Raises:
        DataError: two names of one file.
    """
    first: dict[Path, str] = {}
    for given, path, _ in sources:
        same = first.setdefault(path.resolve(), given)
        if same != given:
            raise DataError(
                f"data.path: {same} and {given} are both {path}; give one of them (a file in "
                "data/ stands for every hf:// address of its name)"
            )
