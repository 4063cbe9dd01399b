"""Files of a data set, on a local disk or on an object store. Standard library only.

A path is a ``pathlib.Path`` or, below a URL, a ``pipeline.data_root.RemotePath``, which is used in
the same way. What a local disk and an object store do differently is told apart here and in
``pipeline.publish``, by ``is_local``.
"""

from __future__ import annotations

import json
import os
import secrets
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path, PurePath
from typing import Any, BinaryIO, TypeVar, cast

NUM_REQUESTS = 16  # to an object store at once

Item = TypeVar("Item")
Result = TypeVar("Result")


def is_local(path: Path) -> bool:
    """Return whether a path is on a file system of this machine, with renames, links and locks."""
    return isinstance(path, PurePath)


def write_durably(path: Path, data: bytes) -> None:
    """Write a local file and wait until it is on the disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_atomically(path: Path, data: bytes) -> None:
    """Write a small file so that a reader sees the old content or the new, never a part.

    An object store does so by itself.
    """
    if not is_local(path):
        path.write_bytes(data)
        return
    with writing(path) as file:
        file.write(data)


@contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """Write a file of any size; ``path`` is replaced when the block ends without an error.

    For an object store the file is spooled to the local disk, and uploaded then.
    """
    if not is_local(path):
        remote: Any = path
        with tempfile.TemporaryFile() as spool:
            yield cast(BinaryIO, spool)
            remote.upload(spool)
        return
    # A hidden name that no other writer on any node has.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    write_atomically(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def sync_folder(folder: Path) -> None:
    """Make renames and links inside a local ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def scan(folder: Path) -> list[Any]:
    """List a folder in one go: entries with ``name``, ``is_dir()`` and ``stat()`` (`os.DirEntry`).

    Raises:
        FileNotFoundError, OSError: there is no such folder (object stores have none that is
            empty), or it can't be listed.
    """
    if not is_local(folder):
        remote: Any = folder
        return remote.scan()
    with os.scandir(folder) as entries:
        return list(entries)


def read_range(path: Path, start: int, nbytes: int) -> bytes:
    """Return a part of a file, cut where the file ends; of a remote one, by a single request."""
    if not is_local(path):
        remote: Any = path
        return remote.read_range(start, nbytes)
    with path.open("rb") as file:
        file.seek(start)
        return file.read(nbytes)


def map_ahead(
    folder: Path, call: Callable[[Item], Result], items: Iterable[Item], num_ahead: int = 512
) -> Iterator[Result]:
    """Yield ``call(item)`` for all items in order; on files of an object store, several at a time.

    One request after the other would take a round trip of the network each. Up to ``num_ahead``
    results are in memory.
    """
    if is_local(folder):
        yield from map(call, items)
        return
    remaining = iter(items)
    with ThreadPoolExecutor(NUM_REQUESTS) as pool:
        while block := list(islice(remaining, num_ahead)):
            yield from pool.map(call, block)
