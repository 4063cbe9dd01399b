"""A run as a person sees it: lines that stay in place in a terminal, or now and then one in a log.

Only this file knows how the figures look; they come from ``pipeline.tally``.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from typing import TextIO

from tqdm import tqdm

from pipeline.tally import Rates, Tally, failures
from pipeline.wording import counted, duration_text, rate_text, size_text

TERMINAL_INTERVAL_S = 0.5
LOG_INTERVAL_S = 20.0
NUM_LINES = 3  # below the bar
CAUSES_SHOWN = 4
NOTES_SHOWN = 20


class Display:
    """Shows a run on a stream.

    Args:
        num_clips: what the run has to do; 0 where it encodes captions only.
        stream: a terminal gets a bar and three lines that stay in place, anything else a line
            every ``LOG_INTERVAL_S``, without control characters.

    Attributes:
        interval_s: how often ``show`` is to be called.
    """

    def __init__(self, num_clips: int, stream: TextIO) -> None:
        self._num_clips, self._stream = num_clips, stream
        self._is_terminal = stream.isatty()
        self.interval_s = TERMINAL_INTERVAL_S if self._is_terminal else LOG_INTERVAL_S
        self._bars: list[tqdm] = []
        self._noted: set[str] = set()
        self._num_hidden = 0

    def note(self, text: str) -> None:
        """Show a text above the state of the run, once however often it comes.

        Those after the first ``NOTES_SHOWN`` are counted only.
        """
        if text in self._noted:
            return
        if len(self._noted) < NOTES_SHOWN:
            self._noted.add(text)
            tqdm.write(text, file=self._stream)
            return
        if not self._num_hidden:
            tqdm.write("more incidents are in events.jsonl only", file=self._stream)
        self._num_hidden += 1

    def say(self, text: str) -> None:
        """Show a text above the state of the run, each time."""
        tqdm.write(text, file=self._stream)
        self._stream.flush()

    def show(self, tally: Tally, rates: Rates) -> None:
        """Show the state of the run."""
        if not self._is_terminal:
            clock = time.strftime("%H:%M:%S")
            self._print(f"{clock} {progress(tally, rates)}; {'; '.join(details(tally, rates))}")
            return
        if not self._bars:
            self._bars = self._open_bars()
        bar, *lines = self._bars
        bar.n = min(tally.clips_done, self._num_clips)
        bar.set_postfix_str(pace(tally, rates), refresh=False)
        width = self._width() - 1  # a full line would wrap
        shards = f"shards {tally.shards_done:,}/{tally.num_shards:,}"
        first, *others = details(tally, rates)
        for line, text in zip(lines, [f"{shards}, {first}", *others], strict=False):
            line.set_description_str(shortened(text, width), refresh=False)
        for each in self._bars:
            each.refresh()

    def close(self, text: str) -> None:
        """End the display with a line that stays."""
        for bar in reversed(self._bars):
            bar.close()
        self._bars = []
        if self._num_hidden:
            self._print(f"{self._num_hidden:,} more incidents in events.jsonl")
        self._print(text)

    def _open_bars(self) -> list[tqdm]:
        shape = "clips {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}"
        total = self._num_clips or None
        options = {"file": self._stream, "leave": False, "dynamic_ncols": True}
        bars = [tqdm(total=total, bar_format=shape, position=0, **options)]
        for position in range(1, 1 + NUM_LINES):
            bars.append(tqdm(total=0, bar_format="{desc}", position=position, **options))
        return bars

    def _width(self) -> int:
        try:
            return os.get_terminal_size(self._stream.fileno()).columns or 80
        except (OSError, ValueError):  # a terminal that isn't one
            return 80

    def _print(self, text: str) -> None:
        print(text, file=self._stream, flush=True)


def progress(tally: Tally, rates: Rates) -> str:
    """Return what is done of what, and when it will be all."""
    clips = f"{tally.clips_done:,}/{tally.num_clips:,} clips"
    share = f" ({tally.clips_done / tally.num_clips:.0%})" if tally.num_clips else ""
    shards = f"{tally.shards_done:,}/{tally.num_shards:,} shards"
    return f"{clips}{share}, {shards}, {pace(tally, rates)}"


def pace(tally: Tally, rates: Rates) -> str:
    """Return clips a second and the time to the end."""
    return f"{rate_text(rates.clips_per_s)} clips/s, ETA {duration_text(tally.eta_s(rates))}"


def details(tally: Tally, rates: Rates) -> list[str]:
    """Return three short texts: speed, load, and what went wrong."""
    speed = f"{rate_text(rates.media_h_per_h)} h of clips per hour"
    decode = f"decode {rates.decode_busy:.0%} busy, " if tally.num_decoders else ""
    load = (
        f"{decode}encode {rates.encode_busy:.0%} busy, "
        f"{size_text(tally.bytes_in_flight)} in flight, {counted(tally.num_cells, 'cell')}"
    )
    return [speed, load, outcome_text(tally)]


def outcome_text(tally: Tally) -> str:
    """Return failures by cause, the most common first."""
    statuses = tally.done.statuses
    failed = failures(statuses)
    dropped = tally.clips_done - statuses["ok"] - failed.total()
    text = f"failed {failed.total():,}"
    if failed:
        text += f" ({tally.failed_share:.1%}): {causes_text(failed)}"
    if dropped:
        text += f"; dropped {dropped:,}"
    if tally.num_lost:
        text += f"; attempts lost {tally.num_lost:,}"
    return text


def causes_text(failed: Counter[str]) -> str:
    """Return the most common causes with their counts."""
    shown = [f"{cause} {count:,}" for cause, count in failed.most_common(CAUSES_SHOWN)]
    rest = failed.total() - sum(count for _, count in failed.most_common(CAUSES_SHOWN))
    return ", ".join(shown + [f"others {rest:,}"] * (rest > 0))


def shortened(text: str, width: int) -> str:
    """Return a text that is no wider than ``width``."""
    return text if len(text) <= width else text[: width - 1] + "…"
