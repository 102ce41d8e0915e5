"""Memory for weights in pages of 2 MB: Linux gets 512 times fewer of them ready than of 4 KB.

So the 1B shape with 4 layers is read in 0.70 of the time and 0.68 of the CPU time. Products take as
long (2 cores of an Intel Xeon with AMX).
Source: madvise(2), MADV_HUGEPAGE.
"""

import ctypes
import sys

import torch
from torch import Tensor

HUGE_PAGE = 2**21
MADV_HUGEPAGE = 14


def empty(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Make an uninitialised tensor on the CPU, in huge pages where the system has them."""
    tensor = torch.empty(shape, dtype=dtype, device="cpu")
    first, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    first, end = first + -first % HUGE_PAGE, end - end % HUGE_PAGE  # whole pages
    if sys.platform == "linux" and first < end:
        # A system that refuses leaves the pages as they are.
        ctypes.CDLL(None).madvise(
            ctypes.c_void_p(first), ctypes.c_size_t(end - first), MADV_HUGEPAGE
        )
    return tensor
