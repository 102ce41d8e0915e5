"""The package from Python: what the README shows runs, and checkpoints come back as modules."""

import gc
import re
import sys
from pathlib import Path

import pytest
import torch

import llama_lightning
from llama_lightning import LlamaModule, LoRAConfig, Trainer

README = Path(__file__).parents[1] / "README.md"


def test_every_public_name_is_there() -> None:
    for name in llama_lightning.__all__:
        assert getattr(llama_lightning, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Lama'"):
        _ = llama_lightning.Lama


@pytest.mark.parametrize("collecting", [True, False])
def test_an_import_leaves_the_collector_as_it_was(
    collecting: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    during = []

    def broken(name: str) -> None:
        during.append(gc.isenabled())
        raise ImportError(name)

    was_collecting = gc.isenabled()
    try:
        (gc.enable if collecting else gc.disable)()
        assert llama_lightning.Row.__name__ == "Row"
        assert gc.isenabled() == collecting
        monkeypatch.setattr(llama_lightning, "import_module", broken)
        monkeypatch.delitem(sys.modules, "llama_lightning.model.llama", raising=False)
        with pytest.raises(ImportError, match=r"llama_lightning\.model\.llama"):
            _ = llama_lightning.Llama
        assert gc.isenabled() == collecting
    finally:
        (gc.enable if was_collecting else gc.disable)()
    assert during == [False]


@pytest.mark.parametrize("frozen", [True, False])
def test_what_is_imported_is_old(frozen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A collector that looked at it as new would do so twice, in a first training step."""
    homes: list[list[str]] = []

    def imported(name: str) -> object:
        homes.append([name])
        return type("Home", (), {"Llama": homes[-1]})

    def is_in(generation: int) -> bool:
        return any(seen is homes[-1] for seen in gc.get_objects(generation))

    monkeypatch.setattr(llama_lightning, "import_module", imported)
    monkeypatch.delitem(sys.modules, "llama_lightning.model.llama", raising=False)
    collects = gc.isenabled()
    try:
        gc.enable()
        if frozen:
            gc.freeze()
        assert llama_lightning.Llama is homes[-1]
        assert is_in(2) == (not frozen)
        assert (gc.get_freeze_count() > 0) == frozen  # what somebody else froze stays so
        monkeypatch.setitem(sys.modules, "llama_lightning.model.llama", sys)
        assert llama_lightning.Llama is homes[-1]
        assert not is_in(2)  # nothing was imported
    finally:
        gc.unfreeze()
        (gc.enable if collects else gc.disable)()


def test_the_readmes_python_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(code.replace("max_steps=200", "max_steps=3"), names)
    assert capsys.readouterr().out.splitlines()[-1]  # an answer, of a model hardly trained
    module = names["module"]
    assert isinstance(module, LlamaModule)
    # And back, without a Trainer.
    loaded = LlamaModule.load_from_checkpoint(
        tmp_path / "lightning_logs/version_0/checkpoints/last.ckpt",
        base_model="tiny",
        base_dtype="float32",
        lora=LoRAConfig(rank=16, alpha=32),
    )
    ours = dict(module.named_parameters())
    theirs = dict(loaded.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_checkpoint_of_the_command_line_needs_no_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llama_lightning.cli import main

    monkeypatch.chdir(tmp_path)
    config = README.parent / "configs" / "tiny_lora.yaml"
    keys = ["--trainer.max_steps=2", "--model.lora.rank=3", "--samples.every_n_steps=0"]
    assert main(["fit", f"--config={config}", *keys]) == 0
    path = tmp_path / "lightning_logs/version_0/checkpoints/last.ckpt"
    module = LlamaModule.load_from_checkpoint(path)
    state = torch.load(path, weights_only=True)["state_dict"]
    assert module.lora.rank == 3
    weights = dict(module.named_parameters())
    assert all(torch.equal(weights[name], tensor) for name, tensor in state.items())


def test_trainer_is_lightnings() -> None:
    import lightning.pytorch as pl

    assert issubclass(Trainer, pl.Trainer)
