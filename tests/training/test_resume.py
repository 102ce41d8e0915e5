"""A run killed at any moment and resumed ends with the weights of the run that was not.

Real `fit` processes are killed with SIGKILL; nothing is simulated. They are forked from a server
that has imported everything, so that a run costs a second and not eight.
"""

import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from llama_lightning.cli import main
from tests.small import write_byte_tokenizer, write_small_llama

STEPS_AN_EPOCH = 13  # 102 records left in training, 8 a step: the last step is partial
EPOCHS = 3


def _fit(arguments: list[str], log: str) -> None:
    """Run `fit` in this process; the process exists for nothing else."""
    with Path(log).open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    os._exit(main(["fit", *arguments]))


@pytest.fixture(scope="module")
def processes():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["llama_lightning.cli", "lightning.pytorch.cli", "llama_lightning.data.alpaca"]
        + ["llama_lightning.training.trainer", "bitsandbytes", "torch.utils.tensorboard"]
    )
    return context


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A base model and 118 records of unequal length."""
    folder = tmp_path_factory.mktemp("resume")
    write_small_llama(folder / "base", vocab_size=512)
    write_byte_tokenizer(folder / "base")
    rng = random.Random(0)
    records = [
        {
            "instruction": f"question {i}",
            "input": "",
            "output": "".join(rng.choices("abcdef", k=rng.randint(1, 40))),
        }
        for i in range(118)
    ]
    (folder / "data.json").write_text(json.dumps(records))
    return folder


def _arguments(workplace: Path, run: Path, every: int) -> list[str]:
    # Dropout in the network and in LoRA, accumulation, a validation inside the epoch, a partial
    # last step: each has its own way to make a resumed run differ. Rank 64 makes matrices of more
    # than 4096 elements, below which bitsandbytes keeps 32-bit state.
    pairs = {
        "model.base_model": workplace / "base",
        "model.base_dtype": "float32",
        "model.dropout": 0.1,
        "model.lora.rank": 64,
        "model.lora.dropout": 0.1,
        "model.optimizer.name": "adamw8bit",
        "model.optimizer.lr": 0.003,
        "model.optimizer.init_lr": 0.0,
        "model.optimizer.warmup": 0.2,
        "model.optimizer.eta_min": 0.0003,
        "data.path": workplace / "data.json",
        "data.batch_size": 8,
        "data.val_fraction": 0.07,
        "data.test_fraction": 0.07,
        "trainer.max_epochs": EPOCHS,
        "trainer.accumulate_grad_batches": 2,
        "trainer.gradient_clip_val": 1.0,
        "trainer.val_check_interval": 9,  # odd: every other validation falls inside a step
        "trainer.accelerator": "cpu",
        "trainer.default_root_dir": run,
        "checkpoint.dirpath": run,
        "checkpoint.every_n_train_steps": every,
    }
    return [f"--{key}={value}" for key, value in pairs.items()]


def _weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return torch.load(checkpoint, weights_only=True)["state_dict"]


def _run(
    processes,
    arguments: list[str],
    run: Path,
    kill_after: float | None = None,
    signum: int = signal.SIGKILL,
) -> float | None:
    """Start fit; send it a signal so many seconds after its first checkpoint.

    Return the seconds from the first checkpoint to the end, or None if the signal ended it.
    """
    process = processes.Process(target=_fit, args=(arguments, str(run / "log.txt")))
    process.start()
    while not (run / "last.ckpt").exists() and process.is_alive():
        time.sleep(0.002)
    start = time.monotonic()
    process.join(kill_after)
    ended_by = 0
    if process.is_alive():
        os.kill(process.pid, signum)
        process.join(60)
        ended_by = -signum if signum == signal.SIGKILL else 128 + signum
    log = (run / "log.txt").read_text()
    assert process.exitcode in (0, ended_by), f"exit code {process.exitcode}\n{log}"
    return time.monotonic() - start if process.exitcode == 0 else None


def _assert_bitwise_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different, f"{len(different)} of {len(one)} tensors differ, e.g. {different[0]}"


@pytest.fixture(scope="module")
def uninterrupted(processes, workplace, tmp_path_factory):
    """Final weights of a run that nobody killed, and its seconds behind the first checkpoint."""
    run = tmp_path_factory.mktemp("uninterrupted")
    seconds = _run(processes, _arguments(workplace, run, 1), run)
    checkpoint = torch.load(run / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == STEPS_AN_EPOCH * EPOCHS
    states = checkpoint["optimizer_states"][0]["state"].values()
    # bitsandbytes keeps its quantised moments in a dictionary of its own.
    moments = [s.get("__bnb_optimizer_quant_state__", s)["state1"].dtype for s in states]
    assert torch.uint8 in moments, f"no 8-bit state in this test: {set(moments)}"
    return _weights(run / "last.ckpt"), seconds, run / "last.ckpt"


@pytest.mark.parametrize(
    ("signum", "every"),
    # Asked to stop, the run writes its checkpoint itself; the first is only there to start the
    # clock.
    [(signal.SIGKILL, 1), (signal.SIGTERM, 2), (signal.SIGINT, 2)],
    ids=["kill -9", "SIGTERM", "Ctrl-C"],
)
def test_stopped_at_random_moments(processes, workplace, uninterrupted, tmp_path, signum, every):
    expected, seconds, _ = uninterrupted
    rng = random.Random(time.time_ns())
    trials, kills = (6 if signum == signal.SIGKILL else 2), 0
    killed_at = []
    for trial in range(trials):
        run = tmp_path / str(trial)
        run.mkdir()
        arguments = _arguments(workplace, run, every)
        # Kills come at any moment, the very end included; of the two trials of a signal one must
        # find the run alive.
        moment = rng.uniform(0, seconds if signum == signal.SIGKILL else 0.7 * seconds)
        if _run(processes, arguments, run, kill_after=moment, signum=signum) is None:
            kills += 1
            step = torch.load(run / "last.ckpt", weights_only=True)["global_step"]
            killed_at.append(step)
            resume = tmp_path / f"{trial}-resume.ckpt"
            shutil.copy(run / "last.ckpt", resume)
            _run(processes, [*arguments, f"--ckpt_path={resume}"], run)
        _assert_bitwise_equal(_weights(run / "last.ckpt"), expected)
    print(f"{trials} of {trials} runs bitwise equal, {kills} of them killed, at steps {killed_at}")
    assert kills >= trials // 2, "too few runs were alive to be killed; the trial says little"


def test_best_is_the_best_of_all_validations(processes, workplace, tmp_path):
    # A validation at the very step of a last.ckpt must not be passed over.
    arguments = _arguments(workplace, tmp_path, 1)
    _run(processes, [*arguments, "--trainer.val_check_interval=26"], tmp_path)
    events = EventAccumulator(str(tmp_path / "lightning_logs" / "version_0"))
    events.Reload()
    losses = {event.step: event.value for event in events.Scalars("val/loss")}
    best = torch.load(tmp_path / "best.ckpt", weights_only=True)["global_step"]
    print(f"validation losses by step: {losses}; best.ckpt is of step {best}")
    assert len(losses) == EPOCHS
    assert losses[best - 1] == min(losses.values())


def test_a_resumed_run_keeps_its_good_checkpoint(processes, workplace, tmp_path):
    # Resumed at a step that is a multiple of every_n_train_steps, as every periodic file is, the
    # run must not write the same step again from inside the next one.
    arguments = [*_arguments(workplace, tmp_path, 2), "--trainer.limit_val_batches=0"]
    arguments += ["--trainer.accumulate_grad_batches=4", "--trainer.max_epochs=null"]
    _run(processes, [*arguments, "--trainer.max_steps=2"], tmp_path)
    written = (tmp_path / "last.ckpt").stat().st_mtime_ns
    resume = [*arguments, f"--ckpt_path={tmp_path / 'last.ckpt'}", "--trainer.max_steps=3"]
    process = processes.Process(target=_fit, args=(resume, str(tmp_path / "resumed.txt")))
    process.start()
    files = set()
    while process.is_alive():
        if (tmp_path / "last.ckpt").stat().st_mtime_ns != written:
            files.add(torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"])
        time.sleep(0.005)
    assert process.exitcode == 0, (tmp_path / "resumed.txt").read_text()
    files.add(torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"])
    print(f"steps of the checkpoints that the resumed run wrote: {files}")
    assert files == {3}


@pytest.mark.parametrize(
    "ended_by",
    [
        "--trainer.max_time=00:00:00:01",
        '--trainer.callbacks={"class_path": "EarlyStopping", "init_args": '
        '{"monitor": "val/loss", "patience": 1, "mode": "max"}}',
    ],
    ids=["max_time", "EarlyStopping"],
)
def test_a_run_that_ends_early_ends_behind_a_step(processes, workplace, tmp_path, ended_by):
    arguments = _arguments(workplace, tmp_path, 0)
    arguments += ["--trainer.accumulate_grad_batches=8", "--trainer.val_check_interval=11"]
    _run(processes, [*arguments, "--trainer.max_epochs=400", ended_by], tmp_path)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    done = checkpoint["AlpacaDataModule"]["micro_batches"]
    print(f"ended at step {checkpoint['global_step']}, {done} micro-batches of 8 in the epoch")
    assert done % 8 == 0
    again = [*arguments, f"--ckpt_path={tmp_path / 'last.ckpt'}", "--trainer.max_epochs=null"]
    steps = checkpoint["global_step"] + 1
    assert _run(processes, [*again, f"--trainer.max_steps={steps}"], tmp_path) is not None
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == steps


def test_a_checkpoint_from_inside_a_step_is_not_resumed(processes, workplace, tmp_path):
    # The first validation, at micro-batch 9 of steps of 2, writes best.ckpt.
    arguments = [*_arguments(workplace, tmp_path, 1), "--trainer.limit_val_batches=1"]
    _run(processes, [*arguments, "--trainer.max_epochs=null", "--trainer.max_steps=5"], tmp_path)
    best = tmp_path / "best.ckpt"
    process = processes.Process(
        target=_fit, args=([*arguments, f"--ckpt_path={best}"], str(tmp_path / "resumed.txt"))
    )
    process.start()
    process.join()
    assert process.exitcode == 3
    last_line = (tmp_path / "resumed.txt").read_text().splitlines()[-1]
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
        ("data.template=plain", "but the checkpoint was trained with 'alpaca'"),
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
    arguments = _arguments(workplace, tmp_path, 1)
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


@pytest.mark.parametrize("step", [STEPS_AN_EPOCH, STEPS_AN_EPOCH + 4])
def test_resume_at_an_epochs_end_and_inside(processes, workplace, uninterrupted, tmp_path, step):
    expected, *_ = uninterrupted
    arguments = _arguments(workplace, tmp_path, step)
    # Killed when its first checkpoint appears: without validations, which write one too, and which
    # must not change what is trained, that is the one of this step.
    _run(processes, [*arguments, "--trainer.limit_val_batches=0"], tmp_path, kill_after=0)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"]
    assert saved == step
    resume = tmp_path / "resume.ckpt"
    shutil.copy(tmp_path / "last.ckpt", resume)
    _run(processes, [*arguments, f"--ckpt_path={resume}"], tmp_path)
    print(f"resumed from step {saved} ({saved / STEPS_AN_EPOCH:g} epochs): bitwise equal")
    _assert_bitwise_equal(_weights(tmp_path / "last.ckpt"), expected)
