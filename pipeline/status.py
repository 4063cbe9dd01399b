"""``python -m pipeline.status DIR``: what a data set holds, from its commit records alone.

It may be called while a run writes: what appears or goes meanwhile is counted or not, and never
an error. Costs one small file a committed shard; of an object store, a request each, several at
once.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass

from pipeline import format as fmt
from pipeline.checks import FACTS_FILE
from pipeline.data_root import open_root
from pipeline.orphans import (
    ColumnFiles,
    Found,
    all_files,
    column_folders,
    entries,
    facts_folders,
    temporaries,
)
from pipeline.records import (
    Count,
    Seconds,
    Totals,
    first_error,
    record_problems,
    records_or_errors,
    repair,
)
from pipeline.speed import Speed, mean_clip_s
from pipeline.sweep import command_parser, one_line_errors
from pipeline.tally import failures
from pipeline.wording import age_text, counted, duration_text, rate_text, size_text

RUNS_SHOWN = 5
ORPHANS_SHOWN = 10


def main() -> None:
    """Parse the command line, print the status; exit 1 where something is damaged."""
    parser = command_parser(
        "status", "Say what a data set holds: columns, clips by status, sizes, speed, runs."
    )
    arguments = parser.parse_args()
    with one_line_errors("nothing was changed"):
        root = open_root(arguments.dir)
        status = data_set_status(root)
        print(json.dumps(status, indent=2) if arguments.json else as_text(status))
        if status["problems"]:
            sys.exit(
                f"error: {len(status['problems'])} damaged; python -m pipeline.verify "
                f"{root} looks closer"
            )


def data_set_status(root: Path) -> dict[str, Any]:
    """Collect the status of a data set as JSON values.

    Raises:
        FormatError: there is no plan.
    """
    plan = fmt.read_plan(root)
    problems: list[str] = []
    orphans = temporaries(root)
    columns = []
    for name in column_folders(root):
        try:
            column = fmt.open_column(root, name, plan.plan_id)
        except fmt.FormatError as error:
            problems.append(str(error))
            continue
        columns.append(column_status(column, plan, problems, orphans))
    facts = [facts_status(root / name, orphans) for name in facts_folders(root)]
    return {
        "dir": str(root),
        "plan": {
            "plan_id": plan.plan_id,
            "source": plan.source,
            "seed": plan.seed,
            "clips": plan.num_clips,
            "shards": len(plan.shard_rows()),
            "captions": int(plan.shard_rows(text=True).sum()),
        },
        "columns": columns,
        "facts": facts,
        "runs": runs_status(root / "runs", problems),
        "orphans": [orphan.told(root) for orphan in orphans],
        "problems": problems,
    }


@checked_dataclass(frozen=True)
class RunSummary:
    """What is shown of a run's summary.json."""

    outcome: str
    clips: Count
    seconds: Seconds
    clips_per_s: Seconds


def column_status(
    column: fmt.Column, plan: fmt.Plan, problems: list[str], orphans: list[Found]
) -> dict[str, Any]:
    """Sum the commit records of a column; add to the lists what is damaged or left over."""
    rows_per_shard = plan.shard_rows(text=column.spec.modality == "text")
    files, totals, speed = ColumnFiles(column.path), Totals(), Speed()
    hosts, runs = Counter[str](), Counter[str]()
    encoded = list[int]()

    for shard, record in records_or_errors(column):
        if isinstance(record, fmt.FormatError):
            problems.append(str(record))
            files.claim(shard, None)
            continue
        if record is None:
            continue
        files.claim(shard, record)
        problems += record_problems(column, shard, record, rows_per_shard, None)
        problems += (
            f"{column.path / name} is missing though committed; {repair(column, shard)}"
            for name in files.missing(record)
        )
        totals.add(record)
        speed.add(shard, record)
        hosts[record.host or "unknown"] += 1
        runs[record.run_id or "unknown"] += 1
        if record.ok:
            encoded.append(shard)
    orphans += files.orphans()
    clip_s = mean_clip_s(column, encoded, problems)
    return {
        "name": column.path.name,
        "modality": column.spec.modality,
        "shards_planned": len(rows_per_shard),
        **{name: getattr(totals, name) for name in ("shards", "rows", "ok", "bytes", "statuses")},
        "mean_clip_s": clip_s and round(clip_s, 3),
        "speed": speed.summary(clip_s),
        "hosts": dict(hosts),
        "runs": dict(runs),
    }


def facts_status(folder: Path, orphans: list[Found]) -> dict[str, Any]:
    """Count the shards that have facts in a folder."""
    orphans += temporaries(folder)
    listed = entries(folder).items()
    shards = {name: entry for name, entry in listed if FACTS_FILE.fullmatch(name)}
    sizes = [file.num_bytes for file in all_files(folder, shards)]
    return {"name": folder.name, "shards": len(sizes), "bytes": sum(sizes)}


