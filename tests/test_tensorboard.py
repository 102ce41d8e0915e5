"""TensorBoard's pages as a person opens them: a real server, and headless Chromium where it is."""

import json
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from llama_lightning.cli import main

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
CONFIG = f"--config={Path(__file__).parents[1]}/configs/tiny_lora.yaml"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Start TensorBoard on the logs of a short fit and predict; give its address."""
    folder = tmp_path_factory.mktemp("run")
    prompts = folder / "prompts.json"
    prompts.write_text('[{"instruction": "What is the capital of France?", "output": "Paris"}]')
    common = [CONFIG, f"--trainer.default_root_dir={folder}", "--trainer.max_steps=4"]
    fit = ["--trainer.val_check_interval=2", "--trainer.log_every_n_steps=1"]
    fit += ["--samples.every_n_steps=2", "--samples.num_prompts=2", "--model.lora.rank=5"]
    assert main(["fit", *common, *fit]) == 0
    assert main(["predict", *common, f"--data.predict_path={prompts}"]) == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["-m", "tensorboard.main", f"--logdir={folder}/lightning_logs", f"--port={port}"]
    server = subprocess.Popen(
        [sys.executable, *command, "--host=127.0.0.1"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            try:
                if len(json.loads(_get(f"{address}/data/runs"))) == 2:
                    break
            except OSError:
                pass
            time.sleep(0.1)
        yield address
    finally:
        server.kill()
        server.wait()


def _get(address: str, body: str | None = None) -> str:
    data = None if body is None else body.encode()
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=20) as answer:
        return answer.read().decode()


def test_scalars_are_grouped(page):
    tags = json.loads(_get(f"{page}/data/plugin/scalars/tags"))
    fit, predict = set(tags["version_0"]), set(tags["version_1"])
    assert {tag.split("/")[0] for tag in fit} == {"train", "val", "perf", "memory"}
    assert predict == {"predict/exact_match", "predict/rouge_l"}


def test_texts_are_tables_of_answers(page):
    tags = json.loads(_get(f"{page}/data/plugin/text/tags"))
    assert tags == {"version_0": ["samples/responses/text_summary"]}
    query = "run=version_0&tag=samples/responses/text_summary"
    steps = json.loads(_get(f"{page}/data/plugin/text/text?{query}"))
    assert [step["step"] for step in steps] == [0, 2, 4]
    assert "<table>" in steps[0]["text"], "Markdown that TensorBoard does not take for a table"
    assert len(re.findall("<tr>", steps[0]["text"])) == 1 + 1 + 2  # a frame, the head, two prompts


def test_hparams_are_what_was_chosen(page):
    experiment = json.loads(_get(f"{page}/data/plugin/hparams/experiment", "{}"))
    names = {info["name"] for info in experiment["hparamInfos"]}
    print(sorted(names))
    assert {"model.lora.rank", "model.optimizer.lr", "data.val_fraction"} <= names
    assert "trainer.benchmark" not in names, "nobody chose it"
    metrics = {info["name"]["tag"] for info in experiment["metricInfos"]}
    assert {"val/loss", "predict/exact_match"} <= metrics


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_the_page_in_a_browser(page, tmp_path):
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    flags += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    flags += [f"--user-data-dir={tmp_path}", "--window-size=1280,1600"]
    flags += ["--virtual-time-budget=20000"]
    dom = subprocess.run(
        [CHROMIUM, *flags, "--dump-dom", f"{page}/#timeseries"],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    ).stdout
    wanted = ("memory", "perf", "predict", "train", "val")
    groups = [group for group in wanted if re.search(rf">\s*{group}\s*<", dom)]
    print(f"groups on the page: {groups}")
    assert groups == list(wanted)
    assert "hp_metric" not in dom
    assert not re.search(r">\s*epoch\s*<", dom)
