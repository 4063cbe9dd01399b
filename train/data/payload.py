"""Bytes of rows: positional reads from the tars straight into arrays, with their checksums.

Imports neither torch nor a tar parser: the index says where every array lies.
"""

from __future__ import annotations

import os
import threading
from functools import lru_cache
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from pipeline.format import Column, FormatError

REPAIR = "remove the shard's commit record (.json) and run pipeline.encode again"


class TarBytes:
    """A tar open for positional reads, by any number of threads.

    It is closed with the last reference to it, so that a cache may drop it while a thread reads.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = -1
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            raise FormatError(f"{path} is missing though committed; {REPAIR}") from None

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)

    def read_into(self, array: np.ndarray, offset: int) -> None:
        """Fill a C-contiguous array with the bytes from ``offset`` on.

        Raises:
            FormatError: the file ends before.
        """
        left = array.reshape(-1).view(np.uint8).data
        while left:
            count = os.preadv(self._descriptor, [left], offset)
            if count == 0:
                raise FormatError(
                    f"{self.path} ends at byte {offset}, {len(left)} bytes short of what its index "
                    f"says; {REPAIR}"
                )
            left, offset = left[count:], offset + count


class PayloadReader:
    """Reads rows of one column, or spans of their time axis.

    Args:
        column: the column.
        max_open: tars kept open.
        verify_crc: check every payload the first time this reader sees its row; that time the
            whole payload is read, later only the span asked for.
    """

    def __init__(self, column: Column, max_open: int, verify_crc: bool) -> None:
        self._dtype = np.dtype(column.spec.dtype)
        self._verify_crc = verify_crc
        self._verified: set[tuple[int, int]] = set()
        self._local = threading.local()
        self._tar = lru_cache(max_open)(lambda shard: TarBytes(column.tar_path(shard)))

    def read_span(
        self, shard: int, row: int, key: str, record: Any, first: int, out: np.ndarray
    ) -> None:
        """Fill ``out`` with the latents [first, first + len(out)) of a row.

        Args:
            shard: shard of the row.
            row: its place in the shard, for messages.
            key: its key, for messages.
            record: its index record (`INDEX_DTYPE`).
            first: first latent of the span.
            out: C-contiguous, of the column's dtype, time first.

        Raises:
            FormatError: the tar is missing or cut short, or the crc32c is wrong.
        """
        tar = self._tar(shard)
        if self._verify_crc and (shard, row) not in self._verified:
            whole = self._scratch(record)
            self._read_verified(tar, row, key, record, whole)
            out[...] = whole[first : first + len(out)]
            self._verified.add((shard, row))
        else:
            latent_bytes = out.nbytes // len(out)
            tar.read_into(out, int(record["offset"]) + first * latent_bytes)

    def read_row(self, shard: int, row: int, key: str, record: Any) -> np.ndarray:
        """Return a whole row, in the column's dtype and the shape of its index record."""
        whole = np.empty(shape_of(record), dtype=self._dtype)
        self._read_verified(self._tar(shard), row, key, record, whole)
        return whole

    def _scratch(self, record: Any) -> np.ndarray:
        """Return this thread's buffer: fresh memory would cost more than the read itself."""
        nbytes = int(record["nbytes"])
        if getattr(self._local, "buffer", np.empty(0)).nbytes < nbytes:
            self._local.buffer = np.empty(nbytes, dtype=np.uint8)
        return self._local.buffer[:nbytes].view(self._dtype).reshape(shape_of(record))

    def _read_verified(
        self, tar: TarBytes, row: int, key: str, record: Any, whole: np.ndarray
    ) -> None:
        tar.read_into(whole, int(record["offset"]))
        payload: Any = whole.reshape(-1).view(np.uint8)
        found, expected = google_crc32c.value(payload), int(record["crc32c"])
        if found != expected:
            raise FormatError(
                f"{tar.path} row {row} ({key}): crc32c is {found:08x}, expected {expected:08x}; "
                f"{REPAIR}"
            )

    def close(self) -> None:
        """Close the tars, once no thread reads from them."""
        self._tar.cache_clear()


def shape_of(record: Any) -> list[int]:
    """Return the shape in an index record, without its padding."""
    return [int(size) for size in record["shape"] if size]
