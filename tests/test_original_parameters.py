"""Every parameter of the original has its key here, and each key has its effect.

The README's table names the keys; a test named after the parameter runs the command line and looks
at what the run left behind: files, events, weights, words on the terminal.
"""

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from llama_lightning.cli import main
from llama_lightning.model.config import PRESETS
from tests.fake_ollama import FakeOllama
from tests.small import write_byte_tokenizer, write_small_llama

ROOT = Path(__file__).parents[1]
# All parameters in the original's tables, in their order.
ORIGINAL = (
    "project_name",
    "experiment_name",
    "data_path",
    "foundation_model",
    "device",
    "max_seq_len",
    "drop_rate",
    "qkv_bias",
    "seed",
    "lr",
    "lr_scheduling",
    "batch_size",
    "weight_decay",
    "num_epochs",
    "num_train_iters",
    "gradient_accumulation_steps",
    "eval_batch_size",
    "eval_freq",
    "max_gen_tokens",
    "generation_freq",
    "use_ollama_for_eval",
    "ollama_model_name",
    "enable_gradient_checkpointing",
    "use_bf16",
    "use_explicit_bfloat16",
    "use_8bit_optim",
    "print_memory_usage",
    "inference_only",
    "preload_model",
    "enable_lora",
    "responses_save_path",
    "model_save_path",
    "log_to_clearml",
)


def table_rows() -> dict[str, list[str]]:
    """The README's mapping table: parameter to the other cells of its row."""
    section = (ROOT / "README.md").read_text().split("## Parameters of the original")[1]
    section = section.split("\n## ")[0]
    rows = (
        line.strip().strip("|").split(" | ") for line in section.splitlines() if line[:3] == "| `"
    )
    return {row[0].strip(" `"): [cell.strip() for cell in row[1:]] for row in rows}


@pytest.mark.parametrize("parameter", ORIGINAL)
def test_the_readme_has_a_row_and_this_file_a_test(parameter: str) -> None:
    rows = table_rows()
    assert parameter in rows, f"README.md has no row for {parameter}"
    assert rows[parameter][0] == "●", f"{parameter} is not marked as built"
    assert callable(globals().get(f"test_{parameter}")), f"{parameter} has no test of its effect"


def test_the_readme_has_no_row_beyond_the_originals() -> None:
    assert set(table_rows()) == set(ORIGINAL)


class Run(NamedTuple):
    """What a run left behind."""

    code: int
    folder: Path  # trainer.default_root_dir
    output: str

    @property
    def version(self) -> Path:
        """The run's own folder."""
        return self.folder / "lightning_logs" / "version_0"

    def checkpoint(self, path: Path | None = None) -> dict[str, Any]:
        return torch.load(path or self.version / "checkpoints" / "last.ckpt", weights_only=True)

    def weights(self) -> dict[str, torch.Tensor]:
        return self.checkpoint()["state_dict"]

    def events(self) -> EventAccumulator:
        events = EventAccumulator(str(self.version))
        events.Reload()
        return events

    def scalars(self, name: str) -> list[float]:
        return [event.value for event in self.events().Scalars(name)]


Runner = Any  # a callable that takes a verb and keys, and returns a Run


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    for name, seed in (("base", 0), ("other-base", 1)):
        write_small_llama(folder / name, vocab_size=512, seed=seed)
        write_byte_tokenizer(folder / name)
    for name, count in (("data", 24), ("other-data", 32)):
        records = [
            {"instruction": f"{name} {i}", "input": "", "output": "abcdefg" * (1 + i % 5)}
            for i in range(count)
        ]
        (folder / f"{name}.json").write_text(json.dumps(records))
    (folder / "run.yaml").write_text(
        f"model:\n  base_model: {folder}/base\n  base_dtype: float32\n  lora: {{rank: 4}}\n"
        "  generation: {max_new_tokens: 4}\n"
        f"data:\n  path: {folder}/data.json\n  batch_size: 8\n  test_fraction: 0.2\n"
        "  val_fraction: 0.2\n"
        "trainer: {max_steps: 2, accelerator: cpu, log_every_n_steps: 1}\n"
    )
    return folder


