"""The 1B shape end to end on a CPU: random weights, the real tokenizer, real records."""

import json
import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.random_llama import write_random_llama

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"
TOKENIZER, RECORDS = SHARED / "llama3-tokenizer.model", SHARED / "alpaca_en_demo.json"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not RECORDS.is_file(), reason="no ../shared/data beside the checkout"),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama-1b")
    return folder, write_random_llama(folder, "llama-3.2-1b", tokenizer=TOKENIZER)


def _run(verb: str, run: Path, *arguments: str) -> tuple[str, float, float]:
    """Run a verb as the README does; return its output, seconds, and peak memory in GiB."""
    start = time.monotonic()
    command = [sys.executable, "-m", "llama_lightning", verb, "--config", "configs/1b_lora.yaml"]
    common = ["--trainer.accelerator=cpu", f"--trainer.default_root_dir={run}"]
    process = subprocess.run(
        [*command, *common, *arguments],
        cwd=ROOT,
        # On all cores, as a user's run; the suite's own processes have one each.
        env={key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    return process.stdout + process.stderr, time.monotonic() - start, peak


def test_fit_and_predict(base, tmp_path):
    folder, weight_bytes = base
    model = [f"--model.base_model={folder}", f"--data.path={RECORDS}"]
    steps = ["--data.batch_size=8", "--trainer.accumulate_grad_batches=2", "--trainer.max_steps=2"]
    output, fit_seconds, fit_gib = _run("fit", tmp_path, *model, *steps)
    checkpoint = tmp_path / "lightning_logs" / "version_0" / "checkpoints" / "last.ckpt"
    share = checkpoint.stat().st_size / weight_bytes
    trained = torch.load(checkpoint, weights_only=True)["state_dict"].values()
    trained_share = sum(tensor.nbytes for tensor in trained) / weight_bytes
    rate = re.findall(r"([\d,]+) tokens/s", output)[-1]

    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps(json.loads(RECORDS.read_text())[:8]))
    responses = tmp_path / "responses.jsonl"
    _, predict_seconds, gib = _run(
        "predict",
        tmp_path,
        *model,
        *steps,
        f"--data.predict_path={prompts}",
        "--model.generation.max_new_tokens=16",
        f"--responses.path={responses}",
        f"--ckpt_path={checkpoint}",
    )
    rows = [json.loads(line) for line in responses.read_text().split("\n") if line]
    print(
        f"1B shape, {os.cpu_count()} cores: fit (2 steps of 8 records) {fit_seconds:.0f} s at "
        f"{rate} tokens/s, {fit_gib:.1f} GiB; predict (8 rows, 16 tokens) {predict_seconds:.0f} s; "
        f"peak {gib:.1f} GiB; trained weights {trained_share:.2%} of the base, "
        f"a checkpoint with the optimizer's 8-bit state {share:.2%}"
    )
    assert [row["id"] for row in rows] == list(range(8))
    assert all(row["num_tokens"] <= 16 for row in rows)
    assert trained_share < 0.01
    assert share < 0.015
    assert gib < 12
    assert fit_seconds + predict_seconds < 600


def test_loading_takes_no_second_copy(base):
    folder, weight_bytes = base
    code = (
        "import re, sys, torch\n"
        "from pathlib import Path\n"
        "from llama_lightning.weights.huggingface import load_huggingface, read_config\n"
        "def anonymous():\n"
        "    text = open('/proc/self/smaps_rollup').read()\n"
        "    return int(re.search(r'Anonymous:\\s+(\\d+)', text)[1]) * 1024\n"
        "folder = Path(sys.argv[1])\n"
        "before = anonymous()\n"
        "model = load_huggingface(folder, read_config(folder), dtype=torch.bfloat16)\n"
        "print(anonymous() - before)\n"
    )
    if not Path("/proc/self/smaps_rollup").exists():
        pytest.skip("anonymous memory is read from Linux's /proc")
    result = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True
    )
    ratio = int(result.stdout.split()[-1]) / weight_bytes
    print(f"1B shape in bf16: {ratio:.3f} times the weights in anonymous memory")
    assert ratio <= 1.15
