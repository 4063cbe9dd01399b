"""Clips with the same content as one earlier in the plan: found by hash once all facts are there.

The facts stay as they are; ``duplicates.parquet`` beside them lists what was found. Policy
"drop" also takes the payloads out of the committed shards. Both depend on the facts alone, not
on the order in which shards were encoded, and can be done again at any time.
"""

from __future__ import annotations

import secrets
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import format as fmt
from pipeline.checks import count_flags, facts_path, read_usable
from pipeline.config import CheckSettings
from pipeline.files import sync_folder
from pipeline.shards import ShardWriter
from pipeline.tables import write_parquet

DUPLICATES_NAME = "duplicates.parquet"
DUPLICATE = fmt.STATUS_CODE["duplicate"]


class Settled(NamedTuple):
    """What the facts of all clips say together.

    Attributes:
        flagged: flag -> number of clips that have it and of which something can be encoded.
        num_dropped: duplicates that have no latents in any column.
        complaint: why the columns are not what the settings ask for, or None.
    """

    flagged: Counter[str]
    num_dropped: int = 0
    complaint: str | None = None


def settle_duplicates(
    plan: fmt.Plan, columns: dict[str, fmt.Column], folder: Path, checks: CheckSettings
) -> Settled:
    """Find the duplicates among all clips, and drop them where the policy says so.

    Args:
        plan: head of the plan.
        columns: by modality; all their shards are committed.
        folder: the facts.
        checks: the policy for duplicates.
    """
    clip_columns = [column for modality, column in columns.items() if modality != "text"]
    rows_per_shard = plan.shard_rows().tolist()
    known = [shard for shard in range(len(rows_per_shard)) if facts_path(folder, shard).exists()]
    if not clip_columns or not known:
        return Settled(Counter())
    duplicates = find_duplicates(folder, known)
    write_duplicates(folder, duplicates)
    if checks.duplicate == "flag":
        flagged = count_flags(folder, known, {})
        return Settled(flagged + Counter(duplicate=len(duplicates)))
    doomed = _rows_by_shard(duplicates)
    flagged = count_flags(folder, known, doomed)
    if lacking := len(rows_per_shard) - len(known):
        return Settled(
            flagged,
            0,
            f"duplicates can't be dropped: {folder} lacks {lacking} of {len(rows_per_shard)} "
            "shards, which were encoded with other checks or another picture size; use those "
            "settings again, or another --out",
        )
    reopened = set[int]()
    for column in clip_columns:
        reopened |= drop_rows(column, folder, doomed, rows_per_shard)
    if reopened:
        return Settled(
            flagged,
            len(duplicates),
            f"{len(reopened)} shards lack clips whose first copy has no latents any more; run the "
            "same command again to encode them",
        )
    return Settled(flagged, len(duplicates))


def find_duplicates(folder: Path, shards: list[int]) -> pa.Table:
    """Find the clips whose content hash an earlier clip has.

    Only clips count of which something can be encoded, picture or sound: what has no latents
    anyway is no copy, and nothing is a copy of it. Hashes are sorted as numbers: two million clips
    take 4 s and 200 MB on one core.

    Args:
        folder: the facts.
        shards: those that have facts.

    Returns:
        A table of shard, row, key and first_key, in plan order.
    """
    hashes, places = _hashes(folder, shards)
    high, low = hashes.T
    order = np.lexsort((low, high))  # stable: equal hashes stay in plan order
    same = np.zeros(len(order), dtype=bool)
    same[1:] = (hashes[order][1:] == hashes[order][:-1]).all(axis=1)
    first = np.maximum.accumulate(np.where(same, 0, np.arange(len(order))))
    found = places[order[same]]
    first_places = places[order[first[same]]]
    in_plan_order = np.lexsort(found.T[::-1])
    return _table(folder, found[in_plan_order], first_places[in_plan_order])