def runs_status(folder: Path, problems: list[str]) -> dict[str, Any]:
    """Count the encode runs and say how the last ones ended."""
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    last = []
    for name in names[-RUNS_SHOWN:]:
        path = folder / name / "summary.json"
        run: dict[str, Any] = {"run_id": name, "outcome": "no summary: under way, or killed"}
        if path.exists():
            try:
                run |= vars(read_summary(path))
            except fmt.FormatError as error:
                problems.append(str(error))
                run["outcome"] = "damaged summary"
        last.append(run)
    return {"count": len(names), "last": last}


def read_summary(path: Path) -> RunSummary:
    """Read the summary of a run.

    Raises:
        FormatError: it is damaged.
    """
    value = fmt.read_json(path)
    try:
        return TypeAdapter(RunSummary).validate_python(value)
    except ValidationError as error:
        raise fmt.FormatError(f"{path}: {first_error(error)}; remove the run's folder") from None


def as_text(status: dict[str, Any]) -> str:
    """Return the status as lines for a person."""
    plan = status["plan"]
    source = " ".join(str(plan["source"].get(name, "")) for name in ("kind", "root")).strip()
    lines = [
        f"{status['dir']}: plan {plan['plan_id']} of {source}: {counted(plan['clips'], 'clip')} "
        f"in {counted(plan['shards'], 'shard')}, {counted(plan['captions'], 'caption')}"
    ]
    for column in status["columns"]:
        lines += ["", *column_lines(column)]
    lines.append("")
    for facts in status["facts"]:
        shards, size = counted(facts["shards"], "shard"), size_text(facts["bytes"])
        lines.append(f"{facts['name']}: {shards}, {size}")
    runs = status["runs"]
    lines.append(f"runs: {runs['count']}")
    for run in runs["last"]:
        lines.append(f"  {run['run_id']}  {run['outcome']}{run_text(run)}")
    orphans = status["orphans"]
    total = size_text(sum(orphan["bytes"] for orphan in orphans))
    lines.append(f"files that no commit record names: {len(orphans):,}, {total}")
    for orphan in orphans[:ORPHANS_SHOWN]:
        age = "" if orphan["age_s"] is None else f", {age_text(orphan['age_s'])} old"
        lines.append(f"  {orphan['file']}  {size_text(orphan['bytes'])}{age}")
    lines += [f"  … {len(orphans) - ORPHANS_SHOWN:,} more"] * (len(orphans) > ORPHANS_SHOWN)
    return "\n".join([*lines, *(f"damaged: {problem}" for problem in status["problems"])])


def run_text(run: dict[str, Any]) -> str:
    """Return what a run did, or "" where it left no summary."""
    if "clips" not in run:
        return ""
    clips, took = counted(run["clips"], "clip"), duration_text(run["seconds"])
    return f", {clips} in {took}, {rate_text(run['clips_per_s'])} clips/s with start-up"


def causes(counts: Counter[str]) -> str:
    """Return the counts by status, in brackets, or "" where there are none."""
    listed = ", ".join(f"{name} {count:,}" for name, count in sorted(counts.items()))
    return f" ({listed})" if listed else ""


def column_lines(column: dict[str, Any]) -> list[str]:
    """Return the lines about one column."""
    failed = failures(Counter(column["statuses"]))
    dropped = Counter(column["statuses"]) - failed - Counter(ok=column["ok"])
    rows = [f"{column['ok']:,} ok", f"{failed.total():,} failed{causes(failed)}"]
    if dropped:
        rows.append(f"{dropped.total():,} dropped{causes(dropped)}")
    lines = [
        column["name"],
        f"  shards   {column['shards']:,} of {column['shards_planned']:,} committed, "
        f"{size_text(column['bytes'])}",
        f"  rows     {'; '.join(rows)}",
    ]
    if speed := column["speed"]:
        encoder, hours = speed["clips_per_encode_s"], speed["hours_per_hour"]
        lines.append(
            f"  speed    {speed['clips_per_s']:,.2f} ok rows/s per cell over "
            f"{duration_text(speed['seconds'])}, without start-up "
            f"(median shard {speed['clips_per_s_median_shard']:,.2f}, "
            f"slowest {speed['clips_per_s_slowest_shard']:,.2f}, shard {speed['slowest_shard']})"
            + (f", codecs alone {encoder:,.2f}" if encoder else "")
            + (f", {hours:,.1f} h of {column['modality']} an hour" if hours else "")
        )
    for what in ("hosts", "runs"):
        listed = [f"{name} {count}" for name, count in Counter(column[what]).most_common(3)]
        more = len(column[what]) - len(listed)
        listed += [f"{more} more"] * (more > 0)
        if listed:
            lines.append(f"  {what:<7}  shards of {', '.join(listed)}")
    return lines


if __name__ == "__main__":
    main()
