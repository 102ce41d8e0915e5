"""Folders travel between transformers and our network unchanged, and damage is named."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from llama_lightning.errors import WeightsError
from llama_lightning.model.config import (
    PRESETS,
    LlamaConfig,
    RopeScaling,
    config_from_huggingface,
    config_to_huggingface,
)
from llama_lightning.model.llama import Llama
from llama_lightning.weights.huggingface import (
    CONFIG_FILE,
    INDEX_FILE,
    WEIGHTS_FILE,
    load_huggingface,
    read_config,
    save_huggingface,
    weight_files,
)
from tests.model.oracle import (
    SMALL,
    huggingface_twin,
    max_difference,
    small_config,
    small_llama,
)

FP32 = torch.float32
UP_PROJ = "model.layers.1.mlp.up_proj.weight"


def _load(folder: Path, dtype: torch.dtype = FP32) -> Llama:
    return load_huggingface(folder, read_config(folder), dtype=dtype).eval()


def _tokens() -> Tensor:
    return torch.randint(SMALL.vocab_size, (2, 32))


# --- from transformers and back ---


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("shard_size", ["1GB", "200KB"], ids=["single", "sharded"])
def test_a_folder_of_transformers_loads_bit_for_bit(
    shard_size: str, tied: bool, tmp_path: Path
) -> None:
    twin = huggingface_twin(small_llama(small_config(tie_word_embeddings=tied)))
    twin.save_pretrained(tmp_path, max_shard_size=shard_size)
    num_files = len(weight_files(tmp_path))
    assert (num_files > 3) == (shard_size == "200KB")
    model = _load(tmp_path)
    assert model.config == small_config(tie_word_embeddings=tied)
    ours, theirs = model.state_dict(), twin.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    tokens = _tokens()
    with torch.no_grad():
        difference = max_difference(model(tokens), twin(tokens, use_cache=False).logits)
    print(f"{num_files} files: {len(ours)} tensors equal, max |logit difference| {difference:.1e}")
    assert difference <= 1e-5


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_tied_head_stays_one_parameter(tied: bool, tmp_path: Path) -> None:
    save_huggingface(small_llama(small_config(tie_word_embeddings=tied)), tmp_path)
    model = _load(tmp_path)
    embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
    assert (id(embedding) == id(head)) == tied
    untied = small_llama(small_config(tie_word_embeddings=False))
    expected = sum(p.numel() for p in untied.parameters()) - tied * embedding.numel()
    assert sum(p.numel() for p in model.parameters()) == expected
    assert all(p.requires_grad and not p.is_meta for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_transformers_loads_what_we_save(tied: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    model = small_llama(small_config(tie_word_embeddings=tied)).to(dtype)
    save_huggingface(model, tmp_path)
    with safe_open(tmp_path / WEIGHTS_FILE, framework="pt") as file:
        assert ("lm_head.weight" in file.keys()) != tied  # noqa: SIM118 - no mapping
    twin, info = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path, dtype="auto", attn_implementation="sdpa", output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert twin.dtype == dtype  # by the stored type's name in config.json
    assert (twin.lm_head.weight is twin.model.embed_tokens.weight) == tied
    tokens = _tokens()
    with torch.no_grad():
        # In fp32 also for bf16 weights: transformers rounds the rotary tables to bf16, we do not.
        difference = max_difference(
            model.float()(tokens), twin.float()(tokens, use_cache=False).logits
        )
    print(f"max |logit difference| {difference:.1e} (bound 1e-05)")
    assert difference <= 1e-5


def test_saved_and_loaded_is_the_same(tmp_path: Path) -> None:
    config = small_config(
        rope_scaling=RopeScaling(8.0, 2.0, 3.0, 4096),
        rope_theta=123_456.0,
        rms_norm_eps=3e-6,
        max_position_embeddings=999,
        tie_word_embeddings=False,
        qkv_bias=True,
    )
    model = small_llama(config)
    save_huggingface(model, tmp_path)
    again = _load(tmp_path)
    assert again.config == config
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_transformers_loads_the_shards_we_save(tied: bool, tmp_path: Path) -> None:
    model = small_llama(small_config(tie_word_embeddings=tied))
    save_huggingface(model, tmp_path, max_shard_bytes=1_000_000)
    files = weight_files(tmp_path)
    sizes = [file.stat().st_size for file in files]
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    assert not (tmp_path / WEIGHTS_FILE).exists()
    assert len(files) > 2
    assert max(sizes) < 1_010_000  # the heads of the files
    assert index["metadata"]["total_size"] == sum(4 * p.numel() for p in model.parameters())
    twin, info = transformers.LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ours, theirs = model.state_dict(), twin.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    again = _load(tmp_path).state_dict()
    assert all(torch.equal(ours[name], again[name]) for name in ours)
    print(f"{len(files)} files of {', '.join(f'{size:,}' for size in sizes)} bytes")


def test_weights_are_cast_to_the_type_asked_for(tmp_path: Path) -> None:
    model = small_llama()
    save_huggingface(model, tmp_path)
    loaded = _load(tmp_path, torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert torch.equal(loaded.state_dict()[UP_PROJ], model.state_dict()[UP_PROJ].bfloat16())


def test_loaded_weights_do_not_live_in_the_file(tmp_path: Path) -> None:
    # A tensor mapped from the file would change, or crash the process, once the file is rewritten.
    save_huggingface(small_llama(), tmp_path)
    model = _load(tmp_path)
    before = model.state_dict()[UP_PROJ].clone()
    with (tmp_path / WEIGHTS_FILE).open("r+b") as file:
        size = file.seek(0, 2)
        file.seek(size // 2)
        file.write(bytes(size - size // 2))
    assert torch.equal(model.state_dict()[UP_PROJ], before)


def test_tensors_of_old_exports_are_no_obstacle(tmp_path: Path) -> None:
    model = small_llama()
    save_huggingface(model, tmp_path)
    weights = load_file(tmp_path / WEIGHTS_FILE)
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(32)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, tmp_path / WEIGHTS_FILE)
    loaded = _load(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    tokens = _tokens()
    assert torch.equal(loaded(tokens), model(tokens))


def test_new_biases_start_at_zero_and_change_nothing(tmp_path: Path) -> None:
    model, tokens = small_llama(), _tokens()
    save_huggingface(model, tmp_path)
    biased = load_huggingface(tmp_path, small_config(qkv_bias=True), dtype=FP32).eval()
    biases = {n: p for n, p in biased.named_parameters() if n.endswith("bias")}
    assert len(biases) == 3 * SMALL.num_hidden_layers
    assert all((p == 0).all() and p.requires_grad for p in biases.values())
    with torch.no_grad():
        assert torch.equal(biased(tokens), model(tokens))
        biases["model.layers.0.self_attn.k_proj.bias"].add_(1.0)
        assert not torch.equal(biased(tokens), model(tokens))


# --- what a user may hold in hand ---


def _edit(change: Callable[[dict[str, Tensor]], None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        weights = load_file(folder / WEIGHTS_FILE)
        change(weights)
        save_file(weights, folder / WEIGHTS_FILE)

    return damage


def _missing(weights: dict[str, Tensor]) -> None:
    del weights[UP_PROJ]


def _extra(weights: dict[str, Tensor]) -> None:
    weights["model.layers.2.mlp.up_proj.weight"] = weights[UP_PROJ].clone()


def _bias(weights: dict[str, Tensor]) -> None:
    weights["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(256)


def _misshapen(weights: dict[str, Tensor]) -> None:
    weights[UP_PROJ] = weights[UP_PROJ].T.contiguous()


def _nan(weights: dict[str, Tensor]) -> None:
    weights[UP_PROJ][7, 7] = float("nan")


def _infinite(weights: dict[str, Tensor]) -> None:
    weights[UP_PROJ][0, 3] = float("inf")


def _negative_infinite(weights: dict[str, Tensor]) -> None:
    weights[UP_PROJ][0, 3] = float("-inf")


def _int8(weights: dict[str, Tensor]) -> None:
    weights[UP_PROJ] = weights[UP_PROJ].to(torch.int8)


def _fp8(weights: dict[str, Tensor]) -> None:
    weights[UP_PROJ] = weights[UP_PROJ].to(torch.float8_e4m3fn)


def _another_head(weights: dict[str, Tensor]) -> None:
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 1


def _cut(folder: Path) -> None:
    file = folder / WEIGHTS_FILE
    file.write_bytes(file.read_bytes()[:-1000])


def _empty(folder: Path) -> None:
    (folder / WEIGHTS_FILE).write_bytes(b"")


def _page_of_html(folder: Path) -> None:
    (folder / WEIGHTS_FILE).write_text("<!DOCTYPE html>" * 100)


def _no_weights(folder: Path) -> None:
    (folder / WEIGHTS_FILE).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")


def _index(text: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / INDEX_FILE).write_text(text)

    return damage


def _map_to(shard: object) -> Callable[[Path], None]:
    return _index(json.dumps({"weight_map": {UP_PROJ: shard}}))


DAMAGED: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "tensor missing": (_edit(_missing), ["missing", UP_PROJ]),
    "tensor too many": (_edit(_extra), [WEIGHTS_FILE, "model.layers.2.mlp.up_proj.weight"]),
    "bias too many": (_edit(_bias), ["model.layers.0.self_attn.q_proj.bias"]),
    "tensor misshapen": (_edit(_misshapen), [UP_PROJ, "(192, 320)", "(320, 192)"]),
    "NaN": (_edit(_nan), [UP_PROJ, "NaN or infinity"]),
    "infinity": (_edit(_infinite), [UP_PROJ, "NaN or infinity"]),
    "negative infinity": (_edit(_negative_infinite), [UP_PROJ, "NaN or infinity"]),
    "int8": (_edit(_int8), [UP_PROJ, "int8", "quantised"]),
    "fp8": (_edit(_fp8), [UP_PROJ, "float8_e4m3fn", "quantised"]),
    "tied head that differs": (_edit(_another_head), ["lm_head.weight differs"]),
    "file cut": (_cut, [WEIGHTS_FILE, "damaged or cut", "bytes", "download it again"]),
    "file empty": (_empty, [WEIGHTS_FILE, "damaged or cut", "0 bytes"]),
    "file of something else": (_page_of_html, [WEIGHTS_FILE, "damaged or cut"]),
    "only a pickle": (_no_weights, ["no weights", "safetensors"]),
    "shard missing": (_map_to("model-00002.safetensors"), ["model-00002.safetensors", "missing"]),
    "shard outside": (_map_to("../model.safetensors"), ["../model.safetensors", "not a file of"]),
    "shard at a path": (_map_to("/etc/passwd"), ["/etc/passwd", "not a file of this folder"]),
    "shard without a name": (_map_to(5), [INDEX_FILE, "5"]),
    "index that is a list": (_index("[]"), [INDEX_FILE, "not an index"]),
    "index that is no json": (_index("{"), [INDEX_FILE, "not an index"]),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_named(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    save_huggingface(small_llama(), folder)
    save_huggingface(small_llama(), tmp_path)  # what a shard named outside the folder would reach
    damage, words = DAMAGED[name]
    damage(folder)
    with pytest.raises(WeightsError) as error:
        _load(folder)
    message = str(error.value)
    print(message.replace(str(tmp_path), "."))
    assert all(word in message for word in words)
    assert "\n" not in message


def test_many_missing_tensors_are_counted(tmp_path: Path) -> None:
    save_huggingface(small_llama(small_config(num_hidden_layers=1)), tmp_path)
    with pytest.raises(WeightsError, match=r"model\.layers\.1\.input_layernorm.* and 6 more"):
        load_huggingface(tmp_path, SMALL, dtype=FP32)


# --- config.json ---

# Llama-3.2-1B's, abridged, as transformers 4 wrote it.
VERSION_4: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 128256,
}
VERSION_5 = {k: v for k, v in VERSION_4.items() if k not in ("rope_scaling", "rope_theta")}
VERSION_5["rope_parameters"] = {**VERSION_4["rope_scaling"], "rope_theta": 500000.0}


@pytest.mark.parametrize("raw", [VERSION_4, VERSION_5], ids=["transformers 4", "transformers 5"])
def test_configs_of_both_versions_mean_the_same(raw: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / CONFIG_FILE).write_text(json.dumps(raw))
    assert read_config(tmp_path) == PRESETS["llama-3.2-1b"]


@pytest.mark.parametrize("name", PRESETS)
def test_transformers_reads_our_config_and_writes_it_back(name: str, tmp_path: Path) -> None:
    raw = config_to_huggingface(PRESETS[name], "bfloat16")
    transformers.LlamaConfig.from_dict(raw).save_pretrained(tmp_path)
    assert read_config(tmp_path) == PRESETS[name]
    assert config_from_huggingface(raw) == PRESETS[name]


@pytest.mark.parametrize("theta", [500_000.0, 10_000.0])
def test_a_config_without_scaling_keeps_its_theta(theta: float, tmp_path: Path) -> None:
    config = small_config(rope_scaling=None, rope_theta=theta)
    raw = config_to_huggingface(config, "float32")
    assert config_from_huggingface(raw) == config
    transformers.LlamaConfig.from_dict(raw).save_pretrained(tmp_path)
    assert read_config(tmp_path) == config


def test_absent_fields_have_transformers_defaults() -> None:
    raw = {
        "model_type": "llama",
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 100,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    theirs = transformers.LlamaConfig.from_dict(raw).to_dict()
    assert config_from_huggingface(raw) == config_from_huggingface(theirs)
    assert config_from_huggingface(raw) == LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=100,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        rope_scaling=None,
        rope_theta=10_000.0,
        rms_norm_eps=1e-6,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "rope_type": ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn' is not supp"),
    "old name of rope_type": ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "'linear'"),
    "rope_parameters": ({"rope_parameters": {"rope_type": "dynamic"}}, "'dynamic'"),
    "scaling without factor": ({"rope_scaling": {"rope_type": "llama3"}}, "'factor' is missing"),
    "attention_bias": ({"attention_bias": True}, "attention_bias=True is not supported"),
    "mlp_bias": ({"mlp_bias": True}, "mlp_bias=True is not supported"),
    "hidden_act": ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
    "pretraining_tp": ({"pretraining_tp": 2}, "pretraining_tp=2 is not supported"),
    "quantization": ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config="),
    "model_type": ({"model_type": "gpt2"}, "model_type is 'gpt2', not 'llama' or 'mistral'"),
    "kv heads": ({"num_key_value_heads": 5}, "num_key_value_heads=5"),
    "odd head_dim": ({"head_dim": 63}, "head_dim=63 is odd"),
    "no number": ({"hidden_size": None}, "hidden_size|NoneType"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_features_are_refused(name: str, tmp_path: Path) -> None:
    changes, message = REFUSED[name]
    (tmp_path / CONFIG_FILE).write_text(json.dumps({**VERSION_4, **changes}))
    with pytest.raises(WeightsError, match=message) as error:
        read_config(tmp_path)
    assert CONFIG_FILE in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"model_type": "llama"}'])
def test_a_config_that_is_none_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / CONFIG_FILE).write_text(text)
    with pytest.raises(WeightsError, match=CONFIG_FILE):
        read_config(tmp_path)


def test_a_folder_without_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"has no config\.json"):
        read_config(tmp_path)
