"""A bounded folder of copies that all processes of a node share; any of them may be killed.

Invariants: a copy is whole or absent (written to ``.NAME.tmp``, checked, renamed); copies in use
and downloads under way hold a flock, which the kernel drops with the process; a download reserves
its size before it starts, so that the sum never exceeds the capacity; ``.lock`` is held for all
changes of names, never while bytes move.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from pipeline.settings import ConfigError

ENTRY = re.compile(r"[0-9a-f]{32}(\.[a-z0-9]{1,8})?")
PARTIAL = re.compile(rf"\.{ENTRY.pattern}\.tmp")
# When full, this share is freed at once: listing 10,000 copies takes some 30 ms.
FREED_SHARE = 0.1
WAIT_FOR_ROOM_S = 60.0


class CacheError(Exception):
    """A file can't be kept: it is too big, or everything else is in use."""


class MediaCache:
    """Copies of files, the least recently used dropped first.

    Args:
        parent: where this user's folder is made; None: the machine's temporary folder.
        capacity_bytes: of all copies together.

    Raises:
        ConfigError: the folder can't be made, or others could write into it.
    """

    def __init__(self, parent: str | None, capacity_bytes: int) -> None:
        base = Path(parent or tempfile.gettempdir())
        self.folder = base.absolute() / f"av-latents-media-{os.geteuid()}"
        self.capacity_bytes = capacity_bytes
        self._is_surveyed = False
        try:
            base.mkdir(parents=True, exist_ok=True)
            self.folder.mkdir(mode=0o700, exist_ok=True)
            found = self.folder.lstat()
        except OSError as error:
            raise ConfigError(
                f"media cache {self.folder}: {error.strerror}; set cache_dir"
            ) from None
        own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()
        if not own or found.st_mode & 0o077:
            raise ConfigError(
                f"media cache {self.folder}: expected a folder that is yours and that nobody else "
                f"can open (mode 0700), found {stat.filemode(found.st_mode)} of user "
                f"{found.st_uid}; remove it, or set cache_dir"
            )

    @contextlib.contextmanager
    def held(self, name: str, size: int, fetch: Callable[[BinaryIO], None]) -> Iterator[Path]:
        """Give the path of a copy that stays for the length of the block.

        Args:
            name: 32 hex digits and perhaps a suffix; the same name is the same content.
            size: bytes of it.
            fetch: writes the bytes into a file, where there is no copy.

        Raises:
            CacheError: no room.
            OSError: from ``fetch``, or the disk is full.
        """
        assert ENTRY.fullmatch(name), name
        if size > self.capacity_bytes:
            raise CacheError(
                f"{size / 1e9:.3g} GB, more than the media cache holds "
                f"(cache_gb={self.capacity_bytes / 1e9:g}); raise cache_gb"
            )
        try:
            descriptor = self._hold(name, size, fetch)
        except FileNotFoundError as error:
            raise CacheError(
                f"{error.filename} was removed by another program; set cache_dir"
            ) from None
        try:
            yield self.folder / name
        finally:
            os.close(descriptor)

    def _hold(self, name: str, size: int, fetch: Callable[[BinaryIO], None]) -> int:
        """Return a descriptor whose shared flock keeps the copy."""
        give_up = time.monotonic() + WAIT_FOR_ROOM_S
        while True:
            with self._locked() as lock:
                if (entry := self._open_entry(name, size)) is not None:
                    return entry
                other = self._open_download(name)
                if other is None and self._make_room(lock, size):
                    download = self._reserve(lock, name, size)
                    break
            if other is not None:  # wait until it is done or dead
                fcntl.flock(other, fcntl.LOCK_SH)
                os.close(other)
            elif time.monotonic() > give_up:
                raise CacheError(
                    f"{size / 1e6:.3g} MB find no room: for {WAIT_FOR_ROOM_S:g} s all of the media "
                    f"cache (cache_gb={self.capacity_bytes / 1e9:g}) was in use; raise cache_gb"
                )
            else:
                time.sleep(0.05)
        try:
            self._download(name, download, size, fetch)
        except BaseException:
            self._cancel(name, download, size)
            raise
        return download

    def _download(
        self, name: str, descriptor: int, size: int, fetch: Callable[[BinaryIO], None]
    ) -> None:
        with os.fdopen(os.dup(descriptor), "r+b") as file:
            fetch(file)
            written = file.tell()
        if written != size or os.fstat(descriptor).st_size != size:
            raise OSError(f"got {written} bytes, expected {size}")
        with self._locked():
            self._partial(name).rename(self.folder / name)
            fcntl.flock(descriptor, fcntl.LOCK_SH)

    def _cancel(self, name: str, descriptor: int, size: int) -> None:
        with self._locked() as lock:
            self._partial(name).unlink(missing_ok=True)
            _write_number(lock, max(0, (_read_number(lock) or 0) - size))
            os.close(descriptor)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[int]:
        """Hold ``.lock``, in which the sum of all sizes stands; give its descriptor."""
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        descriptor = os.open(self.folder / ".lock", flags, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield descriptor
        finally:
            os.close(descriptor)

    def _partial(self, name: str) -> Path:
        return self.folder / f".{name}.tmp"

    def _open_entry(self, name: str, size: int) -> int | None:
        """Open a copy and note that it was used."""
        try:
            descriptor = os.open(self.folder / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            return None
        if os.fstat(descriptor).st_size != size:  # not by our hand; what is renamed is whole
            os.close(descriptor)
            (self.folder / name).unlink()
            return None
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        os.utime(descriptor)
        return descriptor

    def _open_download(self, name: str) -> int | None:
        """Open the download of a copy that is under way elsewhere; a dead one is removed."""
        partial = self._partial(name)
        if not partial.exists() or _unlinked_unless_held(partial):
            return None
        return os.open(partial, os.O_RDONLY | os.O_CLOEXEC)

    def _reserve(self, lock: int, name: str, size: int) -> int:
        """Make a download's file in its full size, locked."""
        _write_number(lock, (_read_number(lock) or 0) + size)  # first: a kill may overstate it only
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        descriptor = os.open(self._partial(name), flags, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        os.ftruncate(descriptor, size)
        return descriptor

    def _make_room(self, lock: int, size: int) -> bool:
        """Drop copies until ``size`` more bytes fit; return whether they do."""
        total = _read_number(lock)
        if self._is_surveyed and total is not None and total + size <= self.capacity_bytes:
            return True
        total, entries = self._survey()
        self._is_surveyed = True
        if total + size > self.capacity_bytes:
            wanted = self.capacity_bytes - max(size, int(FREED_SHARE * self.capacity_bytes))
            for _, path, entry_size in sorted(entries):
                if total <= wanted:
                    break
                if _unlinked_unless_held(path):
                    total -= entry_size
        _write_number(lock, total)
        return total + size <= self.capacity_bytes

    def _survey(self) -> tuple[int, list[tuple[int, Path, int]]]:
        """Remove dead downloads; return the sum of sizes, and (last use, path, size) of copies."""
        total, entries = 0, []
        for item in os.scandir(self.folder):
            is_partial = PARTIAL.fullmatch(item.name)
            if not is_partial and not ENTRY.fullmatch(item.name):
                continue
            if is_partial and _unlinked_unless_held(Path(item.path)):
                continue
            found = item.stat(follow_symlinks=False)
            total += found.st_size
            if not is_partial:
                entries.append((found.st_mtime_ns, Path(item.path), found.st_size))
        return total, entries


def _unlinked_unless_held(path: Path) -> bool:
    """Remove a file that no process holds a flock of; return whether it is gone."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


def _read_number(descriptor: int) -> int | None:
    text = os.pread(descriptor, 32, 0).strip()
    return int(text) if text.isdigit() else None


def _write_number(descriptor: int, value: int) -> None:
    os.pwrite(descriptor, b"%-32d" % value, 0)
