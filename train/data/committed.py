"""Committed shards of a column, whose files are compared with record and plan before any use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.format import OK, Column, FormatError, shard_name
from pipeline.records import (
    CommitRecord,
    read_index,
    read_record,
    record_path,
    record_problems,
    repair,
)


class MissingFileError(FormatError, FileNotFoundError):
    """A file of a committed shard is not there: it was removed, or a file system is away."""


@dataclass(frozen=True)
class CommittedShard:
    """A shard whose index, and whose tar's size, are what its commit record states.

    Attributes:
        record: the commit record.
        index: ``INDEX_DTYPE`` [rows]; every array lies inside the tar.
    """

    record: CommitRecord
    index: np.ndarray


def check_all_committed(column: Column, num_shards: int) -> None:
    """Check by one listing that every planned shard is committed.

    Raises:
        FormatError: some are not; names the first of them.
    """
    missing = sorted(set(range(num_shards)) - column.committed_shards())
    if missing:
        names = ", ".join(shard_name(shard) for shard in missing[:5])
        raise FormatError(
            f"{column.path}: {len(missing)} of {num_shards} shards are not committed "
            f"({names}{', …' if len(missing) > 5 else ''}); run pipeline.encode again"
        )


def read_committed(
    column: Column, shard: int, rows_per_shard: np.ndarray, keys: Sequence[str] | None = None
) -> CommittedShard:
    """Read commit record and index of a shard, and look at the size of its tar.

    Args:
        column: the column.
        shard: number of the shard.
        rows_per_shard: int64 [num_shards], from the plan.
        keys: planned keys of the rows; None where they are compared later, or not planned (text).

    Raises:
        FormatError: record, index, tar or plan don't fit together.
        MissingFileError: one of the files is not there.
        OSError: one can't be read.
    """
    record = read_record(column, shard)
    if record is None:
        path = record_path(column, shard)
        raise MissingFileError(
            f"{path} is missing: the shard is not committed; run pipeline.encode"
        )
    for problem in record_problems(column, shard, record, rows_per_shard, keys):
        raise FormatError(problem)
    try:
        index = read_index(column, shard, record)
    except FormatError as error:
        if not (column.path / record.index).exists():
            raise MissingFileError(str(error)) from None
        raise
    check_shapes(column, shard, index)
    check_tar_size(column, shard, record)
    return CommittedShard(record, index)


def check_shapes(column: Column, shard: int, index: np.ndarray) -> None:
    """Check that every array has all axes of its column and no more.

    Raises:
        FormatError: one has not.
    """
    axes = column.spec.axes
    has_axis = index["shape"] > 0
    is_wrong = (has_axis != (np.arange(4) < len(axes))).any(axis=1) & (index["status"] == OK)
    if is_wrong.any():
        row = int(np.flatnonzero(is_wrong)[0])
        raise FormatError(
            f"{column.path} shard {shard} row {row}: shape is {index['shape'][row].tolist()}, "
            f"expected sizes along {axes}, then zeros; {repair(column, shard)}"
        )


def check_tar_size(column: Column, shard: int, record: CommitRecord) -> None:
    """Compare a tar's size with its commit record.

    Raises:
        FormatError: it has another size.
        MissingFileError: it is missing.
    """
    path = column.path / record.tar
    try:
        found = path.stat().st_size
    except FileNotFoundError:
        raise MissingFileError(
            f"{path} is missing though committed; {repair(column, shard)}"
        ) from None
    if found != record.tar_bytes:
        raise FormatError(
            f"{path}: {found} bytes, expected {record.tar_bytes} as committed: it was cut short "
            f"or replaced; {repair(column, shard)}"
        )
