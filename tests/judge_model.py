"""A judge of a few thousand weights: it knows a few prompts by heart, and the grade of each.

Its files are a real Mistral's (config.json, safetensors, tokenizer.json, a chat template), and the
same as a GGUF. What it says of which response is known, so that whoever runs it can be held to it.
"""

import json
import random
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F

from llama_lightning.data.tokenizer import LLAMA3_PATTERN
from llama_lightning.evaluation.prometheus import instruct_text
from llama_lightning.evaluation.prometheus_prompts import build_prometheus_prompt
from llama_lightning.evaluation.prompts import build_prompt
from llama_lightning.model.config import LlamaConfig
from llama_lightning.model.llama import Llama
from llama_lightning.records import Response
from llama_lightning.weights.gguf import save_gguf
from llama_lightning.weights.huggingface import save_huggingface

GRADES = {"pebble": 1, "lantern": 2, "meadow": 3, "harbour": 4, "violin": 5, "walnut": 2}
SPECIAL = ["<unk>", "<s>", "</s>"]
BOS, EOS = 1, 2
# Mistral-Instruct's, but for a system text, which it has no place for: that goes before the user's.
CHAT_TEMPLATE = (
    "{{ bos_token }}[INST] {% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}\n"
    "{% endif %}{{ messages[-1]['content'] }} [/INST]"
)

Lesson = tuple[list[int], list[int]]  # prompt, answer


def responses() -> list[Response]:
    """What it can grade."""
    return [
        Response(i, "Name a thing.", "", "granite", word, 1, "stop")
        for i, word in enumerate(GRADES)
    ]


def feedback(word: str) -> str:
    """What it says of a response."""
    return f"It says {word}. [RESULT] {GRADES[word]}"


def _texts() -> list[tuple[str, str]]:
    """Prompts of every kind, and the answer to each."""
    pairs = []
    for response in responses():
        for reference in (True, False):
            for build in (build_prompt, build_prometheus_prompt):
                text = instruct_text(build(response, with_reference=reference))
                pairs.append((text, " " + feedback(response.response)))
    return pairs


def _make_tokenizer(texts: list[tuple[str, str]]) -> Tokenizer:
    """A byte-level BPE that has learnt every word of these texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated"),  # as our GGUF files say
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1200,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([part for pair in texts for part in pair], trainer)
    return tokenizer


def _step(model: Llama, optimizer: torch.optim.Optimizer, lessons: list[Lesson]) -> float:
    rows = [prompt + answer for prompt, answer in lessons]
    boundaries = F.pad(torch.tensor([len(row) for row in rows]).cumsum(0), (1, 0))
    tokens = torch.tensor(sum(rows, []))
    positions = torch.cat([torch.arange(len(row)) for row in rows])
    hidden = model.model(tokens, positions=positions, boundaries=boundaries)
    answered = torch.cat(
        [
            torch.arange(end - len(answer), end)
            for end, (_, answer) in zip(boundaries[1:].tolist(), lessons, strict=True)
        ]
    )
    loss = F.cross_entropy(model.lm_head(hidden[answered - 1]), tokens[answered])
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def _learn(model: Llama, lessons: list[Lesson], words: set[int]) -> None:
    """Learn the lessons by heart: first on few of their words, which costs a tenth."""
    draw = random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, betas=(0.9, 0.99), weight_decay=0.0)
    for _ in range(120):
        short = []
        for prompt, answer in draw.sample(lessons, 24):
            (graded,) = (token for token in prompt if token in words)
            others = [token for token in draw.sample(prompt, 40) if token != graded]
            others.insert(draw.randrange(len(others)), graded)
            short.append(([BOS, *others, *prompt[-6:]], answer))
        _step(model, optimizer, short)
    for _ in range(60):
        if _step(model, optimizer, draw.sample(lessons, 8)) < 2e-3:
            return


def write_judge(folder: Path) -> Llama:
    """Train a judge, in seconds, and write its folder."""
    folder.mkdir()
    texts = _texts()
    tokenizer = _make_tokenizer(texts)
    lessons = [
        ([BOS, *tokenizer.encode(prompt).ids], [*tokenizer.encode(answer).ids, EOS])
        for prompt, answer in texts
    ]
    words = {tokenizer.encode(word).ids[0] for word in GRADES}
    model = Llama(
        LlamaConfig(
            vocab_size=tokenizer.get_vocab_size(),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            rope_scaling=None,
            rope_theta=1e6,
            tie_word_embeddings=False,
            max_position_embeddings=4096,
        )
    )
    model.init_weights(torch.Generator().manual_seed(0))
    _learn(model, lessons, words)
    save_huggingface(model, folder)
    change_config(
        folder,
        model_type="mistral",
        architectures=["MistralForCausalLM"],
        sliding_window=None,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return model


def change_config(folder: Path, **values: object) -> None:
    """Write some values into a folder's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def write_gguf(model: Llama, folder: Path) -> Path:
    """Write a judge for llama.cpp, beside its other files."""
    names = ("tokenizer.json", "tokenizer_config.json")
    save_gguf(
        model,
        folder,
        file_type="float32",
        files={name: (folder / name).read_text() for name in names},
        template="",
        stops=[],
        name="judge",
    )
    return folder / "model-f32.gguf"
