"""ClearML gets what TensorBoard gets: its offline sessions are read back, file by file.

A session lies in CACHE/offline/TASK-ID.zip: task.json (name, hyper-parameters, artifacts),
metrics.jsonl (lists of events: scalars, tables) and data/ (the artifacts' files). ClearML keeps
global state, so whatever opens a task runs in a process of its own.
"""

import json
import math
import multiprocessing
import os
import signal
import sys
import time
import zipfile
from argparse import Namespace
from pathlib import Path
from unittest.mock import Mock, call

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from llama_lightning import AlpacaDataModule, ClearMLLogger, LlamaModule, LoRAConfig
from llama_lightning.cli import main
from llama_lightning.errors import UsageError
from llama_lightning.training.last_and_best import LastAndBest
from llama_lightning.training.trainer import Trainer
from tests.verb_processes import forked

COLUMNS = ["prompt", "response"]
ROWS = [["What is the capital of France?", "Paris"], ["Say <b>.", 'ünï "quoted"\nline']]


@pytest.fixture(scope="module")
def run_alone():
    """Run a function in a process of its own, in a folder that is also its HOME."""

    def run(function, folder: Path, **environment: str) -> None:
        arguments = (function, str(folder), environment)
        process = forked().Process(target=_alone, args=arguments)
        process.start()
        process.join(60)
        assert process.exitcode == 0, (folder / "output.txt").read_text()

    return run


def _alone(function, folder: str, environment: dict[str, str]) -> None:
    os.chdir(folder)
    for name in [name for name in os.environ if name.startswith("CLEARML")]:
        del os.environ[name]
    os.environ |= {"HOME": folder, **environment}
    multiprocessing.set_start_method("fork", force=True)  # as where a user starts a run
    with Path("output.txt").open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    function()


class Session:
    """An offline session, read from its zip file."""

    def __init__(self, folder: Path) -> None:
        (path,) = folder.rglob("offline/*.zip")
        with zipfile.ZipFile(path) as file:
            self.files = {name: file.read(name) for name in file.namelist()}
        self.task = json.loads(self.files["task.json"])
        lines = self.files["metrics.jsonl"].decode().splitlines()
        self.events = [event for line in lines for event in json.loads(line)]

    def scalars(self) -> dict[tuple[str, int], float]:
        return {
            (f"{event['metric']}/{event['variant']}", event["iter"]): event["value"]
            for event in self.events
            if event["type"] == "training_stats_scalar"
        }

    def hyperparameters(self) -> dict[str, str]:
        return {name: item["value"] for name, item in self.task["hyperparams"]["General"].items()}

    def artifacts(self) -> dict[str, bytes]:
        """The files' content by the artifact's name."""
        return {
            item["key"]: self.files["data" + item["uri"].partition("/data")[2]]
            for item in self.task["execution"]["artifacts"]
        }


def _write_records() -> None:
    words = ("one", "two", "three", "four")
    records = [
        {"instruction": f"Write the number {i}.", "input": "", "output": words[i % 4]}
        for i in range(40)
    ]
    Path("records.json").write_text(json.dumps(records))


def _fit() -> None:
    """Fit with both loggers, and log a table and a file as a callback would."""
    _write_records()
    tensorboard, clearml = TensorBoardLogger("."), ClearMLLogger(task_name="a small fit")
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    out, save = sys.stdout, torch.save
    clearml.log_hyperparams({"model.lora.rank": 2, "data.path": Path("records.json")})
    assert {number: signal.getsignal(number) for number in handlers} == handlers
    assert (sys.stdout, torch.save) == (out, save), "patched"
    clearml.log_hyperparams(Namespace(seed=None))
    clearml.log_text("val/generations", COLUMNS, ROWS, step=3)
    clearml.log_artifact("records.json", Path("records.json"))
    Trainer(
        max_steps=4,
        accelerator="cpu",
        log_every_n_steps=1,
        val_check_interval=2,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=[tensorboard, clearml],
        callbacks=[LastAndBest(dirpath="checkpoints")],
    ).fit(
        LlamaModule(base_dtype="float32", lora=LoRAConfig(rank=2)),
        datamodule=AlpacaDataModule(path="records.json", val_fraction=0.2, batch_size=8),
    )
    clearml.finalize("success")  # a second time


