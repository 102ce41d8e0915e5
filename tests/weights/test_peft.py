"""Adapters travel between PEFT and our LoRA unchanged, and what we do not have is named."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from llama_lightning.cli import main
from llama_lightning.errors import UsageError, WeightsError
from llama_lightning.model.llama import Llama
from llama_lightning.model.lora import LLAMA_LINEARS, LoRAConfig
from llama_lightning.training.llama_module import LlamaModule
from llama_lightning.weights.huggingface import save_huggingface
from llama_lightning.weights.peft import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    read_peft_config,
    save_peft,
)
from tests.model.oracle import (
    SMALL,
    max_difference,
    relative_difference,
    small_config,
    small_llama,
)
from tests.small import write_byte_tokenizer

BOUND = 1e-4
A_Q = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(1)
    save_huggingface(small_llama(), folder)
    return folder


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("untied")
    torch.manual_seed(2)
    save_huggingface(small_llama(small_config(tie_word_embeddings=False)), folder)
    return folder


def _transformers(folder: Path) -> transformers.LlamaForCausalLM:
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def _write_adapter(folder: Path, base: Path, **settings: Any) -> peft.PeftModel:
    """Have PEFT write an adapter with random A and B, as after a training."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": LLAMA_LINEARS, **settings}
    config = peft.LoraConfig(task_type="CAUSAL_LM", **settings)
    model = peft.get_peft_model(_transformers(base), config)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(folder)
    return model.eval()


def _module(base: Path, adapter: Path | None, lora: LoRAConfig = LoRAConfig()) -> LlamaModule:  # noqa: B008
    module = LlamaModule(
        base_model=str(base),
        base_dtype="float32",
        lora=lora,
        adapter=str(adapter) if adapter else None,
    )
    module.check_base()
    module.configure_model()
    return module.eval()


def _llama(module: LlamaModule) -> Llama:
    assert module.model is not None
    return module.model


@torch.no_grad()
def _logits(model: torch.nn.Module, tokens: Tensor) -> Tensor:
    out = model(tokens)
    return out if isinstance(out, Tensor) else out.logits


# --- theirs to ours ---


@pytest.mark.parametrize(
    ("settings", "targets", "alpha"),
    [
        ({}, LLAMA_LINEARS, 8),
        ({"target_modules": ["v_proj", "q_proj"]}, ["q_proj", "v_proj"], 8),
        ({"target_modules": "all-linear"}, LLAMA_LINEARS, 8),
        ({"target_modules": r".*\.mlp\.(up|down)_proj"}, ["up_proj", "down_proj"], 8),
        ({"target_modules": None}, ["q_proj", "v_proj"], 8),  # PEFT's own choice
        ({"target_modules": ["self_attn.o_proj", "c_attn"]}, ["o_proj"], 8),
        ({"use_rslora": True}, LLAMA_LINEARS, 16),
        ({"lora_alpha": 5.5, "init_lora_weights": "gaussian"}, LLAMA_LINEARS, 5.5),
    ],
    ids=["all", "two", "all-linear", "regex", "default", "paths", "rslora", "fraction"],
)
def test_an_adapter_of_peft_gives_its_logits(
    settings: dict[str, Any], targets: list[str], alpha: float, base: Path, tmp_path: Path
) -> None:
    theirs = _write_adapter(tmp_path, base, **settings)
    module = _module(base, tmp_path)
    assert module.lora == LoRAConfig(4, alpha, 0.0, targets)
    tokens = torch.randint(SMALL.vocab_size, (2, 32))
    reference = _logits(theirs, tokens)
    difference = max_difference(_logits(_llama(module), tokens), reference)
    effect = max_difference(_logits(_transformers(base), tokens), reference)
    print(
        f"max |logit difference| {difference:.1e} (bound {BOUND:.0e}); the adapter moves logits by "
        f"up to {effect:.1e}"
    )
    assert difference <= BOUND
    assert effect > 1000 * BOUND


def test_an_adapter_of_the_head_is_read_where_the_head_is_untied(
    untied: Path, base: Path, tmp_path: Path
) -> None:
    theirs = _write_adapter(tmp_path, untied, target_modules=["lm_head", "k_proj"])
    module = _module(untied, tmp_path)
    tokens = torch.randint(SMALL.vocab_size, (2, 32))
    difference = max_difference(_logits(_llama(module), tokens), _logits(theirs, tokens))
    print(f"max |logit difference| {difference:.1e} (bound {BOUND:.0e})")
    assert difference <= BOUND
    with pytest.raises(WeightsError, match=r"model\.adapter .* lm_head is tied to the embedding"):
        _module(base, tmp_path)
    # Beside its update PEFT writes the head itself, which must be the base's.
    _edit(lambda t: t["base_model.model.lm_head.base_layer.weight"].add_(1))(tmp_path)
    with pytest.raises(WeightsError, match="is not the head of this base model"):
        _module(untied, tmp_path)