def _hashes(folder: Path, shards: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return hashes uint64 [clips, 2] and (shard, row) int32 [clips, 2] of the clips to compare."""
    hashes = [np.zeros((0, 2), dtype=np.uint64)]
    places = [np.zeros((0, 2), dtype=np.int32)]
    for shard in shards:
        found = enumerate(read_usable(folder, shard, "content_hash"))
        hashed = {row: digits for row, digits in found if digits}
        rows, digits = np.array(list(hashed), dtype=np.int64), "".join(hashed.values())
        hashes.append(np.frombuffer(bytes.fromhex(digits), dtype=np.uint64).reshape(-1, 2))
        places.append(np.stack([np.full(len(rows), shard), rows], axis=1).astype(np.int32))
    return np.concatenate(hashes), np.concatenate(places)


def _table(folder: Path, found: np.ndarray, first: np.ndarray) -> pa.Table:
    """Look up the keys of places int32 [duplicates, 2], reading every shard once."""
    places = np.concatenate([found, first])
    keys, order = np.empty(len(places), dtype=object), np.argsort(places[:, 0])
    shards, starts = np.unique(places[order, 0], return_index=True)
    for shard, part in zip(shards.tolist(), np.split(order, starts[1:]), strict=False):
        in_shard = pq.read_table(facts_path(folder, shard), columns=["key"])["key"].to_numpy()
        keys[part] = in_shard[places[part, 1]]
    return pa.table(
        {
            "shard": found[:, 0],
            "row": found[:, 1],
            "key": pa.array(keys[: len(found)], pa.string()),
            "first_key": pa.array(keys[len(found) :], pa.string()),
        }
    )


def write_duplicates(folder: Path, duplicates: pa.Table) -> None:
    """Write what was found beside the facts, unless it is there already."""
    path = folder / DUPLICATES_NAME
    if not path.exists() or not pq.read_table(path).equals(duplicates):
        write_parquet(path, duplicates)


def _rows_by_shard(duplicates: pa.Table) -> dict[int, set[int]]:
    rows: dict[int, set[int]] = {}
    for shard, row in zip(
        *(duplicates[name].to_pylist() for name in ("shard", "row")), strict=True
    ):
        rows.setdefault(shard, set()).add(row)
    return rows


def drop_rows(
    column: fmt.Column, folder: Path, doomed: dict[int, set[int]], rows_per_shard: list[int]
) -> set[int]:
    """Turn the duplicates of a column, rows by shard, into tombstones; others are copied.

    A crash on the way leaves a shard as it was, or without a commit: then the next run encodes
    it again.

    Returns:
        Shards with a tombstone of a clip that is no duplicate any more, because its first copy
        failed when it was tried again. Their commits are taken back.
    """
    reopened = set[int]()
    for shard in sorted(column.committed_shards()):
        wanted = doomed.get(shard, set())
        if not wanted and "duplicate" not in column.committed(shard)["status_counts"]:
            continue
        status = column.index(shard, rows_per_shard[shard])["status"]
        if set(np.flatnonzero(status == DUPLICATE).tolist()) - wanted:
            _take_back_commit(column, shard)
            reopened.add(shard)
        elif rows := wanted & set(np.flatnonzero(status == fmt.OK).tolist()):
            keys = pq.read_table(facts_path(folder, shard), columns=["key"])["key"].to_pylist()
            _drop_of_shard(column, shard, keys, rows)
    return reopened


def _drop_of_shard(column: fmt.Column, shard: int, keys: list[str], doomed: set[int]) -> None:
    """Write a shard again without the payloads of some rows; timings of its commit are kept."""
    record, index = column.committed(shard), column.index(shard, len(keys))
    attempt = f"duplicates-{secrets.token_hex(4)}"
    with ShardWriter(column, shard, attempt) as writer, column.tar_path(shard).open("rb") as tar:
        for row, key in enumerate(keys):
            if row in doomed:
                writer.add(key, None, DUPLICATE)
            elif index["status"][row] != fmt.OK:
                writer.add(key, None, int(index["status"][row]))
            else:
                tar.seek(int(index["offset"][row]))
                payload = tar.read(int(index["nbytes"][row]))
                if google_crc32c.value(payload) != index["crc32c"][row]:
                    raise fmt.FormatError(
                        f"{tar.name} row {row} ({key}): the payload is damaged; remove "
                        f"{fmt.shard_name(shard)}.json beside it and run the same command again"
                    )
                writer.add(key, _array(column, payload, index["shape"][row]))
        _take_back_commit(column, shard)
        writer.commit(record)


def _array(column: fmt.Column, payload: bytes, padded_shape: np.ndarray) -> np.ndarray:
    shape = padded_shape[: len(column.spec.axes)].tolist()
    return np.frombuffer(payload, dtype=column.spec.dtype).reshape(shape)


def _take_back_commit(column: fmt.Column, shard: int) -> None:
    """Make a shard count as not encoded, before any of its files changes."""
    (column.path / f"{fmt.shard_name(shard)}.json").unlink()
    sync_folder(column.path)
