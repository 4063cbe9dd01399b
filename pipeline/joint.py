"""The clips of a plan with their rows in several columns, checked while they are read."""

from __future__ import annotations

import io
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import google_crc32c
import numpy as np

from pipeline import format as fmt
from pipeline.plan_table import PlanTable
from pipeline.records import read_index, read_record, record_problems, repair

CLIP_FACTS = ("caption", "label", "split", "uri", "start_s", "duration_s")
TEXT_SHARDS_OPEN = 64  # indices of text shards kept in memory


class ShardRows:
    """The rows of one shard of one column, read one at a time."""

    def __init__(self, column: fmt.Column, shard: int) -> None:
        self._column, self._shard = column, shard
        record = read_record(column, shard)
        if record is None:
            raise fmt.FormatError(f"{column.path} shard {shard} is not committed; encode it first")
        self.record, self._path = record, column.path / record.tar
        self._index = read_index(column, shard, record)

    def is_ok(self, row: int) -> bool:
        """Return whether the row has an array."""
        return bool(self._index["status"][row] == fmt.OK)

    def npy(self, row: int, key: str) -> bytes:
        """Return a row's array as the bytes of a .npy file.

        Raises:
            FormatError: its checksum is wrong, or the tar is missing or ends before.
        """
        entry = self._index[row]
        try:
            with self._path.open("rb") as file:
                file.seek(int(entry["offset"]))
                payload = file.read(int(entry["nbytes"]))
        except FileNotFoundError:
            payload = b""
        if google_crc32c.value(payload) != int(entry["crc32c"]):
            raise fmt.FormatError(
                f"{self._path} row {row} ({key}): crc32c of {len(payload)} bytes is "
                f"{google_crc32c.value(payload):08x}, expected {int(entry['crc32c']):08x} of "
                f"{entry['nbytes']}; {repair(self._column, self._shard)}"
            )
        shape = [int(size) for size in entry["shape"] if size]
        npy = io.BytesIO()
        np.save(npy, np.frombuffer(payload, self._column.spec.dtype).reshape(shape))
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
        for row, key in enumerate(clips["key"]):
            places = {modality: (opened, row) for modality, opened in rows.items()}
            if "text" in self._columns:
                places["text"] = self._text_place(clips["text_row"][row])
            if all(opened.is_ok(place) for opened, place in places.values()):
                members = {f"{m}.npy": o.npy(place, key) for m, (o, place) in places.items()}
                facts = {name: clips[name][row] for name in CLIP_FACTS}
                yield key, {**members, "json": fmt.canonical_json(facts).encode()}

    def _text_place(self, text_row: int) -> tuple[ShardRows, int]:
        shard = int(np.searchsorted(self._text_ends, text_row, side="right"))
        first = int(self._text_ends[shard - 1]) if shard else 0
        return self._open_text(shard), text_row - first
