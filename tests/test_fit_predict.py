"""The README's first commands: the embedded model learns to follow instructions."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import peft
import pytest
import torch
import transformers

from llama_lightning.assets import TINY, TINY_HELDOUT
from llama_lightning.cli import main
from llama_lightning.data.examples import Row, encode_prompt
from llama_lightning.data.templates import TEMPLATES
from llama_lightning.data.tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "tiny_lora.yaml"


@pytest.fixture
def run(tmp_path, capfd):
    """Run a verb of the tiny config in this process; what it prints."""

    def call(verb: str, *arguments: str) -> str:
        keys = [f"--config={CONFIG}", f"--trainer.default_root_dir={tmp_path}"]
        assert main([verb, *keys, *arguments]) == 0
        return capfd.readouterr().out

    return call


def _exact_match(output: str) -> float:
    found = re.search(r"exact match ([\d.]+)% \((\d+) of (\d+)\)", output)
    assert found is not None, output
    assert int(found[3]) >= 200
    return float(found[1])


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    start = time.monotonic()
    process = subprocess.run(
        [sys.executable, "-m", "llama_lightning", "fit", "--config", "configs/tiny_lora.yaml"]
        + [f"--trainer.default_root_dir={folder}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    print(f"fit --config configs/tiny_lora.yaml: {time.monotonic() - start:.0f} s")
    return folder / "lightning_logs" / "version_0", process.stdout


def test_learns_to_follow_instructions(fitted, run):
    version, _ = fitted
    base = _exact_match(run("predict"))
    tuned = _exact_match(run("predict", f"--ckpt_path={version}/checkpoints/last.ckpt"))
    print(f"held-out exact match: base {base} %, fine-tuned {tuned} %")
    assert base <= 10
    assert tuned >= 90


def test_leaves_what_the_readme_says(fitted):
    version, output = fitted
    assert (version / "config.yaml").is_file()
    assert (version / "checkpoints" / "last.ckpt").is_file()
    assert (version / "checkpoints" / "best.ckpt").is_file()
    assert "Parameters" in output
    assert "Memory on cpu" in output
    # Without a terminal: plain lines with loss, speed and time left.
    assert re.search(r"^fit \d+/\d+  loss [\d.]+ .*tokens/s  \d+:\d\d left$", output, re.MULTILINE)
    assert not re.search(r"[\x00-\x08\x0e-\x1f]", output), "control characters in a log file"


def test_scalars_in_tensorboard(fitted):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    version, _ = fitted
    events = EventAccumulator(str(version))
    events.Reload()
    scalars = set(events.Tags()["scalars"])
    print(sorted(scalars))
    assert scalars >= {
        "train/loss",
        "train/perplexity",
        "train/learning_rate",
        "train/gradient_norm",
        "val/loss",
        "val/perplexity",
        "val/token_accuracy",
        "perf/tokens_per_second",
        "memory/peak_gib",
        "memory/host_peak_gib",
        "memory/frozen_weights_gib",
        "memory/trained_weights_gib",
        "memory/gradients_gib",
        "memory/optimizer_state_gib",
        "memory/rest_of_peak_gib",
    }
    assert {name.split("/")[0] for name in scalars} == {"train", "val", "perf", "memory"}
    losses = [event.value for event in events.Scalars("train/loss")]
    assert losses[-1] < losses[0]


def test_samples_in_tensorboard(fitted):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    version, _ = fitted
    events = EventAccumulator(str(version))
    events.Reload()
    tables = events.Tensors("samples/responses/text_summary")
    assert [table.step for table in tables] == [0, 80, 160, 240, 320]
    first, last = (t.tensor_proto.string_val[0].decode() for t in (tables[0], tables[-1]))
    assert first.startswith("| instruction | input | reference | response |\n| --- |")
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in last.split("\n")[2:]]
    assert len(rows) == 4
    right = sum(row[2] == row[3] for row in rows)
    print(f"samples: {right} of 4 right at the end\n{last}")
    assert right >= 3
    assert not any(row[2] == row[3] for row in [r.split(" | ") for r in first.split("\n")[2:]])


def test_scores_in_the_test_verb(fitted, run):
    version, _ = fitted
    output = run("test", f"--ckpt_path={version}/checkpoints/last.ckpt")
    line = output.splitlines()[-1]
    print(line)
    values = dict(re.findall(r"(test/\w+) ([\d.]+)", line))
    assert set(values) == {
        f"test/{name}"
        for name in ("loss", "perplexity", "token_accuracy", "exact_match", "rouge_l")
    }
    assert float(values["test/exact_match"]) >= 0.9
    assert float(values["test/exact_match"]) <= float(values["test/rouge_l"]) <= 1


def test_response_rows(fitted, run, tmp_path):
    version, _ = fitted
    path = tmp_path / "responses.jsonl"
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"instruction": "What is the capital of France?"}\n')
    run(
        "predict",
        f"--ckpt_path={version}/checkpoints/last.ckpt",
        f"--data.predict_path={prompts}",
        f"--responses.path={path}",
    )
    (row,) = (json.loads(line) for line in path.read_text().split("\n") if line)
    assert list(row) == [
        "id",
        "instruction",
        "input",
        "reference",
        "response",
        "num_tokens",
        "finish_reason",
    ]
    assert row["finish_reason"] == "stop"
    assert row["response"] == "Paris"


@pytest.fixture(scope="module")
def exported(fitted, tmp_path_factory):
    """The fine-tuned model as a Hugging Face folder and as a GGUF file."""
    version, _ = fitted
    folder = tmp_path_factory.mktemp("exported")
    run = [f"--config={version}/config.yaml", f"--ckpt_path={version}/checkpoints/last.ckpt"]
    assert main(["export", *run, "--format=hf", f"--output={folder}/hf"]) == 0
    gguf = ["--format=gguf", "--dtype=float16", f"--output={folder}/gguf"]
    assert main(["export", *run, *gguf]) == 0
    return folder


def _heldout() -> list[tuple[list[dict[str, str]], str]]:
    """Held-out instructions of all skills as chats, and their answers."""
    chats = []
    for record in json.loads(TINY_HELDOUT.read_text())[::12]:
        content = record["instruction"]
        if record["input"]:
            content += f"\n\n### Input:\n{record['input']}"
        chats.append(([{"role": "user", "content": content}], record["output"]))
    return chats


def test_answers_in_transformers(exported):
    model = transformers.AutoModelForCausalLM.from_pretrained(exported / "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported / "hf")
    right = 0
    for chat, answer in _heldout():
        prompt = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        tokens = model.generate(**prompt, max_new_tokens=32)[0, prompt["input_ids"].shape[1] :]
        right += tokenizer.decode(tokens, skip_special_tokens=True) == answer
    print(f"transformers: {right} of {len(_heldout())} held-out answers right")
    assert right >= 0.85 * len(_heldout())


@pytest.mark.llama_cpp
def test_answers_in_llama_cpp(exported):
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    path = exported / "gguf" / "model-f16.gguf"
    llm = llama_cpp.Llama(str(path), n_ctx=512, n_threads=1, verbose=False)
    right = 0
    for chat, answer in _heldout():
        reply = llm.create_chat_completion(chat, max_tokens=32, temperature=0.0)
        right += reply["choices"][0]["message"]["content"] == answer
    llm.close()
    print(f"llama.cpp: {right} of {len(_heldout())} held-out answers right")
    assert right >= 0.85 * len(_heldout())


def test_leaves_an_adapter_that_peft_answers_with(fitted):
    version, output = fitted
    assert f"exported: {version}/export (peft)" in output
    base = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, version / "export").eval()
    tokenizer = Tokenizer.from_path(TINY)
    row = Row(0, "Give the capital city of the country.", "Norway", "")
    prompt = torch.tensor([encode_prompt(row, tokenizer, TEMPLATES["alpaca"])])
    tokens = model.generate(input_ids=prompt, max_new_tokens=8, do_sample=False)
    answer = tokenizer.decode(tokens[0, prompt.shape[1] :].tolist())
    print(f"PEFT: {answer}")
    assert answer == "Oslo"
