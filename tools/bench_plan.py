"""``python -m tools.bench_plan``: a big plan, its resume, and a data set with nothing left to do.

Writes a Parquet table of made-up clips, and plans it in child processes, as ``pipeline.encode``
would: once into an empty folder, once more with nothing changed. Then every shard gets a commit
record with files that are empty: ``pipeline.status`` and ``pipeline.encode`` look at no more than
their names when nothing is left to encode. No media are needed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import format as fmt
from pipeline.config import EncodeConfig, column_specs
from pipeline.plan import ensure_plan
from pipeline.shards import create_column
from pipeline.sources import open_source

CHUNK_ROWS = 1 << 18
CAPTION = "a video of thing {:09d} that makes a sound"


def main() -> None:
    """Parse the command line, measure, and print."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench_plan", description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--captions", type=int, help="different ones (default: rows / 10)")
    parser.add_argument("--folder", type=Path, help="scratch space (default: a temporary folder)")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(plan(*options.child)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        captions = options.captions or max(1, options.rows // 10)
        figures = measure(Path(folder), options.rows, captions)
    if options.json:
        print(json.dumps(figures))
        return
    print(
        f"{figures['rows']:,} rows, {figures['captions']:,} captions, a table of "
        f"{figures['table_mb']:.0f} MB; {figures['cpus']} CPUs ({figures['machine']})"
    )
    for name in ("plan", "resume"):
        figure = figures[name]
        print(
            f"{name:>6}: {figure['wall_s']:6.1f} s with imports, {figure['seconds']:6.1f} s "
            f"without ({figure['cpu_s']:.1f} s of CPU), peak RSS {figure['peak_rss_mb']:,.0f} MB"
        )
    print(f"{figures['commits']:,} shards of video, audio and captions committed, then")
    for name in ("encode", "status"):
        figure = figures[name]
        print(f"{name:>6}: {figure['wall_s']:6.1f} s ({figure['cpu_s']:.1f} s of CPU)")


def measure(folder: Path, num_rows: int, num_captions: int) -> dict:
    """Plan a table of so many rows, then resume."""
    table = folder / "clips.parquet"
    write_table(table, num_rows, num_captions)
    figures = {
        "rows": num_rows,
        "captions": num_captions,
        "table_mb": table.stat().st_size / 1e6,
        "cpus": len(os.sched_getaffinity(0)),
        "machine": platform.processor() or platform.machine(),
    }
    for name in ("plan", "resume"):
        started = time.perf_counter()
        command = [sys.executable, "-m", "tools.bench_plan", "--child", table, folder / "shards"]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        wall_s = time.perf_counter() - started
        figures[name] = {"wall_s": wall_s, **json.loads(done.stdout)}
    figures["commits"] = commit_all(folder / "shards")
    encode = ["pipeline.encode", "--src", table, "--out", folder / "shards"]
    run_module(*encode)  # copies the captions
    figures["encode"] = run_module(*encode)
    figures["status"] = run_module("pipeline.status", folder / "shards")
    return figures


def commit_all(root: Path) -> int:
    """Write a commit record for every shard of the default columns; return their number."""
    plan, count = fmt.read_plan(root), 0
    for modality, spec in column_specs(EncodeConfig()).items():
        column = create_column(root, spec, plan.plan_id)
        for shard, rows in enumerate(plan.shard_rows(text=modality == "text").tolist()):
            stem = fmt.shard_name(shard)
            record = {
                "plan_id": plan.plan_id,
                "column": column.path.name,
                "shard": shard,
                "tar": f"{stem}.tar",
                "index": f"{stem}.idx.npy",
                "rows": rows,
                "ok": 0,  # dropped by a check: needs neither payload nor index
                "status_counts": {"silent": rows},
                "keys_hash": "0" * 16,
                "tar_bytes": 0,
                "tar_crc32c": 0,
                "index_crc32c": 0,
                "channels": {"count": 0, "sum": [0.0] * 16, "sum_of_squares": [0.0] * 16},
            }
            (column.path / f"{stem}.json").write_text(json.dumps(record))
            for name in (record["tar"], record["index"]):
                (column.path / name).touch()
            count += 1
    return count


def run_module(*command: str | Path) -> dict[str, float]:
    """Run a command of the project; return its seconds."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    line = [sys.executable, "-m", *command]
    done = subprocess.run(line, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"python -m {' '.join(map(str, command))} failed: {done.stderr}")
    wall_s = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall_s": wall_s, "cpu_s": cpu_s}


def write_table(path: Path, num_rows: int, num_captions: int) -> None:
    """Write made-up clips: 1000 files a folder, in an order that is not that of their names."""
    schema = pa.schema(
        [
            *(("uri", pa.string()), ("start_s", pa.float64()), ("duration_s", pa.float64())),
            *(("caption", pa.string()), ("label", pa.string()), ("split", pa.string())),
        ]
    )
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, num_rows, CHUNK_ROWS):
            rows = np.arange(start, min(start + CHUNK_ROWS, num_rows))
            names = (rows * 7_919_999 + 13) % num_rows if num_rows % 7_919_999 else rows
            columns = [
                pa.array(
                    [f"part{name // 1000:06d}/video_{name:09d}.mp4" for name in names.tolist()]
                ),
                pa.array(np.zeros(len(rows))),
                pa.array(np.full(len(rows), 10.0)),
                pa.array([CAPTION.format(caption) for caption in (rows % num_captions).tolist()]),
                pa.array([f"label {label}" for label in (rows % 309).tolist()]),
                pa.array(["train" if row % 10 else "test" for row in rows.tolist()]),
            ]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))


def plan(table: str, out: str) -> dict:
    """Plan in this process; return seconds without imports and the peak of its memory."""
    config = EncodeConfig()
    started, cpu_started = time.perf_counter(), time.process_time()
    made = ensure_plan(Path(out), open_source(table, config), config)
    seconds, cpu_s = time.perf_counter() - started, time.process_time() - cpu_started
    peak_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "plan_id": made.plan_id,
        "seconds": seconds,
        "cpu_s": cpu_s,
        "peak_rss_mb": peak_kb * 1024 / 1e6,
    }


if __name__ == "__main__":
    main()
