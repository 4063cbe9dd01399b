"""Following a run: what is counted and what is written, on a disk and on an object store."""

import json
import subprocess
import sys
import tracemalloc
from collections import Counter

import pytest

from pipeline import report
from pipeline.config import EncodeConfig
from pipeline.data_root import open_root
from pipeline.event_log import EventLog, read_events
from pipeline.files import NoRoomError
from pipeline.jobs import ShardUpdate
from pipeline.records import Totals
from pipeline.report import RunReport, print_table
from pipeline.settings import ConfigError, load
from tests.pipeline.run_reports import (
    PLAN,
    A,
    B,
    Clock,
    events,
    missing,
    open_report,
    progress,
    summary_of,
)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


# -- counting


def test_shards_of_two_cells_are_counted_apart(tmp_path):
    with open_report(tmp_path) as run:
        run.update(ShardUpdate("started", "n/0", A))
        run.update(progress(A, ok=3))
        run.update(ShardUpdate("started", "n/1", B))
        run.update(progress(B, ok=2, failed=[missing("b0"), missing("b1")]))
        assert (run.clips_done, run.failed_share) == (7, 2 / 7)
        run.update(ShardUpdate("started", "n/1", A))  # the cell of the first attempt was lost
        assert (run.clips_done, run.failed_share) == (4, 0.5)
        run.update(progress(A, ok=6))
        for task in (A, B):
            run.update(ShardUpdate("committed", "n/1", task))
        assert run.clips_done == 10
    summary = summary_of(tmp_path)
    assert summary["shards"] == 2 and summary["statuses"] == {"ok": 8, "missing": 2}


def test_news_with_the_commit_count_and_captions_are_no_clips(tmp_path):
    with open_report(tmp_path, num_shards=2) as run:
        run.update(ShardUpdate("committed", "n/0", ("text", 0), Counter(ok=99), encode_s=0.5))
        run.update(ShardUpdate("committed", "n/0", A, Counter(ok=7), encode_s=1.0))
        run.update(ShardUpdate("alive", "n/0"))
    summary = summary_of(tmp_path)
    assert (summary["clips"], summary["shards"], summary["encode_s"]) == (7, 2, 1.5)
    assert summary["outcome"] == "complete"


def test_a_lost_attempt_is_uncounted_told_and_still_work_done(tmp_path, capsys):
    tallies = []
    with open_report(tmp_path, publish=tallies.append) as run:
        run.update(progress(A, ok=5, decode_s=4.0))
        run.lost(A, 1, "encoder killed", "n/0")
        assert run.clips_done == 0
        run.update(progress(A, ok=10, decode_s=8.0))
        run.update(ShardUpdate("committed", "n/1", A))
    (lost,) = events(tmp_path, "lost")
    assert {"shard": ["clips", 0], "attempt": 1, "cell": "n/0"}.items() <= lost.items()
    summary = summary_of(tmp_path)
    assert (summary["clips"], summary["decode_s"], summary["attempts_lost"]) == (10, 8.0, 1)
    assert tallies[-1].spent.statuses["ok"] == 15
    assert tallies[-1].spent.decode_s == 12.0
    assert "n/0, shard clips 0, lost: encoder killed" in capsys.readouterr().err


def test_shares_are_of_the_time_that_cells_had_until_the_last_commit(tmp_path, clock):
    with open_report(tmp_path) as run:
        clock.now_s += 30  # Ray starts, codecs are loaded
        run.set_cells(2, 6)
        clock.now_s += 10
        run.set_cells(1, 3)
        clock.now_s += 20
        run.update(progress(A, ok=10, media_s=100.0, decode_s=45.0, encode_s=30.0, write_s=0.4))
        run.update(ShardUpdate("committed", "n/0", A, write_wait_s=0.2))
        clock.now_s += 40  # duplicates are settled
    summary = summary_of(tmp_path)
    assert (summary["cells"], summary["decoders"], summary["startup_s"]) == (2, 6, 30.0)
    assert summary["speed_of_light_share"] == 30 / (2 * 10 + 1 * 20)
    assert summary["decode_busy_share"] == 45 / (6 * 10 + 3 * 20)
    assert (summary["write_share"], summary["write_wait_share"]) == (0.4 / 40, 0.2 / 40)
    assert (summary["seconds"], summary["clips_per_s"]) == (100.0, 0.1)
    assert summary["clips_per_s_after_startup"] == round(10 / 70, 4)
    assert summary["media_h_per_h"] == 1.0
    assert summary["media_h_per_h_after_startup"] == round(100 / 70, 4)


