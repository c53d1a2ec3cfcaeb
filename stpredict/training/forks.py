"""What an optimizer on the CPU rewrites is kept out of forks.

A data worker is a fork of its rank, and keeps a copy of every page that the rank rewrites after it. Of an offloaded
optimizer that is the whole state, in every step: twice the memory that the host was said to need.
"""

import ctypes
import mmap
import os
from collections.abc import Iterable

from torch import Tensor

# glibc maps blocks above 32 MiB by themselves and unmaps them when they are freed, so that nothing else comes to lie in
# pages that forks do not have.
LARGE = 64 << 20


def keep_from_forks(tensors: Iterable[Tensor]) -> int:
    """Processes that are forked from now on do not have the pages of the CPU storages of 64 MiB and more among these:
    they would crash at a touch. Returns how many bytes that is."""
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in tensors if x.device.type == "cpu"}
    libc, page, kept = ctypes.CDLL(None, use_errno=True), mmap.PAGESIZE, 0
    for begin, storage in storages.items():
        if storage.nbytes() < LARGE:
            continue
        first, stop = -(-begin // page) * page, (begin + storage.nbytes()) // page * page  # whole pages
        if libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(stop - first), mmap.MADV_DONTFORK):
            raise OSError(ctypes.get_errno(), f"madvise: {os.strerror(ctypes.get_errno())}")
        kept += stop - first
    return kept
