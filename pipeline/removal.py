"""Removing what a data set can do without, so that no reader and no writer is harmed.

Everything is looked at again right before it goes: a shard may have been committed meanwhile.
Where folders can be locked, this happens under the lock that commits take.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from pipeline import format as fmt
from pipeline.captions import CAPTIONS_NAME
from pipeline.checks import FACTS_FILE
from pipeline.duplicates import DUPLICATES_NAME
from pipeline.files import is_local, map_ahead, sync_folder
from pipeline.orphans import RECORD, SHARD_FILE, TEMPORARY, Found, taken_back_record
from pipeline.publish import locked_folder
from pipeline.records import read_record
from pipeline.sweep import progress_bar


@dataclass
class Orphan:
    """A file that no record names.

    Attributes:
        found: the file.
        column: whose folder it is in; None for temporaries elsewhere.
        kept: why it stays, or "".
        is_removed: whether it is gone.
    """

    found: Found
    column: fmt.Column | None
    kept: str
    is_removed: bool = False

    @property
    def state(self) -> str:
        """kept, removable or removed."""
        return "kept" if self.kept else "removed" if self.is_removed else "removable"

    @property
    def num_bytes(self) -> int:
        """Its size."""
        return self.found.num_bytes

    @property
    def age_s(self) -> float | None:
        """Seconds since it was written, if that is known."""
        return self.found.age_s

    def told(self, root: Path) -> dict[str, Any]:
        """Return what programs are told of it."""
        return {**self.found.told(root), "state": self.state, "kept": self.kept}


@dataclass
class Holding:
    """A column or a folder of facts, whole.

    Attributes:
        path: the folder.
        files: all that is in it.
        is_chosen: whether it is to be removed.
        is_removed: whether it is gone.
    """

    path: Path
    files: list[Found]
    is_chosen: bool
    is_removed: bool = False

    @property
    def is_facts(self) -> bool:
        """Whether it holds facts, else it is a column."""
        return self.path.name.startswith("facts@")

    @property
    def state(self) -> str:
        """kept, removable or removed."""
        if not self.is_chosen:
            return "kept"
        return "removed" if self.is_removed else "removable"

    @property
    def num_bytes(self) -> int:
        """Bytes of all files."""
        return sum(found.num_bytes for found in self.files)

    @property
    def num_shards(self) -> int:
        """Committed shards of a column, or those that have facts."""
        shard = FACTS_FILE if self.is_facts else RECORD
        return sum(bool(shard.fullmatch(found.path.name)) for found in self.files)

    @property
    def age_s(self) -> float | None:
        """Seconds since its youngest file was written, if that is known of all."""
        ages = [found.age_s for found in self.files]
        known = [age_s for age_s in ages if age_s is not None]
        return min(known, default=None) if len(known) == len(ages) else None

    def told(self) -> dict[str, Any]:
        """Return what programs are told of it."""
        age_s = None if self.age_s is None else round(self.age_s, 1)
        return {
            "name": self.path.name,
            "shards": self.num_shards,
            "bytes": self.num_bytes,
            "age_s": age_s,
            "state": self.state,
        }


def is_part_of_column(name: str) -> bool:
    """Return whether a file is named like one of a column."""
    kinds = (RECORD, SHARD_FILE, TEMPORARY)
    return name in ("column.json", CAPTIONS_NAME) or any(kind.fullmatch(name) for kind in kinds)


def is_part_of_facts(name: str) -> bool:
    """Return whether a file is named like one of a folder of facts."""
    return name == DUPLICATES_NAME or bool(FACTS_FILE.fullmatch(name) or TEMPORARY.fullmatch(name))


def remove(orphans: Sequence[Orphan], holdings: Sequence[Holding], min_age_s: float) -> None:
    """Remove what is removable, and note what is gone or why it stays after all."""
    doomed = [orphan for orphan in orphans if orphan.state == "removable"]
    chosen = [holding for holding in holdings if holding.state == "removable"]
    num_files = len(doomed) + sum(len(holding.files) for holding in chosen)
    with progress_bar(num_files, "file") as bar:
        for folder, group in groupby(doomed, key=lambda orphan: orphan.found.path.parent):
            with locked_folder(folder):
                for orphan in group:
                    orphan.kept = reason_to_keep(orphan, min_age_s)
                    if not orphan.kept:
                        orphan.found.path.unlink(missing_ok=True)
                        orphan.is_removed = True
                    bar.update()
        for holding in chosen:
            remove_whole(holding, bar)
            holding.is_removed = True


def reason_to_keep(orphan: Orphan, min_age_s: float) -> str:
    """Return why a file must stay after all, or ""."""
    path = orphan.found.path
    try:
        facts = path.lstat() if is_local(path) else path.stat()
    except FileNotFoundError:
        return ""
    if not facts.st_mtime or time.time() - facts.st_mtime < min_age_s:
        return "written meanwhile"
    shard = SHARD_FILE.fullmatch(path.name)
    if orphan.column is None or not shard:
        return ""
    try:
        record = read_record(orphan.column, int(shard[1]))
    except fmt.FormatError:
        return "its commit record can't be read"
    if record is not None:
        return "committed meanwhile" if path.name in (record.tar, record.index) else ""
    kept = taken_back_record(path.parent, shard[1])
    is_needed = kept is not None and path.name in (kept.tar, kept.index)
    return "taken back meanwhile" if is_needed else ""


def remove_whole(holding: Holding, bar: Any) -> None:
    """Remove a folder that `pipeline.encode` wrote.

    The commit records go first, so that no reader trusts a shard whose tar is gone; column.json
    goes last, so that a removal that was stopped can go on.
    """
    files = {found.path.name: found.path for found in holding.files}
    records = [files.pop(name) for name in sorted(files) if RECORD.fullmatch(name)]
    last = [files.pop(name) for name in ("column.json",) if name in files]
    with locked_folder(holding.path):
        for group in (records, [files[name] for name in sorted(files)], last):
            for _ in map_ahead(holding.path, lambda path: path.unlink(missing_ok=True), group):
                bar.update()
            if is_local(holding.path):
                sync_folder(holding.path)
    if is_local(holding.path):
        holding.path.rmdir()
        sync_folder(holding.path.parent)
