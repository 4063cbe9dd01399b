"""``python -m pipeline.verify DIR [--full] [--reencode N]``: is a data set what it says it is?

Quick by default: every commit record against the plan, every index and the size of every tar
against the record, all facts against plan and columns. ``--full`` also reads every page of all
tables, and every tar once, front to back: each byte of it follows from the plan's keys, the index
and the payloads' checksums.
``--reencode`` encodes random rows again, as only that can tell whether a column still comes from
its source. Holds one shard's index and one payload at a time, of an object store some more.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from pipeline import format as fmt
from pipeline.column_check import ColumnCheck, Looked, check_clip_captions, check_text
from pipeline.data_root import open_root
from pipeline.facts_check import FactsCheck, Judged
from pipeline.files import map_ahead
from pipeline.findings import Finding, Report
from pipeline.orphans import column_folders
from pipeline.plan_table import PlanTable
from pipeline.sweep import command_parser, one_line_errors, progress_bar
from pipeline.tally import failures
from pipeline.wording import size_text


def main() -> None:
    """Parse the command line and verify; exit 1 where anything was found."""
    parser = command_parser(
        "verify", "Compare a data set with its plan, its commit records and its checksums."
    )
    parser.add_argument(
        "--full", action="store_true", help="read every byte of every tar and table"
    )
    parser.add_argument("--columns", help="modalities or column folders, comma-separated")
    parser.add_argument(
        "--reencode",
        type=int,
        metavar="N",
        default=0,
        help="decode and encode N random rows of every column again, and compare",
    )
    parser.add_argument("--seed", type=int, default=0, help="of --reencode's choice (default 0)")
    arguments = parser.parse_args()
    if arguments.reencode < 0 or arguments.seed < 0:
        parser.error("--reencode and --seed must be 0 or more")
    findings: list[Finding] = []

    def report(finding: Finding) -> None:
        findings.append(finding)
        if not arguments.json:
            tqdm.write(finding.message, file=sys.stdout)

    with one_line_errors("nothing was changed"):
        root = open_root(arguments.dir)
        wanted = arguments.columns.split(",") if arguments.columns else None
        found: dict[str, Any] = verify(root, report, wanted, arguments.full)
        if arguments.reencode:
            found["reencoded"] = reencode(root, report, wanted, arguments)
        if arguments.json:
            value = {"dir": str(root), "full": arguments.full, **found}
            listed = [asdict(finding) for finding in findings]
            print(json.dumps({**value, "findings": listed}, indent=2))
        else:
            print_summary(**found)
        if findings:
            sys.exit(f"error: {len(findings)} finding{'s' * (len(findings) > 1)} in {root}")


def verify(
    root: Path, report: Report, wanted: Sequence[str] | None = None, full: bool = False
) -> dict[str, list[dict[str, Any]]]:
    """Verify the columns of a data set, and the facts if columns of clips are among them.

    Args:
        root: the data set's folder.
        report: called with every finding.
        wanted: modalities or column directories; None is all.
        full: whether tars and tables are read whole.

    Returns:
        ``columns``: for each its name, shards, shards_planned, rows, ok, statuses,
        bytes and findings;
        ``facts``: for each folder its name, shards and findings.

    Raises:
        FormatError: there is no readable plan, or no column that ``wanted`` names.
    """
    plan = fmt.read_plan(root)
    table = PlanTable(root, plan)
    check_tables(table, full, report)
    checks = []
    for name in choose_columns(root, wanted):
        try:
            column = fmt.open_column(root, name, plan.plan_id)
            checks.append(ColumnCheck(column, plan, full, report))
        except fmt.FormatError as error:
            report(Finding(str(error)))
    texts = [check for check in checks if check.column.spec.modality == "text"]
    clips = [check for check in checks if check.column.spec.modality != "text"]
    facts = FactsCheck(root, report, full) if clips else None
    with progress_bar(sum(check.num_committed for check in checks), "shard") as bar:
        captions = [check_text(check, bar) for check in texts]
        shards = planned_shards(table, len(plan.shard_rows()), bool(captions), report)
        for planned in map_ahead(root, lambda planned: look_at(planned, clips, facts), shards):
            for hashes in captions:
                if planned.rows is not None and hashes is not None:
                    check_clip_captions(table.path, planned.shard, planned.rows, hashes, report)
            for check, looked in zip(clips, planned.looked, strict=True):
                bar.update(check.take(looked))
            if facts:
                facts.take(planned.facts)
        for check in checks:
            bar.update(check.beyond_the_plan())
        if facts:
            facts.beyond_the_plan(len(plan.shard_rows()))
    return {
        "columns": [check.summary() for check in checks],
        "facts": facts.summary() if facts else [],
    }


def check_tables(table: PlanTable, full: bool, report: Report) -> None:
    """Check that the plan's captions are there and, with ``full``, every page of its tables."""
    try:
        table.captions(0)
        if full:
            table.read_through()
    except fmt.FormatError as error:
        report(Finding(str(error)))


