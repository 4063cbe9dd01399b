"""A column's shards against plan, commit record, index and tar: a part of ``pipeline.verify``."""

from __future__ import annotations

import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from pipeline import format as fmt
from pipeline.captions import CAPTIONS_NAME, caption_hashes, read_rows
from pipeline.files import map_ahead
from pipeline.findings import Finding, Report
from pipeline.records import (
    CommitRecord,
    Totals,
    read_index,
    read_record,
    record_path,
    record_problems,
    repair,
)
from pipeline.tar_check import check_tar


@dataclass
class Looked:
    """What was found in a committed shard.

    Attributes:
        findings: what is wrong.
        record: its commit record, if that can be read.
        statuses: of its rows, codes of ``format.STATUSES``, if record and index are sound.
    """

    findings: list[Finding] = field(default_factory=list)
    record: CommitRecord | None = None
    statuses: np.ndarray | None = None


class ColumnCheck:
    """Checks the shards of one column, one by one, and counts what they hold.

    Args:
        column: the column.
        plan: the plan.
        full: whether tars are read.
        report: called with every finding.
    """

    def __init__(self, column: fmt.Column, plan: fmt.Plan, full: bool, report: Report) -> None:
        self.column = column
        self.rows_per_shard = plan.shard_rows(text=column.spec.modality == "text")
        self._full, self._report = full, report
        self._committed = column.committed_shards()
        self._totals, self._num_findings = Totals(), 0

    @property
    def num_committed(self) -> int:
        """Shards that had a commit record when the check began."""
        return len(self._committed)

    def report(self, finding: Finding) -> None:
        """Report a finding as one of this column."""
        self._num_findings += 1
        self._report(finding)

    def look(self, shard: int, keys: Sequence[str] | None) -> Looked | None:
        """Check one shard, in any thread; return None where it is not committed.

        Args:
            shard: its number.
            keys: the planned keys, or None where they can't be known.
        """
        if shard not in self._committed:
            return None
        looked = Looked()
        try:
            looked.findings += self._findings(shard, keys, looked)
        except fmt.FormatError as error:
            looked.findings.append(Finding(str(error)))
        except OSError as error:
            path = error.filename or record_path(self.column, shard)
            text = f"{path} can't be read ({error.strerror or error})"
            looked.findings.append(Finding(text))
        return looked

    def take(self, looked: Looked | None) -> int:
        """Count and report what was found in a shard; return 1 if it was committed, else 0."""
        if looked is None:
            return 0
        if looked.record is not None:
            self._totals.add(looked.record)
        for finding in looked.findings:
            self.report(finding)
        return 1

    def beyond_the_plan(self) -> int:
        """Check the shards that the plan does not know; return how many there are."""
        shards = [shard for shard in self._committed if shard >= len(self.rows_per_shard)]
        return sum(self.take(self.look(shard, None)) for shard in sorted(shards))

    def _findings(
        self, shard: int, keys: Sequence[str] | None, looked: Looked
    ) -> Iterator[Finding]:
        record = looked.record = read_record(self.column, shard)
        if record is None:
            return
        problems = list(record_problems(self.column, shard, record, self.rows_per_shard, keys))
        yield from (Finding(problem) for problem in problems)
        tar = self.column.path / record.tar
        try:
            facts = tar.stat()
            found = facts.st_size if stat.S_ISREG(facts.st_mode) else None  # to open a pipe hangs
            state = "is no file" if found is None else f"has {found} bytes"
        except FileNotFoundError:
            found, state = None, "is missing"
        if found != record.tar_bytes:
            yield Finding(
                f"{tar} {state}, expected {record.tar_bytes} bytes; {repair(self.column, shard)}"
            )
        index = read_index(self.column, shard, record)
        if not problems:
            looked.statuses = index["status"]
        if self._full and keys is not None and not problems and found is not None:
            for row, text in check_tar(self.column, record, index, keys):
                key = None if row is None else keys[row]
                place = "" if row is None else f" row {row} ({key})"
                message = f"{tar}{place}: {text}; {repair(self.column, shard)}"
                yield Finding(message, str(tar), row, key)

    def summary(self) -> dict[str, Any]:
        """Return what was counted."""
        totals = vars(self._totals)
        return {
            "column": self.column.path.name,
            **{name: totals[name] for name in ("shards", "rows", "ok", "statuses", "bytes")},
            "shards_planned": len(self.rows_per_shard),
            "findings": self._num_findings,
        }


def check_text(check: ColumnCheck, bar: tqdm) -> np.ndarray | None:
    """Check the shards of a text column, whose keys are in its captions.parquet.

    Returns:
        int64 [captions], a hash of each caption to compare the plan with, or None where
        captions.parquet can't be used.
    """
    path = check.column.path / CAPTIONS_NAME
    try:
        hashes = caption_hashes(path, int(check.rows_per_shard.sum()))
        keys = (key for (key,) in read_rows(path, ["key"]))
    except fmt.FormatError as error:
        check.report(Finding(str(error)))
        hashes = keys = None
    shards = (
        (shard, list(islice(keys, num_rows)) if keys else None)
        for shard, num_rows in enumerate(check.rows_per_shard.tolist())
    )
    for looked in map_ahead(check.column.path, lambda item: check.look(*item), shards):
        bar.update(check.take(looked))
    return hashes


def check_clip_captions(
    path: Path, shard: int, rows: dict[str, list[Any]], hashes: np.ndarray, report: Report
) -> None:
    """Compare the captions of a plan's shard with those its text rows lead to."""
    found = np.array([hash(caption) for caption in rows["caption"]], np.int64)
    wrong = np.flatnonzero(found != hashes[rows["text_row"]])
    if len(wrong):
        row = int(wrong[0])
        text_row, key = rows["text_row"][row], rows["key"][row]
        message = (
            f"{path} shard {shard} row {row} ({key}): caption {rows['caption'][row]!r:.60} is not "
            f"row {text_row} of captions.parquet, as planned ({len(wrong)} such rows in this "
            "shard); restore plan.parquet, or remove captions.parquet and encode again"
        )
        report(Finding(message, str(path), row, key))
