"""The arrays of rows: read into the memory of batches, and checked. Imports no torch."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from pipeline.files import read_range
from pipeline.format import OK, FormatError
from train.data.tar_bytes import PatientTar, TarFacts, first_member


class DamagedPayload(FormatError):  # noqa: N818 (it is a FormatError)
    """The bytes of one row are not those that were written, though they are there."""


class Seen:
    """Which rows were found sound: one bit each, as there may be hundreds of millions.

    Of two threads that mark rows at once one may lose its mark, and that row is checked again; no
    row is ever marked that was not checked.
    """

    def __init__(self, num_rows: int) -> None:
        self._bits = bytearray(-(-num_rows // 8))

    def __contains__(self, row: int) -> bool:
        return bool(self._bits[row >> 3] >> (row & 7) & 1)

    def add(self, row: int) -> None:
        """Mark a row."""
        self._bits[row >> 3] |= 1 << (row & 7)


class _Scratch(threading.local):
    """A buffer for each thread: fresh memory would cost more than the read itself."""

    def __init__(self) -> None:
        self._buffer = np.empty(0, np.uint8)

    def take(self, nbytes: int) -> np.ndarray:
        """Return uninitialised bytes, valid until the thread's next call."""
        if len(self._buffer) < nbytes:
            self._buffer = np.empty(nbytes, np.uint8)
        return self._buffer[:nbytes]


_SCRATCH = _Scratch()


class ShardPayloads:
    """The arrays of one shard in one column. Safe in threads.

    Args:
        tar: the shard's.
        index: ``INDEX_DTYPE`` [R].
        keys: of the R rows.
        modality: of the column.
    """

    def __init__(
        self, tar: PatientTar, index: np.ndarray, keys: Sequence[str], modality: str
    ) -> None:
        self.tar, self._index, self._keys, self._modality = tar, index, keys, modality

    def read_checked(self, row: int, start: int, out: np.ndarray) -> None:
        """Read a row's whole array, check it, and fill ``out`` with its bytes from ``start`` on.

        Raises:
            DamagedPayload: the crc32c is wrong.
            FormatError: the tar is missing, cut short, or another shard's.
        """
        nbytes = int(self._index["nbytes"][row])
        if nbytes == len(out):
            self._read_whole(row, out)
        else:
            whole = _SCRATCH.take(nbytes)
            self._read_whole(row, whole)
            out[:] = whole[start:][: len(out)]

    def _read_whole(self, row: int, whole: np.ndarray) -> None:
        self.tar.read_into(whole, int(self._index["offset"][row]))
        expected, name = int(self._index["crc32c"][row]), f"row {row} ({self._keys[row]})"
        try:
            check_crc(whole, expected, self.tar.facts, name)
        except DamagedPayload:
            self._check_owner()
            raise

    def _check_owner(self) -> None:
        """Tell a tar of another shard from one of this shard that is damaged.

        Raises:
            FormatError: the tar begins with another clip.
        """
        first_key = self._keys[int(np.argmax(self._index["status"] == OK))]
        expected, found = f"{first_key}.{self._modality}.npy", first_member(self.tar)
        if found not in (None, expected):
            facts = self.tar.facts
            raise FormatError(
                f"{facts.path} begins with {found!r:.120}, expected {expected!r}: it is the tar of "
                f"another shard or column; put the right one back, or {facts.repair}"
            )


def check_crc(payload: Any, expected: int, tar: TarFacts, name: str) -> None:
    """Compare bytes with their checksum.

    Raises:
        DamagedPayload: they differ.
    """
    if (found := google_crc32c.value(payload)) != expected:
        raise DamagedPayload(
            f"{tar.path} {name}: crc32c is {found:08x}, expected {expected:08x}; {tar.repair}"
        )


def read_row(folder: Path, tar: str, record: Any, name: str) -> np.ndarray:
    """Read one row's whole array by itself, of a local or a remote column.

    Args:
        folder: of the column.
        tar: file name of the tar.
        record: the row's index record.
        name: of the row, for messages.

    Returns:
        float16, in the shape of the record.

    Raises:
        FormatError: the crc32c is wrong.
        OSError: it can't be read.
    """
    data = read_range(folder / tar, int(record["offset"]), int(record["nbytes"]))
    repair = "remove the shard's commit record (.json) and run pipeline.encode again"
    check_crc(data, int(record["crc32c"]), TarFacts(folder / tar, 0, 0, repair), f"({name})")
    return as_array(bytearray(data), record)


def as_array(data: Any, record: Any) -> np.ndarray:
    """Return a row's bytes as float16, in the shape of its index record."""
    return np.frombuffer(data, np.float16).reshape([int(n) for n in record["shape"] if n])
