"""Runs of ``python -m pipeline.encode`` that are timed, and their memory watched."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import format as fmt
from pipeline.calibrate import child_threads
from pipeline.event_log import read_events
from tools.process_memory import Peak, PeakMemory
from tools.side_by_side import Lane, Timing


@dataclass(frozen=True)
class EncodeRun:
    """One run: its timing, a lane for each cell and a step for each shard.

    Attributes:
        summary: what the run itself says, see ``runs/*/summary.json``.
        memory: peaks by role.
    """

    timing: Timing
    summary: dict[str, Any]
    memory: dict[str, Peak]


def encode_run(src: Path, out: Path, settings: Sequence[str]) -> EncodeRun:
    """Encode all clips of a folder into a new data set, with a Ray of its own.

    Raises:
        RuntimeError: the command fails, or not every clip has its latents.
    """
    command = [sys.executable, "-m", "pipeline.encode", "--src", str(src), "--out", str(out)]
    log = out.with_suffix(".log")
    launched_s = time.monotonic()
    with log.open("wb") as file, child_threads(1):
        process = subprocess.Popen([*command, *settings], stdout=file, stderr=file)
        with PeakMemory(process.pid) as memory:
            code = process.wait()
    ended_s = time.monotonic()
    if code:
        raise RuntimeError(f"pipeline.encode: exit {code}; see {log}")
    (folder,) = (out / "runs").iterdir()
    summary = json.loads((folder / "summary.json").read_text())
    if set(summary["statuses"]) != {"ok"}:
        raise RuntimeError(
            f"clips without latents: {summary['statuses']}; give clips that are whole"
        )
    lanes = _lanes(out, folder, launched_s)
    return EncodeRun(Timing(lanes, launched_s, ended_s), summary, memory.by_role())


def _lanes(out: Path, run: Path, launched_s: float) -> tuple[Lane, ...]:
    """Return for each cell when its shards of clips were committed.

    The time is that of the commit record, for a cell reports only now and then.
    """
    plan = fmt.read_plan(out)
    rows = plan.shard_rows().tolist()
    column = fmt.find_column(out, "video", None, plan.plan_id)
    to_monotonic_s = time.monotonic() - time.time()
    steps: dict[str, list[tuple[float, int]]] = defaultdict(list)
    for event in read_events(run / "events.jsonl"):
        if event["event"] == "shard" and event["shard"][0] == "clips":
            shard = event["shard"][1]
            record = column.path / f"{fmt.shard_name(shard)}.json"
            steps[event["cell"]].append((record.stat().st_mtime + to_monotonic_s, rows[shard]))
    return tuple(Lane(launched_s, tuple(sorted(cell))) for cell in steps.values())
