"""What a person sees of an encode run: progress bar, closing table, runs/<run_id>/."""

from __future__ import annotations

import json
import platform
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pipeline import format as fmt
from pipeline.checks import DECISIONS
from pipeline.duplicates import Settled
from pipeline.files import write_json
from pipeline.jobs import ShardUpdate


class RunReport:
    """Follows one run; keeps events.jsonl and, on leaving the block, summary.json in its folder.

    Args:
        folder: ``runs/<run_id>``.
        plan: what is encoded.
        num_clips: clips that this run has to do.

    Attributes:
        settled: what the facts of the whole data set say, once that is known.
    """

    def __init__(self, folder: Path, plan: fmt.Plan, num_clips: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.settled = Settled(Counter())
        self._plan = plan
        self.statuses: Counter[str] = Counter()
        self._shard_statuses: Counter[str] = Counter()
        self._started = time.time()
        self._events = (folder / "events.jsonl").open("a", encoding="utf-8")
        interval_s = 0.5 if sys.stderr.isatty() else 10.0  # a log file gets a line every 10 s
        self._bar = tqdm(
            total=num_clips, unit="clip", file=sys.stderr, delay=0.1, mininterval=interval_s
        )
        self._columns: set[str] = set()
        self._encode_s = 0.0

    @property
    def num_clips(self) -> int:
        """Clips done so far, in committed shards and the one under way."""
        return self.statuses.total() + self._shard_statuses.total()

    @property
    def failed_share(self) -> float:
        """Share of those clips that could not be encoded."""
        failed = failures(self.statuses + self._shard_statuses).total()
        return failed / max(1, self.num_clips)

    def __enter__(self) -> RunReport:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._bar.close()
        self._events.close()
        outcome = f"stopped: {kind.__name__}" if kind else "complete"
        write_json(self.folder / "summary.json", self._summary(outcome))

    def update(self, news: ShardUpdate) -> None:
        """Take in one update of a shard."""
        if news.event == "started":
            self._bar.update(-self._shard_statuses.total())
            self._shard_statuses.clear()
        elif news.event == "clip":
            self._shard_statuses[news.status] += 1
            self._bar.update(1)
            self._bar.set_postfix_str(self._progress(), refresh=False)
            if news.status != "ok":
                self._write("clip", key=news.key, status=news.status, message=news.message)
        elif news.event == "committed":
            self.statuses += self._shard_statuses
            self._shard_statuses.clear()
            self._columns |= set(news.committed)
            self._encode_s += news.encode_s
            columns = list(news.committed)
            self._write("shard", shard=news.shard, columns=columns, seconds=round(news.seconds, 3))

    def _progress(self) -> str:
        counts = self.statuses + self._shard_statuses
        failed, ok = failures(counts).total(), counts["ok"]
        return f"ok {ok}, failed {failed}, dropped {counts.total() - ok - failed}"

    def _write(self, event: str, **fields: Any) -> None:
        record = {"time": round(time.time(), 3), "event": event, **fields}
        self._events.write(json.dumps(record) + "\n")
        self._events.flush()

    def _summary(self, outcome: str) -> dict[str, Any]:
        seconds = time.time() - self._started
        clips = self.statuses.total()
        return {
            "outcome": outcome,
            "plan_id": self._plan.plan_id,
            "clips": clips,
            "statuses": dict(self.statuses),
            "flagged": dict(self.settled.flagged),
            "duplicates_dropped": self.settled.num_dropped,
            "columns": sorted(self._columns),
            "seconds": round(seconds, 3),
            "clips_per_s": round(clips / seconds, 3) if seconds > 0 else 0.0,
            "encode_s": round(self._encode_s, 3),
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self._started)),
            "host": platform.node(),
            "python": platform.python_version(),
        }


def failures(statuses: Counter[str]) -> Counter[str]:
    """Return the counts of clips that could not be encoded: not ok, and not by a decision."""
    return Counter({n: c for n, c in statuses.items() if n != "ok" and n not in DECISIONS})


def column_totals(column: fmt.Column, rows_per_shard: list[int]) -> dict[str, Any]:
    """Sum the commit records of a column: shards, rows, statuses, bytes."""
    committed = sorted(column.committed_shards())
    totals: dict[str, Any] = {
        "column": column.path.name,
        "shards": len(committed),
        "shards_planned": len(rows_per_shard),
        "rows": 0,
        "ok": 0,
        "bytes": 0,
        "statuses": Counter(),
    }
    for shard in committed:
        record = column.committed(shard)
        totals["rows"] += record["rows"]
        totals["ok"] += record["ok"]
        totals["bytes"] += record["tar_bytes"]
        totals["statuses"].update(record["status_counts"])
    return totals


def print_table(totals: list[dict[str, Any]], flagged: Counter[str]) -> None:
    """Print the closing table: one line a column, its tombstones by cause, then the flags."""
    width = max(len(total["column"]) for total in totals)
    heads = f"{'shards':>11}  {'ok':>9}  {'failed':>7}  {'dropped':>7}  {'MB':>9}"
    print(f"{'column':<{width}}  {heads}")
    for total in totals:
        shards = f"{total['shards']}/{total['shards_planned']}"
        failed = failures(total["statuses"])
        dropped = total["statuses"] - failed - Counter(ok=total["ok"])
        print(
            f"{total['column']:<{width}}  {shards:>11}  {total['ok']:>9}  {failed.total():>7}  "
            f"{dropped.total():>7}  {total['bytes'] / 1e6:>9.1f}"
        )
        for what, counts in (("failed", failed), ("dropped", dropped)):
            if counts:
                print(f"{'':<{width}}  {what}: {_listed(counts)}")
    if flagged:
        print(f"flagged, but kept: {_listed(flagged)}")


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