# --- ours to theirs ---


def _trained_module(base: Path, lora: LoRAConfig) -> LlamaModule:
    module = _module(base, None, lora)
    for name, parameter in module.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return module


@pytest.mark.parametrize(
    "lora",
    [LoRAConfig(4, 8.0), LoRAConfig(3, 4.5, 0.1, ["v_proj", "down_proj"])],
    ids=["all", "two"],
)
def test_peft_loads_what_we_save(lora: LoRAConfig, base: Path, tmp_path: Path) -> None:
    module = _trained_module(base, lora)
    save_peft(_llama(module), lora, tmp_path, base_model=str(base))
    with warnings.catch_warnings():
        # PEFT only warns of keys that it does not find.
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        theirs = peft.PeftModel.from_pretrained(_transformers(base), tmp_path).eval()
    raw = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert raw["target_modules"] == sorted(lora.target_modules)
    assert raw["base_model_name_or_path"] == str(base)
    tokens = torch.randint(SMALL.vocab_size, (2, 32))
    ours = _logits(_llama(module), tokens)
    difference = max_difference(ours, _logits(theirs, tokens))
    with theirs.disable_adapter():
        effect = max_difference(ours, _logits(theirs, tokens))
    print(
        f"max |logit difference| {difference:.1e} (bound {BOUND:.0e}); the adapter moves logits by "
        f"up to {effect:.1e}"
    )
    assert difference <= BOUND
    assert effect > 1000 * BOUND
    # And home again.
    again = _module(base, tmp_path)
    assert again.lora == LoRAConfig(
        lora.rank, lora.alpha, lora.dropout, [n for n in LLAMA_LINEARS if n in lora.target_modules]
    )
    state = _llama(module).state_dict()
    assert all(torch.equal(t, state[name]) for name, t in _llama(again).state_dict().items())


def test_the_comparison_notices_another_alpha(base: Path, tmp_path: Path) -> None:
    lora = LoRAConfig(4, 8.0)
    module = _trained_module(base, lora)
    save_peft(_llama(module), LoRAConfig(4, 9.0), tmp_path, base_model=str(base))
    theirs = peft.PeftModel.from_pretrained(_transformers(base), tmp_path).eval()
    tokens = torch.randint(SMALL.vocab_size, (2, 32))
    difference = max_difference(_logits(_llama(module), tokens), _logits(theirs, tokens))
    print(f"max |logit difference| {difference:.1e}, must be above {BOUND:.0e}")
    assert difference > 100 * BOUND


# --- to train on ---


