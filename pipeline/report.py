"""What a person sees of an encode run: live display, closing table, runs/<run_id>/.

    runs/<run_id>/config.yaml     the settings
                  events.jsonl    what happened, and the rates every 10 s
                  summary.json    sums, at the end
                  report.html     both as a page, see ``pipeline.run_page``

Imports neither torch nor Ray.
"""

from __future__ import annotations

import platform
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from pipeline import format as fmt
from pipeline.config import EncodeConfig
from pipeline.display import Display, outcome_text
from pipeline.duplicates import Settled
from pipeline.event_log import EventLog
from pipeline.files import write_atomically, write_json
from pipeline.jobs import ShardUpdate
from pipeline.records import Totals
from pipeline.run_page import write_page
from pipeline.settings import dump
from pipeline.storage import scrubbed
from pipeline.tally import Point, Tally, TaskName, failures, rates_between
from pipeline.wording import age_text, counted, duration_text, rate_text, share_text, size_text

SAMPLE_INTERVAL_S = 10.0
# The rate that is shown, and the time left, come from as much of the past.
RATE_WINDOW_S = 180.0
# Cells that worked for a shorter time were busy for no share that says anything.
MIN_BUSY_TIME_S = 10.0
TOLD = {"starting": "starting Ray …", "stopping": "stopping …"}