class PlannedShard(NamedTuple):
    """A shard of clips and what was found in it.

    Attributes:
        shard: its number.
        rows: what the plan says of it, or None where that can't be read.
        looked: by column.
        facts: findings in its facts, with their folders.
    """

    shard: int
    rows: dict[str, list[Any]] | None
    looked: Sequence[Looked | None] = ()
    facts: Sequence[tuple[str, Finding]] = ()


def planned_shards(
    table: PlanTable, num_shards: int, with_captions: bool, report: Report
) -> Iterator[PlannedShard]:
    """Yield the plan's shards of clips, still to be looked at."""
    for shard in range(num_shards):
        try:
            yield PlannedShard(shard, table.read(shard, ["caption"] if with_captions else []))
        except fmt.FormatError as error:
            report(Finding(str(error)))
            yield PlannedShard(shard, None)


def look_at(
    planned: PlannedShard, checks: Sequence[ColumnCheck], facts: FactsCheck | None
) -> PlannedShard:
    """Look at a shard in all columns and at its facts; in any thread."""
    keys = planned.rows["key"] if planned.rows else None
    looked = [check.look(planned.shard, keys) for check in checks]
    if facts is None or keys is None:
        return planned._replace(looked=looked)
    judged = [
        Judged(check.column, planned.shard, one.record.facts, one.statuses)
        for check, one in zip(checks, looked, strict=True)
        if one is not None and one.record is not None and one.statuses is not None
    ]
    found = facts.look(planned.shard, keys, judged)
    return planned._replace(looked=looked, facts=found)


def choose_columns(root: Path, wanted: Sequence[str] | None) -> list[str]:
    """Return the directories of the columns that are named by modality or directory.

    Raises:
        FormatError: a name fits none.
    """
    there = column_folders(root)
    chosen = []
    for item in there if wanted is None else wanted:
        fitting = [name for name in there if item in (name, name.partition("@")[0])]
        if not fitting:
            raise fmt.FormatError(
                f"{root} has no column {item!r}; there: {', '.join(there) or 'none'}"
            )
        chosen += fitting
    return list(dict.fromkeys(chosen))


def reencode(
    root: Path, report: Report, wanted: Sequence[str] | None, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """Encode random rows again, of the columns that can be opened: the others were reported."""
    from pipeline.reencode import reencode_columns  # loads the codecs

    plan, columns = fmt.read_plan(root), []
    for name in choose_columns(root, wanted):
        try:
            columns.append(fmt.open_column(root, name, plan.plan_id))
        except fmt.FormatError:
            continue  # as verify has said
    return reencode_columns(root, plan, columns, arguments.reencode, arguments.seed, report)


def print_summary(
    columns: list[dict[str, Any]],
    facts: list[dict[str, Any]],
    reencoded: Sequence[dict[str, Any]] = (),
) -> None:
    """Print the closing tables: one line a column, a folder of facts, a column encoded again."""
    names = [*(one["column"] for one in columns), *(one["facts"] for one in facts)]
    width = max(map(len, ["column", *names]))
    heads = f"{'shards':>13}  {'ok':>9}  {'failed':>8}  {'dropped':>8}  {'size':>10}  findings"
    print(f"{'column':<{width}}  {heads}")
    for column in columns:
        shards = f"{column['shards']}/{column['shards_planned']}"
        failed = failures(column["statuses"]).total()
        dropped = column["statuses"].total() - column["ok"] - failed
        print(
            f"{column['column']:<{width}}  {shards:>13}  {column['ok']:>9}  {failed:>8}  "
            f"{dropped:>8}  {size_text(column['bytes']):>10}  {column['findings']:>8}"
        )
    for one in facts:
        print(f"{one['facts']:<{width}}  {one['shards']:>13}  {'':>41}  {one['findings']:>8}")
    for one in reencoded:
        causes = [f"{count} not ({why})" for why, count in one["not_checked"].items()]
        found = f"{one['checked']} rows encoded again, {one['equal']} gave the same bytes"
        if one["equal"] < one["checked"]:
            found += f", others differ by at most {one['largest_difference']:.3g}"
        print(f"{one['column']:<{width}}  {', '.join([found, *causes])}")


if __name__ == "__main__":
    main()
