"""The step that makes a shard exist: tar and index get their names, then the commit record.

A shard is its commit record. It is written last and never over another, so that the first writer
wins and each later one is told so. Three ways lead there:

- A local folder with locks: tar and index are renamed under a lock on the folder, then the record
  is linked into place. Writers on several nodes need locks that hold across these; locks of each
  node's own (Lustre's ``localflock``) are not supported.
- A local folder without (NFS refuses `flock` on folders): the same, but tar and index have the
  name of their attempt in theirs, for two writers may rename at once. The link decides.
- An object store: tar and index are uploaded under names of their attempt, then the record is
  created on condition that there is none.

A record names the files of its own attempt, which nobody else writes. Therefore even where a
file system of fsspec creates without a condition, and two writers both believe to have won, the
record that stays names a whole shard with the same rows; the other's files are left over, for
``pipeline.gc`` to remove. So are those of a writer that was killed while it uploaded.
"""

from __future__ import annotations

import errno
import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

from pipeline import storage
from pipeline.files import is_local, spool_folder, sync_folder, write_durably
from pipeline.format import shard_name

# What systems answer whose folders can't be locked.
NO_LOCKS = (errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class LocalShard:
    """A shard being written into a folder; hidden temporaries until it is published.

    Attributes:
        tar: the file to write the tar to.
        place: what to name where the disk is full, see ``naming_a_full_disk``.
        tar_name, index_name: for the commit record.
    """

    def __init__(self, folder: Path, shard: int, attempt: str) -> None:
        self._folder, stem = folder, shard_name(shard)
        self.place = folder / f".{stem}.{attempt}.tmp"
        self._index = folder / f".{stem}.{attempt}.idx.tmp"
        self._new_record = folder / f".{stem}.{attempt}.json.tmp"
        self._record = folder / f"{stem}.json"
        self._has_locks = has_locks(folder)
        name = stem if self._has_locks else f"{stem}.{attempt}"
        self.tar_name, self.index_name = f"{name}.tar", f"{name}.idx.npy"
        self.place.unlink(missing_ok=True)
        self.tar: BinaryIO = self.place.open("xb")

    def publish(self, index: bytes, record: bytes, replacing: bool) -> bool:
        """Give the shard its files, unless it has a commit record.

        Args:
            index: content of the index.
            record: content of the commit record.
            replacing: take the place of the record that is there, unless another writer has
                published since this one began.

        Returns:
            Whether this attempt's record is the shard's.
        """
        self.tar.flush()
        os.fsync(self.tar.fileno())
        write_durably(self._index, index)
        write_durably(self._new_record, record)
        with locked_folder(self._folder):
            wins = self._owns_temporary() and (replacing or not self._record.exists())
            if wins:
                self._record.unlink(missing_ok=True)
                sync_folder(self._folder)  # before any of its files changes
                wins = self._publish()
            if self._has_locks and self._record.exists():  # a killed writer's files, or the losers'
                for path in self._folder.glob(f".{self._record.stem}.*.tmp"):
                    path.unlink(missing_ok=True)
        return wins

    def close(self) -> None:
        """Remove the temporaries."""
        with suppress(OSError):  # the flush to a full disk, whose first error is on its way up
            self.tar.close()
        for path in (self.place, self._index, self._new_record):
            path.unlink(missing_ok=True)

    def _owns_temporary(self) -> bool:
        """Whether the name still leads to our file: who publishes removes those of all others."""
        with suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(self.tar.fileno()), self.place.stat())
        return False

    def _publish(self) -> bool:
        """Give the files their names, the record's last; a crash before it leaves no shard."""
        tar, index = self._folder / self.tar_name, self._folder / self.index_name
        self.place.rename(tar)
        self._index.rename(index)
        sync_folder(self._folder)
        # A link, not a rename: it can't replace a record that is there already. NFS may say that
        # there is one when it is ours, made by the same request before it was sent again.
        with suppress(FileExistsError):
            self._record.hardlink_to(self._new_record)
        sync_folder(self._folder)
        wins = os.path.samestat(self._record.stat(), self._new_record.stat())
        if not wins and not self._has_locks:  # else they have the names of the winner's
            for path in (tar, index):
                path.unlink()
        return wins


class RemoteShard:
    """A shard being written to an object store, spooled to a nameless local file before.

    Attributes: see ``LocalShard``.
    """

    def __init__(self, folder: Path, shard: int, attempt: str) -> None:
        stem = shard_name(shard)
        self.tar_name, self.index_name = f"{stem}.{attempt}.tar", f"{stem}.{attempt}.idx.npy"
        self._tar: Any = folder / self.tar_name
        self._index: Any = folder / self.index_name
        self._record: Any = folder / f"{stem}.json"
        self.place = spool_folder()
        # Nameless: gone with its last writer, however that ends.
        self.tar = cast(BinaryIO, tempfile.TemporaryFile())  # noqa: SIM115 (closed by ``close``)

    def publish(self, index: bytes, record: bytes, replacing: bool) -> bool:
        """Upload tar and index, then create the commit record; see ``LocalShard.publish``.

        Files of a record that is replaced stay, for those who read them right now.

        Raises:
            OSError: the store can't be reached, is full or refuses, see ``storage.attempt``.
        """
        if not replacing and self._record.exists():
            return False
        wins = may_win = False
        try:
            self._tar.upload(self.tar)
            self._index.write_bytes(index)
            may_win = True  # from the moment that the record is on its way
            if replacing:
                self._record.write_bytes(record)
                wins = True
            else:
                wins, may_win = self._create(record)
        finally:
            if not (wins or may_win):
                self._withdraw()
        return wins

    def close(self) -> None:
        """Remove the local file."""
        self.tar.close()

    def _create(self, record: bytes) -> tuple[bool, bool]:
        """Create the commit record.

        Returns:
            Whether it is the shard's, and whether it may become so later: a request that seemed
            to fail may be carried out all the same. Then the files that it names have to stay.
        """
        may_win = False
        for pause_s in (*storage.PAUSES_S, None):
            try:
                self._record.create(record)
                return True, True
            except FileExistsError:
                break
            except OSError as error:
                may_win = True
                if pause_s is None or isinstance(error, PermissionError):
                    raise
                time.sleep(pause_s)
        with suppress(FileNotFoundError):  # taken back in this very moment, by --retry-failed
            return self._record.read_bytes() == record, may_win
        return False, may_win

    def _withdraw(self) -> None:
        for path in (self._tar, self._index):
            with suppress(OSError):  # then it is left over; why this shard failed matters more
                path.unlink(missing_ok=True)


def shard_files(folder: Path, shard: int, attempt: str) -> LocalShard | RemoteShard:
    """Begin to write a shard of the column in ``folder``."""
    return (LocalShard if is_local(folder) else RemoteShard)(folder, shard, attempt)


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Hold an exclusive lock on the folder itself, so that no lock file is left behind.

    Where there are no such locks, as on object stores, nothing is held.
    """
    if not is_local(folder):
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _lock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def has_locks(folder: Path) -> bool:
    """Return whether a local folder can be locked."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        return _lock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)


def _lock(descriptor: int, how: int) -> bool:
    """Lock a folder; return False where folders can't be locked."""
    try:
        fcntl.flock(descriptor, how)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return False
    return True