@pytest.fixture(scope="module")
def fitted(run_alone, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fitted")
    run_alone(_fit, folder, CLEARML_OFFLINE_MODE="1")
    return folder, Session(folder)


def test_every_scalar_of_tensorboard(fitted):
    folder, session = fitted
    (version,) = folder.glob("lightning_logs/version_*")
    board = EventAccumulator(str(version))
    board.Reload()
    tags = set(board.Tags()["scalars"]) - {"epoch", "hp_metric"}
    assert tags >= {"train/loss", "val/loss", "perf/tokens_per_second"}
    expected = {(tag, event.step): event.value for tag in tags for event in board.Scalars(tag)}
    scalars = session.scalars()
    # TensorBoard keeps 32 bits of a value.
    equal = [key for key, value in expected.items() if np.float32(scalars.get(key)) == value]
    print(f"{len(equal)} of {len(expected)} scalars equal, {len(tags)} tags")
    assert len(equal) == len(expected) >= 24
    assert scalars.keys() == expected.keys()


def test_hyperparameters_of_all_calls(fitted):
    _, session = fitted
    assert session.hyperparameters() == {
        "model.lora.rank": "2",
        "data.path": "records.json",
        "seed": "None",
    }


def test_a_table_of_texts(fitted):
    _, session = fitted
    (event,) = (event for event in session.events if event["type"] == "plot")
    (table,) = json.loads(event["plot_str"])["data"]
    assert (event["metric"], event["variant"], event["iter"]) == ("val", "generations", 3)
    assert table["header"]["values"] == COLUMNS
    assert [list(row) for row in zip(*table["cells"]["values"], strict=True)] == ROWS


def test_artifacts_are_the_files(fitted):
    folder, session = fitted
    checkpoints = folder / "checkpoints"
    assert session.artifacts() == {
        "records.json": (folder / "records.json").read_bytes(),
        "last.ckpt": (checkpoints / "last.ckpt").read_bytes(),
        "best.ckpt": (checkpoints / "best.ckpt").read_bytes(),
    }
    assert session.task["name"] == "a small fit"
    assert session.task["project_name"] == "llama_lightning"


def _fit_from_yaml() -> None:
    _write_records()
    config = {
        "model": {"base_dtype": "float32", "lora": {"rank": 2}},
        "data": {"path": "records.json", "batch_size": 8},
        "trainer": {
            "max_steps": 2,
            "accelerator": "cpu",
            "log_every_n_steps": 1,
            "logger": {
                "class_path": "llama_lightning.ClearMLLogger",
                "init_args": {"task_name": "from YAML"},
            },
        },
    }
    Path("run.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", "run.yaml"]) == 0


def test_the_only_logger_from_yaml(run_alone, tmp_path):
    # The other way to report, which closes at once and not after 10 seconds.
    (tmp_path / "clearml.conf").write_text("sdk.development.report_use_subprocess: false")
    run_alone(_fit_from_yaml, tmp_path, CLEARML_OFFLINE_MODE="1")
    session = Session(tmp_path)
    assert session.task["name"] == "from YAML"
    assert session.hyperparameters()["model.lora.rank"] == "2"
    assert "last.ckpt" in session.artifacts()
    (config,) = tmp_path.glob("lightning_logs/*/config.yaml")
    assert config.parent.name == session.task["id"]


def _open_without_a_server() -> None:
    start = time.monotonic()
    with pytest.raises(UsageError) as caught:
        _ = ClearMLLogger().experiment
    result = {"message": str(caught.value), "seconds": time.monotonic() - start}
    Path("result.json").write_text(json.dumps(result))


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({}, "ClearML is not configured"),
        (
            # Nothing listens on the discard port.
            {
                "CLEARML_API_HOST": "http://127.0.0.1:9",
                "CLEARML_API_ACCESS_KEY": "key",
                "CLEARML_API_SECRET_KEY": "secret",
            },
            "Connection refused",
        ),
    ],
    ids=["no credentials", "no answer"],
)
def test_no_server_is_one_line_and_soon(run_alone, tmp_path, environment, reason):
    run_alone(_open_without_a_server, tmp_path, **environment)
    result = json.loads((tmp_path / "result.json").read_text())
    print(f"{result['seconds']:.1f} s: {result['message']}")
    assert result["seconds"] < 10
    assert reason in result["message"]
    assert "\n" not in result["message"]
    for cure in ("clearml-init", "CLEARML_API_ACCESS_KEY", "CLEARML_OFFLINE_MODE=1"):
        assert cure in result["message"]


def test_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "clearml", None)
    with pytest.raises(UsageError, match=r"pip install -e '\.\[clearml\]'$"):
        ClearMLLogger()


@pytest.fixture
def logger():
    """A logger whose task is a mock, which notes what it is asked for."""
    logger = ClearMLLogger()
    logger._task = Mock()
    return logger


def test_where_a_metric_goes(logger):
    logger.log_metrics(
        {"train/loss": 1.5, "a/b/c": 2.0, "plain": 3.0, "epoch": 0, "x/nan": math.nan}, step=7
    )
    assert logger.experiment.get_logger().report_scalar.mock_calls == [
        call("train", "loss", value=1.5, iteration=7),
        call("a", "b/c", value=2.0, iteration=7),
        call("run", "plain", value=3.0, iteration=7),
    ]


@pytest.mark.parametrize(
    ("error", "last"),
    [
        (ValueError("bad"), call.mark_failed(force=True, status_reason="ValueError: bad")),
        (SystemExit(143), call.mark_stopped(force=True, status_message="SystemExit: 143")),
    ],
)
def test_a_run_that_did_not_end_says_why(logger, error, last):
    task = logger.experiment
    try:
        raise error
    except BaseException:
        logger.finalize("failed")
    assert task.mock_calls == [call.close(), last]


def test_finalize_without_a_task_opens_none():
    logger = ClearMLLogger()
    logger.finalize("failed")
    assert logger.version is None
    assert logger.save_dir is None


def test_an_artifact_that_is_missing(logger, tmp_path):
    with pytest.raises(FileNotFoundError, match="responses.jsonl"):
        logger.log_artifact("responses", tmp_path / "responses.jsonl")


def test_other_ranks_open_no_task(monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    logger = ClearMLLogger()
    logger.experiment.set_name("nothing")
    logger.log_metrics({"train/loss": 1.0}, step=0)
    logger.log_hyperparams({"a": 1})
    logger.finalize("success")
    assert logger.version is None
