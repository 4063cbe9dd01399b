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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass

from pipeline import format as fmt
from pipeline.sweep import (
    CommitRecord,
    Count,
    Seconds,
    Totals,
    first_error,
    one_line_errors,
    read_index,
    read_plan,
    read_record,
    record_problems,
)

# Clip lengths are taken from the indices of this many shards, spread evenly. The plan is
# shuffled, so that 64 shards of 512 clips stand for the others.
SAMPLED_SHARDS = 64
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


@dataclass
class Speed:
    """Sums over the shards whose writer noted its time; ``seconds`` are those of one cell."""

    seconds: float = 0.0
    encode_s: float = 0.0
    ok: int = 0
    rates: list[tuple[float, int]] = field(default_factory=list)  # (ok clips a second, shard)

    def add(self, shard: int, record: CommitRecord) -> None:
        """Take in one shard."""
        if record.seconds:
            self.seconds += record.seconds
            self.encode_s += record.encode_s or 0.0
            self.ok += record.ok
            self.rates.append((record.ok / record.seconds, shard))

    def summary(self, clip_s: float | None) -> dict[str, Any] | None:
        """Return the rates of one cell, or None where no shard was timed.

        Args:
            clip_s: mean length of an ok clip, where it is known.
        """
        if not self.rates:
            return None
        per_s = self.ok / self.seconds
        slowest, shard = min(self.rates)
        return {
            "seconds": round(self.seconds, 3),
            "encode_s": round(self.encode_s, 3),
            "clips_per_s": round(per_s, 3),
            "clips_per_s_median_shard": round(float(np.median([r for r, _ in self.rates])), 3),
            "clips_per_s_slowest_shard": round(slowest, 3),
            "slowest_shard": shard,
            "clips_per_encode_s": round(self.ok / self.encode_s, 3) if self.encode_s else None,
            "hours_per_hour": round(per_s * clip_s, 3) if clip_s else None,
        }


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


def mean_clip_s(column: fmt.Column, shards: list[int], problems: list[str]) -> float | None:
    """Return the mean length of the ok clips of shards, None where the column has no clock."""
    if not shards or column.spec.rate_hz <= 0:
        return None
    places = np.linspace(0, len(shards) - 1, min(len(shards), SAMPLED_SHARDS)).astype(int)
    latents, clips = 0, 0
    for shard in (shards[place] for place in places):
        try:
            record = read_record(column, shard)
            if record is None:
                continue
            index = read_index(column, shard, record)
        except fmt.FormatError as error:
            problems.append(str(error))
            continue
        lengths = index["shape"][index["status"] == fmt.OK, 0]
        latents, clips = latents + int(lengths.sum()), clips + len(lengths)
    return latents / column.spec.rate_hz / clips if clips else None


def facts_status(root: Path, folder: Path, orphans: list[dict[str, Any]]) -> dict[str, Any]:
    """Count the shards that have facts in a folder."""
    shards = [
        entry.stat().st_size
        for entry in os.scandir(folder)
        if re.fullmatch(r"\d{6,}\.parquet", entry.name)
    ]
    orphans += stat_files(root, folder, hidden_names(folder))
    return {"name": folder.name, "shards": len(shards), "bytes": sum(shards)}


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
            f"slowest {speed['clips_per_s_slowest_shard']:,.2f}: {speed['slowest_shard']})"
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
