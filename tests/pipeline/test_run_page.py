"""The page of a run: whole, of itself, and safe whatever clips are called."""

import json
import re
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from html.parser import HTMLParser

import pytest

from pipeline import run_page
from pipeline.charts import HEIGHT, MAX_STEPS, TICKS_S, Series, step_chart, thinned, value_ticks
from pipeline.data_root import open_root
from pipeline.format import FormatError
from pipeline.jobs import FailedClip, ShardUpdate
from pipeline.run_page import escaped, write_page
from tests.pipeline.run_reports import A, Clock, open_report, progress

VOID = {"meta", "br"}
HOSTILE = "\"'><script>alert(1)</script><img src=//evil/x onerror=alert(2)>\x00\n\udcff\u202e&amp;"


class Page(HTMLParser):
    """Checks that tags are closed in order; collects tags, attributes and text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.names, self.text = [], Counter(), set(), ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.names |= {name for name, _ in attrs}
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags[tag] += 1

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def page_of(folder):
    text = (folder / "report.html").read_text(encoding="utf-8")
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ET.fromstring(svg)
    return Page(text)


def test_the_page_of_a_run_shows_what_happened(tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    with open_report(tmp_path) as run:
        run.set_cells(2, 6)
        for _ in range(3):
            clock.now_s += 15
            run.update(ShardUpdate("alive", "n/0"))
        failed = [FailedClip(f"a{n}", "missing", f"no file {n}.mp4") for n in range(9)]
        run.update(progress(A, ok=1, failed=failed, media_s=100.0))
        run.update(ShardUpdate("committed", "n/0", A))
        run.lost(("clips", 1), 1, "encoder killed by the memory monitor", "n/1")
    page = page_of(run.folder)
    assert page.tags["svg"] == 4
    for text in (
        *("Encode run run-1", "10 of 40", "1 of 4", "complete", "clips 1"),
        *("encoder killed by the memory monitor", "video.codec.name", "clips: missing"),
        *("of the cells' time encoding", "clips/s since the first cell was ready", "0:45"),
        *(f"no file {n}.mp4" for n in range(run_page.EXAMPLES_SHOWN)),
    ):
        assert text in page.text, text
    assert f"no file {run_page.EXAMPLES_SHOWN}.mp4" not in page.text


def test_hostile_names_are_shown_and_do_nothing(tmp_path):
    with open_report(tmp_path) as run:
        hostile = FailedClip(HOSTILE, HOSTILE, HOSTILE)
        run.update(progress(A, failed=[hostile], notes=(HOSTILE,)))
        run.event("cell_lost", cell=HOSTILE, reason=HOSTILE)
    page = page_of(run.folder)
    assert not {"script", "img"} & set(page.tags)
    assert not {name for name in page.names if name.startswith("on")} | ({"src"} & page.names)
    shown = HOSTILE.replace("\x00", r"\x00").replace("\n", r"\n")
    shown = shown.replace("\udcff", r"\udcff").replace("\u202e", r"\u202e")
    assert page.text.count(shown) >= 5


def test_the_page_needs_no_other_file(tmp_path):
    with open_report(tmp_path) as run:
        run.update(progress(A, ok=1))
    text = (run.folder / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"(src|href)=|url\(|@import|https?:|<script|<link", text)


def test_a_run_without_news_has_a_page(tmp_path):
    with open_report(tmp_path) as run:
        pass
    page = page_of(run.folder)
    assert page.tags["svg"] == 0 and "too short for charts" in page.text
    assert page.tags["details"] == 1  # the settings


def test_a_killed_run_has_a_page_too(tmp_path, monkeypatch, capsys):
    with open_report(tmp_path) as run:
        run.update(progress(A, ok=9, failed=[FailedClip("a9", "missing", "no file")]))
    for name in ("summary.json", "report.html"):
        (run.folder / name).unlink()
    path = run.folder / "events.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]) + lines[-1][:20])  # killed while it wrote the last one
    monkeypatch.setattr(sys, "argv", ["run_page", str(run.folder)])
    run_page.main()
    assert capsys.readouterr().out == f"{run.folder}/report.html\n"
    page = page_of(run.folder)
    assert "under way, or killed" in page.text
    assert "10 of 40" in page.text and "a9" in page.text


def test_a_run_on_an_object_store_has_a_page(tmp_path):
    root = open_root(f"memory://{tmp_path.name}")
    with open_report(root) as run:
        run.update(progress(A, ok=7))
    assert (
        "7 of 40" not in (run.folder / "report.html").read_bytes().decode()
    )  # it was not committed
    (run.folder / "summary.json").unlink()
    assert "7 of 40" in write_page(run.folder).read_bytes().decode()


@pytest.mark.parametrize(
    ("events", "message"),
    [
        (None, "holds no run; expected a folder DIR/runs/<run_id>"),
        ('{"time": 1.0, "event": "shard"}\n', "holds no run"),
        ('{"time": 1.0}\n', r"no event \(KeyError\('event'\)\)"),
        ("[1]\n", "holds a line that is no event"),
        ("nonsense\n", "line 1 is not JSON"),
    ],
)
def test_what_is_no_run_is_refused(tmp_path, events, message):
    if events is not None:
        (tmp_path / "events.jsonl").write_text(events)
    with pytest.raises(FormatError, match=message):
        write_page(tmp_path)
    assert not (tmp_path / "report.html").exists()


# -- charts


def area(values):
    begins = [0.0, *(time_s for time_s, _ in values)]
    return sum(value * (end - begin) for (end, value), begin in zip(values, begins, strict=False))


@pytest.mark.parametrize("num", [1, 2, MAX_STEPS, MAX_STEPS * 7 + 3])
def test_thinning_keeps_the_area_and_the_end(num):
    values = [(float(n + 1 + n % 3 / 10), n * 37 % 101 / 7) for n in range(num)]
    found = thinned(values, values[-1][0])
    assert len(found) <= MAX_STEPS + 1
    assert area(found) == pytest.approx(area(values))
    assert found[-1][0] == values[-1][0]


def test_a_blink_at_the_end_makes_no_spike():
    values = [(float(n + 1), 5.0) for n in range(10)] + [(10.001, 500.0)]
    assert max(value for _, value in thinned(values, 10.001)) < 6


@pytest.mark.parametrize("highest", [0.0, 1e-3, 0.3, 1.0, 7.0, 99.9, 100.0, 101.0, 3e9])
def test_the_axis_holds_the_highest_value(highest):
    ticks = value_ticks(highest)
    assert ticks[0] == 0 and 2 <= len(ticks) <= 7
    assert highest <= ticks[-1] * (1 + 1e-9)
    assert ticks[-2] < highest or highest == 0


@pytest.mark.parametrize("end_s", [0.001, 0.5, 15.0, 3600.0, 86400.0 * 7, 86400.0 * 365])
def test_a_chart_stays_within_its_frame(end_s):
    figure = step_chart("<b>", [Series("a", [(end_s / 2, 3.0), (end_s, 4.0)])], end_s)
    svg = ET.fromstring(re.search("<svg.*</svg>", figure)[0])
    (line,) = [path for path in svg.iter("path") if path.get("fill") == "none"]
    heights = [float(y) for y in re.findall(r"V([\d.]+)", line.get("d"))]
    assert all(0 <= y <= HEIGHT for y in heights)
    assert 1 <= len([text for text in svg.iter("text") if text.get("text-anchor") == "middle"]) <= 8
    assert "<b>" not in figure


def test_a_run_of_no_time_has_a_chart_without_a_line():
    assert 'fill="none"' not in step_chart("a", [Series("a", [(0.0, 3.0)])], 0.0)


def test_time_ticks_are_in_order():
    assert list(TICKS_S) == sorted(set(TICKS_S))


def test_escaping_keeps_what_can_be_read():
    assert escaped("Grüße <b>, 日本 & 1") == "Grüße &lt;b&gt;, 日本 &amp; 1"
    assert escaped(["a", None, json.loads('"\\ud800"')]) == "a, None, \\ud800"
