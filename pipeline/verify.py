"""``python -m pipeline.verify DIR [--full]``: is the data set what its plan and records say?

Quick by default: every commit record against the plan, every index and the size of every tar
against the record. ``--full`` also reads every tar once, front to back: each byte of it follows
from the plan's keys, the index and the payloads' checksums. Holds one shard's index and one
payload at a time.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from pipeline import format as fmt
from pipeline.captions import caption_hashes, read_rows
from pipeline.data_root import open_root
from pipeline.plan_table import PlanTable
from pipeline.records import Totals, read_index, read_record, record_path, record_problems, repair
from pipeline.sweep import command_parser, one_line_errors, progress_bar
from pipeline.tar_check import check_tar


@dataclass(frozen=True)
class Finding:
    """Something that is not as it should be.

    Attributes:
        message: one line naming file, row and key, what was found and expected, how to mend it.
        file: the file to blame, where the message is about one row of it.
        row: the row in its shard.
        key: the row's key.
    """

    message: str
    file: str = ""
    row: int | None = None
    key: str | None = None


def main() -> None:
    """Parse the command line and verify; exit 1 where anything was found."""
    parser = command_parser(
        "verify", "Compare a data set with its plan, its commit records and its checksums."
    )
    parser.add_argument("--full", action="store_true", help="read every byte of every tar")
    parser.add_argument("--columns", help="modalities or column folders, comma-separated")
    arguments = parser.parse_args()
    findings: list[Finding] = []

    def report(finding: Finding) -> None:
        findings.append(finding)
        if not arguments.json:
            tqdm.write(finding.message, file=sys.stdout)

    with one_line_errors("nothing was changed"):
        wanted = arguments.columns.split(",") if arguments.columns else None
        root = open_root(arguments.dir)
        columns = verify(root, report, wanted, arguments.full)
        if arguments.json:
            value = {"dir": str(root), "full": arguments.full, "columns": columns}
            listed = [asdict(finding) for finding in findings]
            print(json.dumps({**value, "findings": listed}, indent=2))
        else:
            print_summary(columns)
        if findings:
            sys.exit(f"error: {len(findings)} finding{'s' * (len(findings) > 1)} in {root}")


def verify(
    root: Path,
    report: Callable[[Finding], None],
    wanted: Sequence[str] | None = None,
    full: bool = False,
) -> list[dict[str, Any]]:
    """Verify the columns of a data set.

    Args:
        root: the data set's folder.
        report: called with every finding.
        wanted: modalities or column directories; None is all.
        full: whether the tars are read.

    Returns:
        For each column its name, shards, shards_planned, rows, ok, bytes and findings.

    Raises:
        FormatError: there is no readable plan, or no column that ``wanted`` names.
    """
    plan = fmt.read_plan(root)
    table = PlanTable(root, plan)
    checks = []
    for name in choose_columns(root, wanted):
        try:
            column = fmt.open_column(root, name, plan.plan_id)
            checks.append(ColumnCheck(column, plan, full, report))
        except fmt.FormatError as error:
            report(Finding(str(error)))
    texts = [check for check in checks if check.column.spec.modality == "text"]
    clips = [check for check in checks if check.column.spec.modality != "text"]
    with progress_bar(sum(check.num_committed for check in checks), "shard") as bar:
        captions = [check_text(check, bar) for check in texts]
        for shard in range(len(plan.shard_rows())):
            try:
                rows = table.read(shard, ["caption"] if captions else [])
            except fmt.FormatError as error:
                report(Finding(str(error)))
                rows = None
            for hashes in captions:
                if rows is not None and hashes is not None:
                    check_clip_captions(table.path, shard, rows, hashes, report)
            for check in clips:
                bar.update(check.shard(shard, rows and rows["key"]))
        for check in checks:
            bar.update(check.beyond_the_plan())
    return [check.summary() for check in checks]


def choose_columns(root: Path, wanted: Sequence[str] | None) -> list[str]:
    """Return the directories of the columns that are named by modality or directory.

    Raises:
        FormatError: a name fits none.
    """
    there = fmt.column_directories(root)
    chosen = []
    for item in there if wanted is None else wanted:
        fitting = [name for name in there if item in (name, name.partition("@")[0])]
        if not fitting:
            raise fmt.FormatError(
                f"{root} has no column {item!r}; there: {', '.join(there) or 'none'}"
            )
        chosen += fitting
    return list(dict.fromkeys(chosen))


class ColumnCheck:
    """Checks the shards of one column, one by one, and counts what they hold.

    Args:
        column: the column.
        plan: the plan.
        full: whether tars are read.
        report: called with every finding.
    """

    def __init__(
        self, column: fmt.Column, plan: fmt.Plan, full: bool, report: Callable[[Finding], None]
    ) -> None:
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

    def shard(self, shard: int, keys: Sequence[str] | None) -> int:
        """Check one shard if it is committed; return 1 if it was, else 0.

        Args:
            shard: its number.
            keys: the planned keys, or None where they can't be known.
        """
        if shard not in self._committed:
            return 0
        try:
            for finding in self._findings(shard, keys):
                self.report(finding)
        except fmt.FormatError as error:
            self.report(Finding(str(error)))
        except OSError as error:
            path = error.filename or record_path(self.column, shard)
            self.report(Finding(f"{path} can't be read ({error.strerror or error})"))
        return 1

    def beyond_the_plan(self) -> int:
        """Check the shards that the plan does not know; return how many there are."""
        shards = [shard for shard in self._committed if shard >= len(self.rows_per_shard)]
        return sum(self.shard(shard, None) for shard in sorted(shards))

    def _findings(self, shard: int, keys: Sequence[str] | None) -> Iterator[Finding]:
        record = read_record(self.column, shard)
        if record is None:
            return
        self._totals.add(record)
        problems = list(record_problems(self.column, shard, record, self.rows_per_shard, keys))
        yield from (Finding(problem) for problem in problems)
        tar = self.column.path / record.tar
        try:
            found = tar.stat().st_size
        except FileNotFoundError:
            found = None
        if found != record.tar_bytes:
            state = "is missing" if found is None else f"has {found} bytes"
            yield Finding(
                f"{tar} {state}, expected {record.tar_bytes} bytes; {repair(self.column, shard)}"
            )
        index = read_index(self.column, shard, record)
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
            **{name: totals[name] for name in ("shards", "rows", "ok", "bytes")},
            "shards_planned": len(self.rows_per_shard),
            "findings": self._num_findings,
        }


def check_text(check: ColumnCheck, bar: tqdm) -> np.ndarray | None:
    """Check the shards of a text column, whose keys are in its captions.parquet.

    Returns:
        int64 [captions], a hash of each caption to compare the plan with, or None where
        captions.parquet can't be used.
    """
    path = check.column.path / "captions.parquet"
    try:
        hashes = caption_hashes(path, int(check.rows_per_shard.sum()))
        keys = (key for (key,) in read_rows(path, ["key"]))
    except fmt.FormatError as error:
        check.report(Finding(str(error)))
        hashes = keys = None
    for shard, num_rows in enumerate(check.rows_per_shard.tolist()):
        bar.update(check.shard(shard, list(islice(keys, num_rows)) if keys else None))
    return hashes


def check_clip_captions(
    path: Path,
    shard: int,
    rows: dict[str, list[Any]],
    hashes: np.ndarray,
    report: Callable[[Finding], None],
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


def print_summary(columns: list[dict[str, Any]]) -> None:
    """Print the closing table: one line a column."""
    width = max([len("column"), *(len(column["column"]) for column in columns)])
    print(f"{'column':<{width}}  {'shards':>13}  {'ok':>9}  {'failed':>8}  {'MB':>11}  findings")
    for column in columns:
        shards = f"{column['shards']}/{column['shards_planned']}"
        failed = column["rows"] - column["ok"]
        print(
            f"{column['column']:<{width}}  {shards:>13}  {column['ok']:>9}  {failed:>8}  "
            f"{column['bytes'] / 1e6:>11,.1f}  {column['findings']:>8}"
        )


if __name__ == "__main__":
    main()
