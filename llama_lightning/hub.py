"""From a name on the Hugging Face hub to files on this machine, fetched once and then cached.

It knows no formats. What goes wrong on the way is said in one sentence: what, where, what to do.
Source: huggingface.co/docs/huggingface_hub/guides/download.
"""

import difflib
import errno
import os
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from llama_lightning.assets import TINY
from llama_lightning.errors import DataError, WeightsError

# The files a run needs: not the .pth copies that some repositories hold beside them.
PATTERNS = ["config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer.json"]
PATTERNS += ["original/tokenizer.model", "tokenizer.model", "generation_config.json"]

ADDRESS = re.compile(r"hf://datasets/([^/]+/[^/]+)/(.+)")

Kind = Literal["model", "dataset"]


def _did_you_mean(name: str, kind: Kind) -> str:
    """Offer the nearest name among `tiny` and what the cache holds, if one is near."""
    from huggingface_hub.constants import HF_HUB_CACHE

    # A folder without a snapshot is what an attempt to fetch a wrong name leaves behind.
    folders = {path.parents[1].name for path in Path(HF_HUB_CACHE).glob(f"{kind}s--*/snapshots/*")}
    known = {folder.removeprefix(f"{kind}s--").replace("--", "/") for folder in folders} - {name}
    if kind == "model":
        known.add("tiny")
    spelt = {spelling.lower(): spelling for spelling in sorted(known)}
    near = difflib.get_close_matches(name.lower(), spelt, 1)
    return f"; did you mean {spelt[near[0]]}?" if near else ""


def _heard(error: BaseException) -> str:
    """Say what went wrong below the hub: the system's words, e.g. "Connection refused", if any."""
    words, below = str(error), error.__cause__ or error.__context__
    while below is not None:
        words = getattr(below, "strerror", None) or words
        below = below.__cause__ or below.__context__
    return textwrap.shorten(words, 120)


def _reason(error: Exception, name: str, kind: Kind) -> str:
    """Say why a download failed, and what to do about it."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    hub, cache = constants.ENDPOINT, constants.HF_HUB_CACHE
    page = f"{hub}/datasets/{name}" if kind == "dataset" else f"{hub}/{name}"
    token = "the token of `hf auth login`" if get_token() else ""
    if os.environ.get("HF_TOKEN"):
        token = "HF_TOKEN"
    # "Not in the cache either" hides what the hub, or the way to it, answered.
    unreached = isinstance(error, LocalEntryNotFoundError)
    answer = error.__cause__ or error if unreached else error
    status = getattr(getattr(answer, "response", None), "status_code", 0)
    disk = "" if isinstance(answer, ConnectionError) else getattr(answer, "strerror", None)
    if os.strerror(errno.ENOSPC) in str(answer):
        disk = os.strerror(errno.ENOSPC)  # the Xet client gives no error numbers
    heard = _heard(answer)

    if isinstance(answer, HFValidationError):
        return "not a possible hub name; it is OWNER/NAME, of letters, digits, '-', '_' and '.'"
    if isinstance(answer, OfflineModeIsEnabled):
        near = _did_you_mean(name, kind)
        return f"not in the cache {cache}, and HF_HUB_OFFLINE is set; unset it to fetch it{near}"
    if status == 401 and token:
        return f"{token} is wrong or expired; make a new one at {hub}/settings/tokens"
    if isinstance(answer, GatedRepoError) and token:
        return f"gated, and the account of {token} has no access yet; ask for it at {page}"
    if isinstance(answer, GatedRepoError):
        return f"gated; accept its licence at {page}, then set HF_TOKEN or run `hf auth login`"
    if isinstance(answer, RepositoryNotFoundError):
        cure = f"{token} may not see it" if token else "set HF_TOKEN if you may see it"
        near = _did_you_mean(name, kind)
        what = "data set" if kind == "dataset" else kind
        return f"there is no such {what} at {hub}, or it is private: {cure}{near}"
    if isinstance(answer, EntryNotFoundError) and not unreached:
        return f"there is no such file in it; its files are listed at {page}/tree/main"
    if status >= 500:
        return f"{hub} answers {status}, a fault of the server; try again later"
    if status:
        return f"{hub} answers {status}; {getattr(answer, 'server_message', None) or f'see {page}'}"
    if disk:
        return (
            f"cannot be written to the cache {cache} ({disk}); make room there, or set HF_HOME to "
            "another folder"
        )
    if isinstance(answer, ValueError):
        return f"{hub} does not answer as the hub does ({heard}); check the network and HF_ENDPOINT"
    if unreached:
        return f"{hub} cannot be reached ({heard}); check the network and HF_ENDPOINT"
    return f"the download from {hub} broke off ({heard}); run it again, finished files are kept"


def _download(call: Callable[[], str], what: str, name: str, kind: Kind) -> Path:
    """Run a download of huggingface_hub; the one place where its errors become ours."""
    # The base of the hub's HTTP errors: of requests, httpx or httpx2, as huggingface_hub has it.
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    http_error: type[Exception] = HfHubHTTPError.__bases__[0]
    try:
        return Path(call())
    except (OSError, ValueError, RuntimeError, EntryNotFoundError, http_error) as error:
        raised = DataError if kind == "dataset" else WeightsError
        raise raised(f"{what}: {_reason(error, name, kind)}") from error


def resolve_base(base_model: str, key: str = "model.base_model") -> Path:
    """Find the folder of `tiny`, of a path, or of a hub name (downloaded once, then cached).

    Args:
        base_model: what the user gave.
        key: where, for the error's sentence.

    Raises:
        WeightsError: no such folder, or a hub name that cannot be fetched.
    """
    if base_model == "tiny":
        return TINY
    folder = Path(base_model)
    if folder.is_dir():
        return folder
    if base_model.count("/") != 1 or base_model.startswith((".", "/", "~")):
        raise WeightsError(
            f"{key}: {base_model} is not a folder here, nor a hub name (OWNER/NAME), "
            f"nor 'tiny'{_did_you_mean(base_model, 'model')}"
        )
    from huggingface_hub import snapshot_download

    def call() -> str:
        return snapshot_download(base_model, allow_patterns=PATTERNS)

    return _download(call, f"{key} {base_model}", base_model, "model")


def parse_address(address: str) -> tuple[str, str]:
    """Split `hf://datasets/OWNER/NAME/FILE` into (OWNER/NAME, FILE).

    Raises:
        DataError: another form.
    """
    match = ADDRESS.fullmatch(address)
    if match is None:
        raise DataError(
            f"{address}: not an address on the hub; it has the form hf://datasets/OWNER/NAME/FILE"
        )
    return match[1], match[2]


def fetch_data(address: str) -> Path:
    """Fetch `hf://datasets/OWNER/NAME/FILE` (downloaded once, then cached).

    Raises:
        DataError: another form of address, or a file that cannot be fetched.
    """
    name, file = parse_address(address)
    from huggingface_hub import hf_hub_download

    return _download(
        lambda: hf_hub_download(name, file, repo_type="dataset"), address, name, "dataset"
    )
