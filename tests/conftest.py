"""What every test starts from: one thread, the same seed, and the default dtype as it was."""

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator

# pytest has several processes; on tensors this small a second thread in one of them only costs. The
# processes that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Tokenised data of the tests and of the processes that they start.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="llama_lightning_cache_")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

import lightning.pytorch  # noqa: F401  # its log handler keeps the stderr of now, not a test's own
import pytest
import torch

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begun last, the files that take longest would leave the other cores idle."""
    longest = ("test_fit_predict", "test_stopped", "test_resume", "test_original_parameters")
    order = {name: place for place, name in enumerate(longest)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _restore_default_dtype() -> Iterator[None]:
    before = torch.get_default_dtype()
    yield
    torch.set_default_dtype(before)
