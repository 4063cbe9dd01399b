"""The column writer: the rows of one shard go into a tar and an index, then the commit.

Rows are streamed to hidden temporaries, so a killed writer leaves nothing a reader would look
at. `ShardWriter.commit` publishes tar, index and, last, the commit record; the first writer of a
shard wins and every later one is told so. The same rows write the same bytes. The folder lock
needs a file system with `flock` on directories (local disks, Lustre, BeeGFS, CephFS).
"""

from __future__ import annotations

import errno
import fcntl
import io
import os
import shutil
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from pipeline.files import sync_folder, write_durably, write_json
from pipeline.format import (
    INDEX_DTYPE,
    OK,
    Column,
    ColumnSpec,
    FormatError,
    canonical_json,
    check_key,
    keys_hash,
    open_column,
    shard_name,
    status_counts,
)


class NoRoomError(Exception):
    """The disk, or the quota on it, is full."""


def create_column(root: Path, spec: ColumnSpec, plan_id: str) -> Column:
    """Open the column of ``spec`` under ``root``; make its folder and column.json if absent.

    Raises:
        FormatError: the axes lack a channel, or the column.json there is another's.
    """
    if "channel" not in spec.axes:
        raise FormatError(f"codec {spec.codec.get('name')!r}: axes {spec.axes} lack a channel axis")
    folder = root / spec.directory
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "column.json").exists():
        with naming_a_full_disk(folder / "column.json"):
            write_json(folder / "column.json", asdict(spec))
    return open_column(root, spec.directory, plan_id)


