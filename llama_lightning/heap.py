"""Memory that has been freed, and that the C library keeps."""

import ctypes
import sys


def give_back_memory() -> None:
    """Give the system what has been freed, which glibc keeps, for each thread, between what is not.

    So the 1B shape with 4 layers takes 1.9 instead of 3.4 GiB at most while it is packed, and 1.7
    instead of 2.6 while its head's codes are made.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
