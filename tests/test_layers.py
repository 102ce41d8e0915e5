"""Imports point only downwards: the layers of the package, as a table and held by a test.

L0 errors, records, the heap, the progress bar, the embedded default and the hub; L1 the network
and the data; L2 formats on disk and evaluation; L3 training; L4 the command line, which sees
everything.
"""

import ast
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import llama_lightning

PACKAGE = "llama_lightning"
EVERYTHING = {"*"}

# What each unit may import of the package, besides itself. A unit is a folder or a file on top. The
# files beside assets/__init__.py make the embedded default: tools that nothing else imports.
MAY_IMPORT: dict[str, set[str]] = {
    "": {"data", "model", "training"},  # the public names, imported at first use
    "errors": set(),
    "records": set(),
    "heap": set(),
    "assets": set(),
    "progress": set(),
    "hub": {"errors", "assets"},
    "model": {"records", "heap"},
    "data": {"errors", "records", "heap", "assets", "hub"},
    "weights": {"errors", "assets", "model"},
    "evaluation": {"errors", "progress", "records", "hub"},
    "training": {"errors", "progress", "records", "hub", "model", "weights"},
    "usage": EVERYTHING,
    "keys": EVERYTHING,
    "verbs": EVERYTHING,
    "cli": EVERYTHING,
    "__main__": EVERYTHING,
    "assets tools": EVERYTHING,
}
# The judge that runs in a process of its own is a program rather than a part.
ALSO = {"evaluation/local_judge.py": {"model", "weights", "tokenizers"}}
PLAIN_PYTHON = {"errors", "heap", "assets"}
TORCH_ONLY = {"records", "model"}
LIGHTNING_IN = {"data/alpaca.py", "evaluation/callbacks.py"}  # of those that have little of it
LITTLE_LIGHTNING = {"data", "evaluation"}
LIGHTNING = {"lightning", "pytorch_lightning", "lightning_fabric"}
HUB = "huggingface_hub"
ORACLES = {"transformers", "peft", "tokenizers"}  # the tests compare against them


def _module(path: str) -> str:
    """Name the module of a file: model/llama.py is llama_lightning.model.llama."""
    parts = [PACKAGE, *path.removesuffix(".py").split("/")]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _unit(module: str) -> str:
    _, _, below = module.partition(".")
    head, _, tail = below.partition(".")
    return "assets tools" if head == "assets" and tail else head


def _imports(path: str, source: str, modules: set[str]) -> Iterator[str]:
    """All modules a file imports, wherever in the file, by their full names."""
    folder = _module(path) if path.endswith("__init__.py") else _module(path).rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = folder.split(".")[: len(folder.split(".")) - node.level + 1]
                base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                name = f"{base}.{alias.name}"
                yield name if name in modules else base


def _foreign(unit: str, path: str, top: str) -> str | None:
    """Say why a file may not import a package from outside, if it may not."""
    if top in sys.stdlib_module_names:
        return None
    if top == HUB and unit != "hub":
        return "belongs in hub.py"
    if unit == "hub" and top != HUB:
        return f"is not {HUB}"
    if top in ORACLES - ALSO.get(path, set()):
        return "is for tests only"
    if unit in PLAIN_PYTHON:
        return "is not of the standard library"
    if unit in TORCH_ONLY and top != "torch":
        return "is not torch"
    if top in LIGHTNING and unit in LITTLE_LIGHTNING and path not in LIGHTNING_IN:
        return f"belongs in {' or '.join(sorted(LIGHTNING_IN))}"
    return None


def violations(sources: dict[str, str]) -> list[str]:
    """List the forbidden imports of a package given as {path: source}."""
    modules, programs = {_module(path) for path in sources}, {_module(path) for path in ALSO}
    found = []
    for path, source in sources.items():
        unit = _unit(_module(path))
        if unit not in MAY_IMPORT:
            found.append(f"{path}: {unit} is in no layer")
            continue
        allowed = MAY_IMPORT[unit] | ALSO.get(path, set())
        for name in _imports(path, source, modules):
            if name.partition(".")[0] != PACKAGE:
                if reason := _foreign(unit, path, name.partition(".")[0]):
                    found.append(f"{path}: {name} {reason}")
            elif name in programs and name != _module(path):
                found.append(f"{path}: {name} is a program of its own")
            elif _unit(name) not in {"", unit, *allowed} and allowed != EVERYTHING:
                found.append(f"{path}: {unit} may not import {name}")
    return found


