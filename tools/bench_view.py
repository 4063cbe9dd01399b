"""``python -m tools.bench_view``: how a rank opens a huge data set, starts on it and goes on.

Makes a data set without payloads (``tools.made_up_view``): of 200 million clips 5.6 GB of disk,
nearly all of it the census. Then a fresh process does what each rank of a run does: opens the view,
makes the loader, and reads its first micro-batch, at the start of the epoch and from its middle.

Included are the census's head and tables per shard, the order, commit records and indices of the
shards read ahead, latents (of zeros) and their checksums, captions. Not included: making the
census, once per node and data set, and waiting for disks: what is read was just written, and is in
the page cache.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from tools.made_up_view import MadeUpView, key_of, write_view
from tools.process_memory import memory_bytes
from train.data import DataConfig, LatentLoader, open_view
from train.data.stream import Cursor, Place, Stream
from train.latents import LatentBatch

Result = TypeVar("Result")

SEED, NUM_RANKS, MICRO_BATCH = 0, 64, 4
GLOBAL_BATCH = 512
READ_WINDOWS = 6  # windows of shards behind each start that can be read


def main() -> None:
    """Parse the command line, measure, and print."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench_view",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rows", type=int, default=200_000_000, help="clips")
    parser.add_argument("--shard-size", type=int, default=500, help="clips of a shard")
    parser.add_argument("--folder", type=Path, help="scratch space (default: a temporary folder)")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(be_a_rank(options.child)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        figures = measure(Path(folder), options.rows, options.shard_size)
    print(json.dumps(figures) if options.json else as_text(figures))


def measure(folder: Path, num_rows: int, shard_size: int) -> dict[str, Any]:
    """Make a data set, and have a rank in a process of its own open and read it."""
    view = MadeUpView(folder / "shards", num_rows, shard_size)
    config = DataConfig(root=str(view.root), cache_dir=str(folder / "cache"))
    stream = stream_over(view, config)
    starts = [stream.start(), middle_of(view)]
    shards = {shard for start in starts for shard in first_shards(stream, start, config)}
    _, made_s = timed(lambda: write_view(view, config, shards))
    task = {"config": {"root": config.root, "cache_dir": config.cache_dir}, "starts": []}
    for start in starts:
        rows = next(stream.batches(start)).rows[:MICRO_BATCH].tolist()
        task["starts"].append({"cursor": start.to_json(), "keys": [key_of(row) for row in rows]})
    (folder / "task.json").write_text(json.dumps(task))
    command = [sys.executable, "-m", "tools.bench_view", "--child", folder / "task.json"]
    done, wall_s = timed(lambda: subprocess.run(command, check=True, stdout=subprocess.PIPE))
    return {
        "rows": num_rows,
        "shards": len(view.counts),
        "usable": int(view.counts.sum()),
        "made_s": made_s,
        "wall_s": wall_s,
        "cpus": len(os.sched_getaffinity(0)),
        "machine": platform.processor() or platform.machine(),
        "stages": json.loads(done.stdout),
    }


def stream_over(view: Any, config: DataConfig) -> Stream:
    """Return the stream of a run over the one data set."""
    return Stream(
        [view],
        [1.0],
        global_batch=GLOBAL_BATCH,
        window_shards=config.window_shards,
        tail=config.tail,
        seed=SEED,
    )


def middle_of(view: MadeUpView) -> Cursor:
    """Return a cursor in the middle of the first epoch, behind whole batches of every bucket."""
    steps = [int(rows) // GLOBAL_BATCH // 2 for rows in view.counts.sum(axis=0)]
    consumed = tuple(GLOBAL_BATCH * num_steps for num_steps in steps)
    return Cursor(sum(consumed), sum(steps), (Place(0, consumed),))


def first_shards(stream: Stream, start: Cursor, config: DataConfig) -> list[int]:
    """Return the shards of the first windows behind a cursor."""
    found: dict[int, None] = {}
    for batch in islice(stream.batches(start), stream.steps_per_epoch[0] // 2):
        found |= dict.fromkeys(stream.shards_of(batch))
        if len(found) >= READ_WINDOWS * config.window_shards:
            break
    return list(found)


def be_a_rank(task: Path) -> list[dict[str, Any]]:
    """Do what a rank does; return stages with their seconds and the memory after them."""
    given = json.loads(task.read_text())
    stages = [stage("Python and imports", None)]
    view, seconds = timed(lambda: open_view(DataConfig(**given["config"])))
    stages.append(stage("open the view", seconds))
    loader, seconds = timed(
        lambda: LatentLoader(
            view,
            seed=SEED,
            global_batch=GLOBAL_BATCH,
            micro_batch=MICRO_BATCH,
            num_ranks=NUM_RANKS,
        )
    )
    stages.append(stage("make the loader", seconds))
    with loader:
        for name, start in zip(("start", "middle"), given["starts"], strict=True):
            batch, seconds = timed(lambda cursor=start["cursor"]: first_batch(loader, cursor))
            if list(batch.keys) != start["keys"]:
                raise SystemExit(f"{name}: read {batch.keys}, expected {start['keys']}")
            stages.append(stage(f"first micro-batch, {name} of the epoch", seconds))
    return stages


def first_batch(loader: LatentLoader, cursor: dict[str, Any]) -> LatentBatch:
    """Set a loader to a place in the stream, and read its micro-batch there."""
    state = {**loader.state_dict(), "samples_consumed": cursor["samples"], "cursor": cursor}
    loader.load_state_dict(state)
    return next(loader)


def stage(name: str, seconds: float | None) -> dict[str, Any]:
    """Return a stage, with the peak of this process's memory until now."""
    # Not ru_maxrss: the kernel hands the parent's on to a process that it starts.
    peak_bytes = memory_bytes(os.getpid(), "VmHWM") or 0
    return {"name": name, "seconds": seconds, "peak_rss_mb": peak_bytes / 1e6}


def timed(work: Callable[[], Result]) -> tuple[Result, float]:
    """Return what ``work`` returns, and its seconds."""
    started = time.perf_counter()
    return work(), time.perf_counter() - started


def as_text(figures: dict[str, Any]) -> str:
    """Return the figures as lines for people."""
    stages = figures["stages"]
    known_s = sum(one["seconds"] for one in stages[1:])
    stages[0]["seconds"] = figures["wall_s"] - known_s
    lines = [
        f"{figures['rows']:,} clips in {figures['shards']:,} shards, {figures['usable']:,} usable; "
        f"rank 0 of {NUM_RANKS}, global batch {GLOBAL_BATCH}; {figures['cpus']} CPUs "
        f"({figures['machine']})",
        f"{'':<42}{'seconds':>8}  peak RSS",
    ]
    lines += [
        f"{one['name']:<42}{one['seconds']:>8.2f}  {one['peak_rss_mb']:,.0f} MB" for one in stages
    ]
    lines.append(f"{'all':<42}{figures['wall_s']:>8.2f}")
    lines.append(f"(the data set was made in {figures['made_s']:.0f} s)")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
