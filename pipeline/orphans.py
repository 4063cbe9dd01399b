"""What lies in a data set though no commit record names it: temporaries, losers' uploads, tars.

A killed writer leaves its temporaries; a lost race or a record that was replaced leaves an upload
on an object store. ``pipeline.status`` lists them, ``pipeline.gc`` removes them. What a commit
that was taken back names is none of that until its shard is committed again: rows that are ok are
copied from there, see ``pipeline.old_rows``.
"""

from __future__ import annotations

import re
import stat
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import format as fmt
from pipeline.captions import CAPTIONS_NAME
from pipeline.files import scan
from pipeline.records import RECORD_TYPE, CommitRecord

# How our writers name what they have not published yet, and what only a record makes valid.
TEMPORARY = re.compile(r"\.[A-Za-z0-9_.-]+\.tmp")
SHARD_FILE = re.compile(r"(\d{6,})(\.[A-Za-z0-9_-]+)?\.(tar|idx\.npy)")
RECORD = re.compile(r"(\d{6,})\.json")
TAKEN_BACK = re.compile(r"\.(\d{6,})\.reopened\.tmp")


@dataclass(frozen=True)
class Found:
    """A file or folder of a data set.

    Attributes:
        path: where it is.
        num_bytes: its size.
        age_s: seconds since it was written; None where an object store does not tell.
        is_file: whether it is a plain file: no folder and no link.
    """

    path: Path
    num_bytes: int
    age_s: float | None
    is_file: bool

    @property
    def is_ours(self) -> bool:
        """Whether it is named as our writers name what a record must name, or what is temporary."""
        name = self.path.name
        return self.is_file and bool(TEMPORARY.fullmatch(name) or SHARD_FILE.fullmatch(name))

    def told(self, root: Path) -> dict[str, Any]:
        """Return what programs are told of it."""
        age_s = None if self.age_s is None else round(self.age_s, 1)
        name = str(self.path).removeprefix(str(root)).lstrip("/")
        return {"file": name, "bytes": self.num_bytes, "age_s": age_s}


def entries(folder: Path) -> dict[str, Any]:
    """List a folder by name, as `files.scan` does; empty where there is none."""
    try:
        return {entry.name: entry for entry in scan(folder)}
    except FileNotFoundError:
        return {}


def column_folders(root: Path) -> list[str]:
    """Return the names of the folders of columns, sorted, without those that are empty.

    Some object stores list a folder after all that was in it has been removed.
    """
    names = fmt.column_directories(root)
    return [n for n in names if (root / n / "column.json").exists() or entries(root / n)]


def facts_folders(root: Path) -> list[str]:
    """Return the names of the folders of facts, sorted."""
    listed = entries(root).items()
    return sorted(name for name, e in listed if name.startswith("facts@") and e.is_dir())


def look_at(folder: Path, entry: Any) -> Found | None:
    """Return what an entry of a folder is, or None where it has gone meanwhile."""
    try:
        facts = entry.stat(follow_symlinks=False)
    except FileNotFoundError:
        return None
    age_s = max(0.0, time.time() - facts.st_mtime) if facts.st_mtime else None
    return Found(folder / entry.name, facts.st_size, age_s, stat.S_ISREG(facts.st_mode))


def all_files(folder: Path, listed: dict[str, Any]) -> list[Found]:
    """Return what ``listed`` entries of a folder are, sorted; those that have gone are left out."""
    looked_at = (look_at(folder, entry) for _, entry in sorted(listed.items()))
    return [found for found in looked_at if found]


def temporaries(folder: Path) -> list[Found]:
    """Return a folder's hidden files, sorted: temporaries of its writers."""
    listed = entries(folder).items()
    hidden = {name: e for name, e in listed if name.startswith(".") and not e.is_dir()}
    return all_files(folder, hidden)


def taken_back_record(folder: Path, stem: str) -> CommitRecord | None:
    """Return the record of a shard that was taken back, or None where it is of no use."""
    try:
        return RECORD_TYPE.validate_json((folder / f".{stem}.reopened.tmp").read_bytes())
    except (FileNotFoundError, ValueError):  # pydantic's error is a ValueError
        return None


class ColumnFiles:
    """Tells the files of a column that its records name from the others.

    The folder is listed first, the records are read after: a shard that is committed meanwhile
    leaves nothing over.

    Attributes:
        folder: the column's.
        there: its entries by name, see ``entries``.
        taken_back_facts: folders of facts that shards which were taken back were judged by.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.there = folder, entries(folder)
        self._named = {"column.json", CAPTIONS_NAME}
        self._unreadable = set[str]()
        self.taken_back_facts = set[str]()
        for match in filter(None, map(TAKEN_BACK.fullmatch, self.there)):
            if f"{match[1]}.json" in self.there:
                continue
            if record := taken_back_record(folder, match[1]):
                self._named |= {match[0], record.tar, record.index}
                self.taken_back_facts |= {record.facts} - {""}

    def claim(self, shard: int, record: CommitRecord | None) -> None:
        """Take out what a shard's record names; all of the shard where it can't be read."""
        stem = fmt.shard_name(shard)
        self._named.add(f"{stem}.json")
        if record is None:
            self._unreadable.add(stem)
        else:
            self._named |= {record.tar, record.index}

    def missing(self, record: CommitRecord) -> list[str]:
        """Return which of the files that a record names are not there."""
        unlisted = [name for name in (record.tar, record.index) if name not in self.there]
        return [name for name in unlisted if not (self.folder / name).exists()]  # not even by now

    def orphans(self) -> list[Found]:
        """Return what no record names, sorted by name; a record taken back meanwhile is gone."""
        names = {name for name in self.there.keys() - self._named if not RECORD.fullmatch(name)}
        left = {name for name in names if name.partition(".")[0] not in self._unreadable}
        return all_files(self.folder, {name: self.there[name] for name in left})
