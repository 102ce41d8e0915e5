"""Meta's own files mean here what they mean to Meta's network; what is wrong with them is named."""

import json
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llama_lightning.cli import main
from llama_lightning.errors import WeightsError
from llama_lightning.model.config import PRESETS, RopeScaling
from llama_lightning.model.llama import Llama
from llama_lightning.weights import meta
from llama_lightning.weights.base import load_base, read_config
from llama_lightning.weights.huggingface import save_huggingface
from tests.model.oracle import huggingface_twin, max_difference, small_llama
from tests.small import write_byte_tokenizer
from tests.weights.meta_reference import (
    PARAMS,
    Weights,
    cut,
    meta_logits,
    random_weights,
    write_meta,
)

BOUND = 1e-4


def _load(folder: Path, dtype: torch.dtype = torch.float32) -> Llama:
    return load_base(folder, read_config(folder), dtype=dtype).eval()


def _logits(model: Llama, tokens: Tensor, first: int) -> Tensor:
    with torch.no_grad():
        return model(tokens, positions=first + torch.arange(tokens.shape[1]))


# --- what the files mean ---


@pytest.mark.parametrize("num_files", [1, 2])
@pytest.mark.parametrize(
    ("head", "factor"),
    [("equal", 32.0), ("absent", 32.0), ("own", 8.0), ("own", 0.0)],
    ids=["3.2", "3.2 without a head", "3.1", "3"],
)
def test_logits_equal_metas_network_and_transformers(
    head: str, factor: float, num_files: int, tmp_path: Path
) -> None:
    weights = random_weights(head=head)
    write_meta(tmp_path, cut(weights, num_files), use_scaled_rope=bool(factor))
    model = _load(tmp_path)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (head != "own")
    twin = huggingface_twin(model)  # the Hugging Face layout of the same weights
    weights.setdefault("output.weight", weights["tok_embeddings.weight"])
    tokens = torch.randint(PARAMS["vocab_size"], (2, 32))
    for first in (0, 8192):
        ours = _logits(model, tokens, first)
        reference = meta_logits(weights, tokens, first, factor)
        positions = first + torch.arange(32).expand_as(tokens)
        with torch.no_grad():
            theirs = twin(tokens, position_ids=positions, use_cache=False).logits
        differences = max_difference(ours, reference), max_difference(ours, theirs)
        print(
            f"from position {first}: max |logit difference| to Meta's layout {differences[0]:.1e}, "
            f"to transformers {differences[1]:.1e} (bound {BOUND:.0e}; logits up to "
            f"{reference.abs().max():.0f})"
        )
        assert max(differences) <= BOUND


def test_the_comparison_notices_rows_that_are_not_reordered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = random_weights(head="equal")
    write_meta(tmp_path, [weights])
    tokens = torch.randint(PARAMS["vocab_size"], (2, 32))
    reference = meta_logits(weights, tokens, 0, 32.0)
    monkeypatch.setattr(meta, "_half_split", lambda weight, head_dim: weight)
    difference = max_difference(_logits(_load(tmp_path), tokens, 0), reference)
    print(f"max |logit difference| {difference:.1e}, must be above {BOUND:.0e}")
    assert difference > 100 * BOUND


def test_the_comparison_notices_another_factor(tmp_path: Path) -> None:
    weights = random_weights(head="equal")
    write_meta(tmp_path, [weights])
    tokens = torch.randint(PARAMS["vocab_size"], (2, 32))
    reference = meta_logits(weights, tokens, 8192, 8.0)
    difference = max_difference(_logits(_load(tmp_path), tokens, 8192), reference)
    print(f"max |logit difference| {difference:.1e}, must be above {BOUND:.0e}")
    assert difference > 100 * BOUND


@pytest.mark.parametrize("embedding_dim", [0, 1], ids=["vocabulary", "hidden size"])
@pytest.mark.parametrize("vocab_size", [PARAMS["vocab_size"], -1, None])
def test_files_are_joined_bit_for_bit(
    vocab_size: int | None, embedding_dim: int, tmp_path: Path
) -> None:
    weights = random_weights(head="own")
    write_meta(tmp_path / "one", [weights])
    shards = cut(weights, 2, embedding_dim=embedding_dim)
    write_meta(tmp_path / "two", shards, vocab_size=vocab_size)
    one, two = _load(tmp_path / "one"), _load(tmp_path / "two")
    assert one.config == two.config
    ours, theirs = one.state_dict(), two.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


