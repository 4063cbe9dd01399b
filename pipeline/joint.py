"""The clips of a plan with their rows in several columns, checked while they are read."""

from __future__ import annotations

import io
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from pipeline import format as fmt
from pipeline.files import map_ahead, read_range
from pipeline.plan_table import PlanTable
from pipeline.records import read_index, read_record, record_problems, repair

CLIP_FACTS = ("caption", "label", "split", "uri", "start_s", "duration_s")
TEXT_SHARDS_OPEN = 64  # indices of text shards kept in memory
ROWS_AHEAD = 32  # clips read from an object store before they are wanted


def read_array(column: fmt.Column, tar: Path, entry: np.void) -> np.ndarray | None:
    """Read the array of a row that is ok, read-only.

    Args:
        column: the column.
        tar: of the shard.
        entry: the row's record in the shard's index.

    Returns:
        None where the bytes are not there, or others than were written.
    """
    try:
        payload = read_range(tar, int(entry["offset"]), int(entry["nbytes"]))
    except FileNotFoundError:
        return None
    if google_crc32c.value(payload) != entry["crc32c"]:
        return None
    shape = entry["shape"][: len(column.spec.axes)].tolist()
    return np.frombuffer(payload, column.spec.dtype).reshape(shape)


class ShardRows:
    """The rows of one shard of one column, read one at a time.

    Attributes:
        record: the shard's commit record.
        index: its index, ``INDEX_DTYPE`` [rows].

    Raises:
        FormatError: the shard is not committed, or record or index are damaged.
    """

    def __init__(self, column: fmt.Column, shard: int) -> None:
        self._column, self._shard = column, shard
        record = read_record(column, shard)
        if record is None:
            raise fmt.FormatError(f"{column.path} shard {shard} is not committed; encode it first")
        self.record, self._path = record, column.path / record.tar
        self.index = read_index(column, shard, record)

    def is_ok(self, row: int) -> bool:
        """Return whether the row has an array."""
        return bool(self.index["status"][row] == fmt.OK)

    def array(self, row: int, key: str) -> np.ndarray:
        """Return a row's array, read-only.

        Raises:
            FormatError: its checksum is wrong, or the tar is missing or ends before.
        """
        entry = self.index[row]
        array = read_array(self._column, self._path, entry)
        if array is None:
            is_there = self._path.exists()
            what = "crc32c is another, or the file ends before" if is_there else "it is missing"
            raise fmt.FormatError(
                f"{self._path} row {row} ({key}): {what}; "
                f"expected {entry['crc32c']:08x} of {entry['nbytes']} bytes at {entry['offset']}; "
                f"{repair(self._column, self._shard)}"
            )
        return array

    def npy(self, row: int, key: str) -> bytes:
        """Return a row's array as the bytes of a .npy file; raises as ``array`` does."""
        npy = io.BytesIO()
        np.save(npy, self.array(row, key))
        return npy.getvalue()


class JointRows:
    """The clips of a plan with their rows in several columns.

    Args:
        root: the data set's folder.
        plan: its plan.
        columns: by modality; all shards are committed.
    """

    def __init__(self, root: Path, plan: fmt.Plan, columns: dict[str, fmt.Column]) -> None:
        self._table, self._columns = PlanTable(root, plan), columns
        self._rows_per_shard = plan.shard_rows()
        self._text_ends = np.cumsum(plan.shard_rows(text=True))
        self._open_text = lru_cache(TEXT_SHARDS_OPEN)(lambda s: ShardRows(columns["text"], s))

    def samples(self, shard: int) -> Iterator[tuple[str, dict[str, bytes]]]:
        """Yield (key, members by extension) of a shard's clips that are ok in all columns.

        Raises:
            FormatError: a commit record, an index or a payload is damaged.
        """
        clips = self._table.read(shard, CLIP_FACTS)
        rows = {m: ShardRows(column, shard) for m, column in self._columns.items() if m != "text"}
        for modality, opened in rows.items():
            column = self._columns[modality]
            arguments = column, shard, opened.record, self._rows_per_shard, clips["key"]
            for problem in record_problems(*arguments):
                raise fmt.FormatError(problem)
        found = (
            self._places(row, text_row, rows) for row, text_row in enumerate(clips["text_row"])
        )
        whole = [
            (clips["key"][row], {name: clips[name][row] for name in CLIP_FACTS}, places)
            for row, places in enumerate(found)
            if all(opened.is_ok(place) for opened, place in places.values())
        ]
        yield from map_ahead(self._table.path, _sample, whole, ROWS_AHEAD)

    def _places(
        self, row: int, text_row: int, rows: dict[str, ShardRows]
    ) -> dict[str, tuple[ShardRows, int]]:
        """Return where a clip's arrays are, by modality."""
        places = {modality: (opened, row) for modality, opened in rows.items()}
        if "text" in self._columns:
            places["text"] = self._text_place(text_row)
        return places

    def _text_place(self, text_row: int) -> tuple[ShardRows, int]:
        shard = int(np.searchsorted(self._text_ends, text_row, side="right"))
        first = int(self._text_ends[shard - 1]) if shard else 0
        return self._open_text(shard), text_row - first


def _sample(
    clip: tuple[str, dict[str, Any], dict[str, tuple[ShardRows, int]]],
) -> tuple[str, dict[str, bytes]]:
    """Read the arrays of (key, facts, places) and return the clip's sample."""
    key, facts, places = clip
    members = {f"{m}.npy": opened.npy(row, key) for m, (opened, row) in places.items()}
    return key, {**members, "json": fmt.canonical_json(facts).encode()}
