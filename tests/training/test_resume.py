"""A resumed run ends with the weights of the run that nobody stopped, or does not begin."""

import shutil
import time

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from llama_lightning.cli import main
from tests.training.fit_processes import (
    STEPS_AN_EPOCH,
    assert_bitwise_equal,
    fit_arguments,
    run_fit,
    weights_of,
)
from tests.verb_processes import running


@pytest.mark.slow
def test_best_is_the_best_of_all_validations(workplace, tmp_path):
    # A validation at the very step of a last.ckpt must not be passed over.
    arguments = fit_arguments(workplace, tmp_path, 1)
    run_fit([*arguments, "--trainer.val_check_interval=26", "--trainer.max_epochs=4"], tmp_path)
    events = EventAccumulator(str(tmp_path / "lightning_logs" / "version_0"))
    events.Reload()
    losses = {event.step: event.value for event in events.Scalars("val/loss")}
    best = torch.load(tmp_path / "best.ckpt", weights_only=True)["global_step"]
    print(f"validation losses by step: {losses}; best.ckpt is of step {best}")
    assert len(losses) == 4
    assert losses[best - 1] == min(losses.values())


@pytest.mark.slow
def test_a_resumed_run_keeps_its_good_checkpoint(workplace, tmp_path):
    # Resumed at a step that is a multiple of every_n_train_steps, as every periodic file is, the
    # run must not write the same step again from inside the next one.
    arguments = [*fit_arguments(workplace, tmp_path, 2), "--trainer.limit_val_batches=0"]
    arguments += ["--trainer.accumulate_grad_batches=4", "--trainer.max_epochs=null"]
    run_fit([*arguments, "--trainer.max_steps=2"], tmp_path)
    written = (tmp_path / "last.ckpt").stat().st_mtime_ns
    resume = [*arguments, f"--ckpt_path={tmp_path / 'last.ckpt'}", "--trainer.max_steps=3"]
    files, log = set(), tmp_path / "resumed.txt"
    with running(["fit", *resume], log) as process:
        while process.is_alive():
            if (tmp_path / "last.ckpt").stat().st_mtime_ns != written:
                files.add(torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"])
            time.sleep(0.005)
        assert process.exitcode == 0, log.read_text()
    files.add(torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"])
    print(f"steps of the checkpoints that the resumed run wrote: {files}")
    assert files == {3}


def test_a_run_that_was_through_says_so(workplace, tmp_path, capfd):
    arguments = [*fit_arguments(workplace, tmp_path, 0), "--trainer.limit_val_batches=0"]
    arguments += ["--trainer.max_epochs=null", "--trainer.max_steps=1"]
    assert main(["fit", *arguments]) == 0
    assert "nothing was trained" not in capfd.readouterr().out
    last = tmp_path / "last.ckpt"
    assert main(["fit", *arguments, f"--ckpt_path={last}"]) == 0
    assert f"nothing was trained: {last} is at step 1 already" in capfd.readouterr().out


@pytest.mark.parametrize(
    "ended_by",
    [
        "--trainer.max_time=00:00:00:01",
        '--trainer.callbacks={"class_path": "EarlyStopping", "init_args": '
        '{"monitor": "val/loss", "patience": 1, "mode": "max"}}',
    ],
    ids=["max_time", "EarlyStopping"],
)
def test_a_run_that_ends_early_ends_behind_a_step(workplace, tmp_path, ended_by):
    arguments = fit_arguments(workplace, tmp_path, 0)
    arguments += ["--trainer.accumulate_grad_batches=8", "--trainer.val_check_interval=11"]
    run_fit([*arguments, "--trainer.max_epochs=400", ended_by], tmp_path)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    done = checkpoint["AlpacaDataModule"]["micro_batches"]
    print(f"ended at step {checkpoint['global_step']}, {done} micro-batches of 8 in the epoch")
    assert done % 8 == 0
    again = [*arguments, f"--ckpt_path={tmp_path / 'last.ckpt'}", "--trainer.max_epochs=null"]
    steps = checkpoint["global_step"] + 1
    assert run_fit([*again, f"--trainer.max_steps={steps}"], tmp_path) is not None
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == steps


def test_a_checkpoint_from_inside_a_step_is_not_resumed(workplace, tmp_path):
    # The first validation, at micro-batch 9 of steps of 2, writes best.ckpt.
    arguments = [*fit_arguments(workplace, tmp_path, 1), "--trainer.limit_val_batches=1"]
    run_fit([*arguments, "--trainer.max_epochs=null", "--trainer.max_steps=5"], tmp_path)
    best, log = tmp_path / "best.ckpt", tmp_path / "resumed.txt"
    with running(["fit", *arguments, f"--ckpt_path={best}"], log) as process:
        process.join()
        assert process.exitcode == 3, log.read_text()
    last_line = log.read_text().splitlines()[-1]
    print(last_line)
    assert "written by a validation inside an optimizer step (micro-batch 1 of 2)" in last_line


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("model.optimizer.lr=0.1", "model.optimizer.lr is 0.1, the checkpoint has 0.003"),
        ("model.optimizer.weight_decay=0.5", "weight_decay is 0.5, the checkpoint has 0.01"),
        ("model.lora.alpha=4", "model.lora.alpha is 4.0, the checkpoint has 16.0"),
        ("model.qkv_bias=true", "model.qkv_bias is True, the checkpoint has False"),
        ("data.batch_size=4", "data.batch_size is 4, was 8"),
        ("data.template=alpaca", "but the checkpoint was trained with 'plain'"),
        (
            "data.tokenizer={workplace}/other.model",
            "makes other tokens than the tokenizer that the checkpoint",
        ),
        (
            "data.test_path={workplace}/held.json",
            "data.test_fraction is 0.0, was 0.07",
        ),
    ],
)
def test_a_setting_unlike_the_checkpoints_is_never_passed_over(
    workplace, uninterrupted, tmp_path, capfd, argument, said
):
    _, _, checkpoint = uninterrupted
    arguments = fit_arguments(workplace, tmp_path, 1)
    (workplace / "held.json").write_text('[{"instruction": "question 3", "output": "a"}]')
    # The same bytes under other ids.
    lines = (workplace / "base" / "tokenizer.model").read_text().splitlines()
    swapped = (f"{line.split()[0]} {255 - rank}" for rank, line in enumerate(lines))
    (workplace / "other.model").write_text("\n".join(swapped))
    argument = argument.replace("{workplace}", str(workplace))
    assert main(["fit", *arguments, f"--{argument}", f"--ckpt_path={checkpoint}"]) == 3
    error = capfd.readouterr().err.splitlines()[-1]
    print(error)
    assert said in error


@pytest.mark.slow
@pytest.mark.parametrize("step", [STEPS_AN_EPOCH, STEPS_AN_EPOCH + 4])
def test_resume_at_an_epochs_end_and_inside(workplace, uninterrupted, tmp_path, step):
    expected, *_ = uninterrupted
    arguments = fit_arguments(workplace, tmp_path, step)
    # Killed when its first checkpoint appears: without validations, which write one too, and which
    # must not change what is trained, that is the one of this step.
    killed = run_fit([*arguments, "--trainer.limit_val_batches=0"], tmp_path, kill_after=0) is None
    assert killed, "the run had ended before it could be killed"
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"]
    assert saved == step
    resume = tmp_path / "resume.ckpt"
    shutil.copy(tmp_path / "last.ckpt", resume)
    run_fit([*arguments, f"--ckpt_path={resume}"], tmp_path)
    print(f"resumed from step {saved} ({saved / STEPS_AN_EPOCH:g} epochs): bitwise equal")
    assert_bitwise_equal(weights_of(tmp_path / "last.ckpt"), expected)
