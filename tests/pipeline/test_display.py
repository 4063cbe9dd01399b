"""What a person sees of a run, in a terminal and in a log file."""

import io
import re
import sys
from collections import Counter

import pytest

from pipeline import display
from pipeline.display import Display
from pipeline.jobs import ShardUpdate
from tests.pipeline.run_reports import A, Clock, missing, open_report, progress

CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f]")


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def screen(text):
    """Return the lines that a terminal shows after ``text``, without empty ones."""
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[A|.|\n|\r", text):
        if part == "\x1b[A":
            row -= 1
        elif part == "\r":
            column = 0
        elif part == "\n":
            row, column = row + 1, 0
            lines += [""] * (row == len(lines))
        else:
            lines[row] = lines[row].ljust(column)[:column] + part + lines[row][column + 1 :]
            column += 1
    return [line.rstrip() for line in lines if line.strip()]


def run_for(clock, run, seconds):
    for _ in range(seconds):
        clock.now_s += 1
        run.update(
            progress(A, ok=2, failed=[missing("x")], media_s=30.0, bytes_in_flight=5 * 10**8)
        )


def test_a_log_file_gets_a_line_now_and_then_without_control_characters(
    tmp_path, clock, monkeypatch
):
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    with open_report(tmp_path, num_clips=1000) as run:
        run.event("starting")
        clock.now_s += 12
        run.set_cells(1, 3)
        run.update(ShardUpdate("started", "n/0", A))
        run_for(clock, run, 70)
        run.event("stopping")
    starting, ready, first, *lines, stopping, last = log.getvalue().splitlines()
    assert (starting, stopping) == ("starting Ray …", "stopping …")
    assert ready == "1 cell with 3 decoders ready after 12 s"
    assert " 3/1,000 clips (0%), 0/4 shards, " in first
    assert len(lines) == 3
    assert not CONTROL.search(log.getvalue())
    for text in (
        "183/1,000 clips (18%), 0/4 shards, 3 clips/s, ETA 4:32; 30 h of clips per hour",
        "decode 0% busy, encode 0% busy, 500.0 MB in flight, 1 cell",
        "failed 61 (33.3%): missing 61",
    ):
        assert text in lines[-1]
    assert last.startswith(
        "incomplete: 4 of 4 shards not committed; 0 clips, 0 clip shards in 1:22"
    )


def test_a_quick_run_gives_one_line(tmp_path, monkeypatch):
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    with open_report(tmp_path, num_shards=1) as run:
        run.update(ShardUpdate("committed", "n/0", A, Counter(ok=10)))
    (line,) = log.getvalue().splitlines()
    assert line.startswith("complete; 10 clips, 1 clip shard in ")


def test_a_terminal_shows_lines_that_stay_in_place_and_fit(tmp_path, clock, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with open_report(tmp_path, num_clips=10**9, num_shards=10**6) as run:
        run.set_cells(64, 1024)
        clock.now_s += 10
        causes = Counter(dict.fromkeys(("missing", "unreadable", "no_video", "silent"), 10**6))
        run.update(ShardUpdate("progress", "n/0", A, causes, bytes_in_flight=10**12))
        run_for(clock, run, 3)
        shown = terminal.getvalue()
    assert "\n" in shown and "\x1b[A" in shown  # the cursor goes down, and up again
    assert len(screen(shown)) == 1 + 4  # above it, that cells are ready
    assert max(map(len, screen(shown))) <= 80
    assert "decode" in shown and "clips per hour" in shown and "failed 3,000," in shown
    _, line = screen(terminal.getvalue())  # bar and lines are gone
    assert line.startswith("incomplete: ")


def test_a_note_is_shown_once_and_those_that_are_not_are_counted(monkeypatch):
    stream = io.StringIO()
    shown = Display(10, stream)
    for _ in range(5):
        shown.note("batch halved")
    for number in range(100):
        shown.note(f"note {number}")
    assert stream.getvalue().count("batch halved") == 1
    shown.close("complete")
    *notes, told, count, end = stream.getvalue().splitlines()
    assert len(notes) == display.NOTES_SHOWN and end == "complete"
    assert told == "more incidents are in events.jsonl only"
    assert count == f"{101 - display.NOTES_SHOWN} more incidents in events.jsonl"
