"""Fine-tune a hand-written Llama 3.2 on Alpaca-format data with PyTorch Lightning."""

import gc
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llama_lightning.data.alpaca import AlpacaDataModule
    from llama_lightning.data.rows import Row
    from llama_lightning.model.config import LlamaConfig
    from llama_lightning.model.generate import generate
    from llama_lightning.model.llama import Llama
    from llama_lightning.model.lora import LoRAConfig
    from llama_lightning.model.sampling import GenerationConfig
    from llama_lightning.training.clearml_logger import ClearMLLogger
    from llama_lightning.training.llama_module import LlamaModule
    from llama_lightning.training.optim import OptimizerConfig
    from llama_lightning.training.trainer import Trainer

__all__ = [
    "AlpacaDataModule",
    "ClearMLLogger",
    "GenerationConfig",
    "Llama",
    "LlamaConfig",
    "LlamaModule",
    "LoRAConfig",
    "OptimizerConfig",
    "Row",
    "Trainer",
    "generate",
]

_HOMES = {
    "AlpacaDataModule": "data.alpaca",
    "ClearMLLogger": "training.clearml_logger",
    "GenerationConfig": "model.sampling",
    "Llama": "model.llama",
    "LlamaConfig": "model.config",
    "LlamaModule": "training.llama_module",
    "LoRAConfig": "model.lora",
    "OptimizerConfig": "training.optim",
    "Row": "data.rows",
    "Trainer": "training.trainer",
    "generate": "model.generate",
}


def __getattr__(name: str) -> Any:
    """Import a public name at first use, so that `--help` does not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = f"{__name__}.{_HOMES[name]}"
    if home in sys.modules:
        return getattr(import_module(home), name)
    # What is imported stays. Looking through it for garbage takes a tenth of the seconds that torch
    # and Lightning take; and where freezing and thawing did not count it among what is old, the
    # next two looks would, another tenth (2 cores of an Intel Xeon with AMX).
    was_collecting = gc.isenabled()
    gc.disable()
    try:
        return getattr(import_module(home), name)
    finally:
        if was_collecting:
            if not gc.get_freeze_count():  # else somebody wants what is frozen to stay so
                gc.freeze()
                gc.unfreeze()
            gc.enable()