# params.json of the hub's repositories of these names, in the folder `original`.
LLAMA_3_2_1B = {
    "dim": 2048,
    "n_layers": 16,
    "n_heads": 32,
    "n_kv_heads": 8,
    "vocab_size": 128256,
    "ffn_dim_multiplier": 1.5,
    "multiple_of": 256,
    "norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "use_scaled_rope": True,
}
LLAMA_3_2_3B = {**LLAMA_3_2_1B, "dim": 3072, "n_layers": 28, "n_heads": 24}
LLAMA_3_2_3B["ffn_dim_multiplier"] = 1.0
LLAMA_3_1_8B = {**LLAMA_3_2_1B, "dim": 4096, "n_layers": 32}
LLAMA_3_1_8B |= {"ffn_dim_multiplier": 1.3, "multiple_of": 1024}

LLAMA_3_1_8B_CONFIG = replace(
    PRESETS["llama-3.2-1b"],
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    head_dim=128,
    rope_scaling=RopeScaling(factor=8.0),
    tie_word_embeddings=False,
)


@pytest.mark.parametrize(
    ("raw", "tied", "config"),
    [
        (LLAMA_3_2_1B, True, PRESETS["llama-3.2-1b"]),
        (LLAMA_3_2_3B, True, PRESETS["llama-3.2-3b"]),
        (LLAMA_3_1_8B, False, LLAMA_3_1_8B_CONFIG),
        (
            {**LLAMA_3_1_8B, "use_scaled_rope": False},
            False,
            replace(LLAMA_3_1_8B_CONFIG, rope_scaling=None, max_position_embeddings=8192),
        ),
    ],
    ids=["3.2 1B", "3.2 3B", "3.1 8B", "3 8B"],
)
def test_real_params_mean_the_real_config(raw: dict[str, Any], tied: bool, config: object) -> None:
    def one_number(value: float) -> list[Tensor]:  # in the whole shape, without the memory
        return [torch.full((1, 1), value).expand(raw["vocab_size"], raw["dim"])]

    pieces = {"tok_embeddings.weight": one_number(1.0)}
    if not tied:
        pieces["output.weight"] = one_number(2.0)
    assert meta._config(raw, pieces) == config


def test_loaded_weights_do_not_live_in_the_file(tmp_path: Path) -> None:
    write_meta(tmp_path, [random_weights(head="equal")])
    model = _load(tmp_path)
    before = {name: p.clone() for name, p in model.named_parameters()}
    file = tmp_path / meta.WEIGHTS_FILE
    size = file.stat().st_size
    with file.open("r+b") as stream:
        stream.write(bytes(size))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_tensors_of_old_files_are_no_obstacle(tmp_path: Path) -> None:
    weights = random_weights(head="own")
    write_meta(tmp_path, [{**weights, "rope.freqs": torch.ones(32)}])
    assert torch.equal(_load(tmp_path).lm_head.weight, weights["output.weight"])


# --- one door ---


def test_hugging_faces_format_goes_first(tmp_path: Path) -> None:
    write_meta(tmp_path, [random_weights(head="equal")])
    model = small_llama()
    save_huggingface(model, tmp_path)
    assert torch.equal(_load(tmp_path).lm_head.weight, model.lm_head.weight)


def test_a_folder_of_neither_format_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"has no config\.json .* no params\.json \(Meta\)$"):
        read_config(tmp_path)
    write_meta(tmp_path / "original", [random_weights(head="equal")])
    with pytest.raises(WeightsError, match="give .*original$"):
        read_config(tmp_path)


# --- what a user may hold in hand ---


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def _plain_bomb(bomb: Bomb, file: Path) -> None:
    file.write_bytes(pickle.dumps({"tok_embeddings.weight": bomb}))


def _torch_bomb(bomb: Bomb, file: Path) -> None:
    torch.save({"tok_embeddings.weight": bomb}, file)