def test_decoders_are_busy_before_the_first_row_is_heard_of(tmp_path, clock):
    with open_report(tmp_path, num_clips=1, num_shards=1) as run:
        run.set_cells(1, 4)
        clock.now_s += 12
        run.update(ShardUpdate("started", "n/0", A))
        run.update(ShardUpdate("committed", "n/0", A, Counter(ok=1), decode_s=24.0, encode_s=3.0))
    summary = summary_of(tmp_path)
    assert (summary["decode_busy_share"], summary["speed_of_light_share"]) == (0.5, 0.25)


def test_no_share_is_told_of_a_run_that_is_too_short(tmp_path, clock, capsys):
    with open_report(tmp_path, num_clips=1, num_shards=1) as run:
        run.set_cells(1, 4)
        clock.now_s += report.MIN_BUSY_TIME_S - 1
        run.update(ShardUpdate("committed", "n/0", A, Counter(ok=1), decode_s=1.0, encode_s=1.0))
        clock.now_s += 60  # duplicates are settled
    summary = summary_of(tmp_path)
    for name in ("speed_of_light_share", "decode_busy_share", "write_share", "write_wait_share"):
        assert summary[name] is None
    assert "encoders busy –" in capsys.readouterr().err


def test_clip_shards_and_caption_shards_are_told_apart(tmp_path, clock, capsys):
    with open_report(tmp_path, num_clips=7, num_shards=3) as run:
        clock.now_s += 13
        run.set_cells(1, 1)
        clock.now_s += 20
        for task in (A, B, ("text", 0)):
            run.update(ShardUpdate("committed", "n/0", task, Counter(ok=5)))
    assert summary_of(tmp_path)["caption_shards"] == 1
    end = capsys.readouterr().err.splitlines()[-1]
    assert end.startswith(
        "complete; 10 clips, 2 clip shards and 1 caption shard in 0:33, of it 0:13"
    )
    assert "since then 0.5 clips/s" in end


def test_time_left_comes_from_the_last_minutes(tmp_path, clock):
    with open_report(tmp_path, num_clips=100_000) as run:
        for clips_per_s, seconds in ((100, 300), (10, 400)):
            for _ in range(seconds):
                clock.now_s += 1
                run.update(progress(A, ok=clips_per_s))
    *_, last = events(tmp_path, "sample")
    assert last["eta_s"] == pytest.approx((100_000 - 34_000) / 10, rel=1e-3)
    assert last["clips_per_s"] == pytest.approx(10)


def test_no_rate_counts_the_start_of_the_cells(tmp_path, clock):
    with open_report(tmp_path) as run:
        clock.now_s += 50
        run.set_cells(0, 0)
        clock.now_s += 50
        run.set_cells(1, 1)
        clock.now_s += 5
        run.update(progress(A, ok=10))
    samples = events(tmp_path, "sample")
    assert [sample["clips_per_s"] for sample in samples] == [0.0, 2.0]
    assert samples[-1]["eta_s"] == 15.0


def test_a_blink_at_the_end_is_no_interval_of_its_own(tmp_path, clock):
    with open_report(tmp_path) as run:
        run.update(ShardUpdate("started", "n/0", A))
        clock.now_s += 10
        run.update(progress(A, ok=10))
        clock.now_s += 0.01
        run.update(progress(A, ok=10))
    *_, last = events(tmp_path, "sample")
    assert last["clips_per_s"] == pytest.approx(20 / 10.01, abs=1e-4)


# -- what is written


def test_events_hold_settings_failed_clips_commits_and_rates(tmp_path, clock):
    with open_report(tmp_path) as run:
        clock.now_s += 1
        run.set_cells(1, 1)
        for _ in range(24):
            clock.now_s += 1
            run.update(progress(A))
        run.update(progress(A, ok=9, failed=[missing("a9")], notes=("batch halved",)))
        run.update(ShardUpdate("committed", "n/0", A, committed=("video@x",), seconds=2.5))
        run.event("cell_lost", cell="n/0", reason="node gone")
    (start,) = events(tmp_path, "run")
    assert start["settings"]["video"]["codec"]["name"] == "dct"
    assert (start["clips"], start["shards"], start["plan_id"]) == (40, 4, PLAN.plan_id)
    (clip,) = events(tmp_path, "clip")
    assert (clip["key"], clip["status"], clip["shard"]) == ("a9", "missing", ["clips", 0])
    (shard,) = events(tmp_path, "shard")
    assert (shard["columns"], shard["cell"], shard["seconds"]) == (["video@x"], "n/0", 2.5)
    assert events(tmp_path, "note")[0]["message"] == "batch halved"
    assert events(tmp_path, "cell_lost")[0]["reason"] == "node gone"
    samples = events(tmp_path, "sample")
    assert [sample["time"] - start["time"] for sample in samples] == [1.0, 11.0, 21.0, 25.0]
    assert samples[-1]["statuses"] == {"ok": 9, "missing": 1}
    assert events(tmp_path, "end")[0]["outcome"] == "incomplete: 3 of 4 shards not committed"


