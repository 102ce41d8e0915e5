"""Whether a judge grades its own kin: models favour text of their own family.

It goes by names alone, and says nothing where it knows none.
Source: Panickssery et al., LLM Evaluators Recognize and Favor Their Own Generations (2024).
"""

import contextlib
import re
from pathlib import Path

import yaml

FAMILIES = ("llama", "mistral", "mixtral", "qwen", "gemma", "phi", "deepseek", "gpt", "claude")


def model_path(responses: Path) -> Path:
    """Name the file that says whose responses another holds."""
    return responses.with_suffix(".model.txt")


def model_beside(responses: Path) -> str:
    """Read whose responses these are from what predict leaves beside them.

    That is the run's config.yaml, or `model_path` where the responses go to another folder.

    Returns:
        What model.base_model was; empty where there is no such file.
    """
    with contextlib.suppress(OSError, ValueError):
        return model_path(responses).read_text(encoding="utf-8").strip()
    try:
        config = yaml.safe_load((responses.parent / "config.yaml").read_text(encoding="utf-8"))
        model = config["model"]
        return str(model.get("init_args", model)["base_model"])
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError, AttributeError):
        return ""  # a file of somebody else's


def _bare(name: str) -> str:
    """Write llama3.2:1b and meta-llama/Llama-3.2-1B in one way."""
    last = name.rstrip("/").rpartition("/")[2].lower().removesuffix(":latest")
    return re.sub(r"[^a-z0-9]", "", last)


def kinship(judge: str, model: str) -> str:
    """Say how a judge is related to the model it grades; empty where it is not, for all we know.

    Args:
        judge: its full name: backend, model, digest.
        model: the graded model's name or folder.
    """
    name = (judge.split() + ["", ""])[1]
    if not name or not model:
        return ""
    if _bare(name) == _bare(model):
        return "the judge is the graded model's own base"
    shared = [family for family in FAMILIES if family in name.lower() and family in model.lower()]
    if shared:
        return f"judge and graded model are of one family, {shared[0]}"
    return ""
