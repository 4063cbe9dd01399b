"""What a run has done so far, and how fast: sums over the news of its cells. Pure counting.

Shards come interleaved from several cells, and an attempt that is lost takes its counts along.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

from pipeline.checks import DECISIONS
from pipeline.jobs import ShardUpdate

TaskName = tuple[str, int]


@dataclass
class Sums:
    """Sums over rows: clips by status (captions are not counted), and seconds."""

    statuses: Counter[str] = field(default_factory=Counter)
    media_s: float = 0.0
    decode_s: float = 0.0
    encode_s: float = 0.0
    write_s: float = 0.0
    write_wait_s: float = 0.0

    def add(self, statuses: Counter[str], news: ShardUpdate | Sums, sign: int = 1) -> None:
        """Take in news, or with sign -1 take back what was taken in."""
        for status, count in statuses.items():
            self.statuses[status] += sign * count
        self.media_s += sign * news.media_s
        self.decode_s += sign * news.decode_s
        self.encode_s += sign * news.encode_s
        self.write_s += sign * news.write_s
        self.write_wait_s += sign * news.write_wait_s


class Point(NamedTuple):
    """Sums of a run at one time; two of them make rates.

    ``spent_*`` count lost attempts too; ``cell_s`` and ``decoder_s`` are seconds that cells and
    decoders had, summed over them.
    """

    time_s: float
    clips: int
    shards: int
    media_s: float
    spent_decode_s: float
    spent_encode_s: float
    cell_s: float
    decoder_s: float


class Rates(NamedTuple):
    """How fast a run is between two points.

    Attributes:
        media_h_per_h: hours of clips done in an hour.
        decode_busy: share of the decoders' time in which they decoded.
        encode_busy: share of the cells' time in which codecs encoded.
    """

    clips_per_s: float
    shards_per_s: float
    media_h_per_h: float
    decode_busy: float
    encode_busy: float


class Tally:
    """Counts the news of a run.

    Args:
        num_clips, num_shards: what the run has to do; shards of captions count as shards.
        now_s: the time, of any clock that never goes back.

    Attributes:
        done: sums over committed shards and those under way.
        spent: the same, with what was lost.
        shards_done: committed by this run, or by another one meanwhile.
        caption_shards_done: those of them that hold captions.
        num_cells, num_decoders: alive now, the decoders of all cells together.
        most_cells, most_decoders: alive at one time.
        num_lost: attempts of shards that came to nothing.
        started_s: when the run started.
        ready_s: when the first cell was alive, or None: until then all cells start. From then on
            cells have time: decoders begin at once, long before the first row is heard of.
        at_last_commit: the sums then, or None.
    """

    def __init__(self, num_clips: int, num_shards: int, now_s: float) -> None:
        self.num_clips, self.num_shards = num_clips, num_shards
        self.done, self.spent = Sums(), Sums()
        self.shards_done = self.caption_shards_done = 0
        self.num_cells = self.num_decoders = 0
        self.most_cells = self.most_decoders = 0
        self.num_lost = 0
        self.started_s = now_s
        self.ready_s: float | None = None
        self.at_last_commit: Point | None = None
        self._under_way: dict[TaskName, Sums] = {}
        self._bytes: dict[str, int] = {}
        self._cell_s = self._decoder_s = 0.0
        self._integrated_s = now_s

    @property
    def clips_done(self) -> int:
        """Clips with a row, in committed shards and those under way."""
        return self.done.statuses.total()

    @property
    def failed_share(self) -> float:
        """Share of those clips that could not be encoded."""
        return failures(self.done.statuses).total() / max(1, self.clips_done)

    @property
    def bytes_in_flight(self) -> int:
        """Decoded frames and sound in all cells."""
        return sum(self._bytes.values())

    def update(self, news: ShardUpdate, now_s: float) -> None:
        """Take in one update."""
        self._bytes[news.cell] = news.bytes_in_flight
        if news.task is None:
            return
        if news.event == "started":
            self.take_back(news.task)
        is_text = news.task[0] == "text"
        statuses = Counter[str]() if is_text else news.statuses
        sums = self._under_way.setdefault(news.task, Sums())
        for each in (sums, self.done, self.spent):
            each.add(statuses, news)
        if news.event == "committed":
            self.shards_done += 1
            self.caption_shards_done += is_text
            del self._under_way[news.task]
            self.at_last_commit = self.point(now_s)

    def take_back(self, task: TaskName) -> None:
        """Uncount what was counted for a shard that is not committed."""
        if lost := self._under_way.pop(task, None):
            self.done.add(lost.statuses, lost, sign=-1)

    def take_back_all(self) -> None:
        """Uncount all shards that are not committed: the run is over."""
        for task in list(self._under_way):
            self.take_back(task)

    def set_cells(self, num_cells: int, num_decoders: int, now_s: float) -> None:
        """Say how many cells and decoders there are from now on."""
        self._integrate(now_s)
        if num_cells and self.ready_s is None:
            self.ready_s = now_s
        self.num_cells, self.num_decoders = num_cells, num_decoders
        self.most_cells = max(self.most_cells, num_cells)
        self.most_decoders = max(self.most_decoders, num_decoders)
        self._bytes.clear()  # a cell that is alive says it again within seconds

    def point(self, now_s: float) -> Point:
        """Return the sums at this time."""
        self._integrate(now_s)
        return Point(
            now_s,
            self.clips_done,
            self.shards_done,
            self.done.media_s,
            self.spent.decode_s,
            self.spent.encode_s,
            self._cell_s,
            self._decoder_s,
        )

    def eta_s(self, rates: Rates) -> float | None:
        """Return the seconds to the end at these rates, None where nothing moves."""
        if self.num_clips:
            left, rate = self.num_clips - self.clips_done, rates.clips_per_s
        else:
            left, rate = self.num_shards - self.shards_done, rates.shards_per_s
        return left / rate if rate > 0 else None

    def _integrate(self, now_s: float) -> None:
        seconds = now_s - self._integrated_s
        self._cell_s += seconds * self.num_cells
        self._decoder_s += seconds * self.num_decoders
        self._integrated_s = now_s


def rates_between(before: Point, after: Point) -> Rates:
    """Return how fast it went; never below 0, though a lost attempt takes its counts back."""

    def rate(name: str, per: str = "time_s") -> float:
        span = getattr(after, per) - getattr(before, per)
        return max(0.0, getattr(after, name) - getattr(before, name)) / span if span > 0 else 0.0

    return Rates(
        rate("clips"),
        rate("shards"),
        rate("media_s"),
        # Seconds come with the row that they belong to, which may be in the next interval.
        min(1.0, rate("spent_decode_s", "decoder_s")),
        min(1.0, rate("spent_encode_s", "cell_s")),
    )


def failures(statuses: Counter[str]) -> Counter[str]:
    """Return the counts of clips that could not be encoded: not ok, and not by a decision."""
    return Counter({n: c for n, c in statuses.items() if c and n != "ok" and n not in DECISIONS})