@pytest.fixture(scope="module")
def sources() -> dict[str, str]:
    root = Path(llama_lightning.__file__).parent
    return {
        path.relative_to(root).as_posix(): path.read_text(encoding="utf-8")
        for path in sorted(root.rglob("*.py"))
    }


def test_no_import_points_upwards(sources: dict[str, str]) -> None:
    modules = {_module(path) for path in sources}
    own = sum(
        name.startswith(PACKAGE)
        for path, source in sources.items()
        for name in _imports(path, source, modules)
    )
    print(f"{len(sources)} files, {own} imports of the package's own modules")
    assert len(sources) > 20
    assert own > 50
    assert violations(sources) == []


def test_no_module_imports_itself_in_a_circle(sources: dict[str, str]) -> None:
    modules = {_module(path) for path in sources}
    graph = {
        _module(path): set(_imports(path, source, modules)) - {_module(path)}
        for path, source in sources.items()
    }
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError
    assert set(order) >= set(graph)  # the libraries too


PLANTED = {
    "model to training": ("model/llama.py", "from llama_lightning.training import optim"),
    "model to errors": ("model/config.py", "from llama_lightning.errors import UserError"),
    "model to lightning": ("model/llama.py", "import lightning.pytorch as pl"),
    "model to another package": ("model/llama.py", "import numpy"),
    "records to model": ("records.py", "import llama_lightning.model.config"),
    "errors to torch": ("errors.py", "import torch"),
    "package to cli": ("__init__.py", "from llama_lightning.cli import main"),
    "hub to data": ("hub.py", "from llama_lightning.data.alpaca import AlpacaDataModule"),
    "hub to another package": ("hub.py", "import httpx"),
    "the hub's package elsewhere": ("cli.py", "from huggingface_hub import snapshot_download"),
    "data to model": ("data/batching.py", "from ..model.llama import Llama"),
    "data to lightning": ("data/batching.py", "from lightning.pytorch import LightningDataModule"),
    "data to the tools of assets": ("data/alpaca.py", "from llama_lightning.assets import world"),
    "weights to training": ("weights/huggingface.py", "from llama_lightning import training"),
    "evaluation to training": ("evaluation/callbacks.py", "import llama_lightning.training.optim"),
    "evaluation to model": ("evaluation/prometheus.py", "from llama_lightning.model import llama"),
    "evaluation to weights": (
        "evaluation/grading.py",
        "import llama_lightning.weights.huggingface",
    ),
    "evaluation to the other process": (
        "evaluation/prometheus.py",
        "from llama_lightning.evaluation.local_judge import JudgeModel",
    ),
    "the other process to data": (
        "evaluation/local_judge.py",
        "import llama_lightning.training",
    ),
    "tokenizers elsewhere": ("evaluation/prometheus.py", "from tokenizers import Tokenizer"),
    "evaluation to lightning": ("evaluation/exact_match.py", "import lightning"),
    "training to data": ("training/optim.py", "from llama_lightning.data.alpaca import Row"),
    "training to evaluation": ("training/callbacks.py", "from .. import evaluation"),
    "training to cli": ("training/trainer.py", "from ..cli import main"),
    "an oracle": ("cli.py", "import transformers.models.llama"),
    "inside a function": ("model/lora.py", "def f():\n    from llama_lightning import weights"),
    "for types only": ("model/lora.py", "if TYPE_CHECKING:\n    import llama_lightning.data"),
    "a folder in no layer": ("extras/new.py", "import torch"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_import_is_caught(name: str, sources: dict[str, str]) -> None:
    path, line = PLANTED[name]
    found = violations({**sources, path: f"{sources.get(path, '')}\n{line}\n"})
    print(found)
    assert len(found) == 1
    assert found[0].startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("model/llama.py", "from ..records import IGNORE_INDEX"),
        ("data/alpaca.py", "import lightning.pytorch"),
        ("training/optim.py", "from llama_lightning import __version__, weights"),
        ("cli.py", "import llama_lightning.training.trainer, llama_lightning.data"),
    ],
)
def test_a_downward_import_is_allowed(path: str, line: str, sources: dict[str, str]) -> None:
    assert violations({**sources, path: f"{sources[path]}\n{line}\n"}) == []
