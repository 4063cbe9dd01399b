"""The column writer: the rows of one shard go into a tar and an index, then the commit.

Rows are streamed to temporaries, so a killed writer leaves nothing a reader would look at.
`ShardWriter.commit` publishes tar, index and, last, the commit record (``pipeline.publish``); the
first writer of a shard wins and every later one is told so. The same rows write the same bytes.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from pipeline.files import naming_a_full_disk, write_json
from pipeline.format import (
    INDEX_DTYPE,
    LOG_VARIANCE_RANGE,
    OK,
    Column,
    ColumnSpec,
    FormatError,
    canonical_json,
    check_key,
    keys_hash,
    open_column,
    status_counts,
)
from pipeline.publish import shard_files


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
        write_json(folder / "column.json", asdict(spec))
    return open_column(root, spec.directory, plan_id)


class ShardWriter:
    """Writes one shard of one column; a context manager.

    Leaving the block without a successful `commit`, by an exception or not, removes the
    temporaries: nothing is published. Its methods may be called in different threads, one after
    the other.

    Args:
        column: the column, from `create_column`.
        shard: number of the shard.
        attempt: name of this attempt, matching the key pattern; unique among all writers.
    """

    def __init__(self, column: Column, shard: int, attempt: str) -> None:
        self._column, self._shard, self._attempt = column, shard, check_key(attempt)
        self._keys: list[str] = []
        self._records: list[np.ndarray] = []
        self._sums = np.zeros((2, 1))  # of values and of squares, one per channel
        self._num_values, self._tar_bytes, self._tar_crc = 0, 0, 0

    def __enter__(self) -> ShardWriter:
        self._files = shard_files(self._column.path, self._shard, self._attempt)
        return self

    def __exit__(self, *exception: object) -> None:
        self._files.close()

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
            with naming_a_full_disk(self._files.place):
                record["offset"], record["crc32c"] = self._write_member(key, array)
            record["nbytes"] = array.nbytes
            self._sums = self._sums + channel_sums(array, self._column.spec)
            self._num_values += array.size // array.shape[self._column.spec.channel_axis]
        self._records.append(record)

    def commit(self, extra: dict[str, Any] | None = None, replacing: bool = False) -> bool:
        """Publish the shard, unless another writer has.

        Args:
            extra: more facts for the commit record: timings, versions, host.
            replacing: take the place of the shard that is committed, unless another writer has
                published it since this one began.

        Returns:
            Whether this writer's shard is the one published.

        Raises:
            NoRoomError: the disk, or the store, is full; nothing is published.
            OSError: of an object store: ``errno.EIO`` where the network fails for long, EACCES
                where it refuses.
        """
        canonical_json(extra or {})  # unfit facts must fail before anything is published
        with naming_a_full_disk(self._files.place):
            self._finish_tar()
        index = io.BytesIO()
        np.save(index, np.array(self._records, dtype=INDEX_DTYPE))
        record = {**(extra or {}), **self._record(google_crc32c.value(index.getvalue()))}
        with naming_a_full_disk(self._column.path / self._files.tar_name):
            data = f"{canonical_json(record)}\n".encode()
            return self._files.publish(index.getvalue(), data, replacing)

    def _check(self, key: str, array: np.ndarray) -> None:
        spec = self._column.spec
        fits = array.dtype == spec.dtype and array.ndim == len(spec.axes) <= 4 and array.size
        if not fits or not array.flags.c_contiguous:
            raise FormatError(
                f"row {key}: {array.dtype} array of shape {array.shape}, strides {array.strides}; "
                f"expected a C-contiguous {spec.dtype} one with axes {spec.axes} (at most 4)"
            )
        if spec.stores_moments and array.shape[spec.channel_axis] % 2:
            raise FormatError(
                f"row {key}: {array.shape[spec.channel_axis]} channels of means and log-variances, "
                "expected as many of one as of the other"
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
        self._files.tar.write(data)
        self._tar_crc = google_crc32c.extend(self._tar_crc, data)
        self._tar_bytes += len(data)

    def _finish_tar(self) -> None:
        """End the archive as `tarfile` does: two empty blocks, then up to a whole record."""
        end = 2 * tarfile.BLOCKSIZE
        self._write(bytes(end + -(self._tar_bytes + end) % tarfile.RECORDSIZE))

    def _record(self, index_crc: int) -> dict[str, Any]:
        codes = [int(record["status"]) for record in self._records]
        total, squares = self._sums.tolist()
        return {
            "plan_id": self._column.plan_id,
            "column": self._column.path.name,
            "shard": self._shard,
            "tar": self._files.tar_name,
            "index": self._files.index_name,
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


def channel_sums(array: np.ndarray, spec: ColumnSpec) -> np.ndarray:
    """Return the sums of values and of their squares, float64 [2, channels].

    Of moments those that latents drawn from them have on average, so that the statistics are of
    what a model gets: E[x] is the mean, E[x²] = mean² + variance; [2, channels / 2].
    """
    others = tuple(axis for axis in range(array.ndim) if axis != spec.channel_axis)
    values, variance = array.astype(np.float64), 0.0
    if spec.stores_moments:
        values, log_variance = np.split(values, 2, axis=spec.channel_axis)
        variance = np.exp(np.clip(log_variance, *LOG_VARIANCE_RANGE)).sum(axis=others)
    total = values.sum(axis=others)
    return np.stack([total, np.square(values, out=values).sum(axis=others) + variance])
