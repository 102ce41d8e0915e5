"""`python -m tests.benchmarks.busy_cores`: training speed on a CPU whose cores others use too.

Measures forward and backward passes of the tiny model, with OpenMP's own spin count and with that
which the command line sets, in turn, on cores otherwise idle and beside one busy process. Prints
one JSON line of medians and ratios.
"""

import json
import os
import platform
import statistics
import subprocess
import sys

SPIN_COUNT = "10000"  # as in cli.py
REPEATS = 5
PASSES = """
import time, torch
from llama_lightning.assets import TINY
from llama_lightning.model.lora import LoRAConfig, inject_lora
from llama_lightning.weights.huggingface import load_huggingface, read_config
model = load_huggingface(TINY, read_config(TINY), dtype=torch.float32)
inject_lora(model, LoRAConfig(rank=16), dtype=torch.float32)
tokens = torch.randint(0, 1400, (32, 44))
def run():
    model(tokens)[:, ::10].logsumexp(-1).sum().backward()
run()
start, passes = time.perf_counter(), 0
while time.perf_counter() - start < 3:
    run()
    passes += 1
print(passes * tokens.numel() / (time.perf_counter() - start))
"""


def tokens_per_second(spin_count: str | None) -> float:
    """Measure one process of its own."""
    environment = {k: v for k, v in os.environ.items() if k != "GOMP_SPINCOUNT"}
    if spin_count is not None:
        environment["GOMP_SPINCOUNT"] = spin_count
    command = [sys.executable, "-c", PASSES]
    return float(subprocess.run(command, env=environment, check=True, capture_output=True).stdout)


def main() -> None:
    """Measure in turn and print."""
    result: dict[str, object] = {"machine": platform.processor() or platform.machine()}
    result |= {"cores": os.cpu_count(), "repeats": REPEATS, "spin_count": SPIN_COUNT}
    for neighbours in (0, 1):
        busy = [
            subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(neighbours)
        ]
        try:
            speeds: dict[str, list[float]] = {"own": [], "set": []}
            for _ in range(REPEATS):
                speeds["own"].append(tokens_per_second(None))
                speeds["set"].append(tokens_per_second(SPIN_COUNT))
        finally:
            for process in busy:
                process.kill()
        own, ours = statistics.median(speeds["own"]), statistics.median(speeds["set"])
        name = f"{neighbours} busy neighbours"
        result[name] = {"own_tok_s": round(own), "set_tok_s": round(ours), "ratio": ours / own}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
