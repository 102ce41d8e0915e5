"""From what the user calls a base model to a folder on this machine."""

from pathlib import Path

from llama_lightning.assets import TINY
from llama_lightning.errors import WeightsError

# The files a run needs: not the .pth copies that some repositories hold beside them.
PATTERNS = ["config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer.json"]
PATTERNS += ["original/tokenizer.model", "tokenizer.model", "generation_config.json"]


def resolve_base(base_model: str) -> Path:
    """Find the folder of `tiny`, of a path, or of a hub name (downloaded once, then cached).

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
            f"model.base_model: {base_model} is not a folder here, nor a hub name (OWNER/NAME), "
            "nor 'tiny'"
        )
    # Imported here: only hub names need it.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(base_model, allow_patterns=PATTERNS))
    except GatedRepoError as error:
        raise WeightsError(
            f"model.base_model: {base_model} is gated: accept its licence on its hub page, then "
            "set HF_TOKEN or run `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise WeightsError(
            f"model.base_model: there is no {base_model} on the hub, or it is private: set HF_TOKEN"
        ) from error
    except OSError as error:
        raise WeightsError(
            f"model.base_model: {base_model} is not a folder here and the hub cannot be reached "
            f"({type(error).__name__}); check the network, or give a folder"
        ) from error
