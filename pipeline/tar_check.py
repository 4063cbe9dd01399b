"""A shard's tar, byte by byte: what the plan, the index and the commit record make of it.

`pipeline.shards` writes it; here it is read again, front to back and once. Its bytes leave no
choice: headers follow from key, shape and dtype, payloads from their checksums, the rest is zero.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import google_crc32c
import numpy as np

from pipeline.format import OK, Column, ColumnSpec
from pipeline.records import CommitRecord
from pipeline.shards import channel_sums, member_header

# Sums are bit-equal when the numpy that wrote them adds them up; another may add in another order.
SUMS_TOLERANCE = 1e-9
HEADER_FIELDS = ("name", "size", "mode", "uid", "gid", "mtime", "type", "uname", "gname")


class ChecksummedReader:
    """Reads a file front to back; ``crc32c`` covers what was read so far."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.position, self.crc32c = 0, 0

    def read(self, nbytes: int) -> bytes:
        """Return the next bytes; fewer only at the end of the file."""
        data = self._file.read(nbytes)
        self.position += len(data)
        self.crc32c = google_crc32c.extend(self.crc32c, data)
        return data


class MemberError(Exception):
    """A member is not what it should be.

    Attributes:
        is_end: whether the tar ends in it, so that no other member follows.
    """

    def __init__(self, message: str, is_end: bool = False) -> None:
        super().__init__(message)
        self.is_end = is_end


def check_tar(
    column: Column, record: CommitRecord, index: np.ndarray, keys: Sequence[str]
) -> Iterator[tuple[int | None, str]]:
    """Read a committed shard's tar and yield (row, what was found and expected) of all damage.

    A row is named once, by the first thing that is wrong with it; it is None where the whole
    tar is meant. The tar's checksum and sums are compared only where all its rows are sound:
    what spoils a row spoils them too.

    Args:
        column: the column.
        record: the shard's commit record.
        index: its index, ``INDEX_DTYPE`` [rows].
        keys: the planned keys of its rows.
    """
    sums, num_values, is_sound = np.zeros((2, 1)), 0, True
    axis = column.spec.channel_axis
    with (column.path / record.tar).open("rb") as file:
        reader = ChecksummedReader(file)
        for row in np.flatnonzero(index["status"] == OK).tolist():
            try:
                array = read_member(reader, column, keys[row], index[row])
                sums = sums + finite_sums(array, column.spec)
                num_values += array.size // array.shape[axis]
            except MemberError as error:
                is_sound = False
                yield row, str(error)
                if error.is_end:
                    return
        end_bytes = 2 * tarfile.BLOCKSIZE
        end_bytes += -(reader.position + end_bytes) % tarfile.RECORDSIZE
        end = reader.read(end_bytes)
        if any(end) or len(end) < end_bytes or reader.read(1):
            yield None, f"the last member is not followed by {end_bytes} zero bytes and the end"
        elif is_sound:
            yield from ((None, text) for text in differences(record, reader, num_values, sums))


def read_member(reader: ChecksummedReader, column: Column, key: str, entry: Any) -> np.ndarray:
    """Read the next member and return its array.

    Args:
        reader: stands where the member starts.
        column: the column.
        key: the planned key.
        entry: the row's index record (`INDEX_DTYPE`), which fits the size of the tar.

    Raises:
        MemberError: the member differs from what key and index say. The reader is behind it.
    """
    dtype, nbytes = np.dtype(column.spec.dtype), int(entry["nbytes"])
    shape = [int(size) for size in entry["shape"] if size]
    expected = member_header(f"{key}.{column.spec.modality}.npy", shape, dtype)
    header, offset = reader.read(len(expected)), reader.position
    payload = reader.read(nbytes)
    padding_bytes = -reader.position % tarfile.BLOCKSIZE
    padding = reader.read(padding_bytes)
    if len(padding) < padding_bytes or len(payload) < nbytes:
        raise MemberError(f"the tar ends at byte {reader.position}, inside this row", is_end=True)
    if header != expected:
        raise MemberError(header_difference(header, expected))
    if int(entry["offset"]) != offset:
        raise MemberError(f"the array is at byte {offset}, the index says {entry['offset']}")
    if (found := google_crc32c.value(payload)) != int(entry["crc32c"]):
        raise MemberError(f"crc32c is {found:08x}, expected {int(entry['crc32c']):08x}")
    if len(shape) != len(column.spec.axes):
        raise MemberError(f"shape is {shape}, expected axes {column.spec.axes}")
    if any(padding):
        raise MemberError("the bytes behind the array are not zero")
    return np.frombuffer(payload, dtype).reshape(shape)


def header_difference(found: bytes, expected: bytes) -> str:
    """Say in what two headers differ, as far as that can be read."""
    block = tarfile.BLOCKSIZE
    try:
        one, two = (
            tarfile.TarInfo.frombuf(h[:block], "ascii", "replace") for h in (found, expected)
        )
    except tarfile.HeaderError as error:
        return (
            f"no tar header ({error}), expected that of {expected[:100].rstrip(bytes(1)).decode()}"
        )
    for name in HEADER_FIELDS:
        if getattr(one, name) != getattr(two, name):
            values = getattr(one, name), getattr(two, name)
            return f"{name} in the tar header is {values[0]!r}, expected {values[1]!r}"
    if found[:block] != expected[:block]:
        return "the tar header is not the plain USTAR one that pipeline.encode writes"
    return f"the .npy header is {found[block:]!r:.120}, expected {expected[block:]!r:.120}"


def finite_sums(array: np.ndarray, spec: ColumnSpec) -> np.ndarray:
    """Return the channel sums of an array, see ``shards.channel_sums``.

    Raises:
        MemberError: it holds NaN or infinity (finite float16 and float32 can't overflow the sums),
            or means without log-variances.
    """
    if not np.isfinite(array).all():
        raise MemberError("the array holds NaN or infinity, expected finite values")
    if spec.stores_moments and (found := array.shape[spec.channel_axis]) % 2:
        raise MemberError(f"{found} channels of means and log-variances, expected an even number")
    return channel_sums(array, spec)


def differences(
    record: CommitRecord, reader: ChecksummedReader, num_values: int, sums: np.ndarray
) -> Iterator[str]:
    """Yield how a tar whose rows are all sound differs from the commit record."""
    if reader.crc32c != record.tar_crc32c:
        yield f"crc32c is {reader.crc32c:08x}, expected {record.tar_crc32c:08x} as committed"
    channels = record.channels
    total, squares = np.array(channels.sum), np.array(channels.sum_of_squares)
    is_same = channels.count == num_values and total.shape == squares.shape == sums[0].shape
    if is_same:
        scale = np.sqrt(num_values * sums[1])  # bounds the sum of absolute values
        is_same = bool((abs(total - sums[0]) <= SUMS_TOLERANCE * scale).all())
        is_same &= bool((abs(squares - sums[1]) <= SUMS_TOLERANCE * sums[1]).all())
    if not is_same:
        found, expected = (num_values, *sums.tolist()), (channels.count, total, squares)
        yield f"channel sums are {found!s:.150}, expected {expected!s:.150} as committed"
