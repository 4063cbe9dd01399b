"""Bytes of a tar by their place: of a local file straight into memory, of a remote one by request.

Nothing is parsed: the index of a shard says where every array lies.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipeline.files import read_range
from pipeline.format import FormatError
from train.data.retry import Patience

HEADER_BYTES, NAME_BYTES, CHECKSUM = 512, 100, slice(148, 156)  # of a USTAR header


class TarFacts(NamedTuple):
    """A tar, and what is known of it before it is opened.

    Attributes:
        path: in the data set.
        nbytes: by the commit record.
        crc32c: by the commit record.
        repair: how its shard is mended, for messages.
    """

    path: Path
    nbytes: int
    crc32c: int
    repair: str


class LocalTar:
    """A tar open for positional reads, by any number of threads.

    It is closed with the last reference to it, so that it may be dropped while a thread reads.

    Args:
        facts: of the tar.
        file: the local file with its bytes: itself or a copy.
        hold: what keeps the copy; ended with the file.

    Raises:
        FormatError: the file has another size.
        OSError: it can't be opened.
    """

    def __init__(
        self,
        facts: TarFacts,
        file: Path,
        hold: contextlib.AbstractContextManager[Any] | None = None,
    ) -> None:
        self.facts = facts
        self._hold, self._descriptor = hold, -1
        # Of a pipe in its place it would wait for a writer, without O_NONBLOCK.
        self._descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        found = os.fstat(self._descriptor).st_size
        if found != facts.nbytes:
            raise FormatError(
                f"{facts.path}: {found} bytes, expected {facts.nbytes} as committed: it was cut "
                f"short or replaced; {facts.repair}"
            )

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
        if self._hold is not None:
            self._hold.__exit__(None, None, None)

    def read_into(self, out: np.ndarray, offset: int) -> None:
        """Fill ``out``, uint8 and C-contiguous, with the bytes from ``offset`` on.

        Raises:
            FormatError: the file ends before.
            OSError: it can't be read.
        """
        buffer: Any = out
        count = os.preadv(self._descriptor, [buffer], offset)
        while count < len(out):  # interrupted, or at the end of a file that was cut meanwhile
            more = os.preadv(self._descriptor, [buffer[count:]], offset + count)
            if more == 0:
                raise ends_early(self.facts, offset + count, len(out) - count)
            count += more


class RemoteTar:
    """A remote tar of which single rows are read, each by a request of its own."""

    def __init__(self, facts: TarFacts) -> None:
        self.facts = facts

    def read_into(self, out: np.ndarray, offset: int) -> None:
        """As ``LocalTar.read_into``."""
        data = read_range(self.facts.path, offset, len(out))
        if len(data) < len(out):
            raise ends_early(self.facts, offset + len(data), len(out) - len(data))
        out[:] = np.frombuffer(data, np.uint8)


Tar = LocalTar | RemoteTar


class PatientTar:
    """A tar that is opened when it is first needed, and anew when it can't be read any more.

    Args:
        facts: of the tar.
        open_tar: opens it.
        patience: how long to try again.
    """

    def __init__(
        self, facts: TarFacts, open_tar: Callable[[TarFacts], Tar], patience: Patience
    ) -> None:
        self.facts, self._open_tar, self._patience = facts, open_tar, patience
        self._tar: Tar | None = None

    def open(self) -> None:
        """Open the tar now.

        Raises:
            FormatError: it is missing, or not the one that was committed.
            LoaderClosed: the loader was closed meanwhile.
        """
        self._patience.call(self.facts.path, self._opened)

    def read_into(self, out: np.ndarray, offset: int) -> None:
        """As ``LocalTar.read_into``; raises as ``open`` where it can't be read for long."""
        try:
            (self._tar or self._opened()).read_into(out, offset)
        except OSError:  # not there, the disk or the network fails, or a file handle is stale
            self._patience.call(self.facts.path, lambda: self._opened().read_into(out, offset))

    def _opened(self) -> Tar:
        self._tar = tar = self._open_tar(self.facts)
        return tar


def ends_early(facts: TarFacts, end: int, num_missing: int) -> FormatError:
    """Return the error of a tar that ends inside an array."""
    return FormatError(
        f"{facts.path} ends at byte {end}, {num_missing} bytes short of what its index says; "
        f"{facts.repair}"
    )


def first_member(tar: PatientTar) -> str | None:
    """Return the name of a tar's first member, None where no sound header stands there."""
    header = np.empty(HEADER_BYTES, np.uint8)
    tar.read_into(header, 0)
    data = header.tobytes()
    blank = data[: CHECKSUM.start] + b" " * 8 + data[CHECKSUM.stop :]
    if data[CHECKSUM].rstrip(b"\0 ") != b"%06o" % sum(blank):
        return None
    return data[:NAME_BYTES].rstrip(b"\0").decode("ascii", "replace")
