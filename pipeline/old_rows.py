"""Rows of a shard whose commit was taken back: those that are ok are copied, not encoded again.

The record that was taken back is kept under a hidden name, for it says where the payloads are. It
is only believed as far as it can be checked, so that a stale or a damaged one costs time, never
a wrong byte; ``pipeline.gc`` may remove it as any other temporary.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import google_crc32c
import numpy as np

from pipeline import format as fmt
from pipeline.files import is_local, read_range, sync_folder, write_atomically
from pipeline.records import RECORD_TYPE, record_path


def take_back(column: fmt.Column, shard: int) -> None:
    """Make a shard count as not encoded, but for its rows that are ok.

    One that is not committed stays so: another run may have taken it back at the same time.
    """
    path = record_path(column, shard)
    try:
        write_atomically(kept_path(column, shard), path.read_bytes())
        path.unlink()
    except FileNotFoundError:
        return
    if is_local(path):
        sync_folder(path.parent)  # before any file that the record names changes


def kept_path(column: fmt.Column, shard: int) -> Path:
    """Return where a record that was taken back is kept, until the shard is committed again."""
    return column.path / f".{fmt.shard_name(shard)}.reopened.tmp"


@dataclass(frozen=True)
class OldRows:
    """Payloads of a shard that was taken back."""

    column: fmt.Column
    shard: int
    tar: Path
    index: np.ndarray

    def read(self, row: int) -> np.ndarray | None:
        """Return a row's latent; None where it has none, or another than was written."""
        record = self.index[row]
        if record["status"] != fmt.OK:
            return None
        try:
            payload = read_range(self.tar, int(record["offset"]), int(record["nbytes"]))
        except FileNotFoundError:
            return None
        if google_crc32c.value(payload) != record["crc32c"]:
            return None
        shape = record["shape"][: len(self.column.spec.axes)].tolist()
        return np.frombuffer(payload, self.column.spec.dtype).reshape(shape)

    def forget(self) -> None:
        """Remove the record that was kept: the shard is committed again."""
        kept_path(self.column, self.shard).unlink(missing_ok=True)


def open_old_rows(column: fmt.Column, shard: int, keys: Sequence[str]) -> OldRows | None:
    """Return the rows of a shard that was taken back.

    Args:
        column: the column.
        shard: number of the shard.
        keys: of its rows, as planned.

    Returns:
        None where it was not taken back, or what was kept is not of this shard and its files.
    """
    try:
        raw = json.loads(kept_path(column, shard).read_bytes())
        record = RECORD_TYPE.validate_python(raw)
        data = (column.path / record.index).read_bytes()
    except (FileNotFoundError, ValueError):  # pydantic's error is a ValueError
        return None
    found = (raw.get("plan_id"), raw.get("column"), record.shard, record.keys_hash)
    expected = (column.plan_id, column.path.name, shard, fmt.keys_hash(keys))
    if found != expected or google_crc32c.value(data) != record.index_crc32c:
        return None
    index = np.load(io.BytesIO(data), allow_pickle=False)
    if index.dtype != fmt.INDEX_DTYPE or index.shape != (len(keys),):
        return None
    return OldRows(column, shard, column.path / record.tar, index)