class RunReport:
    """Follows one run; a context manager.

    Leaving the block writes summary and page, and raises NoRoomError or OSError where that can't
    be done, but not over what ended the run.

    Args:
        root: of the data set.
        run_id: names the folder in ``runs/``.
        plan: what is encoded.
        num_clips, num_shards: what this run has to do; shards of captions count, captions don't.
        config: the settings.
        publish: gets the tally every 10 s, for monitoring.

    Attributes:
        folder: ``runs/<run_id>``.
        settled: what the facts of the whole data set say, once that is known.
    """

    def __init__(
        self,
        root: Path,
        run_id: str,
        plan: fmt.Plan,
        num_clips: int,
        num_shards: int,
        config: EncodeConfig,
        publish: Callable[[Tally], None] | None = None,
    ) -> None:
        self.folder = root / "runs" / run_id
        self.folder.mkdir(parents=True, exist_ok=True)
        self.settled = Settled(Counter())
        self._plan, self._publish = plan, publish
        self._started = time.time()
        now_s = time.monotonic()
        self._tally = Tally(num_clips, num_shards, now_s)
        self._columns: set[str] = set()
        self._points: deque[Point] = deque([self._tally.point(now_s)])
        self._display = Display(num_clips, sys.stderr)
        self._next_show_s = now_s + self._display.interval_s
        self._next_sample_s = now_s + SAMPLE_INTERVAL_S
        write_atomically(self.folder / "config.yaml", dump(config).encode())
        self._events = EventLog(self.folder / "events.jsonl", self._display.note)
        self.event(
            "run",
            run_id=run_id,
            plan_id=plan.plan_id,
            source=plan.source,
            clips=num_clips,
            shards=num_shards,
            settings=TypeAdapter(EncodeConfig).dump_python(config, mode="json"),
        )

    @property
    def clips_done(self) -> int:
        """Clips done so far, in committed shards and those under way."""
        return self._tally.clips_done

    @property
    def failed_share(self) -> float:
        """Share of the clips done so far that could not be encoded."""
        return self._tally.failed_share

    def __enter__(self) -> RunReport:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self._end(self._outcome(kind))
        except Exception as error:
            if kind is None:
                raise
            # What ended the run is the news; a full disk may well be the cause of both.
            print(f"{self.folder} is incomplete: {scrubbed(error)}", file=sys.stderr)

    def _end(self, outcome: str) -> None:
        try:
            self._sample(time.monotonic())
        finally:
            self._tally.take_back_all()
            summary = self._summary(outcome)
            self._display.close(self._closing_line(summary))
        self._events.write("end", outcome=outcome)
        self._events.close()
        write_json(self.folder / "summary.json", summary)
        write_page(self.folder)

    def update(self, news: ShardUpdate) -> None:
        """Take in one update of a cell.

        Raises:
            NoRoomError: the disk is full.
        """
        now_s = time.monotonic()
        is_first = not self._tally.clips_done
        self._tally.update(news, now_s)
        if is_first and self._tally.clips_done and news.event == "progress":
            self._next_show_s = now_s
        shard = list(news.task) if news.task else None
        for clip in news.failed:
            self._events.write(
                "clip", shard=shard, key=clip.key, status=clip.status, message=clip.message
            )
        for note in news.notes:
            self._events.write("note", cell=news.cell, shard=shard, message=note)
            self._display.note(f"{news.cell}: {note}")
        if news.event == "committed":
            self._columns |= set(news.committed)
            self._events.write(
                "shard",
                shard=shard,
                cell=news.cell,
                columns=list(news.committed),
                seconds=round(news.seconds, 3),
            )
        self._tick(now_s)

    def set_cells(self, num_cells: int, num_decoders: int) -> None:
        """Say how many cells are alive from now on, with how many decoders in all of them."""
        now_s, is_first = time.monotonic(), self._tally.ready_s is None and num_cells > 0
        if is_first:
            self._sample(now_s)  # until now the cells started: no rate shall count that
            self._points = deque([self._tally.point(now_s)])
            with_decoders = f" with {counted(num_decoders, 'decoder')}" * (num_decoders > 0)
            took = age_text(now_s - self._tally.started_s)
            self._display.say(f"{counted(num_cells, 'cell')}{with_decoders} ready after {took}")
        self._tally.set_cells(num_cells, num_decoders, now_s)
        self.event("cells", cells=num_cells, decoders=num_decoders)

    def lost(self, task: TaskName, attempt: int, reason: str, cell: str = "") -> None:
        """Say that an attempt of a shard came to nothing: its clips don't count."""
        self._tally.take_back(task)
        self._tally.num_lost += 1
        self.event("lost", shard=list(task), attempt=attempt, cell=cell, reason=reason)

    def event(self, kind: str, **fields: Any) -> None:
        """Write anything else that is worth a line in events.jsonl.

        It is shown too where it has a reason, or where people have to wait.
        """
        self._events.write(kind, **fields)
        if kind in TOLD:
            self._display.say(TOLD[kind])
        if reason := fields.get("reason"):
            what = f"shard {' '.join(map(str, fields['shard']))}, " if "shard" in fields else ""
            where = f"{fields['cell']}, " if fields.get("cell") else ""
            self._display.note(f"{where}{what}{kind.replace('_', ' ')}: {reason}")
        self._events.flush()

    def _tick(self, now_s: float) -> None:
        """Show, sample and upload what is due."""
        self._events.flush()
        if now_s >= self._next_show_s:
            self._next_show_s = now_s + self._display.interval_s
            recent = rates_between(self._points[0], self._tally.point(now_s))
            self._display.show(self._tally, recent)
        if now_s >= self._next_sample_s:
            self._sample(now_s)

    def _sample(self, now_s: float) -> None:
        """Write the rates since the last sample."""
        self._next_sample_s = now_s + SAMPLE_INTERVAL_S
        tally, point = self._tally, self._tally.point(now_s)
        # The last interval of a run may be a blink: then its rates are those since the one before.
        is_short = now_s - self._points[-1].time_s < SAMPLE_INTERVAL_S / 2
        before = self._points[-2] if is_short and len(self._points) > 1 else self._points[-1]
        rates = rates_between(before, point)
        self._points.append(point)
        while len(self._points) > 2 and self._points[1].time_s < now_s - RATE_WINDOW_S:
            self._points.popleft()
        eta_s = tally.eta_s(rates_between(self._points[0], point))
        self._events.write(
            "sample",
            clips=tally.clips_done,
            shards=tally.shards_done,
            statuses={name: count for name, count in tally.done.statuses.items() if count},
            **{name: round(value, 4) for name, value in rates._asdict().items()},
            bytes_in_flight=tally.bytes_in_flight,
            cells=tally.num_cells,
            decoders=tally.num_decoders,
            eta_s=None if eta_s is None else round(eta_s, 1),
        )
        if self._publish:
            self._publish(tally)

    def _outcome(self, kind: type[BaseException] | None) -> str:
        if kind is KeyboardInterrupt:
            return "stopped (Ctrl-C or SIGTERM)"
        if kind:
            return f"stopped: {kind.__name__}"
        open_shards = self._tally.num_shards - self._tally.shards_done
        if open_shards:  # they were given up
            return f"incomplete: {open_shards} of {self._tally.num_shards} shards not committed"
        return "complete"

    def _summary(self, outcome: str) -> dict[str, Any]:
        seconds, tally, done = time.time() - self._started, self._tally, self._tally.done
        now_s, last = time.monotonic(), tally.at_last_commit
        ready_s = now_s if tally.ready_s is None else tally.ready_s
        startup_s = ready_s - tally.started_s
        worked_s = last.time_s - ready_s if last else 0.0
        cell_s, decoder_s = (last.cell_s, last.decoder_s) if last else (0.0, 0.0)

        def share(busy_s: float, of_s: float) -> float | None:
            return round(busy_s / of_s, 4) if worked_s >= MIN_BUSY_TIME_S and of_s > 0 else None

        return {
            "outcome": outcome,
            "plan_id": self._plan.plan_id,
            "clips": tally.clips_done,
            "shards": tally.shards_done,
            "caption_shards": tally.caption_shards_done,
            "statuses": {name: count for name, count in done.statuses.items() if count},
            "flagged": dict(self.settled.flagged),
            "duplicates_dropped": self.settled.num_dropped,
            "columns": sorted(self._columns),
            "cells": tally.most_cells,
            "decoders": tally.most_decoders,
            "attempts_lost": tally.num_lost,
            "seconds": round(seconds, 3),
            # Until the first cell was ready; rates are over all seconds, and over the rest.
            "startup_s": round(startup_s, 3),
            "clips_per_s": _ratio(tally.clips_done, seconds),
            "clips_per_s_after_startup": _ratio(tally.clips_done, seconds - startup_s),
            "media_h": round(done.media_s / 3600, 3),
            "media_h_per_h": _ratio(done.media_s, seconds),
            "media_h_per_h_after_startup": _ratio(done.media_s, seconds - startup_s),
            "decode_s": round(done.decode_s, 3),
            "encode_s": round(done.encode_s, 3),
            "write_s": round(done.write_s, 3),
            "write_wait_s": round(done.write_wait_s, 3),
            # Of the time that cells and decoders had, from when they were ready to the last commit;
            # None where that is too short to say. The share in which codecs were busy is also the
            # rate over that of the same codecs never waiting, as fast as they were in this run;
            # tools.bench_encode compares with codecs that are fed ready tensors.
            "speed_of_light_share": share(done.encode_s, cell_s),
            "decode_busy_share": share(done.decode_s, decoder_s),
            "write_share": share(done.write_s, cell_s),
            "write_wait_share": share(done.write_wait_s, cell_s),
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self._started)),
            "host": platform.node(),
            "python": platform.python_version(),
        }

    def _closing_line(self, summary: dict[str, Any]) -> str:
        captions = summary["caption_shards"]
        shards = counted(summary["shards"] - captions, "clip shard")
        if captions:
            shards += f" and {counted(captions, 'caption shard')}"
        return (
            f"{summary['outcome']}; {counted(summary['clips'], 'clip')}, {shards} in "
            f"{duration_text(summary['seconds'])}, of it {duration_text(summary['startup_s'])} "
            f"starting; since then {rate_text(summary['clips_per_s_after_startup'])} clips/s, "
            f"{rate_text(summary['media_h_per_h_after_startup'])} h of clips per hour, "
            f"encoders busy {share_text(summary['speed_of_light_share'])}; "
            f"{outcome_text(self._tally)}; {self.folder / 'report.html'}"
        )


def _ratio(value: float, over: float) -> float:
    return round(value / over, 4) if over > 0 else 0.0


def print_table(columns: Mapping[str, tuple[Totals, int]], flagged: Counter[str]) -> None:
    """Print the closing table: one line a column, its tombstones by cause, then the flags.

    Args:
        columns: name -> what is committed, and how many shards are planned.
        flagged: flag -> number of clips.
    """
    width = max(map(len, columns))
    heads = f"{'shards':>11}  {'ok':>9}  {'failed':>7}  {'dropped':>7}  {'size':>9}"
    print(f"{'column':<{width}}  {heads}")
    for name, (total, num_planned) in columns.items():
        failed = failures(total.statuses)
        dropped = total.statuses - failed - Counter(ok=total.ok)
        print(
            f"{name:<{width}}  {f'{total.shards}/{num_planned}':>11}  {total.ok:>9}  "
            f"{failed.total():>7}  {dropped.total():>7}  {size_text(total.bytes):>9}"
        )
        for what, counts in (("failed", failed), ("dropped", dropped)):
            if counts:
                print(f"{'':<{width}}  {what}: {_listed(counts)}")
    if flagged:
        print(f"flagged, but kept: {_listed(flagged)}")


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