@pytest.fixture
def run(
    place: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> Runner:
    """Run a verb of the command line in this process, with some keys changed."""
    runs = []

    def call(verb: str = "fit", /, **keys: Any) -> Run:
        folder = tmp_path / f"run{len(runs)}"
        runs.append(folder)
        keys = {"trainer.default_root_dir": folder, **keys}
        arguments = [f"--{key}={value}" for key, value in keys.items()]
        code = main([verb, f"--config={place}/run.yaml", *arguments])
        captured = capfd.readouterr()
        said = captured.out + captured.err + caplog.text  # pytest takes log lines off stderr
        caplog.clear()
        return Run(code, folder, said)

    call.place = place
    return call


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().split("\n") if line]


# Basic configuration


def test_project_name(run: Runner) -> None:
    done = run(**{"trainer.project_name": "alpaca"})
    assert (done.folder / "lightning_logs" / "alpaca" / "version_0" / "config.yaml").is_file()


def test_experiment_name(run: Runner) -> None:
    names = {"trainer.project_name": "alpaca", "trainer.experiment_name": "first"}
    done = [run(**names, **{"trainer.max_steps": 1}) for _ in range(2)]
    folders = [next((d.folder / "lightning_logs" / "alpaca").iterdir()).name for d in done]
    print(folders)
    assert all(re.fullmatch(r"first-[0-9a-f]{6}", folder) for folder in folders)
    assert folders[0] != folders[1], "the same seed, and still two names"


def test_data_path(run: Runner, place: Path) -> None:
    one, other = run(), run(**{"data.path": place / "other-data.json"})
    assert "14 train records" in one.output
    assert "20 train records" in other.output
    assert run(**{"data.path": place / "nowhere.json"}).code == 3


def test_foundation_model(run: Runner, place: Path) -> None:
    keys = {"model.generation.max_new_tokens": 8}
    one = rows(run("predict", **keys).version / "responses.jsonl")
    keys["model.base_model"] = place / "other-base"
    other = rows(run("predict", **keys).version / "responses.jsonl")
    assert [row["id"] for row in one] == [row["id"] for row in other]
    assert [row["response"] for row in one] != [row["response"] for row in other]
    for name, layers, hidden in (("llama-3.2-1b", 16, 2048), ("llama-3.2-3b", 28, 3072)):
        preset = PRESETS[name]
        assert (preset.num_hidden_layers, preset.hidden_size) == (layers, hidden)


def test_device(run: Runner) -> None:
    assert "Memory on cpu" in run(**{"trainer.accelerator": "cpu"}).output
    if not torch.cuda.is_available():
        refused = run(**{"trainer.accelerator": "cuda"})
        assert refused.code == 2
        assert "error: " in refused.output


# Model


def test_max_seq_len(run: Runner) -> None:
    whole, cut = run(**{"data.max_seq_len": 512}), run(**{"data.max_seq_len": 180})
    assert "cut at data.max_seq_len" not in whole.output
    assert "cut at data.max_seq_len" in cut.output
    counts = [re.search(r"train records, ([\d,]+) tokens", d.output)[1] for d in (whole, cut)]
    tokens = [int(count.replace(",", "")) for count in counts]
    print(f"{tokens[0]} tokens whole, {tokens[1]} cut at 180")
    assert tokens[1] < tokens[0]
    assert tokens[1] <= 14 * 180


def test_drop_rate(run: Runner) -> None:
    off, again = run(**{"model.dropout": 0.0}), run(**{"model.dropout": 0.0})
    on = run(**{"model.dropout": 0.3})
    assert off.scalars("train/loss") == again.scalars("train/loss")
    assert on.scalars("train/loss")[0] != off.scalars("train/loss")[0]
    # Only in training: before the first step, the validation loss does not feel it.
    keys = {"trainer.max_steps": 1}
    validated = [
        run("validate", **{"model.dropout": rate, **keys}).scalars("val/loss") for rate in (0, 0.3)
    ]
    assert validated[0] == validated[1]


