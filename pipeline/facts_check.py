"""Facts against the plan and the columns that were judged by them: a part of ``pipeline.verify``.

A clip with latents was whole when they were made, and its facts say so: they are measured again
only where picture or sound had failed. What a check decided (silent, still, low_fps) stays
decided. Other failures may be mended since, so that facts that are better than a column are sound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline import format as fmt
from pipeline.checks import DECISIONS, facts_path, shards_with_facts
from pipeline.findings import Finding, Report
from pipeline.orphans import facts_folders
from pipeline.tables import read_parquet

COLUMNS = ("key", "row", "status", "video_status", "audio_status")
# Never measured again: duplicates are settled after, see ``pipeline.duplicates``.
DECIDED = DECISIONS - {"duplicate"}
MEND = "remove the shard's commit records and run pipeline.encode again"


@dataclass(frozen=True)
class Judged:
    """The statuses of a committed shard of a column, and which facts it was judged by.

    Attributes:
        column: the column.
        shard: the shard.
        folder: name of the folder of facts, "" where the record does not tell.
        status: codes of ``format.STATUSES``, [rows].
    """

    column: fmt.Column
    shard: int
    folder: str
    status: np.ndarray

    @property
    def name(self) -> str:
        """What people are told it is."""
        return f"{self.column.path.name} shard {self.shard}"


class FactsCheck:
    """Checks the facts of one shard after the other.

    Args:
        root: the data set.
        report: called with every finding.
        full: whether facts are read that nothing is compared with, for their checksums.
    """

    def __init__(self, root: Path, report: Report, full: bool = False) -> None:
        self._root, self._full, self._report = root, full, report
        names = facts_folders(root)
        self._shards = {name: set(shards_with_facts(root / name)) for name in names}
        self._num_findings = dict.fromkeys(names, 0)

    def look(
        self, shard: int, keys: Sequence[str], columns: Sequence[Judged]
    ) -> list[tuple[str, Finding]]:
        """Check a shard's facts in all folders, in any thread.

        Args:
            shard: its number.
            keys: the planned keys of its rows.
            columns: those that have committed it.

        Returns:
            Findings with the folders that they are about, for ``take``.
        """
        found = []
        for judged in columns:
            if judged.folder and shard not in self._shards.get(judged.folder, ()):
                path = facts_path(self._root / judged.folder, shard)
                text = f"{path} is missing, by which {judged.name} was judged; {MEND}"
                found.append((judged.folder, Finding(text)))
        for folder, shards in self._shards.items():
            if shard not in shards:
                continue
            path = facts_path(self._root / folder, shard)
            try:
                rows = read_checked(path, keys, self._full)
            except fmt.FormatError as error:
                found.append((folder, Finding(f"{error}; remove it; {MEND}")))
                continue
            for judged in columns:
                stated = rows[f"{judged.column.spec.modality}_status"]
                if judged.folder == folder and (finding := difference(path, stated, keys, judged)):
                    found.append((folder, finding))
        return found

    def take(self, found: Sequence[tuple[str, Finding]]) -> None:
        """Count and report findings."""
        for folder, finding in found:
            self._num_findings[folder] = self._num_findings.get(folder, 0) + 1
            self._report(finding)

    def beyond_the_plan(self, num_shards: int) -> None:
        """Report facts of shards that the plan does not have."""
        for folder, shards in self._shards.items():
            for shard in sorted(shard for shard in shards if shard >= num_shards):
                path = facts_path(self._root / folder, shard)
                text = f"{path}: shard {shard} of a plan of {num_shards} shards; remove it"
                self.take([(folder, Finding(text))])

    def summary(self) -> list[dict[str, Any]]:
        """Return for each folder its name, shards and findings."""
        return [
            {"facts": name, "shards": len(self._shards.get(name, ())), "findings": count}
            for name, count in sorted(self._num_findings.items())
        ]


def difference(
    path: Path, stated: Sequence[str], keys: Sequence[str], judged: Judged
) -> Finding | None:
    """Return how the facts of a shard contradict a column that was judged by them."""
    found = [fmt.STATUSES[code] for code in judged.status.tolist()]
    wrong = [
        row
        for row, (status, fact) in enumerate(zip(found, stated, strict=True))
        if status in DECIDED | {"ok"} and fact != status
    ]
    if not wrong:
        return None
    row = wrong[0]
    text = (
        f"{path} row {row} ({keys[row]}): {judged.column.spec.modality} is {stated[row]}, expected "
        f"{found[row]} as in {judged.name} ({len(wrong)} such rows): the media were others when "
        f"they were last looked at; put them back, {MEND}"
    )
    return Finding(text, str(path), row, keys[row])


def read_checked(path: Path, keys: Sequence[str], full: bool) -> dict[str, list[Any]]:
    """Read keys and statuses of a shard's facts, by column; with ``full`` all pages of the others.

    Raises:
        FormatError: they can't be read, or are not of these clips in this order.
    """
    try:
        table = read_parquet(path, None if full else COLUMNS)
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
