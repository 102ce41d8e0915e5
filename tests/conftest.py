"""What every test starts from: the same seed, and the default dtype as it was."""

from collections.abc import Iterator

import pytest
import torch

# On tensors this small a second thread only costs, and where cores are shared it costs minutes.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _restore_default_dtype() -> Iterator[None]:
    before = torch.get_default_dtype()
    yield
    torch.set_default_dtype(before)