def test_qkv_bias(run: Runner) -> None:
    full = {"model.lora.rank": 0, "model.optimizer.lr": 0.01}
    without, having = run(**full), run(**full, **{"model.qkv_bias": "true"})
    assert not [name for name in without.weights() if name.endswith("bias")]
    biases = {n: w for n, w in having.weights().items() if n.endswith("bias")}
    assert len(biases) == 2 * 3  # layers x (q, k, v)
    assert "6 q, k and v biases are new and start at zero" in having.output
    # A key's bias shifts all scores of a query alike, which a softmax does not feel.
    moved = [name for name, bias in biases.items() if bias.abs().max() > 1e-3]
    assert {name.split(".")[-2] for name in moved} >= {"q_proj", "v_proj"}
    # And back: the checkpoint predicts with them, and is refused without.
    checkpoint = having.version / "checkpoints" / "last.ckpt"
    keys = {"model.lora.rank": 0, "ckpt_path": checkpoint}
    assert run("predict", **keys, **{"model.qkv_bias": "true"}).code == 0
    refused = run("predict", **keys)
    assert refused.code == 3
    assert "model.qkv_bias is False, the checkpoint has True" in refused.output


# Training


def test_seed(run: Runner) -> None:
    one, again, other = run(), run(), run(seed_everything=7)
    assert same(one.weights(), again.weights())
    assert not same(one.weights(), other.weights())
    order = run(**{"data.seed": 7})
    assert order.scalars("train/loss") != one.scalars("train/loss")


def test_lr(run: Runner) -> None:
    slow, fast = (run(**{"model.optimizer.lr": lr}) for lr in (1e-5, 1e-2))
    assert slow.scalars("train/learning_rate") == pytest.approx([1e-5] * 2)
    assert fast.scalars("train/learning_rate") == pytest.approx([1e-2] * 2)
    moved = [
        max(float(w.abs().max()) for n, w in d.weights().items() if "lora_B" in n)
        for d in (slow, fast)
    ]
    print(f"largest weight of B, which starts at zero: {moved[0]:.1e} and {moved[1]:.1e}")
    assert moved[1] > 100 * moved[0]


def test_lr_scheduling(run: Runner) -> None:
    keys = {"trainer.max_steps": 10, "model.optimizer.lr": 1e-3, "model.optimizer.warmup": 0.4}
    rates = run(
        **keys, **{"model.optimizer.init_lr": 0.0, "model.optimizer.eta_min": 1e-4}
    ).scalars("train/learning_rate")
    print([f"{rate:.2e}" for rate in rates])
    assert rates[:5] == pytest.approx([0.0, 2.5e-4, 5e-4, 7.5e-4, 1e-3])
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[-1] == pytest.approx(1e-4)
    # init_lr and eta_min default to lr.
    assert run(**keys).scalars("train/learning_rate") == pytest.approx([1e-3] * 10)


def test_batch_size(run: Runner) -> None:
    keys = {"trainer.max_steps": "null", "trainer.max_epochs": 1}
    steps = {
        size: run(**keys, **{"data.batch_size": size}).checkpoint()["global_step"]
        for size in (2, 7, 14)
    }
    assert steps == {2: 7, 7: 2, 14: 1}  # of 14 records


def test_weight_decay(run: Runner) -> None:
    keys = {"model.lora.rank": 0, "model.optimizer.lr": 1e-2, "trainer.max_steps": 1}
    none, default, strong = (
        run(**keys, **given).weights()
        for given in (
            {"model.optimizer.weight_decay": 0.0},
            {},
            {"model.optimizer.weight_decay": 0.5},
        )
    )
    matrix, norm = "model.model.layers.0.mlp.up_proj.weight", "model.model.norm.weight"
    base_shrunk = [(w[matrix] - none[matrix]).abs().max().item() for w in (default, strong)]
    print(f"the decay moved a matrix by {base_shrunk[0]:.1e} (0.01) and {base_shrunk[1]:.1e} (0.5)")
    assert base_shrunk[1] == pytest.approx(50 * base_shrunk[0], rel=0.01)  # the default is 0.01
    assert torch.equal(none[norm], strong[norm])


