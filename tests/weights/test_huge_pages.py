"""Memory in pages of 2 MB: the system is asked for them, for what fills some."""

import sys
from pathlib import Path

import pytest
import torch

from llama_lightning.weights import huge_pages

if not Path("/sys/kernel/mm/transparent_hugepage").is_dir():
    pytest.skip("this system has no transparent huge pages", allow_module_level=True)


def _is_asked_for(address: int) -> bool:
    """Look an address up in the list of mappings, each with the flags it has."""
    found = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        start, dash, rest = line.partition(" ")[0].partition("-")
        if dash:
            found = int(start, 16) <= address < int(rest, 16)
        elif found and line.startswith("VmFlags:"):
            return "hg" in line.split()
    raise AssertionError(f"no mapping holds {address:x}")


@pytest.mark.parametrize("rows", [1024, 40_000])
def test_whole_pages_are_asked_for(rows: int) -> None:
    tensor = huge_pages.empty(torch.Size((rows, 2048)), torch.bfloat16)
    assert (tensor.shape, tensor.dtype, tensor.device.type) == ((rows, 2048), torch.bfloat16, "cpu")
    middle = tensor.data_ptr() + tensor.nbytes // 2
    assert _is_asked_for(middle)
    tensor.fill_(1.0)
    assert tensor.float().sum() == tensor.numel()


def test_nothing_is_asked_for_what_fills_no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(name: None) -> None:
        raise AssertionError("the system was asked")

    monkeypatch.setattr(huge_pages.ctypes, "CDLL", refused)
    for shape in ((), (0,), (2048,), (64, 2048)):
        assert huge_pages.empty(torch.Size(shape), torch.float32).shape == shape


def test_other_systems_are_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    tensor = huge_pages.empty(torch.Size((2, 2**22)), torch.float32)
    assert not _is_asked_for(tensor.data_ptr() + tensor.nbytes // 2)
