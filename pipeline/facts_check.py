"""Facts against the plan and the columns that were judged by them: a part of ``pipeline.verify``.

A clip with latents was whole when they were made, and its facts say so: they are measured again
only where picture or sound had failed. What a check decided (silent, still, low_fps) stays
decided. Other failures may be mended since, so that facts that are better than a column are sound.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline import format as fmt
from pipeline.checks import DECISIONS, facts_path
from pipeline.findings import Finding, Report
from pipeline.orphans import entries
from pipeline.tables import read_parquet

FACTS_FILE = re.compile(r"(\d{6,})\.parquet")
COLUMNS = ("key", "row", "status", "video_status", "audio_status")
# Never measured again: duplicates are settled after, see ``pipeline.duplicates``.
DECIDED = DECISIONS - {"duplicate"}


@dataclass(frozen=True)
class Judged:
    """The statuses of a committed shard of a column, and which facts it was judged by.

    Attributes:
        modality: of the column.
        folder: name of the folder of facts, "" where the record does not tell.
        status: codes of ``format.STATUSES``, [rows].
        file: the index.
    """

    modality: str
    folder: str
    status: np.ndarray
    file: str


class FactsCheck:
    """Checks the facts of one shard after the other.

    Args:
        root: the data set.
        report: called with every finding.
    """

    def __init__(self, root: Path, report: Report) -> None:
        self._root, self._report = root, report
        names = sorted(name for name in entries(root) if name.startswith("facts@"))
        self._shards = {name: shards_with_facts(root / name) for name in names}
        self._num_findings = dict.fromkeys(names, 0)

    def shard(self, shard: int, keys: Sequence[str], columns: Sequence[Judged]) -> None:
        """Check a shard's facts in all folders.

        Args:
            shard: its number.
            keys: the planned keys of its rows.
            columns: those that have committed it.
        """
        for judged in columns:
            if judged.folder and shard not in self._shards.get(judged.folder, ()):
                path = facts_path(self._root / judged.folder, shard)
                self._find(judged.folder, f"{path} is missing, by which {judged.file} was judged")
        for folder, shards in self._shards.items():
            if shard not in shards:
                continue
            path = facts_path(self._root / folder, shard)
            try:
                rows = read_checked(path, keys)
            except fmt.FormatError as error:
                self._find(folder, f"{error}; remove it")
                continue
            for judged in columns:
                if judged.folder == folder:
                    self._compare(path, rows[f"{judged.modality}_status"], keys, judged)

    def beyond_the_plan(self, num_shards: int) -> None:
        """Report facts of shards that the plan does not have."""
        for folder, shards in self._shards.items():
            for shard in sorted(shard for shard in shards if shard >= num_shards):
                path = facts_path(self._root / folder, shard)
                self._report(Finding(f"{path}: shard {shard} of a plan of {num_shards}; remove it"))
                self._num_findings[folder] += 1

    def summary(self) -> list[dict[str, Any]]:
        """Return for each folder its name, shards and findings."""
        return [
            {"facts": name, "shards": len(self._shards.get(name, ())), "findings": count}
            for name, count in sorted(self._num_findings.items())
        ]

    def _compare(
        self, path: Path, stated: Sequence[str], keys: Sequence[str], judged: Judged
    ) -> None:
        found = [fmt.STATUSES[code] for code in judged.status.tolist()]
        wrong = [
            row
            for row, (status, fact) in enumerate(zip(found, stated, strict=True))
            if status in DECIDED | {"ok"} and fact != status
        ]
        if wrong:
            row = wrong[0]
            text = (
                f"{path} row {row} ({keys[row]}): {judged.modality} is {stated[row]}, expected "
                f"{found[row]} as in {judged.file} ({len(wrong)} such rows in this shard): the "
                "media were others when they were last looked at; put them back"
            )
            self._find(judged.folder, text, str(path), row, keys[row])

    def _find(
        self, folder: str, text: str, file: str = "", row: int | None = None, key: str | None = None
    ) -> None:
        """Report a finding; the facts are measured again where shards are encoded again."""
        self._num_findings[folder] = self._num_findings.get(folder, 0) + 1
        mend = "remove the shard's commit records and run pipeline.encode again"
        self._report(Finding(f"{text}; {mend}", file, row, key))


def shards_with_facts(folder: Path) -> set[int]:
    """Return the shards that a folder has facts of."""
    matches = (FACTS_FILE.fullmatch(name) for name in entries(folder))
    return {int(match[1]) for match in matches if match}


def read_checked(path: Path, keys: Sequence[str]) -> dict[str, list[Any]]:
    """Read keys and statuses of a shard's facts, by column.

    Raises:
        FormatError: they can't be read, or are not of these clips in this order.
    """
    try:
        table = read_parquet(path, COLUMNS)
        rows = {name: table[name].to_pylist() for name in COLUMNS}
    except (OSError, pa.ArrowException, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise fmt.FormatError(f"{path} can't be read ({reason})") from None
    if len(rows["key"]) != len(keys):
        raise fmt.FormatError(
            f"{path} has {len(rows['key'])} rows, expected {len(keys)} as planned"
        )
    for row, (found, key) in enumerate(zip(rows["key"], keys, strict=True)):
        if found != key or rows["row"][row] != row:
            raise fmt.FormatError(
                f"{path} row {row}: clip {found!r:.80}, row {rows['row'][row]}, expected {key!r}, "
                f"row {row}, as planned; the facts are another shard's"
            )
    for name in ("status", "video_status", "audio_status"):
        if unknown := set(rows[name]) - set(fmt.STATUSES):
            raise fmt.FormatError(f"{path}: {name} {unknown.pop()!r:.80} is no known status")
    return rows