def test_num_epochs(run: Runner) -> None:
    done = run(**{"trainer.max_steps": "null", "trainer.max_epochs": 3})
    assert done.checkpoint()["global_step"] == 3 * 2  # 14 records, 8 a step
    both = run(**{"trainer.max_epochs": 3})
    assert both.code == 2
    assert "both given; set one of them to null" in both.output


def test_num_train_iters(run: Runner) -> None:
    assert run(**{"trainer.max_steps": 5}).checkpoint()["global_step"] == 5
    neither = run(**{"trainer.max_steps": "null"})
    assert neither.code == 2
    assert "neither trainer.max_steps nor trainer.max_epochs is given" in neither.output
    # The original's iterations are micro-batches: 70,000 of them, 128 a step.
    assert round(70_000 / 128) == 547
    for config in ("1b_full", "1b_lora", "3b_lora"):
        assert "max_steps: 547" in (ROOT / "configs" / f"{config}.yaml").read_text()


def test_gradient_accumulation_steps(run: Runner) -> None:
    whole, parts = (run(**{"trainer.accumulate_grad_batches": n}) for n in (1, 4))
    assert whole.checkpoint()["global_step"] == parts.checkpoint()["global_step"] == 2
    loops = [
        d.checkpoint()["loops"]["fit_loop"]["epoch_loop.batch_progress"] for d in (whole, parts)
    ]
    assert [loop["total"]["ready"] for loop in loops] == [2, 8]  # micro-batches
    for name, weight in whole.weights().items():
        torch.testing.assert_close(parts.weights()[name], weight, atol=1e-5, rtol=1e-3)


# Evaluation and generation


def test_eval_batch_size(run: Runner) -> None:
    one, five = (run("predict", **{"data.eval_batch_size": n}) for n in (1, 5))
    assert "predict 5/5" in one.output  # 5 test records
    assert "predict 1/1" in five.output
    text = "responses.jsonl"
    assert (one.version / text).read_bytes() == (five.version / text).read_bytes()
    micro = run("predict", **{"trainer.accumulate_grad_batches": 4})  # 8 records in 4 turns
    assert "predict 3/3" in micro.output


def test_eval_freq(run: Runner) -> None:
    keys = {"trainer.check_val_every_n_epoch": "null", "trainer.accumulate_grad_batches": 2}
    done = run(**keys, **{"trainer.max_steps": 6, "trainer.val_check_interval": 4})
    # In micro-batches, as there: 4 of 2 a step are 2 steps; events count steps from 0.
    assert [event.step for event in done.events().Scalars("val/loss")] == [1, 3, 5]


def test_max_gen_tokens(run: Runner) -> None:
    for limit in (3, 9):
        # Sampled: a random model's greedy answers may all end at once.
        keys = {"model.generation.temperature": 1.0, "model.generation.max_new_tokens": limit}
        done = run("predict", **keys)
        answers = rows(done.version / "responses.jsonl")
        assert max(row["num_tokens"] for row in answers) == limit
        assert {row["finish_reason"] for row in answers if row["num_tokens"] == limit} == {"length"}


def test_generation_freq(run: Runner) -> None:
    assert "samples/responses/text_summary" not in run().events().Tags()["tensors"]
    keys = {"samples.every_n_steps": 2, "samples.num_prompts": 2, "trainer.max_steps": 5}
    tables = run(**keys).events().Tensors("samples/responses/text_summary")
    assert [table.step for table in tables] == [0, 2, 4]
    texts = [table.tensor_proto.string_val[0].decode() for table in tables]
    prompts = [[row.split(" | ")[0] for row in text.split("\n")[2:]] for text in texts]
    assert prompts[0] == prompts[1] == prompts[2]  # the same prompts each time
    assert len(prompts[0]) == 2