class ShardWriter:
    """Writes one shard of one column; a context manager.

    Leaving the block without a successful `commit`, by an exception or not, removes the
    temporaries: nothing is published.

    Args:
        column: the column, from `create_column`.
        shard: number of the shard.
        attempt: name of this attempt, matching the key pattern; unique among all writers.
    """

    def __init__(self, column: Column, shard: int, attempt: str) -> None:
        self._column, self._shard, self._attempt = column, shard, check_key(attempt)
        hidden = f".{shard_name(shard)}.{attempt}"
        self._tar_path = column.path / f"{hidden}.tmp"
        self._index_path = column.path / f"{hidden}.idx.tmp"
        self._record_path = column.path / f"{hidden}.json.tmp"
        self._keys: list[str] = []
        self._records: list[np.ndarray] = []
        self._sums = np.zeros((2, 1))  # of values and of squares, one per channel
        self._num_values, self._tar_bytes, self._tar_crc = 0, 0, 0

    def __enter__(self) -> ShardWriter:
        self._tar_path.unlink(missing_ok=True)
        self._tar = self._tar_path.open("xb")
        return self

    def __exit__(self, *exception: object) -> None:
        with suppress(OSError):  # the flush to a full disk, whose first error is on its way up
            self._tar.close()
        for path in (self._tar_path, self._index_path, self._record_path):
            path.unlink(missing_ok=True)

    def add(self, key: str, array: np.ndarray | None, status: int = OK) -> None:
        """Write the next row, in plan order.

        Args:
            key: key of the row, unique in the shard.
            array: finite values in the column's axes and dtype, or None for a tombstone.
            status: code of `format.STATUSES`; ``OK`` exactly where there is an array.

        Raises:
            FormatError: the array is not what column.json promises.
            NoRoomError: the disk is full.
        """
        check_key(key)
        self._keys.append(key)
        record = np.zeros((), INDEX_DTYPE)
        record["status"] = status
        if (array is None) != (status != OK):
            raise FormatError(
                f"row {key}: status {status} {'without' if array is None else 'with'}"
                " an array; a tombstone has neither array nor status ok"
            )
        if array is not None:
            self._check(key, array)
            record["shape"][: array.ndim] = array.shape
            with naming_a_full_disk(self._tar_path):
                record["offset"], record["crc32c"] = self._write_member(key, array)
            record["nbytes"] = array.nbytes
            axis = self._column.spec.channel_axis
            self._sums = self._sums + channel_sums(array, axis)
            self._num_values += array.size // array.shape[axis]
        self._records.append(record)

    def commit(self, extra: dict[str, Any] | None = None) -> bool:
        """Publish the shard, unless another writer has.

        Args:
            extra: more facts for the commit record: timings, versions, host.

        Returns:
            Whether this writer's shard is the one published.

        Raises:
            NoRoomError: the disk is full; nothing is published.
        """
        canonical_json(extra or {})  # unfit facts must fail before anything is published
        with naming_a_full_disk(self._tar_path):
            self._finish_tar()
            index_crc = self._write_index()
            with locked_folder(self._column.path):
                stem = self._column.path / shard_name(self._shard)
                wins = not stem.with_suffix(".json").exists() and self._owns_temporary()
                if wins:
                    self._publish(stem, {**(extra or {}), **self._record(stem, index_crc)})
                if stem.with_suffix(".json").exists():  # a killed writer's files, or the losers'
                    for path in self._column.path.glob(f".{stem.name}.*.tmp"):
                        path.unlink(missing_ok=True)
        return wins

    def _check(self, key: str, array: np.ndarray) -> None:
        spec = self._column.spec
        fits = array.dtype == spec.dtype and array.ndim == len(spec.axes) <= 4 and array.size
        if not fits or not array.flags.c_contiguous:
            raise FormatError(
                f"row {key}: {array.dtype} array of shape {array.shape}, strides {array.strides}; "
                f"expected a C-contiguous {spec.dtype} one with axes {spec.axes} (at most 4)"
            )

    def _write_member(self, key: str, array: np.ndarray) -> tuple[int, int]:
        """Append one tar member; return offset and crc32c of the array's own bytes."""
        name = f"{key}.{self._column.spec.modality}.npy"
        self._write(member_header(name, array.shape, array.dtype))
        offset = self._tar_bytes
        payload: Any = array.reshape(-1).view(np.uint8)
        self._write(payload)
        self._write(bytes(-self._tar_bytes % tarfile.BLOCKSIZE))
        return offset, google_crc32c.value(payload)

    def _write(self, data: Any) -> None:
        self._tar.write(data)
        self._tar_crc = google_crc32c.extend(self._tar_crc, data)
        self._tar_bytes += len(data)

    def _finish_tar(self) -> None:
        """End the archive as `tarfile` does: two empty blocks, then up to a whole record."""
        end = 2 * tarfile.BLOCKSIZE
        self._write(bytes(end + -(self._tar_bytes + end) % tarfile.RECORDSIZE))
        self._tar.flush()
        os.fsync(self._tar.fileno())

    def _write_index(self) -> int:
        """Write the index's temporary and return its crc32c."""
        buffer = io.BytesIO()
        np.save(buffer, np.array(self._records, dtype=INDEX_DTYPE))
        write_durably(self._index_path, buffer.getvalue())
        return google_crc32c.value(buffer.getvalue())

    def _owns_temporary(self) -> bool:
        """Whether the name still leads to our file: the winner removes all others."""
        with suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(self._tar.fileno()), self._tar_path.stat())
        return False

    def _record(self, stem: Path, index_crc: int) -> dict[str, Any]:
        codes = [int(record["status"]) for record in self._records]
        total, squares = self._sums.tolist()
        return {
            "plan_id": self._column.plan_id,
            "column": self._column.path.name,
            "shard": self._shard,
            "tar": f"{stem.name}.tar",
            "index": f"{stem.name}.idx.npy",
            "rows": len(codes),
            "ok": codes.count(OK),
            "status_counts": status_counts(codes),
            "keys_hash": keys_hash(self._keys),
            "tar_bytes": self._tar_bytes,
            "tar_crc32c": self._tar_crc,
            "index_crc32c": index_crc,
            "channels": {"count": self._num_values, "sum": total, "sum_of_squares": squares},
            "attempt": self._attempt,
        }

    def _publish(self, stem: Path, record: dict[str, Any]) -> None:
        """Give the files their names, the record's last; a crash before it leaves no shard."""
        write_durably(self._record_path, f"{canonical_json(record)}\n".encode())
        self._tar_path.rename(self._column.path / record["tar"])
        self._index_path.rename(self._column.path / record["index"])
        sync_folder(self._column.path)
        # A link, not a rename: it can't replace a record that is there already.
        stem.with_suffix(".json").hardlink_to(self._record_path)
        sync_folder(self._column.path)


def member_header(name: str, shape: Sequence[int], dtype: np.dtype) -> bytes:
    """Return what stands before an array's own bytes: the USTAR header and the .npy header."""
    npy = io.BytesIO()
    descr = np.lib.format.dtype_to_descr(dtype)
    facts = {"descr": descr, "fortran_order": False, "shape": tuple(shape)}
    np.lib.format.write_array_header_1_0(npy, facts)
    member = tarfile.TarInfo(name)
    member.size = npy.tell() + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    member.mode = 0o644
    return member.tobuf(tarfile.USTAR_FORMAT) + npy.getvalue()


def channel_sums(array: np.ndarray, channel_axis: int) -> np.ndarray:
    """Return the sums of values and of their squares, float64 [2, channels]."""
    others = tuple(axis for axis in range(array.ndim) if axis != channel_axis)
    values = array.astype(np.float64)
    return np.stack([values.sum(axis=others), np.square(values, out=values).sum(axis=others)])


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Hold an exclusive lock on the folder itself, so that no lock file is left behind."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def naming_a_full_disk(path: Path) -> Iterator[None]:
    """Turn "no space left" into a `NoRoomError` that says where and how to go on."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = shutil.disk_usage(path.parent).free
        raise NoRoomError(
            f"no room to write {path} ({error.strerror}; {free:,} bytes free); make room and run "
            "the same command again, committed shards are kept"
        ) from error