def test_a_loaded_adapter_has_pefts_gradients(base: Path, tmp_path: Path) -> None:
    theirs = _write_adapter(tmp_path, base)
    module = _module(base, tmp_path)
    tokens = torch.randint(SMALL.vocab_size, (2, 32))
    for logits in (_llama(module)(tokens), theirs(tokens).logits):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    reference = {
        name.replace(".default", "").removeprefix("base_model.model."): p.grad
        for name, p in theirs.named_parameters()
        if p.requires_grad
    }
    ours = {name: p.grad for name, p in _llama(module).named_parameters() if p.requires_grad}
    assert ours.keys() == reference.keys()
    worst = max(relative_difference(ours[name], reference[name]) for name in ours)
    print(f"{len(ours)} gradients, worst relative difference {worst:.1e} (bound 1e-4)")
    assert worst <= 1e-4


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, list[str]]]:
    """Call a verb with an adapter; return the exit code and the lines that begin with "error"."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "base"
    torch.manual_seed(3)
    save_huggingface(small_llama(small_config(vocab_size=512)), folder)
    write_byte_tokenizer(folder)
    _write_adapter(tmp_path / "adapter", folder, lora_dropout=0.05)
    records = [{"instruction": f"q{i}", "input": "", "output": "a"} for i in range(20)]
    (tmp_path / "data.json").write_text(json.dumps(records))
    (tmp_path / "run.yaml").write_text(
        "model:\n  base_model: base\n  adapter: adapter\n  optimizer: {lr: 0.001}\n"
        "  generation: {max_new_tokens: 8}\n"
        "data: {path: data.json, batch_size: 8}\n"
        "trainer: {max_steps: 1, accelerator: cpu}\n"
    )

    def call(verb: str, *arguments: str, config: str = "run.yaml") -> tuple[int, list[str]]:
        code = main([verb, f"--config={config}", *arguments])
        lines = capfd.readouterr().err.splitlines()
        assert not any("Traceback" in line for line in lines)
        return code, [line for line in lines if line.startswith("error: ")]

    return call


def test_fit_trains_on_and_predict_answers_with_it(
    run: Callable[..., tuple[int, list[str]]], tmp_path: Path
) -> None:
    assert run("fit") == (0, [])
    version = tmp_path / "lightning_logs" / "version_0"
    path = version / "checkpoints" / "last.ckpt"
    before = load_file(tmp_path / "adapter" / WEIGHTS_FILE)
    state = torch.load(path, weights_only=True)["state_dict"]
    after = {f"base_model.{name}": tensor for name, tensor in state.items()}
    assert after.keys() == before.keys()
    moved = [(after[name] - before[name]).abs().max().item() for name in before]
    # AdamW's first step is lr long in every coordinate, whatever the gradient, plus the decay.
    assert min(moved) > 0.9e-3
    assert max(moved) < 1.1e-3

    def responses(*arguments: str) -> str:
        config = str(version / "config.yaml")  # the run's own, which names the adapter too
        assert run("predict", "--responses.path=r.jsonl", *arguments, config=config) == (0, [])
        return (tmp_path / "r.jsonl").read_text()

    with_adapter, with_checkpoint = responses(), responses(f"--ckpt_path={path}")
    zeros = {name: torch.zeros_like(tensor) for name, tensor in before.items()}
    save_file(zeros, tmp_path / "adapter" / WEIGHTS_FILE)
    assert responses() != with_adapter
    assert responses(f"--ckpt_path={path}") == with_checkpoint
    # And a checkpoint needs no adapter at all.
    module = LlamaModule.load_from_checkpoint(path)
    assert module.lora.dropout == 0.05
    assert all(torch.equal(p, state[n]) for n, p in module.named_parameters() if ".lora_" in n)
    print(
        f"one step of lr 1e-3 moved the adapter's weights by {min(moved):.2e} to {max(moved):.2e}"
    )


# --- what contradicts it ---


def test_other_settings_than_the_adapters_are_refused(base: Path, tmp_path: Path) -> None:
    _write_adapter(tmp_path, base, lora_dropout=0.1)
    assert _module(base, tmp_path).lora.dropout == 0.1
    assert _module(base, tmp_path, LoRAConfig(4, 8.0)).lora.dropout == 0.0
    for lora, said in (
        (LoRAConfig(8, 8.0), "model.lora.rank is 8, the adapter .* has 4"),
        (LoRAConfig(4), "model.lora.alpha is 16.0, the adapter .* has 8.0"),
        (LoRAConfig(4, 8.0, 0.0, ["q_proj"]), r"target_modules is \['q_proj'\], the adapter"),
    ):
        with pytest.raises(WeightsError, match=said) as error:
            _module(base, tmp_path, lora)
        print(error.value)
    with pytest.raises(UsageError, match="from_scratch"):
        LlamaModule(base_model=str(base), adapter=str(tmp_path), from_scratch=True)


def test_a_smaller_base_is_named(base: Path, tmp_path: Path) -> None:
    _write_adapter(tmp_path / "adapter", base)
    save_huggingface(small_llama(small_config(num_hidden_layers=1)), tmp_path / "base")
    with pytest.raises(
        WeightsError, match=r"not part of this model's LoRA: .*layers\.1\..*11 more"
    ):
        _module(tmp_path / "base", tmp_path / "adapter")


SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "use_dora": ({"use_dora": True}, "use_dora=True is not supported"),
    "bias": ({"bias": "all"}, "bias='all' is not supported"),
    "lora_bias": ({"lora_bias": True}, "lora_bias=True"),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, "modules_to_save=['lm_head']"),
    "rank_pattern": ({"rank_pattern": {"q_proj": 2}}, "rank_pattern={'q_proj': 2}"),
    "alpha_pattern": ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern={'q_proj': 2}"),
    "fan_in_fan_out": ({"fan_in_fan_out": True}, "fan_in_fan_out=True"),
    "layers_to_transform": ({"layers_to_transform": [0]}, "layers_to_transform=[0]"),
    "exclude_modules": ({"exclude_modules": ["q_proj"]}, "exclude_modules=['q_proj']"),
    "trainable tokens": ({"trainable_token_indices": [3]}, "trainable_token_indices=[3]"),
    "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
    "a setting of the future": ({"use_xlora": {"a": 1}}, "use_xlora={'a': 1} is not supported"),
    "another method": ({"peft_type": "IA3"}, "peft_type is 'IA3', not 'LORA'"),
    "no method": ({"peft_type": None}, "peft_type is None"),
    "foreign targets": ({"target_modules": ["c_attn"]}, "['c_attn'] names no linear layer"),
    "no rank": ({"r": None}, "r=None is not a rank"),
    "no alpha": ({"lora_alpha": None}, "lora_alpha=None is not a number"),
    "rank 0": ({"r": 0}, "r=0 is not a rank"),
    "dropout": ({"lora_dropout": 2.0}, "lora.dropout is 2.0"),
}


@pytest.fixture(scope="module")
def written(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    _write_adapter(folder, base)
    return folder


@pytest.fixture
def adapter(written: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        (tmp_path / name).write_bytes((written / name).read_bytes())
    return tmp_path


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_we_do_not_have_are_named(name: str, adapter: Path) -> None:
    changes, said = SETTINGS[name]
    raw = json.loads((adapter / CONFIG_FILE).read_text())
    (adapter / CONFIG_FILE).write_text(json.dumps({**raw, **changes}))
    with pytest.raises(WeightsError) as error:
        read_peft_config(adapter)
    message = str(error.value)
    print(message.replace(str(adapter), "."))
    assert said in message
    assert CONFIG_FILE in message
    assert "\n" not in message


def _edit(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS_FILE)
        change(tensors)
        save_file(tensors, folder / WEIGHTS_FILE)

    return damage


def _only_first_layer(tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if ".layers.1." in name]:
        del tensors[name]


def _embedding(tensors: dict[str, Tensor]) -> None:
    tensors["base_model.model.model.embed_tokens.weight"] = torch.ones(300, 192)


def _int8(tensors: dict[str, Tensor]) -> None:
    tensors[A_Q] = tensors[A_Q].to(torch.int8)


def _cut(folder: Path) -> None:
    file = folder / WEIGHTS_FILE
    file.write_bytes(file.read_bytes()[:-1000])


def _pickled(folder: Path) -> None:
    (folder / WEIGHTS_FILE).rename(folder / "adapter_model.bin")


DAMAGED: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "tensor missing": (_edit(lambda t: t.pop(A_Q)), ["missing", A_Q]),
    "layers missing": (_edit(_only_first_layer), ["missing", ".layers.1.", "11 more"]),
    "tensor too many": (_edit(_embedding), ["not part of", "embed_tokens.weight"]),
    "tensor misshapen": (
        _edit(lambda t: t.update({A_Q: torch.ones(3, 192)})),
        [A_Q, "(3, 192)", "mean (4, 192)"],
    ),
    "NaN": (_edit(lambda t: t[A_Q].fill_(float("nan"))), [A_Q, "NaN or infinity"]),
    "int8": (_edit(_int8), [A_Q, "quantised"]),
    "file cut": (_cut, [WEIGHTS_FILE, "damaged or cut", "bytes"]),
    "only a pickle": (_pickled, ["has no adapter_model.safetensors", "adapter_model.bin"]),
    "no config": (lambda f: (f / CONFIG_FILE).unlink(), ["has no adapter_config.json"]),
    "no json": (lambda f: (f / CONFIG_FILE).write_text("{"), [CONFIG_FILE, "line 1"]),
    "a list": (lambda f: (f / CONFIG_FILE).write_text("[]"), [CONFIG_FILE]),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_named(name: str, base: Path, adapter: Path) -> None:
    damage, words = DAMAGED[name]
    damage(adapter)
    with pytest.raises(WeightsError) as error:
        _module(base, adapter)
    message = str(error.value)
    print(message.replace(str(adapter), "."))
    assert all(word in message for word in words)
    assert "\n" not in message


def test_the_command_line_says_it_in_one_line(
    run: Callable[..., tuple[int, list[str]]], tmp_path: Path
) -> None:
    for arguments, said in (
        (["--model.adapter=nix"], "nix has no adapter_config.json"),
        (["--model.lora.rank=7"], "model.lora.rank is 7"),
    ):
        code, lines = run("fit", *arguments)
        print(lines)
        assert code == 3
        assert len(lines) == 1
        assert said in lines[0]
    _edit(lambda t: t.update({A_Q: torch.ones(3, 192)}))(tmp_path / "adapter")
    (tmp_path / "base" / "model.safetensors").write_bytes(b"not weights")  # found before they are
    code, lines = run("predict")
    assert code == 3
    assert A_Q in lines[0]
    assert not (tmp_path / "lightning_logs").exists()


def test_checking_reads_no_tensor(base: Path, adapter: Path) -> None:
    _edit(lambda t: t[A_Q].fill_(float("nan")))(adapter)
    module = LlamaModule(base_model=str(base), adapter=str(adapter))
    module.check_base()  # names and shapes only
    assert module.model is None
