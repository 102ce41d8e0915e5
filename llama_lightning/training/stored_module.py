"""The half of LlamaModule that checkpoints know: what is stored, and what is read back, or refused.

It knows by what arguments a LlamaModule is built, and not how it trains.
"""

from pathlib import Path
from typing import Any, TypeVar

from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from llama_lightning.errors import CheckpointError
from llama_lightning.model.lora import LoRAConfig
from llama_lightning.model.sampling import GenerationConfig
from llama_lightning.training.checkpoint_io import read_checkpoint
from llama_lightning.training.optim import OptimizerConfig
from llama_lightning.training.provenance import check_arguments, check_tensors

Stored = TypeVar("Stored", bound="StoredModule")


class StoredModule(LightningModule):
    """Trained weights alone go into a checkpoint; nothing of it is loaded in part or in silence.

    Attributes:
        base_fingerprint: of the weights before training, known once configure_model has run.
    """

    base_fingerprint: str

    def __init__(self) -> None:
        super().__init__()
        self.strict_loading = False  # frozen weights are missing; see on_load_checkpoint

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments that the constructor takes again, as plain values; of a dataclass, a dict."""
        raise NotImplementedError

    @property
    def _is_fitting(self) -> bool:
        trainer = self._trainer  # none in load_from_checkpoint
        return trainer is not None and trainer.state.fn == TrainerFn.FITTING

    def _trained(self) -> dict[str, Tensor]:
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the trained weights only, and what they were trained with."""
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: state[name] for name in self._trained()}
        checkpoint["llama_lightning"] = {
            "arguments": self.arguments,
            "base_fingerprint": self.base_fingerprint,
        }

    def check_checkpoint(self, checkpoint: dict[str, Any], *, resume: bool) -> None:
        """Compare a checkpoint with this run, before weights are read; see `check_arguments`."""
        theirs = checkpoint["llama_lightning"]["arguments"]
        check_arguments(self.arguments, theirs, resume=resume)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint that would load as less than all of it.

        Raises:
            CheckpointError: other settings, another base, or other tensors.
        """
        self.check_checkpoint(checkpoint, resume=self._is_fitting)
        self.configure_model()  # likewise not called there
        stored = checkpoint["llama_lightning"]
        if self.arguments["lora"]["rank"] and stored["base_fingerprint"] != self.base_fingerprint:
            raise CheckpointError(
                f"model.base_model {self.arguments['base_model']} is not the base of this "
                f"checkpoint ({stored['arguments']['base_model']}): its weights differ"
            )
        check_tensors(self._trained(), checkpoint["state_dict"])

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls: type[Stored],
        checkpoint_path: str | Path,
        map_location: Any = "cpu",
        **arguments: Any,
    ) -> Stored:
        """Build the module that wrote a checkpoint, with its weights.

        Args:
            checkpoint_path: a file written by fit.
            map_location: device of the weights.
            **arguments: of the constructor, instead of those of the run that wrote it.

        Raises:
            CheckpointError: it cannot be read, or `arguments` contradict it.
        """
        checkpoint = read_checkpoint(checkpoint_path)
        stored = dict(checkpoint["llama_lightning"]["arguments"])
        stored["lora"] = LoRAConfig(**stored["lora"])
        stored["optimizer"] = OptimizerConfig(**stored["optimizer"])
        stored["generation"] = GenerationConfig(**stored["generation"])
        module = cls(**(stored | arguments))
        module.on_load_checkpoint(checkpoint)
        module.load_state_dict(checkpoint["state_dict"], strict=False)
        return module.to(map_location)
