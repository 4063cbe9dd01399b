"""``python -m pipeline.run_page RUN``: runs/<run_id>/ as a page, of a run under way too.

The page needs no other file and runs no script. All that it shows of clips is escaped: keys and
messages hold names of files, which anybody may have chosen.
"""

from __future__ import annotations

import argparse
import html
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline import format as fmt
from pipeline.charts import Series, step_chart
from pipeline.data_root import open_root
from pipeline.event_log import read_events
from pipeline.files import write_atomically
from pipeline.sweep import one_line_errors
from pipeline.totals import flattened, labelled
from pipeline.wording import rate_text, share_text

EXAMPLES_SHOWN = 5  # failed clips of a cause
INCIDENTS_SHOWN = 100
MIN_SAMPLES = 3  # fewer make no chart
INCIDENTS = ("lost", "note", "given_up", "cell_lost")

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title><style>
:root {{ color-scheme: light dark; --ground: #fafafa; --card: #fff; --ink: #222; --soft: #666;
  --line: #ddd; --a: #2166ac; --b: #c2571a; }}
@media (prefers-color-scheme: dark) {{ :root {{ --ground: #17181a; --card: #202225; --ink: #e4e4e4;
  --soft: #a0a0a0; --line: #3a3d41; --a: #6fb1f0; --b: #f0a066; }} }}
body {{ font: 15px/1.4 system-ui, sans-serif; margin: 24px; background: var(--ground);
  color: var(--ink); }}
details {{ margin: 28px 0 8px; }} summary {{ font-weight: 600; }}
h1 {{ font-size: 20px; }} h2 {{ font-size: 16px; margin: 28px 0 8px; }}
.note {{ color: var(--soft); }}
.cards {{ display: flex; flex-wrap: wrap; gap: 16px; }}
figure, .card {{ background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  margin: 0; padding: 12px 16px; }}
.card b {{ display: block; font-size: 22px; }} .card span {{ color: var(--soft); }}
figure {{ width: 560px; max-width: 100%; box-sizing: border-box; flex: 1 1 420px; }}
figcaption {{ font-weight: 600; margin-bottom: 4px; }}
figcaption span {{ font-weight: normal; margin-left: 14px; }}
figcaption i {{ display: inline-block; width: 14px; height: 3px; margin-right: 5px;
  vertical-align: middle; }}
svg {{ width: 100%; display: block; }} svg text {{ font-size: 11px; fill: var(--soft); }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; background: var(--card); }}
th, td {{ border: 1px solid var(--line); padding: 4px 10px; text-align: left;
  vertical-align: top; }}
td.number {{ text-align: right; font-variant-numeric: tabular-nums; }}
td {{ overflow-wrap: anywhere; }}
</style></head><body><h1>{title}</h1><p class="note">{note}</p>
{body}
</body></html>
"""


@dataclass
class RunHistory:
    """What events.jsonl says, in as much memory as there are samples and shards.

    Attributes:
        start: the first event, with the settings.
        outcome: how the run ended, or None.
        last_time: of the last event.
        samples: the records of rates.
        commits: times at which shards were committed.
        examples: cause -> the first failed clips.
        incidents: the last of what went wrong apart from clips, and how much there was.
    """

    start: dict[str, Any] = field(default_factory=dict)
    outcome: str | None = None
    last_time: float = 0.0
    samples: list[dict[str, Any]] = field(default_factory=list)
    commits: list[float] = field(default_factory=list)
    examples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    incidents: list[dict[str, Any]] = field(default_factory=list)
    num_incidents: int = 0

    @property
    def seconds(self) -> float:
        """From the first event to the last."""
        return self.last_time - self.start["time"]

    def add(self, event: dict[str, Any]) -> None:
        """Take in one event."""
        self.last_time, kind = event["time"], event["event"]
        if kind == "run":
            self.start = event
        elif kind == "sample":
            self.samples.append(event)
        elif kind == "shard":
            self.commits.append(event["time"])
        elif kind == "clip":
            examples = self.examples.setdefault(event["status"], [])
            if len(examples) < EXAMPLES_SHOWN:
                examples.append(event)
        elif kind == "end":
            self.outcome = event["outcome"]
        elif kind in INCIDENTS:
            self.num_incidents += 1
            self.incidents = [*self.incidents[1 - INCIDENTS_SHOWN :], event]


def main() -> None:
    """Parse the command line and write the page."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.run_page",
        description="Write report.html of an encode run, also of one under way or killed.",
    )
    parser.add_argument("run", metavar="RUN", help="a folder or URL: DIR/runs/<run_id>")
    arguments = parser.parse_args()
    with one_line_errors("nothing was changed"):
        print(write_page(open_root(arguments.run)))


def write_page(folder: Path) -> Path:
    """Write ``report.html`` of a run beside its events and return its path.

    Raises:
        FormatError: there are no events of a run, or damaged ones.
    """
    history = read_history(folder)
    summary_path = folder / "summary.json"
    summary = fmt.read_json(summary_path) if summary_path.exists() else {}
    path = folder / "report.html"
    write_atomically(path, page(history, summary).encode())
    return path


def read_history(folder: Path) -> RunHistory:
    """Read the events of a run.

    Raises:
        FormatError: there are none, or damaged ones.
    """
    path, history = folder / "events.jsonl", RunHistory()
    try:
        for event in read_events(path):
            history.add(event)
    except (KeyError, TypeError) as error:
        raise fmt.FormatError(f"{path} holds a line that is no event ({error!r})") from None
    if not history.start:
        raise fmt.FormatError(f"{path} holds no run; expected a folder DIR/runs/<run_id>")
    return history


def page(history: RunHistory, summary: Mapping[str, Any]) -> str:
    """Return the page.

    Args:
        history: of the run.
        summary: its summary.json; empty while it is under way, or where it was killed.
    """
    start = history.start
    last = history.samples[-1] if history.samples else {}
    begun, until = (
        time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(t))
        for t in (start["time"], history.last_time)
    )
    outcome = history.outcome or "under way, or killed"
    source = start["source"]
    note = (
        f"{outcome}; from {begun} to {until}; "
        f"plan {start['plan_id']} of {source['kind']} {source['root']}"
    )
    body = [
        _cards(start, summary, last),
        "<h2>Over time</h2>" + _charts(history),
        _failures(Counter(last.get("statuses", {})), history.examples),
        _incidents(history),
        f"<h2>Totals</h2>{_pairs(labelled(summary))}" if summary else "",
        "<details><summary>Settings</summary>"
        f"{_pairs(flattened({'source': source, **start['settings']}))}</details>",
    ]
    title = f"Encode run {start['run_id']}"
    return PAGE.format(title=escaped(title), note=escaped(note), body="\n".join(filter(None, body)))


def _cards(start: dict[str, Any], summary: Mapping[str, Any], last: dict[str, Any]) -> str:
    known = {**last, **summary}
    cards = {
        "clips": f"{known.get('clips', 0):,} of {start['clips']:,}",
        "shards": f"{known.get('shards', 0):,} of {start['shards']:,}",
        "clips/s": rate_text(_rate(known, "clips_per_s")),
        "hours of clips per hour": rate_text(_rate(known, "media_h_per_h")),
    }
    if "speed_of_light_share" in summary:
        cards["of the cells' time encoding"] = share_text(summary["speed_of_light_share"])
        cards["of the decoders' time decoding"] = share_text(summary["decode_busy_share"])
    shown = (
        f'<div class="card"><b>{value}</b><span>{name}</span></div>'
        for name, value in cards.items()
    )
    return f'<div class="cards">{"".join(shown)}</div>'


def _rate(known: Mapping[str, Any], name: str) -> float:
    """Return a rate: at the end that without start-up, before it the last one."""
    return known.get(f"{name}_after_startup", known.get(name, 0.0))


def _charts(history: RunHistory) -> str:
    if len(history.samples) < MIN_SAMPLES:
        return '<p class="note">The run is too short for charts.</p>'
    begun, end_s = history.start["time"], history.seconds

    def series(name: str, key: str, unit: float = 1.0) -> Series:
        return Series(name, [(s["time"] - begun, s[key] / unit) for s in history.samples])

    commits = [(moment - begun, number) for number, moment in enumerate(history.commits)]
    commits.append((end_s, len(commits)))
    busy = [series("decoders", "decode_busy"), series("encoders", "encode_busy")]
    charts = "".join(
        (
            step_chart("Clips per second", [series("clips/s", "clips_per_s")], end_s),
            step_chart("Share of time busy", busy, end_s, top=1.0),
            step_chart("Megabytes in flight", [series("MB", "bytes_in_flight", 1e6)], end_s),
            step_chart("Shards committed", [Series("shards", commits)], end_s),
        )
    )
    return f'<div class="cards">{charts}</div>'


def _failures(statuses: Counter[str], examples: Mapping[str, list[dict[str, Any]]]) -> str:
    counts = {status: count for status, count in statuses.most_common() if status != "ok"}
    rows = []
    for status in [*counts, *(status for status in examples if status not in counts)]:
        shown = "<br>".join(
            f"<b>{escaped(clip['key'])}</b> {escaped(clip['message'])}"
            for clip in examples.get(status, [])
        )
        rows.append(
            f'<tr><td>{escaped(status)}</td><td class="number">{counts.get(status, 0):,}</td>'
            f"<td>{shown}</td></tr>"
        )
    title = "<h2>Failed and dropped clips</h2>"
    if not rows:
        return f"{title}<p>None.</p>"
    head = "<tr><th>cause</th><th>clips</th><th>the first of them</th></tr>"
    return f'{title}<div class="wide"><table>{head}{"".join(rows)}</table></div>'


def _incidents(history: RunHistory) -> str:
    if not history.incidents:
        return ""
    rows = []
    for event in history.incidents:
        clock = time.strftime("%H:%M:%S", time.gmtime(event["time"]))
        where = " ".join(str(part) for part in event.get("shard") or ())
        why = event.get("reason", event.get("message", ""))
        rows.append(_row((clock, event["event"], where, event.get("cell", ""), why)))
    head = "".join(f"<th>{name}</th>" for name in ("UTC", "what", "shard", "cell", "why"))
    return (
        f"<h2>Incidents: {history.num_incidents:,}</h2>"
        f'<div class="wide"><table><tr>{head}</tr>{"".join(rows)}</table></div>'
    )


def _pairs(values: Mapping[str, Any]) -> str:
    rows = "".join(_row(pair) for pair in values.items())
    return f'<div class="wide"><table>{rows}</table></div>'


def _row(cells: Iterable[Any]) -> str:
    return f"<tr>{''.join(f'<td>{escaped(cell)}</td>' for cell in cells)}</tr>"


def escaped(value: Any) -> str:
    """Return a value as text for HTML that shows all of it, and does nothing else."""
    text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return html.escape("".join(c if c.isprintable() else repr(c)[1:-1] for c in text))


if __name__ == "__main__":
    main()