def test_use_ollama_for_eval(run: Runner, place: Path) -> None:
    keys = {"model.base_model": place / "other-base", "model.generation.max_new_tokens": 8}
    with FakeOllama() as server:
        off = run("predict", **keys)
        assert not server.paths
        on = run("predict", **keys, **{"judge.backend": "ollama", "judge.base_url": server.url})
    assert not (off.version / "verdicts.jsonl").exists()
    assert [v["score"] for v in rows(on.version / "verdicts.jsonl")] == [4] * 5
    assert "4.00 [4.00, 4.00], n=5 of 5" in on.output
    assert on.scalars("judge/mean") == [4.0]


def test_ollama_model_name(run: Runner, place: Path) -> None:
    keys = {"model.base_model": place / "other-base", "model.generation.max_new_tokens": 8}
    with FakeOllama() as server:
        keys |= {"judge.backend": "ollama", "judge.base_url": server.url}
        run("predict", **keys)
        run("predict", **keys, **{"judge.model": "mistral:7b"})
        absent = run("predict", **keys, **{"judge.model": "qwen3"})
    asked = [chat["model"] for chat in server.chats]
    assert asked == ["llama3.1"] * 5 + ["mistral:7b"] * 5  # the default, as there
    assert absent.code == 3
    assert "`ollama pull qwen3`" in absent.output


# Optimization and memory


