"""What a view builds on: the plan's rows and the indices of committed shards, all checked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.format import INDEX_DTYPE, Column, FormatError, Plan, keys_hash, shard_name
from train.data.payload import REPAIR


@dataclass(frozen=True)
class PlanRows:
    """All clips of a plan, in plan order.

    Attributes:
        shards: int64 [N].
        rows: int64 [N], row within the shard.
        keys: N clip keys.
        splits: object [N], names of splits.
        text_rows: int64 [N], row of the caption among all captions.
    """

    shards: np.ndarray
    rows: np.ndarray
    keys: tuple[str, ...]
    splits: np.ndarray
    text_rows: np.ndarray


def read_plan_rows(root: Path, plan: Plan) -> PlanRows:
    """Read plan.parquet.

    Raises:
        FormatError: it is missing, unreadable, or does not match plan.json.
    """
    path = root / "plan.parquet"
    try:
        table = pq.read_table(path, columns=["shard", "row", "key", "split", "text_row"])
        table = table.slice(0, plan.num_clips)  # an extension that was stopped may stand behind it
    except (OSError, pa.ArrowException) as error:
        raise FormatError(f"{path} can't be read ({error}); restore it, or encode again") from None
    rows_per_shard = plan.shard_rows()
    shards = np.repeat(np.arange(len(rows_per_shard)), rows_per_shard)
    rows = np.arange(len(shards)) - np.repeat(
        np.cumsum(rows_per_shard) - rows_per_shard, rows_per_shard
    )
    places = (("shard", shards), ("row", rows))
    if not all(np.array_equal(table[name].to_numpy(), expected) for name, expected in places):
        raise FormatError(
            f"{path} holds {table.num_rows} clips, not the {plan.num_clips} of plan.json in order; "
            "the two are of different plans: restore them"
        )
    return PlanRows(
        shards=shards,
        rows=rows,
        keys=tuple(table["key"].to_pylist()),
        splits=table["split"].to_numpy(),
        text_rows=table["text_row"].to_numpy(),
    )


def read_index(
    column: Column, rows_per_shard: np.ndarray, keys: tuple[str, ...] | None
) -> np.ndarray:
    """Read the indices of all shards of a column.

    Args:
        column: the column.
        rows_per_shard: int64 [num_shards], from the plan.
        keys: keys of all rows, or None for text, whose keys the plan does not hold.

    Returns:
        ``INDEX_DTYPE`` [sum(rows_per_shard)].

    Raises:
        FormatError: shards are not committed, or a file is not what its commit record states.
    """
    missing = sorted(set(range(len(rows_per_shard))) - column.committed_shards())
    if missing:
        names = ", ".join(shard_name(shard) for shard in missing[:5])
        raise FormatError(
            f"{column.path}: {len(missing)} of {len(rows_per_shard)} shards are not committed "
            f"({names}{', …' if len(missing) > 5 else ''}); run pipeline.encode again"
        )
    indices, first = [np.empty(0, INDEX_DTYPE)], 0
    for shard, num_rows in enumerate(rows_per_shard.tolist()):
        shard_keys = None if keys is None else keys[first : first + num_rows]
        check_shard(column, shard, num_rows, shard_keys)
        indices.append(column.index(shard, num_rows))
        first += num_rows
    return np.concatenate(indices)


def check_shard(column: Column, shard: int, num_rows: int, keys: tuple[str, ...] | None) -> None:
    """Compare a committed shard's files with its commit record, and the record with the plan.

    Raises:
        FormatError: they differ; names the file, what was found and what was expected.
    """
    record = column.commit(shard) or {}
    tar, index = (column.path / record[name] for name in ("tar", "index"))
    try:
        found = {
            "shard": record["shard"],
            "rows": record["rows"],
            "tar_bytes": tar.stat().st_size,
            "index_crc32c": google_crc32c.value(index.read_bytes()),
        }
    except FileNotFoundError as error:
        raise FormatError(f"{error.filename} is missing though committed; {REPAIR}") from None
    expected = {
        "shard": shard,
        "rows": num_rows,
        "tar_bytes": record["tar_bytes"],
        "index_crc32c": record["index_crc32c"],
    }
    if keys is not None:
        found["keys_hash"], expected["keys_hash"] = record["keys_hash"], keys_hash(keys)
    for name, value in expected.items():
        if found[name] != value:
            raise FormatError(
                f"{column.path / shard_name(shard)}: {name} is {found[name]}, expected {value}; "
                f"{REPAIR}"
            )
