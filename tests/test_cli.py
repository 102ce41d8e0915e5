"""Bad input ends in one line that says what, where and what to do, and in the right exit code.

Each case runs the real command line up to its end; none gets as far as reading weights.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import lightning.pytorch  # noqa: F401  (its log keeps the stderr of its first import)
import pytest
import torch

from llama_lightning.cli import main
from tests.small import write_byte_tokenizer, write_small_llama

ROOT = Path(__file__).parents[1]
USAGE, DATA = 2, 3


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    write_small_llama(folder, vocab_size=512)
    write_byte_tokenizer(folder)
    return folder


@pytest.fixture
def run(base, tmp_path, monkeypatch, capfd):
    """Call `fit` with a config of our own and return the exit code and what stood on stderr."""
    monkeypatch.chdir(tmp_path)
    # A weights file that cannot be read: reaching it would be another error than the one expected.
    broken = tmp_path / "base"
    broken.mkdir()
    for file in base.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    (broken / "model.safetensors").write_bytes(b"not weights")
    records = [{"instruction": f"q{i}", "input": "", "output": "a"} for i in range(20)]
    (tmp_path / "data.json").write_text(json.dumps(records))
    config = tmp_path / "run.yaml"
    config.write_text(
        "model:\n  base_model: base\n  lora: {rank: 4}\n"
        "data:\n  path: data.json\n  batch_size: 8\n"
        "trainer: {max_steps: 2, accelerator: cpu}\n"
    )

    def call(*arguments: str, verb: str = "fit", text: str | None = None) -> tuple[int, str]:
        if text is not None:
            config.write_text(text)
        code = main([verb, "--config", str(config), *arguments])
        lines = capfd.readouterr().err.splitlines()
        errors = [line for line in lines if line.startswith("error: ")]
        assert "Traceback" not in "\n".join(lines)
        assert len(errors) == 1, lines
        assert lines[-1] == errors[0], "the error must be the last word"
        print(f"exit {code}: {errors[0]}")
        return code, errors[0]

    return call


@pytest.mark.parametrize(
    ("argument", "nearest"),
    [
        ("--model.lora.rnak=3", "model.lora.rank"),
        ("--model.lrr=3", "model.optimizer.lr"),
        ("--data.batchsize=3", "data.batch_size"),
        ("--trainer.max_step=3", "trainer.max_steps"),
        ("--trainer.max_epoch=3", "trainer.max_epochs"),
        ("--checkpoint.every=3", "checkpoint.every_n_train_steps"),
        ("--response.path=x", "responses.path"),
        ("--model.init_args.lora.rnak=3", "model.lora.rank"),
    ],
)
def test_unknown_key_names_the_nearest(run, argument, nearest):
    code, error = run(argument)
    assert code == USAGE
    assert error.endswith(f"did you mean {nearest}?")


def test_unknown_key_in_yaml_names_key_and_file(run):
    code, error = run(text="model:\n  base_model: base\n  lora:\n    rnak: 8\n")
    assert code == USAGE
    assert "model.lora.rnak" in error
    assert "run.yaml" in error
    assert "model.lora.rank" in error


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "the file is empty"),
        ("model: [\n", "run.yaml, line 2"),
        ("- a\n", "keys and values"),
        ("trainor: {max_steps: 3}\n", "did you mean trainer.max_steps?"),
    ],
)
def test_broken_config(run, text, said):
    code, error = run(text=text)
    assert code == USAGE
    assert said in error


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--config=nix.yaml"], USAGE, "nix.yaml: no such file; there are run.yaml"),
        (["--model.lora.rank=x"], USAGE, "model.lora.rank: expected a whole number, got x"),
        (["--model.lora.rank=-1"], USAGE, "model.lora.rank is -1"),
        (["--model.optimizer.lr=0"], USAGE, "model.optimizer.lr is 0.0"),
        (["--model.optimizer.name=sgd"], USAGE, "one of 'adamw', 'adamw8bit', 'paged_adamw8bit'"),
        (["--data.template=foo"], USAGE, "data.template: expected one of 'alpaca'"),
        (["--model.generation.temperature=-1"], USAGE, "model.generation.temperature is -1.0"),
        (["--model.generation.top_p=1.5"], USAGE, "model.generation.top_p is 1.5"),
        (["--model.generation.top_k=-2"], USAGE, "model.generation.top_k is -2"),
        (["--model.generation.seed=x"], USAGE, "generation.seed: expected a whole number, got x"),
        (["--seed_everything=1.5"], USAGE, "seed_everything"),
        (["--samples.every_n_steps=-1"], USAGE, "samples.every_n_steps is -1"),
        (
            ["--samples.every_n_steps=1", "--data.val_fraction=0"],
            USAGE,
            "or samples.every_n_steps to 0",
        ),
        (["--model.dropout=1"], USAGE, "model.dropout is 1.0"),
        (
            ["--model.gradient_checkpointing=some"],
            USAGE,
            "gradient_checkpointing: expected true or false or one of 'selective', got some",
        ),
        (["--model.lora.target_modules=[foo]"], USAGE, "foo matches no linear layer; there are"),
        (["--model.lora.target_modules=[lm_head]"], USAGE, "tied to the embedding"),
        (["--trainer.max_epochs=2"], USAGE, "set one of them to null (--trainer.max_steps null)"),
        (["--trainer.max_steps=null"], USAGE, "neither trainer.max_steps nor trainer.max_epochs"),
        (["--trainer.accumulate_grad_batches=9"], USAGE, "data.batch_size 8 is smaller than"),
        (["--trainer.precision=16-true"], USAGE, "trainer.precision 16-true: use one of"),
        (["--trainer.devices=0"], USAGE, "trainer.devices is 0; use auto, or a number of devices"),
        (["--trainer.devices=8x"], USAGE, "trainer.devices is 8x; use auto, or a number of"),
        (["--config=base"], USAGE, "--config base: a folder; name a file; there are run.yaml"),
        (
            ["--model=llama_lightning.model.Llama2"],
            USAGE,
            "model: there is no class llama_lightning.model.Llama2",
        ),
        (
            ["--trainer.logger=CSVLogerr"],
            USAGE,
            "trainer.logger: there is no class CSVLogerr",
        ),
        (["--trainer.max_steps=0"], USAGE, "trainer.max_steps is 0; use 1 or more"),
        (["--trainer.strategy=foo"], USAGE, "trainer: You selected an invalid strategy name"),
        (["--trainer.overfit_batches=2"], USAGE, "trainer.overfit_batches changes the order"),
        (["--trainer.gradient_clip_val=-1"], USAGE, "trainer.gradient_clip_val is -1"),
        (["--trainer.gradient_clip_algorithm=value"], USAGE, "only norm is built"),
        (
            [
                '--trainer.callbacks={"class_path": "GradientAccumulationScheduler", '
                '"init_args": {"scheduling": {"0": 2}}}'
            ],
            USAGE,
            "use trainer.accumulate_grad_batches",
        ),
        (["--trainer.logger=false"], USAGE, "set checkpoint.dirpath"),
        (["--checkpoint.dirpath=/dev/null/x"], USAGE, "checkpoint.dirpath: /dev/null/x cannot be"),
        (["--checkpoint.monitor=val/los"], USAGE, "checkpoint.monitor: expected one of 'val/loss'"),
        (["--model.optimizer.betas=[1,2]"], USAGE, "model.optimizer.betas is [1.0, 2.0]"),
        (
            ["--trainer.experiment_name=../x"],
            USAGE,
            "trainer.experiment_name is '../x'; use a name",
        ),
        (["--trainer.use_bf16=true"], USAGE, "did you mean trainer.precision?"),
        (["run2.yaml"], USAGE, "a config file goes behind --config"),
        (["--data.num_workers=-1"], USAGE, "data.num_workers is -1; use 0 or more"),
        (["--model.optimizer.learning_rate=1"], USAGE, "did you mean model.optimizer.lr?"),
        (["--num_epochs=1"], USAGE, "did you mean trainer.max_epochs?"),
        (["--ckpt_path=."], DATA, "--ckpt_path .: a folder; give a file"),
        (["--data.path=."], DATA, ".: a folder; give a .json, .jsonl, .csv or .parquet"),
        (["--data.val_fraction=2"], USAGE, "data.val_fraction is 2.0"),
        (["--data.path=nix.json"], DATA, "nix.json: no such data file"),
        (["--data.max_seq_len=8"], DATA, "prompt longer than data.max_seq_len"),
        (["--model.base_model=nix"], DATA, "nix is not a folder here"),
        (["--model.base_model=."], DATA, "has no config.json"),
        (["--ckpt_path=nix.ckpt"], DATA, "nix.ckpt: no such file"),
        (["--ckpt_path=http://127.0.0.1/x.ckpt"], DATA, "URLs are refused"),
    ],
)
def test_wrong_value(run, arguments, code, said):
    found, error = run(*arguments)
    assert said in error
    assert found == code


def test_a_missing_checkpoint_names_those_beside_it(run, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").touch()
    code, error = run("--ckpt_path=checkpoints/best.ckpt")
    assert code == DATA
    assert error.endswith("best.ckpt: no such file; there are checkpoints/last.ckpt")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_asked_for_and_absent(run):
    code, error = run("--trainer.accelerator=cuda")
    assert code == USAGE
    assert "cpu" in error


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[{]", "data.json, line 1, column 3: not JSON"),
        ('{"instruction": "x"}', "a list of records is needed, not an object"),
        ("[]", "no records"),
        (
            '[{"instruction": "x", "output": "y"}, {"prompt": "x"}]',
            "row 1: no column 'instruction'",
        ),
        ('[{"instruction": "x", "output": 3}]', "row 0: 'output' is a number instead of a string"),
        (r'[{"instruction": "hi \ud83d", "output": "x"}]', "row 0: 'instruction' holds half a"),
        ('[{"instruction": "x", "output": ""}]', "nothing to learn in all 1 train records"),
    ],
)
def test_broken_data(run, tmp_path, text, said):
    (tmp_path / "data.json").write_text(text)
    code, error = run("--data.val_fraction=0", "--data.test_fraction=0")
    assert code == DATA
    assert said in error


def test_a_run_that_fails_before_it_begins_leaves_no_folder(run, tmp_path):
    (tmp_path / "data.json").write_text("[]")
    run()
    assert not list((tmp_path / "lightning_logs").glob("version_*"))


def test_an_epoch_cut_inside_a_step(base, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    records = [{"instruction": f"q{i}", "input": "", "output": "a"} for i in range(40)]
    (tmp_path / "data.json").write_text(json.dumps(records))
    keys = {
        "model.base_model": base,
        "data.path": "data.json",
        "data.batch_size": 8,
        "trainer.accelerator": "cpu",
        "trainer.max_steps": 4,
        "trainer.accumulate_grad_batches": 4,
        "trainer.limit_train_batches": 5,
    }
    assert main(["fit", *(f"--{key}={value}" for key, value in keys.items())]) == USAGE
    error = capfd.readouterr().err.splitlines()[-1]
    print(error)
    assert "leaves 5 micro-batches an epoch" in error


def test_the_users_own_config_is_never_overwritten(run, tmp_path):
    text = (tmp_path / "run.yaml").read_text()
    (tmp_path / "config.yaml").write_text("# mine\n" + text)
    run("--config=config.yaml", "--trainer.logger=false", "--checkpoint.dirpath=ck")
    assert (tmp_path / "config.yaml").read_text() == "# mine\n" + text


def test_folder_without_weights(run, tmp_path):
    (tmp_path / "base" / "model.safetensors").unlink()
    code, error = run()
    assert code == DATA
    assert "has no weights (model.safetensors or" in error


def test_damaged_weights(run):
    code, error = run()
    assert code == DATA
    assert "damaged or cut" in error


def test_tokenizer_larger_than_the_embedding(run, tmp_path):
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config["vocab_size"] = 300
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    code, error = run()
    assert code == USAGE
    assert "has 512 tokens, the embedding of base only 300" in error


def test_checkpoint_that_is_something_else(run, tmp_path):
    torch.save({"a": torch.zeros(3)}, tmp_path / "weights.ckpt")
    code, error = run("--ckpt_path=weights.ckpt")
    assert code == DATA
    assert "not a checkpoint written by `fit`" in error
    (tmp_path / "empty.ckpt").touch()
    code, error = run("--ckpt_path=empty.ckpt")
    assert code == DATA
    assert "damaged, or not a checkpoint" in error


def test_hostile_checkpoint_runs_no_code(run, tmp_path, monkeypatch):
    class Hostile:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"llama_lightning": Hostile()}, tmp_path / "hostile.ckpt")
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    code, _ = run("--ckpt_path=hostile.ckpt")
    assert code == DATA
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("verb", ["fit", "predict", "export", "judge"])
def test_a_verb_alone(capsys, verb):
    assert main([verb]) == USAGE
    assert "Traceback" not in capsys.readouterr().err


def test_no_verb_and_unknown_verb(capsys):
    assert main([]) == USAGE
    assert "fit" in capsys.readouterr().out
    assert main(["--help"]) == 0
    assert main(["fti"]) == USAGE
    assert "unknown verb fti; verbs are fit" in capsys.readouterr().err
    assert main(["--config", "x.yaml", "fit"]) == USAGE
    assert "the verb goes first; verbs are fit" in capsys.readouterr().err


def test_the_help_of_a_verb_explains_every_key_of_ours(capsys):
    assert main(["fit", "--help"]) == 0
    text = capsys.readouterr().out
    keys = re.findall(
        r"^  --((?:model|data|checkpoint|export|samples|memory|responses)\.\S+)", text, re.M
    )
    assert {"model.lora.rank", "model.generation.top_p", "data.batch_size"} <= set(keys)
    unexplained = re.findall(r"^  --(\S+)  \(.*\)\n(?!        \S)", text, re.MULTILINE)
    print(f"{len(keys)} keys, unexplained: {unexplained}")
    assert not unexplained
    # And every key of the README's table is one of them, or Lightning's.
    table = (ROOT / "README.md").read_text().split("\n## Keys")[1].split("\n## ")[0]
    named = []
    for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE):
        first, *others = re.findall(r"`([\w.*]+)`", row)
        named += [first, *(first.rpartition(".")[0] + other for other in others)]
    assert len(named) > 40
    unknown = [k for k in named if k not in keys and k not in text and not k.startswith("trainer")]
    assert not unknown


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from llama_lightning.cli import main; main(['--help']); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'lightning', 'tiktoken')))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert result.returncode == 0
