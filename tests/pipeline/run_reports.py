"""What the tests of a run's report share: a clock that is set by hand, and news of cells."""

import time
from collections import Counter

from pipeline import event_log, report
from pipeline.config import EncodeConfig
from pipeline.event_log import read_events
from pipeline.format import Plan, PlanSegment, read_json
from pipeline.jobs import FailedClip, ShardUpdate
from pipeline.report import RunReport

PLAN = Plan("0123abcd", 0, {"kind": "folder", "root": "/clips"}, (PlanSegment(0, 40, 10),), ())
A, B = ("clips", 0), ("clips", 1)


class Clock:
    """Stands for the module ``time`` in those that measure a run."""

    strftime, gmtime = staticmethod(time.strftime), staticmethod(time.gmtime)

    def __init__(self, monkeypatch):
        self.now_s = 1000.0
        for module in (report, event_log):
            monkeypatch.setattr(module, "time", self)

    def monotonic(self):
        return self.now_s

    def time(self):
        return 1.8e9 + self.now_s


def open_report(root, num_clips=40, num_shards=4, **options):
    return RunReport(root, "run-1", PLAN, num_clips, num_shards, EncodeConfig(), **options)


def progress(task, ok=0, cell="n/0", failed=(), **fields):
    statuses = Counter({"ok": ok} if ok else {}) + Counter(clip.status for clip in failed)
    return ShardUpdate("progress", cell, task, statuses, tuple(failed), **fields)


def missing(key):
    return FailedClip(key, "missing", f"no file {key}.mp4")


def events(root, kind):
    path = root / "runs" / "run-1" / "events.jsonl"
    return [event for event in read_events(path) if event["event"] == kind]


def summary_of(root):
    return read_json(root / "runs" / "run-1" / "summary.json")
