"""Files of a data set, on a local disk or on an object store. Standard library only.

A path is a ``pathlib.Path`` or, below a URL, a ``pipeline.data_root.RemotePath``, which is used in
the same way. What a local disk and an object store do differently is told apart here and in
``pipeline.publish``, by ``is_local``.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
import stat
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


class NoRoomError(Exception):
    """The disk or the object store, or a quota on it, is full."""


def is_local(path: Path) -> bool:
    """Return whether a path is on a file system of this machine, with renames, links and locks."""
    return isinstance(path, PurePath)


def spool_folder() -> Path:
    """Return where files for an object store wait on the local disk until they are uploaded."""
    return Path(tempfile.gettempdir())


@contextmanager
def naming_a_full_disk(path: Path) -> Iterator[None]:
    """Turn "no space left" into a `NoRoomError` that says where and how to go on.

    Args:
        path: what the block writes; a local folder for nameless files in it.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        reason, what = str(error.strerror), f"{path}"
        if is_local(path):
            folder = path if path.is_dir() else path.parent
            what = f"into {path}" if folder == path else what
            reason += f"; {shutil.disk_usage(folder).free:,} bytes free"
        raise NoRoomError(
            f"no room to write {what} ({reason}); make room and run the same command again, "
            "committed shards are kept"
        ) from error


def write_durably(path: Path, data: bytes) -> None:
    """Write a local file and wait until it is on the disk.

    Raises:
        NoRoomError: that is full.
    """
    with naming_a_full_disk(path), path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_atomically(path: Path, data: bytes) -> None:
    """Write a small file so that a reader sees the old content or the new, never a part.

    An object store does so by itself.

    Raises:
        NoRoomError: there is no room for it.
    """
    if not is_local(path):
        with naming_a_full_disk(path):
            path.write_bytes(data)
        return
    with writing(path) as file:
        file.write(data)


def create_file(path: Path, data: bytes) -> None:
    """Write a small file, whole, unless there is one.

    Raises:
        FileExistsError: there is one.
        NoRoomError: there is no room for it.
    """
    if not is_local(path):
        remote: Any = path
        with naming_a_full_disk(path):
            remote.create(data)
        return
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        write_durably(temporary, data)
        path.hardlink_to(temporary)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """Write a file of any size; ``path`` is replaced when the block ends without an error.

    For an object store the file is spooled to the local disk, and uploaded then.

    Raises:
        NoRoomError: there is no room for it, here or there.
    """
    if is_local(path):
        with naming_a_full_disk(path), _writing_here(path) as file:
            yield file
        return
    remote: Any = path
    with naming_a_full_disk(spool_folder()), tempfile.TemporaryFile() as spool:
        yield cast(BinaryIO, spool)
        spool.flush()
        with naming_a_full_disk(path):
            remote.upload(spool)


@contextmanager
def _writing_here(path: Path) -> Iterator[BinaryIO]:
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


def read_file(path: Path) -> bytes:
    """Return all bytes of a file; raises as ``check_plain``, and OSError if it can't be read."""
    check_plain(path)
    return path.read_bytes()


def check_plain(path: Path) -> None:
    """Refuse a local file that has no end or may have no writer: opening it could wait for ever.

    Raises:
        FileNotFoundError: there is none.
        OSError: it is a pipe, a socket or a device.
    """
    if is_local(path):
        mode = path.stat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # of a folder, reading says so itself
            raise OSError(
                errno.EINVAL, "a pipe or device, expected a plain file: put that back", str(path)
            )


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
