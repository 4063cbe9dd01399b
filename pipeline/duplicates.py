"""Clips with the same content as one earlier in the plan: found by hash once all facts are there.

The facts stay as they are; ``duplicates.parquet`` beside them lists what was found. Policy
"drop" also takes the payloads out of the committed shards. Both depend on the facts alone, not
on the order in which shards were encoded, and can be done again at any time. What came out is noted
in ``duplicates.parquet``, so that a run with nothing to do need not read all facts again.
"""

from __future__ import annotations

import json
import secrets
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from pipeline import format as fmt
from pipeline.checks import count_flags, facts_path, read_usable, shards_with_facts
from pipeline.config import CheckSettings
from pipeline.files import map_ahead
from pipeline.joint import ROWS_AHEAD, ShardRows
from pipeline.old_rows import take_back
from pipeline.publish import locked_folder
from pipeline.records import record_path
from pipeline.shards import ShardWriter
from pipeline.tables import read_parquet, write_parquet

DUPLICATES_NAME = "duplicates.parquet"
DUPLICATE = fmt.STATUS_CODE["duplicate"]
SETTLED = "settled"  # name of the note in the schema of duplicates.parquet


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
    known = [shard for shard in shards_with_facts(folder) if shard < len(rows_per_shard)]
    if not clip_columns or not known:
        return Settled(Counter())
    with locked_folder(folder):  # drivers that end together settle one after the other
        return _settle(clip_columns, folder, checks, known, rows_per_shard)


def _settle(
    clip_columns: list[fmt.Column],
    folder: Path,
    checks: CheckSettings,
    known: list[int],
    rows_per_shard: list[int],
) -> Settled:
    duplicates = find_duplicates(folder, known)
    if checks.duplicate == "flag":
        flagged = count_flags(folder, known, {})
        settled = Settled(flagged + Counter(duplicate=len(duplicates)))
    else:
        settled = _drop(clip_columns, folder, duplicates, known, rows_per_shard)
    note = {
        "columns": [column.path.name for column in clip_columns],
        "flagged": settled.flagged,
        "num_dropped": settled.num_dropped,
    }
    write_duplicates(folder, duplicates, None if settled.complaint else note)
    return settled


def _drop(
    columns: list[fmt.Column],
    folder: Path,
    duplicates: pa.Table,
    known: list[int],
    rows_per_shard: list[int],
) -> Settled:
    """Take the payloads of the duplicates out of all columns."""
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
    for column in columns:
        reopened |= drop_rows(column, folder, doomed, rows_per_shard)
    if reopened:
        return Settled(
            flagged,
            len(duplicates),
            f"{len(reopened)} shards lack clips whose first copy has no latents any more; run the "
            "same command again to encode them",
        )
    return Settled(flagged, len(duplicates))


def write_duplicates(folder: Path, duplicates: pa.Table, note: dict[str, Any] | None) -> None:
    """Write what was found beside the facts, unless it is there already."""
    path = folder / DUPLICATES_NAME
    table = duplicates.replace_schema_metadata(note and {SETTLED: json.dumps(note)})
    try:
        if read_parquet(path).equals(table, check_metadata=True):
            return
    except FileNotFoundError:
        pass
    write_parquet(path, table)


def read_settled(folder: Path, columns: Iterable[fmt.Column]) -> Settled | None:
    """Return what ``settle_duplicates`` came to, or None where it has to be called.

    Args:
        folder: the facts.
        columns: columns of clips; those of captions don't count.
    """
    try:
        metadata = read_parquet(folder / DUPLICATES_NAME).schema.metadata or {}
        note = json.loads(metadata[SETTLED.encode()])
    except (FileNotFoundError, KeyError):
        return None
    if not {c.path.name for c in columns if c.spec.modality != "text"} <= set(note["columns"]):
        return None
    return Settled(Counter(note["flagged"]), note["num_dropped"])


def forget_settled(folder: Path) -> None:
    """Have duplicates settled anew; to be called before any shard is encoded."""
    (folder / DUPLICATES_NAME).unlink(missing_ok=True)


def find_duplicates(folder: Path, shards: list[int]) -> pa.Table:
    """Find the clips whose content hash an earlier clip has.

    Only clips count of which something can be encoded, picture or sound: what has no latents
    anyway is no copy, and nothing is a copy of it. Hashes are sorted as numbers: they take 24 bytes
    a clip with their places.

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
    found = map_ahead(folder, lambda shard: read_usable(folder, shard, "content_hash"), shards)
    for shard, rows in zip(shards, found, strict=True):
        hashed = {row: digits for row, digits in enumerate(rows) if digits}
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
        in_shard = read_parquet(facts_path(folder, shard), ["key"])["key"].to_numpy()
        keys[part] = in_shard[places[part, 1]]
    return pa.table(
        {
            "shard": found[:, 0],
            "row": found[:, 1],
            "key": pa.array(keys[: len(found)], pa.string()),
            "first_key": pa.array(keys[len(found) :], pa.string()),
        }
    )


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

    A crash on the way leaves a shard as it was or, on a local disk, without a commit: then the next
    run encodes it again.

    Returns:
        Shards with a tombstone of a clip that is no duplicate any more, because its first copy
        failed when it was tried again. Their commits are taken back.
    """
    reopened, shards = set[int](), sorted(column.committed_shards())
    for shard, record in zip(shards, map_ahead(column.path, column.committed, shards), strict=True):
        wanted = doomed.get(shard, set())
        if not wanted and "duplicate" not in record["status_counts"]:
            continue
        status = column.index(shard, rows_per_shard[shard])["status"]
        if set(np.flatnonzero(status == DUPLICATE).tolist()) - wanted:
            take_back(column, shard)
            reopened.add(shard)
        elif rows := wanted & set(np.flatnonzero(status == fmt.OK).tolist()):
            keys = read_parquet(facts_path(folder, shard), ["key"])["key"].to_pylist()
            _drop_of_shard(column, shard, keys, rows)
    return reopened


def _drop_of_shard(column: fmt.Column, shard: int, keys: list[str], doomed: set[int]) -> None:
    """Write a shard again without the payloads of some rows; timings of its commit are kept."""
    record, there = column.committed(shard), ShardRows(column, shard)

    def kept(row: int) -> np.ndarray | None:
        is_kept = row not in doomed and there.is_ok(row)
        return there.array(row, keys[row]) if is_kept else None

    arrays = map_ahead(column.path, kept, range(len(keys)), ROWS_AHEAD)
    with ShardWriter(column, shard, f"duplicates-{secrets.token_hex(4)}") as writer:
        for row, (key, array) in enumerate(zip(keys, arrays, strict=True)):
            status = DUPLICATE if row in doomed else int(there.index["status"][row])
            writer.add(key, array, status)
        if not writer.commit(record, replacing=True):
            raise fmt.FormatError(
                f"{record_path(column, shard)}: another run replaced this shard at the same time; "
                "run the same command again when that has ended"
            )
