"""Files in and out of the page cache, without root. Linux only."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

READ_BYTES = 1 << 22


def _files(folder: Path) -> Iterator[int]:
    """Yield open descriptors of the files below a folder."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            yield descriptor
        finally:
            os.close(descriptor)


def drop(folder: Path) -> None:
    """Take the files below a folder out of the page cache."""
    for descriptor in _files(folder):
        os.fsync(descriptor)  # pages not yet written would stay
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def warm(folder: Path) -> None:
    """Read the files below a folder once."""
    memory = bytearray(READ_BYTES)
    for descriptor in _files(folder):
        offset = 0
        while count := os.preadv(descriptor, [memory], offset):
            offset += count


def cached_share(folder: Path) -> float:
    """Return the share of pages of the files below a folder that are in the page cache.

    Raises:
        OSError: the kernel does not say.
    """
    mincore = ctypes.CDLL(None, use_errno=True).mincore
    num_pages = num_cached = 0
    for descriptor in _files(folder):
        size = os.fstat(descriptor).st_size
        if not size:
            continue
        # A private mapping, which ctypes may point to and which reads no page until it is touched.
        with mmap.mmap(descriptor, size, access=mmap.ACCESS_COPY) as mapped:
            pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
            start = ctypes.c_char.from_buffer(mapped)
            if mincore(ctypes.byref(start), ctypes.c_size_t(size), pages):
                raise OSError(ctypes.get_errno(), "mincore")
            del start  # or the mapping can't be closed
            num_pages += len(pages)
            num_cached += sum(page & 1 for page in pages)
    return num_cached / max(1, num_pages)
