"""llama.cpp itself reads our GGUF files and writes what transformers writes, token for token.

Random weights, large enough that the logits are confident. Files that lack one of the two things
that go wrong in silence, the order of q's and k's rows and the scaling of positions, must fail.
"""

import functools
import re
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from llama_lightning.assets import TINY
from llama_lightning.data.examples import Row
from llama_lightning.data.templates import TEMPLATES
from llama_lightning.data.tokenizer import Tokenizer
from llama_lightning.data.tokenizer_files import huggingface_files
from llama_lightning.model.llama import Llama
from llama_lightning.model.lora import LoRAConfig, inject_lora, merge_lora
from llama_lightning.weights import gguf as ours
from llama_lightning.weights.gguf import FileType, interleave, save_gguf
from tests.model.oracle import huggingface_twin, randomise_lora, small_config, small_llama

NEW = 40
PROMPTS = [
    "Name it.\n",
    "naïve café — 東京 🙂 привет\n\n\tx  =  f(y)",
    "Below is an instruction that describes a task.\n\n### Instruction:\nSay 12,345",
    "The quick brown fox's jumps over the lazy dog, and then it rests. " * 3,
]
STOPS = ["<|end_of_text|>", "<|eot_id|>"]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_path(TINY), TINY


@pytest.fixture(scope="module")
def prompts(tokenizer):
    return [[tokenizer[0].bos_id, *tokenizer[0].encode(prompt)] for prompt in PROMPTS]


UNSCALED = {"rope_scaling": None, "tie_word_embeddings": False, "rope_theta": 1e6}  # as Mistral
# With these seeds the two likeliest tokens are never nearer than 0.7 % of the logits' standard
# deviation. Among 160 random choices, one nearer than what fp16 rounds off is no rarity.
SEEDS = {"scaled": 91, "merged LoRA": 23, "untied, unscaled": 14}


def _llama(kind: str = "scaled") -> Llama:
    torch.manual_seed(SEEDS[kind])
    changes = UNSCALED if kind == "untied, unscaled" else {}
    model = small_llama(small_config(vocab_size=1472, **changes), std=0.12)
    if kind == "merged LoRA":
        inject_lora(model, LoRAConfig(rank=4, alpha=8), dtype=torch.float32)
        randomise_lora(model)
        model = merge_lora(model, dtype=torch.float32)
    return model


def _save(model: Llama, folder: Path, tokenizer, file_type: FileType = "float32") -> Path:
    files = huggingface_files(*tokenizer, TEMPLATES["alpaca"].jinja)
    template = TEMPLATES["alpaca"].ollama
    save_gguf(
        model, folder, file_type=file_type, files=files, template=template, stops=STOPS, name="x"
    )
    return next(folder.glob("*.gguf"))


@pytest.fixture(scope="module")
def transformers_greedy(prompts):
    @functools.cache
    def greedy(kind: str) -> list[list[int]]:
        twin = huggingface_twin(_llama(kind))
        limits = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
        whole = [twin.generate(torch.tensor([prompt]), **limits)[0].tolist() for prompt in prompts]
        return [tokens[len(p) :] for tokens, p in zip(whole, prompts, strict=True)]

    return greedy


def _llama_cpp_greedy(path: Path, prompts: list[list[int]]) -> list[list[int]]:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    llm = llama_cpp.Llama(str(path), n_ctx=512, n_threads=1, verbose=False)
    try:
        for text, prompt in zip(PROMPTS, prompts, strict=True):
            assert llm.tokenize(text.encode(), add_bos=True, special=False) == prompt
        return [list(islice(llm.generate(p, temp=0.0, top_k=1), NEW)) for p in prompts]
    finally:
        llm.close()


def _equal(ours: list[list[int]], theirs: list[list[int]]) -> int:
    pairs = [pair for rows in zip(ours, theirs, strict=True) for pair in zip(*rows, strict=True)]
    assert len(pairs) == len(PROMPTS) * NEW
    return sum(a == b for a, b in pairs)


@pytest.mark.llama_cpp
@pytest.mark.parametrize("file_type", ["float32", "float16"])
@pytest.mark.parametrize("kind", SEEDS)
def test_llama_cpp_writes_what_transformers_writes(
    kind, file_type, tokenizer, prompts, transformers_greedy, tmp_path
):
    path = _save(_llama(kind), tmp_path, tokenizer, file_type)
    equal = _equal(_llama_cpp_greedy(path, prompts), transformers_greedy(kind))
    print(f"{kind}, {file_type}: {equal} of {len(PROMPTS) * NEW} greedy tokens equal")
    assert equal == len(PROMPTS) * NEW


def _no_permutation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "interleave", lambda rows, heads: rows)


def _no_rope_freqs(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = ours._tensors

    def without(model):
        return ((name, t) for name, t in tensors(model) if name != "rope_freqs.weight")

    monkeypatch.setattr(ours, "_tensors", without)


@pytest.mark.llama_cpp
@pytest.mark.parametrize("broken", [_no_permutation, _no_rope_freqs])
def test_a_file_without_it_fails(
    broken, tokenizer, prompts, transformers_greedy, tmp_path, monkeypatch
):
    broken(monkeypatch)
    path = _save(_llama(), tmp_path, tokenizer)
    equal = _equal(_llama_cpp_greedy(path, prompts), transformers_greedy("scaled"))
    print(f"{broken.__name__}: {equal} of {len(PROMPTS) * NEW} greedy tokens equal")
    assert equal < 0.9 * len(PROMPTS) * NEW


@pytest.mark.llama_cpp
@pytest.mark.parametrize("file_type", ["bfloat16", "q8_0"])
def test_rounded_files_are_near(file_type, tokenizer, prompts, tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    model = _llama()
    path = _save(model, tmp_path, tokenizer, file_type)
    llm = llama_cpp.Llama(str(path), n_ctx=512, n_threads=1, logits_all=True, verbose=False)
    llm.eval(prompts[3])
    theirs = torch.from_numpy(np.array(llm.scores[: len(prompts[3])]))
    llm.close()
    with torch.no_grad():
        exact = model(torch.tensor([prompts[3]]))[0]
    error = ((theirs - exact).norm() / exact.norm()).item()
    print(f"{file_type}: {path.stat().st_size:,} bytes, relative error of the logits {error:.1e}")
    assert error < {"bfloat16": 0.03, "q8_0": 0.1}[file_type]


def test_interleave_by_hand() -> None:
    rows = torch.arange(8)[:, None]  # two heads of four
    assert interleave(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def _rendered(modelfile: str, instruction: str) -> str:
    """Render the TEMPLATE as Ollama does for a prompt without a system message."""
    template = re.search(r'TEMPLATE """(.*?)"""', modelfile, re.DOTALL)[1]
    template = re.sub(r"\{\{ if \.System \}\}.*?\{\{ else \}\}(.*?)\{\{ end \}\}", r"\1", template)
    return template.replace("{{ .Prompt }}", instruction).replace("{{ .Response }}", "")


def test_the_modelfile_is_the_training(tokenizer, tmp_path):
    path = _save(_llama(), tmp_path, tokenizer, "float16")
    text = (tmp_path / "Modelfile").read_text()
    assert path.name == "model-f16.gguf"
    assert "\nFROM ./model-f16.gguf\n" in text
    assert re.findall(r'^PARAMETER stop "(.*)"$', text, re.MULTILINE) == STOPS
    row = Row(0, "Say it.", "", "")
    assert _rendered(text, row.instruction) == TEMPLATES["alpaca"].format(row.instruction, "")