def test_enable_gradient_checkpointing(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    from llama_lightning.model.llama import Block

    calls = []
    forward = Block.forward

    def counted(self: Block, *arguments: Any) -> torch.Tensor:
        if torch.is_grad_enabled():
            calls.append(1)
        return forward(self, *arguments)

    monkeypatch.setattr(Block, "forward", counted)
    weights, counts = [], []
    for flag in ("false", "true", "selective"):
        calls.clear()
        weights.append(run(**{"model.gradient_checkpointing": flag}).weights())
        counts.append(len(calls))
    print(f"block forwards in 2 steps of 2 layers: {counts[0]} without, then {counts[1:]}")
    assert counts == [2 * 2, 2 * 2 * 2, 2 * 2 * 2]
    assert same(*weights[:2])
    assert same(*weights[1:])


def test_use_bf16(run: Runner) -> None:
    exact, mixed = (run(**{"trainer.precision": p}) for p in ("32-true", "bf16-mixed"))
    one, other = exact.scalars("train/loss")[0], mixed.scalars("train/loss")[0]
    assert one != other
    assert other == pytest.approx(one, rel=0.02)
    assert {w.dtype for w in mixed.weights().values()} == {torch.float32}


def test_use_explicit_bfloat16(run: Runner) -> None:
    done = run(**{"trainer.precision": "bf16-true", "model.base_dtype": "bfloat16"})
    assert {w.dtype for w in done.weights().values()} == {torch.bfloat16}
    table = done.output.split("Parameters")[1]
    assert "bfloat16" in table
    assert "float32" not in table.split("Memory")[0]


def test_use_8bit_optim(run: Runner) -> None:
    # Rank 64, as bitsandbytes keeps 32 bits for tensors below 4,096 elements; some are left.
    states = {}
    for name in ("adamw", "adamw8bit", "paged_adamw8bit"):
        keys = {"model.optimizer.name": name, "model.lora.rank": 64}
        state = run(**keys).checkpoint()["optimizer_states"][0]["state"].values()
        moments = [s.get("__bnb_optimizer_quant_state__", s) for s in state]
        states[name] = {
            m.dtype for s in moments for k, m in s.items() if k in ("exp_avg", "state1")
        }
    print(states)
    assert states["adamw"] == {torch.float32}
    assert torch.uint8 in states["adamw8bit"]
    assert torch.uint8 in states["paged_adamw8bit"]


def test_print_memory_usage(run: Runner) -> None:
    on, off = (run(**{"memory.table": flag}) for flag in ("true", "false"))
    for part in ("frozen weights", "trained weights", "gradients", "optimizer state", "peak"):
        assert part in on.output
    assert "optimizer state" not in off.output
    assert "memory/optimizer_state_gib" in off.events().Tags()["scalars"]


# Model and output


def test_inference_only(run: Runner) -> None:
    done = run("predict")
    assert len(rows(done.version / "responses.jsonl")) == 5
    assert not list(done.folder.rglob("*.ckpt"))


def test_preload_model(run: Runner) -> None:
    keys = {"model.generation.max_new_tokens": 8}
    fitted = run(**{"model.optimizer.lr": 0.05, "trainer.max_steps": 8})
    checkpoint = fitted.version / "checkpoints" / "last.ckpt"
    base = rows(run("predict", **keys).version / "responses.jsonl")
    tuned = rows(run("predict", **keys, ckpt_path=checkpoint).version / "responses.jsonl")
    assert [row["response"] for row in base] != [row["response"] for row in tuned]
    resumed = run(**{"model.optimizer.lr": 0.05, "trainer.max_steps": 9}, ckpt_path=checkpoint)
    assert resumed.checkpoint()["global_step"] == 9


def test_enable_lora(run: Runner) -> None:
    lora, full = run(**{"model.lora.rank": 4}).weights(), run(**{"model.lora.rank": 0}).weights()
    assert lora
    assert all("lora_" in name for name in lora)
    assert not any("lora_" in name for name in full)
    assert "model.model.embed_tokens.weight" in full


def test_responses_save_path(run: Runner, tmp_path: Path) -> None:
    path = tmp_path / "results" / "mine.jsonl"
    done = run("predict", **{"responses.path": path})
    assert len(rows(path)) == 5
    assert not (done.version / "responses.jsonl").exists()


@pytest.mark.slow
def test_log_to_clearml(run: Runner, tmp_path: Path) -> None:
    # ClearML keeps global state: a process of its own. Its offline session is read back.
    code = (
        "import sys; from llama_lightning.cli import main; sys.exit(main(sys.argv[1:]))",
        "fit",
        f"--config={run.place}/run.yaml",
        f"--trainer.default_root_dir={tmp_path}",
        "--trainer.log_to_clearml=true",
        "--trainer.project_name=alpaca",
        "--trainer.experiment_name=first",
        "--samples.every_n_steps=1",
    )
    environment = {**os.environ, "HOME": str(tmp_path), "CLEARML_OFFLINE_MODE": "1"}
    subprocess.run([sys.executable, "-c", *code], check=True, capture_output=True, env=environment)
    (session,) = tmp_path.rglob("offline/*.zip")
    with zipfile.ZipFile(session) as file:
        task = json.loads(file.read("task.json"))
        lines = file.read("metrics.jsonl").decode().splitlines()
    logged = {(e["metric"], e["variant"]) for line in lines for e in json.loads(line)}
    events = EventAccumulator(str(next((tmp_path / "lightning_logs" / "alpaca").iterdir())))
    events.Reload()
    tags = events.Tags()["scalars"]
    there = [tag for tag in tags if tuple(tag.split("/")) in logged]
    print(f"{len(there)} of {len(tags)} of TensorBoard's scalars are in the ClearML session")
    assert there == tags
    assert ("samples", "responses") in logged
    plain = run(**{"samples.every_n_steps": 1}).scalars("train/loss")
    assert [event.value for event in events.Scalars("train/loss")] == plain  # it seeds nothing
    assert task["name"].startswith("first-")
    assert task["hyperparams"]["General"]["model.lora.rank"]["value"] == "4"
    assert {a["key"] for a in task["execution"]["artifacts"]} >= {"last.ckpt", "config.yaml"}


def test_model_save_path(run: Runner, tmp_path: Path) -> None:
    done = run(**{"checkpoint.dirpath": tmp_path / "models"})
    assert (tmp_path / "models" / "last.ckpt").is_file()
    assert not (done.version / "checkpoints").exists()
