"""Is a data set that was written through faults the one that was written undisturbed?

Asked of every column: exactly one row for every planned clip, tars and indexes byte for byte those
of the reference, commit records that say the same, ``verify --full`` without findings, and no
file left over once ``pipeline.gc`` has been there.
"""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from pipeline import format as fmt
from pipeline.captions import caption_key
from pipeline.plan_table import PlanTable
from pipeline.verify import Finding, verify

# What a commit record says of the attempt that wrote it; all else must be the same.
OF_THE_ATTEMPT = {"attempt", "run_id", "host", "seconds", "encode_s", "write_s", "decode_s"}


def differences(root: Path, reference: Path) -> list[str]:
    """Return what is wrong with a data set, nothing where it is as it should be.

    Raises:
        FormatError: the plan can't be read.
    """
    found: list[str] = []

    def report(finding: Finding) -> None:
        found.append(f"verify: {finding.message}")

    with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
        verify(root, report, full=True)
    plan = fmt.read_plan(root)
    if plan != fmt.read_plan(reference):
        return [*found, f"{root} has another plan than {reference}"]
    names = fmt.column_directories(root)
    if names != (there := fmt.column_directories(reference)):
        return [*found, f"{root} has columns {names}, expected {there}"]
    for name in names:
        column = fmt.open_column(root, name, plan.plan_id)
        expected = fmt.open_column(reference, name, plan.plan_id)
        found += _column_differences(column, expected, plan, root)
    found += _facts_differences(root, reference)
    found += _left_over(root, reference)
    return found


def _column_differences(
    column: fmt.Column, reference: fmt.Column, plan: fmt.Plan, root: Path
) -> Iterator[str]:
    is_text = column.spec.modality == "text"
    rows_per_shard, table = plan.shard_rows(text=is_text), PlanTable(root, plan)
    shards = set(range(len(rows_per_shard)))
    if column.committed_shards() != shards:
        missing = sorted(shards - column.committed_shards())
        yield f"{column.path}: shards {missing} are not committed"
        return
    for shard in sorted(shards):
        if is_text:
            keys = [caption_key(caption) for caption in table.captions(shard)]
        else:
            keys = [clip.key for clip in table.clips(shard)]
        yield from _row_differences(column, shard, keys)
        record, expected = column.committed(shard), reference.committed(shard)
        for name, value in expected.items():
            if name not in OF_THE_ATTEMPT and record.get(name) != value:
                yield f"{column.path} shard {shard}: {name} {record.get(name)}, expected {value}"
        for name in ("tar", "index"):
            ours, theirs = column.path / record[name], reference.path / expected[name]
            if ours.read_bytes() != theirs.read_bytes():
                yield f"{ours} has other bytes than {theirs}"


def _row_differences(column: fmt.Column, shard: int, keys: list[str]) -> Iterator[str]:
    """Compare the rows with the plan without trusting hashes: tombstones and members of the tar."""
    index = column.index(shard, len(keys))
    stored = [key for key, row in zip(keys, index, strict=True) if row["status"] == fmt.OK]
    with tarfile.open(column.tar_path(shard)) as tar:
        members = tar.getnames()
    if members != [f"{key}.{column.spec.modality}.npy" for key in stored]:
        yield f"{column.path} shard {shard}: members {members}, expected those of {stored}"


def _facts_differences(root: Path, reference: Path) -> Iterator[str]:
    for path in sorted(reference.glob("facts@*/*.parquet")):
        ours = root / path.relative_to(reference)
        if not ours.exists():
            yield f"{ours} is missing"
        elif _rows(ours) != _rows(path):
            yield f"{ours} has other rows than {path}"


def _rows(path: Path) -> list[dict[str, Any]]:
    return pq.read_table(path).to_pylist()


def _left_over(root: Path, reference: Path) -> Iterator[str]:
    """Let ``pipeline.gc`` remove what no record names; then there must be the same files."""
    command = [sys.executable, "-m", "pipeline.gc", str(root), "--yes", "--min-age-hours", "0"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        yield f"pipeline.gc: exit {done.returncode}: {done.stderr.strip()}"
    there, expected = _files(root), _files(reference)
    for name in sorted(there - expected):
        yield f"{root / name} is left over, and pipeline.gc does not remove it"
    for name in sorted(expected - there):
        yield f"{root / name} is missing"


def _files(root: Path) -> set[str]:
    """Return the names of all files but those of ``runs/``, of which every command adds some."""
    files = (path.relative_to(root) for path in root.rglob("*") if path.is_file())
    return {str(name) for name in files if name.parts[0] != "runs"}
