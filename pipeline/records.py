"""Commit records, read by programs that trust nothing: typed, and compared with plan and index.

Imports neither torch nor Ray, so that a command starts at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import google_crc32c
import numpy as np
from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass

from pipeline import format as fmt
from pipeline.files import map_ahead, read_file

Count = Annotated[int, Field(strict=True, ge=0, lt=2**63)]
Crc = Annotated[int, Field(strict=True, ge=0, lt=2**32)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Seconds = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=0)]
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9_.-]*$")]  # leads nowhere else
FactsName = Annotated[str, Field(pattern=r"^(facts@[A-Za-z0-9_-]+)?$")]


@checked_dataclass(frozen=True)
class ChannelSums:
    """Sums over a shard: values per channel, and one sum and sum of squares a channel."""

    count: Count
    sum: list[Number]
    sum_of_squares: list[Number]


@checked_dataclass(frozen=True)
class CommitRecord:
    """What a commit record says of its shard, with the types that it must have.

    ``facts`` (name of the folder of facts), ``run_id``, ``host``, ``seconds`` and ``encode_s`` are
    the encoder's notes, empty or None where another writer left none.
    """

    shard: Count
    tar: FileName
    index: FileName
    rows: Count
    ok: Count
    status_counts: dict[str, Count]
    keys_hash: str
    tar_bytes: Count
    tar_crc32c: Crc
    index_crc32c: Crc
    channels: ChannelSums
    facts: FactsName = ""
    run_id: str = ""
    host: str = ""
    seconds: Seconds | None = None
    encode_s: Seconds | None = None


RECORD_TYPE = TypeAdapter(CommitRecord)


@dataclass
class Totals:
    """Sums of the commit records of a column."""

    shards: int = 0
    rows: int = 0
    ok: int = 0
    bytes: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    channels: list[ChannelSums] = field(default_factory=list)  # of shards that hold a payload

    def add(self, record: CommitRecord) -> None:
        """Take in one shard."""
        self.shards += 1
        self.rows += record.rows
        self.ok += record.ok
        self.bytes += record.tar_bytes
        self.statuses.update(record.status_counts)
        if record.channels.count:
            self.channels.append(record.channels)

    def statistics(self) -> dict[str, Any] | None:
        """Return what ``statistics_of`` does.

        Raises:
            FormatError: the shards have not the same number of channels.
        """
        lengths = {len(values) for c in self.channels for values in (c.sum, c.sum_of_squares)}
        if len(lengths) > 1:
            raise fmt.FormatError(
                f"commit records hold sums of {sorted(lengths)} channels, expected as many in all "
                "shards; pipeline.verify --full names them"
            )
        return statistics_of(vars(sums) for sums in self.channels)


def sum_records(column: fmt.Column) -> Totals:
    """Sum all commit records of a column.

    Raises:
        FormatError: one of them is damaged.
    """
    totals, shards = Totals(), sorted(column.committed_shards())
    for record in map_ahead(column.path, lambda shard: read_record(column, shard), shards):
        if record is not None:
            totals.add(record)
    return totals


def repair(column: fmt.Column, shard: int) -> str:
    """Return how a damaged shard is mended."""
    return f"remove {record_path(column, shard)} and run pipeline.encode again"


def record_path(column: fmt.Column, shard: int) -> Path:
    """Return where the commit record of a shard is, or would be."""
    return column.path / f"{fmt.shard_name(shard)}.json"


def read_record(column: fmt.Column, shard: int) -> CommitRecord | None:
    """Read a commit record; None where the shard is not committed (any more).

    Raises:
        FormatError: it is another data set's, lacks a key, has a wrong type or contradicts itself.
    """
    try:
        raw = column.commit(shard)
        record = RECORD_TYPE.validate_python(raw) if raw is not None else None
    except ValidationError as error:
        path = record_path(column, shard)
        message = f"{path}: {first_error(error)}; {repair(column, shard)}"
        raise fmt.FormatError(message) from None
    if record is not None:
        _check_sums(column, shard, record)
    return record


def records_or_errors(
    column: fmt.Column,
) -> Iterator[tuple[int, CommitRecord | fmt.FormatError | None]]:
    """Yield every committed shard, sorted, with what ``read_record`` returns or raises."""

    def read(shard: int) -> CommitRecord | fmt.FormatError | None:
        try:
            return read_record(column, shard)
        except fmt.FormatError as error:
            return error

    shards = sorted(column.committed_shards())
    yield from zip(shards, map_ahead(column.path, read, shards), strict=True)


def first_error(error: ValidationError) -> str:
    """Return where the first wrong value is, what it is and what was expected."""
    first = error.errors()[0]
    found = "missing" if first["type"] == "missing" else repr(first["input"])[:80]
    return f"{'.'.join(str(part) for part in first['loc'])} is {found}, expected: {first['msg']}"


def _check_sums(column: fmt.Column, shard: int, record: CommitRecord) -> None:
    counts = record.status_counts
    is_sound = sum(counts.values()) == record.rows and counts.get("ok", 0) == record.ok
    if not is_sound or not set(counts) <= set(fmt.STATUSES):
        raise fmt.FormatError(
            f"{record_path(column, shard)}: status_counts are {counts}, expected known statuses "
            f"that sum to rows {record.rows}, with ok {record.ok}; {repair(column, shard)}"
        )


def record_problems(
    column: fmt.Column,
    shard: int,
    record: CommitRecord,
    rows_per_shard: np.ndarray,
    keys: Sequence[str] | None,
) -> Iterator[str]:
    """Yield how a commit record differs from the plan.

    Args:
        column: the column.
        shard: number of the shard.
        record: its commit record.
        rows_per_shard: int64 [num_shards], from the plan.
        keys: the plan's keys of the shard, or None where they are not compared.
    """
    path = record_path(column, shard)
    if shard >= len(rows_per_shard):
        yield f"{path}: shard {shard} of a plan of {len(rows_per_shard)} shards; remove its files"
        return
    found: dict[str, Any] = {"shard": record.shard, "rows": record.rows}
    expected: dict[str, Any] = {"shard": shard, "rows": int(rows_per_shard[shard])}
    if keys is not None:
        found["keys_hash"], expected["keys_hash"] = record.keys_hash, fmt.keys_hash(keys)
    for name, value in expected.items():
        if found[name] != value:
            yield (
                f"{path}: {name} is {found[name]}, expected {value} as planned; "
                f"{repair(column, shard)}"
            )


def read_index(column: fmt.Column, shard: int, record: CommitRecord) -> np.ndarray:
    """Read a committed shard's index and compare it with the commit record.

    Raises:
        FormatError: it is missing, or not what the record states.
    """
    path = column.path / record.index
    try:
        data = read_file(path)
    except FileNotFoundError:
        raise fmt.FormatError(
            f"{path} is missing though committed; {repair(column, shard)}"
        ) from None
    found = google_crc32c.value(data)
    if found != record.index_crc32c:
        raise fmt.FormatError(
            f"{path}: crc32c is {found:08x}, expected {record.index_crc32c:08x}; "
            f"{repair(column, shard)}"
        )
    index = column.parse_index(path, data, record.rows, record.tar_bytes)
    counts = fmt.status_counts(index["status"])
    if counts != {name: count for name, count in record.status_counts.items() if count}:
        raise fmt.FormatError(
            f"{path}: statuses are {counts}, expected {record.status_counts} as committed; "
            f"{repair(column, shard)}"
        )
    is_tombstone = index["status"] != fmt.OK
    if index["nbytes"][is_tombstone].any():
        row = int(np.flatnonzero(is_tombstone & (index["nbytes"] > 0))[0])
        raise fmt.FormatError(
            f"{path} row {row}: {index['nbytes'][row]} bytes of a row that failed, expected 0; "
            f"{repair(column, shard)}"
        )
    return index


def statistics_of(sums: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the channel statistics of a column from its shards' "channels".

    Returns:
        ``count`` (values per channel), ``mean`` and ``std`` (lists, one value a channel); None
        where the shards hold no payload.
    """
    count, total, squares = 0, np.zeros(1), np.zeros(1)
    for shard in sums:
        if shard["count"]:
            count += shard["count"]
            total = total + np.array(shard["sum"])
            squares = squares + np.array(shard["sum_of_squares"])
    if count == 0:
        return None
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 0))
    return {"count": count, "mean": mean.tolist(), "std": std.tolist()}