def _old_torch_bomb(bomb: Bomb, file: Path) -> None:
    torch.save({"tok_embeddings.weight": bomb}, file, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("write", [_plain_bomb, _torch_bomb, _old_torch_bomb])
def test_a_bomb_is_refused_and_does_not_go_off(
    write: Callable[[Bomb, Path], None], tmp_path: Path
) -> None:
    folder, marker = tmp_path / "base", tmp_path / "marker"
    write_meta(folder, [random_weights(head="equal")])
    write(Bomb(marker), folder / meta.WEIGHTS_FILE)
    with pytest.raises(WeightsError) as error:
        read_config(folder)
    print(error.value)
    assert meta.WEIGHTS_FILE in str(error.value)
    assert "\n" not in str(error.value)
    assert not marker.exists()
    if write is _plain_bomb:  # it is a real one
        pickle.loads((folder / meta.WEIGHTS_FILE).read_bytes())
    else:
        torch.load(folder / meta.WEIGHTS_FILE, weights_only=False)
    assert marker.exists()


def _edit(change: Callable[[Weights], None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        weights = torch.load(folder / meta.WEIGHTS_FILE, weights_only=True)
        change(weights)
        torch.save(weights, folder / meta.WEIGHTS_FILE)

    return damage


def _params(**changes: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        params = {k: v for k, v in {**PARAMS, **changes}.items() if v is not None}
        (folder / "params.json").write_text(json.dumps(params))

    return damage


W2 = "layers.1.feed_forward.w2.weight"


def _missing(weights: Weights) -> None:
    del weights[W2]


def _extra(weights: Weights) -> None:
    weights["layers.0.attention.wqkv.weight"] = torch.ones(3)


def _nan(weights: Weights) -> None:
    weights[W2][3, 3] = float("nan")


def _int8(weights: Weights) -> None:
    weights[W2] = weights[W2].to(torch.int8)


def _flat(weights: Weights) -> None:
    weights["layers.1.attention.wq.weight"] = torch.ones(5)


def _no_embedding(weights: Weights) -> None:
    del weights["tok_embeddings.weight"]


def _number(folder: Path) -> None:
    torch.save({"step": 3}, folder / meta.WEIGHTS_FILE)


def _cut(folder: Path) -> None:
    file = folder / meta.WEIGHTS_FILE
    file.write_bytes(file.read_bytes()[:-1000])


def _empty(folder: Path) -> None:
    (folder / meta.WEIGHTS_FILE).write_bytes(b"")


def _gap(folder: Path) -> None:
    (folder / meta.WEIGHTS_FILE).rename(folder / "consolidated.01.pth")


def _none(folder: Path) -> None:
    (folder / meta.WEIGHTS_FILE).unlink()


def _half(folder: Path) -> None:
    torch.save(cut(random_weights(head="own"), 2)[0], folder / meta.WEIGHTS_FILE)


def _unlike(folder: Path) -> None:
    torch.save({"norm.weight": torch.ones(3)}, folder / "consolidated.01.pth")


def _no_json(folder: Path) -> None:
    (folder / "params.json").write_text("{")


def _list(folder: Path) -> None:
    (folder / "params.json").write_text("[]")


EMBEDDING = "tok_embeddings.weight"
DAMAGED: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "dim": (_params(dim=128), [EMBEDDING, "(512, 256)", "params.json means (512, 128)"]),
    "n_layers, less": (_params(n_layers=1), ["layers.1.", "not part of a params.json"]),
    "n_layers, more": (_params(n_layers=3), ["missing", "model.layers.2."]),
    "n_kv_heads": (_params(n_kv_heads=4), ["wk.weight", "(128, 256)", "means (256, 256)"]),
    "n_heads": (_params(n_heads=8), ["wk.weight", "(128, 256)", "means (64, 256)"]),
    "n_heads that do not divide": (_params(n_heads=3), ["params.json", "dim=256", "n_heads=3"]),
    "ffn_dim_multiplier": (_params(ffn_dim_multiplier=1.0), ["w1.weight", "(1024, 256)", "704"]),
    "multiple_of": (_params(multiple_of=1000), ["w1.weight", "(1024, 256)", "2000"]),
    "vocab_size": (_params(vocab_size=300), [EMBEDDING, "(512, 256)", "(300, 256)"]),
    "n_heads 0": (_params(n_heads=0), ["params.json", "by zero"]),
    "an infinite factor": (_params(ffn_dim_multiplier=float("inf")), ["params.json", "infinity"]),
    "a key missing": (_params(n_heads=None), ["params.json", "'n_heads' is missing"]),
    "a word for a number": (_params(dim="large"), ["params.json", "'large'"]),
    "quantised": (_params(quantization_args={"scheme": "x"}), ["quantization_args", "not supp"]),
    "a vision model": (_params(vision_chunk_size=560), ["vision_chunk_size=560", "not supported"]),
    "params that are no json": (_no_json, ["params.json", "line 1"]),
    "params that are a list": (_list, ["params.json"]),
    "tensor missing": (_edit(_missing), ["missing", "model.layers.1.mlp.down_proj.weight"]),
    "tensor too many": (_edit(_extra), ["wqkv.weight is not part of a Llama"]),
    "tensor misshapen": (_edit(_flat), ["layers.1.attention.wq.weight", "(5,)", "(256, 256)"]),
    "no embedding": (_edit(_no_embedding), ["params.json", EMBEDDING]),
    "NaN": (_edit(_nan), [W2, "NaN or infinity"]),
    "int8": (_edit(_int8), [W2, "int8", "quantised"]),
    "a number for a tensor": (_number, [meta.WEIGHTS_FILE, "named tensors"]),
    "file cut": (_cut, [meta.WEIGHTS_FILE, "damaged, cut", "bytes"]),
    "file empty": (_empty, [meta.WEIGHTS_FILE, "0 bytes"]),
    "no file": (_none, ["has no consolidated.00.pth"]),
    "first file missing": (_gap, ["consolidated.00.pth is missing", "consolidated.01.pth is"]),
    "last file missing": (_half, [EMBEDDING, "(256, 256)", "(512, 256)"]),
    "files that do not belong together": (_unlike, ["consolidated.01.pth", "unlike"]),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_named(name: str, tmp_path: Path) -> None:
    write_meta(tmp_path, [random_weights(head="equal")])
    damage, words = DAMAGED[name]
    damage(tmp_path)
    with pytest.raises(WeightsError) as error:
        _load(tmp_path)
    message = str(error.value)
    print(message.replace(str(tmp_path), "."))
    assert all(word in message for word in words)
    assert "\n" not in message


# --- the command line ---


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Call a verb on a hub folder that has Meta's format in its folder `original`."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "hub" / "original"
    write_meta(folder, cut(random_weights(head="equal", std=0.06), 2))
    write_byte_tokenizer(folder)
    records = [{"instruction": f"q{i}", "input": "", "output": "a"} for i in range(20)]
    (tmp_path / "data.json").write_text(json.dumps(records))
    (tmp_path / "run.yaml").write_text(
        "model:\n  base_model: hub/original\n  lora: {rank: 2}\n"
        "  generation: {max_new_tokens: 2}\n"
        "data: {path: data.json, batch_size: 8}\n"
        "trainer: {max_steps: 2, accelerator: cpu}\n"
    )
    return lambda verb, *arguments: main([verb, "--config=run.yaml", *arguments])


def test_fit_and_predict_on_metas_files(run: Callable[..., int], tmp_path: Path) -> None:
    assert run("fit") == 0
    checkpoint = "lightning_logs/version_0/checkpoints/last.ckpt"
    assert run("predict", f"--ckpt_path={checkpoint}", "--responses.path=r.jsonl") == 0
    assert len((tmp_path / "r.jsonl").read_text().splitlines()) == 1
    # The same weights in the other format are the same base.
    save_huggingface(_load(tmp_path / "hub" / "original"), tmp_path / "hub")
    write_byte_tokenizer(tmp_path / "hub")
    again = ("--model.base_model=hub", f"--ckpt_path={checkpoint}", "--responses.path=again.jsonl")
    assert run("predict", *again) == 0
    assert (tmp_path / "again.jsonl").read_text() == (tmp_path / "r.jsonl").read_text()


def test_a_bomb_ends_the_run_in_one_line(
    run: Callable[..., int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    _torch_bomb(Bomb(tmp_path / "marker"), tmp_path / "hub/original" / meta.WEIGHTS_FILE)
    assert run("fit") == 3
    (line,) = (s for s in capfd.readouterr().err.splitlines() if s.startswith("error: "))
    print(line)
    assert "refused" in line
    assert not (tmp_path / "marker").exists()
    assert not (tmp_path / "lightning_logs").exists()
