"""What a benchmark says of the machine it ran on: name, ceiling, memory, time since the start.

It does not import torch before torch is measured.
"""

import os
import platform
import re
import resource
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def seconds_since_start() -> float:
    """Wall time since this process was started, imports and all (Linux)."""
    ticks = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(ticks) / os.sysconf("SC_CLK_TCK")


def machine_name(device: str) -> str:
    """The GPU, or the processor and the number of its cores."""
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name()
    lines = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().split("\n")]
    said = {key.strip(): text.strip() for key, _, text in lines}  # by the last core
    name = re.sub(r"\((R|TM)\)", "", said.get("model name", platform.machine()))
    # Processors of one name, as virtual ones are called, may differ in what decides most.
    flags = said.get("flags", "").split()
    units = {"amx_bf16": " with AMX", "avx512_bf16": " with AVX512-BF16"}
    unit = next((words for flag, words in units.items() if flag in flags), "")
    return f"{os.cpu_count()} cores of {name}{unit}"


def synchronize(device: str) -> None:
    """Wait until the device has done what it was told to."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def matmul_ceiling(dtype: "torch.dtype", device: str) -> float:
    """The best of 10 products of a 1B matrix with 512 rows, after one more, in GFLOP/s.

    A GPU, which would be done with those before it is asked for the next, gets larger ones.
    """
    import torch

    rows, width = (512, 2048) if device == "cpu" else (8192, 8192)
    x = torch.randn(rows, width, dtype=dtype, device=device)
    w = torch.randn(8192, width, dtype=dtype, device=device)
    times = []
    for _ in range(11):
        start = time.perf_counter()
        torch.nn.functional.linear(x, w)
        synchronize(device)
        times.append(time.perf_counter() - start)
    return 2e-9 * x.numel() * len(w) / min(times[1:])


def reading_ceiling(device: str) -> float:
    """The best of 10 sums of 1 GiB, after one more, in GB/s."""
    import torch

    numbers = torch.ones(2**28, device=device)
    times = []
    for _ in range(11):
        start = time.perf_counter()
        numbers.sum()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return 1e-9 * numbers.nbytes / min(times[1:])


def memory(device: str) -> dict[str, Any]:
    """Peak memory of this process so far."""
    peak: dict[str, Any] = {
        "peak_rss_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
    }
    if device == "cuda":
        import torch

        peak["peak_cuda_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return peak
