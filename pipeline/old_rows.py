"""Rows of a shard whose commit was taken back: those that are ok are copied, not encoded again.

The record that was taken back is kept under a hidden name, for it says where the payloads are;
``pipeline.gc`` leaves it, tar and index alone until the shard is committed again. It is only
believed as far as it can be checked, so that a stale or a damaged one costs time, never a wrong
byte. A latent is copied where the facts that it was judged by are of the same content as those
that count now: picture and sound of a clip are always of one file.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from pipeline import format as fmt
from pipeline.checks import BOTH, DECISIONS, judge, read_facts, with_facts
from pipeline.config import CheckSettings
from pipeline.files import is_local, sync_folder, write_atomically
from pipeline.joint import read_array
from pipeline.media import Decoded
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
    """Payloads of a shard that was taken back, and its facts, None of captions."""

    column: fmt.Column
    shard: int
    tar: Path
    index: np.ndarray
    facts: list[dict[str, Any]] | None

    def read(self, row: int, content: str | None) -> np.ndarray | None:
        """Return a row's latent.

        Args:
            row: its number.
            content: hash of the clip that it must be of; of a caption None.

        Returns:
            None where there is none, or another than was written, or one of another content.
        """
        entry = self.index[row]
        if entry["status"] != fmt.OK or (self.facts and self.facts[row]["content_hash"] != content):
            return None
        return read_array(self.column, self.tar, entry)

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
    facts = None
    try:
        raw = json.loads(kept_path(column, shard).read_bytes())
        record = RECORD_TYPE.validate_python(raw)
        data = (column.path / record.index).read_bytes()
        if column.spec.modality != "text":
            facts = read_facts(column.path.parent / record.facts, shard) or []
    except (FileNotFoundError, ValueError):  # those of pydantic and pyarrow are ValueErrors
        return None
    found = (raw.get("plan_id"), raw.get("column"), record.shard, record.keys_hash)
    expected = (column.plan_id, column.path.name, shard, fmt.keys_hash(keys))
    if found != expected or google_crc32c.value(data) != record.index_crc32c:
        return None
    index = np.load(io.BytesIO(data), allow_pickle=False)
    if index.dtype != fmt.INDEX_DTYPE or index.shape != (len(keys),):
        return None
    if facts is not None and [row["key"] for row in facts] != list(keys):
        return None
    return OldRows(column, shard, column.path / record.tar, index, facts)


def best_facts(tables: Iterable[list[dict[str, Any]] | None]) -> list[dict[str, Any]]:
    """Return of each clip of a shard the facts by which most of it could be encoded.

    There are several where columns were encoded with other checks: each have a folder of facts.
    """

    def num_ok(facts: dict[str, Any]) -> int:
        return sum(facts[f"{modality}_status"] == "ok" for modality in BOTH)

    return [max(facts, key=num_ok) for facts in zip(*filter(None, tables), strict=True)]


def never_worse(now: Decoded, before: dict[str, Any] | None, checks: CheckSettings) -> Decoded:
    """Return the verdict over a clip that was looked at again: no failure where it was fine.

    So a retry loses no latent, neither when a disk is away nor when a machine is slow.

    Args:
        now: what was found in the clip now, judged.
        before: its facts as they were, if any.
        checks: by which it is judged.

    Returns:
        ``now``, or where picture or sound was fine before and fails now, the verdict over what
        was measured then. A decision, such as over a silent clip, is no failure.
    """
    before = before or {}
    fine = DECISIONS | {"ok"}
    was_ok = [modality for modality in BOTH if before.get(f"{modality}_status") == "ok"]
    if all(now.problems.get(modality, ("ok", ""))[0] in fine for modality in was_ok):
        return now
    statuses = {modality: before[f"{modality}_status"] for modality in BOTH}
    problems = {
        m: (status, before["message"]) for m, status in statuses.items() if status not in fine
    }
    return judge(with_facts(Decoded(None, None, problems), before), checks)
