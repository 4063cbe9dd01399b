"""``python -m pipeline.status DIR``: what a data set holds, from its commit records alone.

It may be called while a run writes: what appears or goes meanwhile is counted or not, and never
an error. Costs one small file a committed shard.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass

from pipeline import format as fmt
from pipeline.records import Count, Seconds, Totals, first_error, read_record, record_problems
from pipeline.speed import Speed, mean_clip_s
from pipeline.sweep import one_line_errors, read_plan

RUNS_SHOWN = 5
ORPHANS_SHOWN = 10


def main() -> None:
    """Parse the command line, print the status; exit 1 where something is damaged."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.status",
        description="Say what a data set holds: columns, clips by status, sizes, speed, runs.",
    )
    parser.add_argument("dir", type=Path, metavar="DIR", help="data set folder")
    parser.add_argument("--json", action="store_true", help="print JSON for programs")
    arguments = parser.parse_args()
    with one_line_errors("nothing was changed"):
        status = data_set_status(arguments.dir)
        print(json.dumps(status, indent=2) if arguments.json else as_text(status))
        if status["problems"]:
            sys.exit(
                f"error: {len(status['problems'])} damaged; python -m pipeline.verify "
                f"{arguments.dir} looks closer"
            )


def data_set_status(root: Path) -> dict[str, Any]:
    """Collect the status of a data set as JSON values.

    Raises:
        FormatError: there is no plan.
    """
    plan = read_plan(root)
    problems: list[str] = []
    orphans = stat_files(root, root, hidden_names(root))
    columns = []
    for name in fmt.column_directories(root):
        try:
            column = fmt.open_column(root, name, plan.plan_id)
        except fmt.FormatError as error:
            problems.append(str(error))
            continue
        columns.append(column_status(root, column, plan, problems, orphans))
    facts = [facts_status(root, folder, orphans) for folder in sorted(root.glob("facts@*"))]
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
        "orphans": orphans,
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
    root: Path,
    column: fmt.Column,
    plan: fmt.Plan,
    problems: list[str],
    orphans: list[dict[str, Any]],
) -> dict[str, Any]:
    """Sum the commit records of a column; add to the lists what is damaged or left over."""
    rows_per_shard = plan.shard_rows(text=column.spec.modality == "text")
    # Listed before the records are read: a shard committed meanwhile leaves nothing over.
    there = {entry.name for entry in os.scandir(column.path)}
    totals, speed = Totals(), Speed()
    hosts, runs = Counter[str](), Counter[str]()
    named, encoded = {"column.json", "captions.parquet"}, list[int]()
    for shard in sorted(column.committed_shards()):
        stem = fmt.shard_name(shard)
        named |= {f"{stem}{ending}" for ending in (".json", ".tar", ".idx.npy")}
        try:
            record = read_record(column, shard)
        except fmt.FormatError as error:
            problems.append(str(error))
            continue
        if record is None:
            continue
        named |= {record.tar, record.index}
        problems += record_problems(column, shard, record, rows_per_shard, None)
        totals.add(record)
        speed.add(shard, record)
        hosts[record.host or "unknown"] += 1
        runs[record.run_id or "unknown"] += 1
        if record.ok:
            encoded.append(shard)
    orphans += stat_files(root, column.path, there - named)
    clip_s = mean_clip_s(column, encoded, problems)
    return {
        "name": column.path.name,
        "modality": column.spec.modality,
        "shards_planned": len(rows_per_shard),
        **vars(totals),
        "mean_clip_s": clip_s and round(clip_s, 3),
        "speed": speed.summary(clip_s),
        "hosts": dict(hosts),
        "runs": dict(runs),
    }


def facts_status(root: Path, folder: Path, orphans: list[dict[str, Any]]) -> dict[str, Any]:
    """Count the shards that have facts in a folder."""
    names = {e.name for e in os.scandir(folder) if re.fullmatch(r"\d{6,}\.parquet", e.name)}
    sizes = [file["bytes"] for file in stat_files(root, folder, names)]
    orphans += stat_files(root, folder, hidden_names(folder))
    return {"name": folder.name, "shards": len(sizes), "bytes": sum(sizes)}


def hidden_names(folder: Path) -> set[str]:
    """Return the names of the hidden files of a folder: temporaries of a writer."""
    return {e.name for e in os.scandir(folder) if e.name.startswith(".") and not e.is_dir()}


def stat_files(root: Path, folder: Path, names: set[str]) -> list[dict[str, Any]]:
    """Return path, size and age of files; those that have gone meanwhile are left out."""
    found = []
    for name in sorted(names):
        with suppress(FileNotFoundError):
            facts = (folder / name).lstat()
            age_s = round(max(0.0, time.time() - facts.st_mtime), 1)
            path = str((folder / name).relative_to(root))
            found.append({"file": path, "bytes": facts.st_size, "age_s": age_s})
    return found


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
    source = " ".join(str(value) for value in plan["source"].values())
    lines = [
        f"{status['dir']}: plan {plan['plan_id']} of {source}: {plan['clips']} clips in "
        f"{plan['shards']} shards, {plan['captions']} captions"
    ]
    for column in status["columns"]:
        lines += ["", *column_lines(column)]
    lines += ["", *(f"{f['name']}: {f['shards']} shards, {f['bytes'] / 1e6:,.1f} MB"
                    for f in status["facts"])]  # fmt: skip
    runs = status["runs"]
    lines.append(f"runs: {runs['count']}")
    for run in runs["last"]:
        counts = f", {run['clips']} clips in {run['seconds']:,.0f} s" if "clips" in run else ""
        lines.append(f"  {run['run_id']}  {run['outcome']}{counts}")
    orphans = status["orphans"]
    total = sum(orphan["bytes"] for orphan in orphans)
    lines.append(f"files that no commit record names: {len(orphans)}, {total / 1e6:,.1f} MB")
    for orphan in orphans[:ORPHANS_SHOWN]:
        size_age = f"{orphan['bytes'] / 1e6:,.1f} MB, {orphan['age_s']:,.0f} s old"
        lines.append(f"  {orphan['file']}  {size_age}")
    lines += [f"  … {len(orphans) - ORPHANS_SHOWN} more"] * (len(orphans) > ORPHANS_SHOWN)
    return "\n".join([*lines, *(f"damaged: {problem}" for problem in status["problems"])])


def column_lines(column: dict[str, Any]) -> list[str]:
    """Return the lines about one column."""
    failed = {name: count for name, count in column["statuses"].items() if name != "ok"}
    causes = ", ".join(f"{name} {count}" for name, count in sorted(failed.items()))
    lines = [
        column["name"],
        f"  shards   {column['shards']} of {column['shards_planned']} committed, "
        f"{column['bytes'] / 1e6:,.1f} MB",
        f"  rows     {column['ok']} ok, {column['rows'] - column['ok']} failed"
        + f": {causes}" * bool(causes),
    ]
    if speed := column["speed"]:
        encoder, hours = speed["clips_per_encode_s"], speed["hours_per_hour"]
        lines.append(
            f"  speed    {speed['clips_per_s']:,.2f} ok rows/s per cell over "
            f"{speed['seconds']:,.0f} s (median shard {speed['clips_per_s_median_shard']:,.2f}, "
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