def test_the_settings_written_can_be_loaded_again(tmp_path):
    with open_report(tmp_path) as run:
        assert load(EncodeConfig, run.folder / "config.yaml", []) == EncodeConfig()


def test_a_stopped_run_counts_what_is_committed(tmp_path):
    with pytest.raises(KeyboardInterrupt), open_report(tmp_path) as run:
        run.update(ShardUpdate("committed", "n/0", A, Counter(ok=10)))
        run.update(progress(B, ok=4))
        raise KeyboardInterrupt
    summary = summary_of(tmp_path)
    assert (summary["outcome"], summary["clips"]) == ("stopped (Ctrl-C or SIGTERM)", 10)
    assert events(tmp_path, "sample")[-1]["clips"] == 14
    assert (tmp_path / "runs" / "run-1" / "report.html").exists()


@pytest.mark.parametrize(
    "refused",
    [(report, "write_json"), (report, "write_page"), (EventLog, "write"), (RunReport, "_sample")],
    ids=lambda refused: refused[1],
)
def test_a_report_that_cannot_be_written_does_not_hide_what_ended_the_run(
    tmp_path, monkeypatch, capsys, refused
):
    def refuse(*_, **__):
        raise NoRoomError("no room to write it")

    with pytest.raises(ConfigError, match="no GPU"), open_report(tmp_path):
        monkeypatch.setattr(*refused, refuse)
        raise ConfigError("no GPU")
    assert "incomplete: NoRoomError: no room to write it" in capsys.readouterr().err
    monkeypatch.undo()
    with pytest.raises(NoRoomError, match="no room to write it"), open_report(tmp_path):
        monkeypatch.setattr(*refused, refuse)


def test_many_failed_clips_take_no_memory(tmp_path):
    num_shards, rows = 25, 512
    tracemalloc.start()
    with open_report(tmp_path, num_shards * rows, num_shards) as run:
        for shard in range(num_shards):
            task = ("clips", shard)
            run.update(progress(task, failed=[missing(f"{shard}-{row}") for row in range(rows)]))
            run.update(ShardUpdate("committed", "n/0", task))
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 5e5  # of 1.7 MB in events.jsonl
    assert summary_of(tmp_path)["statuses"] == {"missing": num_shards * rows}
    assert len(events(tmp_path, "clip")) == num_shards * rows


def test_a_run_on_an_object_store_leaves_the_same_files(tmp_path):
    store = open_root(f"memory://{tmp_path.name}")
    with open_report(store) as run:
        run.update(progress(A, ok=9, failed=[missing("a9")]))
        run.update(ShardUpdate("committed", "n/0", A))
        names = {path.name for path in run.folder.iterdir()}
        assert names == {"config.yaml"}
    names = {path.name for path in run.folder.iterdir()}
    assert names == {"config.yaml", "events.jsonl", "summary.json", "report.html"}
    assert [event["event"] for event in read_events(run.folder / "events.jsonl")] == [
        *("run", "clip", "shard", "sample", "end")
    ]
    assert summary_of(store)["clips"] == 10


def test_the_closing_table_tells_failed_from_dropped(capsys):
    statuses = Counter(ok=6, missing=2, silent=2)
    total = Totals(shards=1, rows=10, ok=6, bytes=2_500_000, statuses=statuses)
    print_table({"video@dct-01234567": (total, 4)}, Counter(still=3))
    head, line, failed, dropped, flagged = capsys.readouterr().out.splitlines()
    assert head.split() == ["column", "shards", "ok", "failed", "dropped", "size"]
    assert line.split() == ["video@dct-01234567", "1/4", "6", "2", "2", "2.5", "MB"]
    assert failed.strip() == "failed: missing 2"
    assert dropped.strip() == "dropped: silent 2"
    assert flagged == "flagged, but kept: still 3"


def test_a_report_needs_neither_torch_nor_ray():
    code = "import sys, pipeline.report; print(json.dumps(sorted(sys.modules)))"
    found = subprocess.run(
        [sys.executable, "-c", f"import json; {code}"], capture_output=True, text=True, check=True
    )
    assert not {"torch", "ray"} & set(json.loads(found.stdout))
