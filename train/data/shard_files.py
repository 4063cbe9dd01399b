"""Tars of shards as open local files: themselves, or copies in the node's cache.

A remote tar is copied whole, by one process of the node, and checked against the commit record
while its bytes come. A copy stays at least for as long as it is open, then until its room is
needed. What a killed download leaves goes when its shard, or room, is next asked for.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import logging
import resource
import threading
import time
from pathlib import Path
from typing import BinaryIO

import google_crc32c

from pipeline.files import is_local, read_range
from pipeline.format import FormatError
from pipeline.media_cache import CacheError, MediaCache
from pipeline.settings import ConfigError
from train.data.retry import LoaderClosed
from train.data.tar_bytes import LocalTar, TarFacts

log = logging.getLogger(__name__)

REQUEST_BYTES = 16 << 20  # of one request for a part of a tar
# For a copy: ranks that are behind, or in a pause of the training, hold what this one is past.
WAIT_FOR_ROOM_S = 900.0
SPARE_FILES = 256  # descriptors left to the rest of the process


class TarStore:
    """Opens tars; safe in threads.

    Args:
        cache_dir: where copies of remote tars are kept; None: the machine's temporary folder.
        cache_bytes: of all copies together, of all processes of the node.
        closing: ends downloads.
    """

    def __init__(self, cache_dir: str | None, cache_bytes: int, closing: threading.Event) -> None:
        self._cache_dir, self.cache_bytes, self._closing = cache_dir, cache_bytes, closing
        self._counting = threading.Lock()
        self.num_fetched_bytes = 0  # by this process

    @functools.cached_property
    def _cache(self) -> MediaCache:
        return MediaCache(self._cache_dir, self.cache_bytes)

    def open(self, tar: TarFacts) -> LocalTar:
        """Open a tar, of a remote one a copy; comes back when that is whole.

        Raises:
            FormatError: it has another size or other bytes than its commit record says.
            ConfigError: there is no room for a copy.
            OSError: it can't be read.
            LoaderClosed: the loader was closed meanwhile.
        """
        if is_local(tar.path):
            return LocalTar(tar, tar.path)
        if tar.nbytes > self.cache_bytes:
            raise ConfigError(
                f"{tar.path} has {tar.nbytes / 1e9:.3g} GB, more than data.cache_gb="
                f"{self.cache_bytes / 1e9:.3g}; raise data.cache_gb"
            )
        give_up = time.monotonic() + WAIT_FOR_ROOM_S
        while True:
            copy = self._cache.held(copy_name(tar), tar.nbytes, lambda file: self._fetch(tar, file))
            try:
                return LocalTar(tar, copy.__enter__(), hold=copy)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                raise ConfigError(
                    f"copy of {tar.path}: the disk of {self._cache.folder} is full; lower "
                    f"data.cache_gb={self.cache_bytes / 1e9:g}, or set data.cache_dir"
                ) from None
            except CacheError as error:  # other processes hold copies that this one is past
                if self._closing.is_set():
                    raise LoaderClosed from None
                if time.monotonic() > give_up:
                    raise ConfigError(f"copy of {tar.path}: {error}") from None
                log.warning("waiting for room for a copy of %s: %s", tar.path, error)

    def _fetch(self, tar: TarFacts, file: BinaryIO) -> None:
        """Write a tar's bytes into a file; once more where they are wrong on their way."""
        found = [self._fetch_once(tar, file)]
        if found[0] != tar.crc32c:
            found.append(self._fetch_once(tar, file))
        if found[-1] != tar.crc32c:
            crcs = " and ".join(f"{crc:08x}" for crc in found)
            raise FormatError(
                f"{tar.path}: crc32c of what came is {crcs}, fetched twice; its commit record says "
                f"{tar.crc32c:08x}; {tar.repair}"
            )

    def _fetch_once(self, tar: TarFacts, file: BinaryIO) -> int:
        file.seek(0)
        crc = 0
        for start in range(0, tar.nbytes, REQUEST_BYTES):
            if self._closing.is_set():
                raise LoaderClosed
            wanted = min(REQUEST_BYTES, tar.nbytes - start)
            try:
                data = read_range(tar.path, start, wanted)
            except FileNotFoundError:  # which of a file in the cache would mean something else
                raise OSError(f"there is no {tar.path.name}") from None
            with self._counting:
                self.num_fetched_bytes += len(data)
            if len(data) != wanted:
                raise FormatError(
                    f"{tar.path} ends at byte {start + len(data)}, its commit record says "
                    f"{tar.nbytes}; {tar.repair}"
                )
            crc = google_crc32c.extend(crc, data)
            file.write(data)
        return crc


def copy_name(tar: TarFacts) -> str:
    """Name a copy by what decides its bytes.

    The boot counts too: copies aren't synced to the disk, a crash may leave them empty.
    """
    identity = json.dumps([_boot_id(), str(tar.path), tar.nbytes, tar.crc32c])
    return hashlib.sha256(identity.encode()).hexdigest()[:32] + ".tar"


@functools.cache
def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def allow_open_files(num_files: int) -> None:
    """Let this process open so many files at once, beside those of the rest of it.

    Raises:
        ConfigError: it may not.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = num_files + SPARE_FILES
    if soft == resource.RLIM_INFINITY or wanted <= soft:
        return
    if hard != resource.RLIM_INFINITY and wanted > hard:
        raise ConfigError(
            f"two windows of shards are {num_files} open files, this process may have {hard}; "
            "lower data.window_shards, or raise the limit (ulimit -n)"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
