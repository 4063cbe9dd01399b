"""What an encoder needs of its decoders, and in which order and number clips pass them. No Ray."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from pipeline.media import Clip, Decoded

# A clip whose decoder died or hung this often is quarantined.
MAX_CLIP_ATTEMPTS = 2


class CellError(Exception):
    """A cell can't be kept alive: its decoders don't start, or its node lacks the data set."""


class CellLostError(Exception):
    """This cell is broken, such as by a failed GPU; another may do its work."""


@dataclass(frozen=True)
class Item:
    """A clip for the decoders.

    Attributes:
        ticket: place in the order of submission, the same for no other item of the pool.
        clip: which span of which file.
        wanted: of {"video", "audio"}: what to decode.
        num_bytes: of its frames and sound, at most.
    """

    ticket: int
    clip: Clip
    wanted: frozenset[str]
    num_bytes: int


class Pool(Protocol):
    """Decodes clips, and gives them back in the order in which they came.

    Bytes in flight are those of all items given to decoders and not released yet. They stay
    within the window, but for the one clip that must move when nothing else does.
    """

    @property
    def bytes_in_flight(self) -> int:
        """Bytes of frames and sound, at most, in decoders and behind them."""
        ...

    def submit(self, items: Iterable[Item]) -> None:
        """Put clips at the end of the line; none at all lets the decoders have those there."""
        ...

    def poll(self, timeout_s: float) -> tuple[Item, Decoded] | None:
        """Return the next clip in line; None where it does not come in time, or none is in line.

        One at a time, and only called by an encoder that can do nothing more with those it has:
        the pool may then have to go beyond its window for one more.
        """
        ...

    def release(self, item: Item) -> None:
        """Tell the pool that frames and sound of an item are no longer held."""
        ...


class Line:
    """The order and the bytes of items on their way: in line, in decoders, decoded, held.

    A clip that a lost decoder had goes back to the head of the line and keeps its bytes in the
    window: they were given to it, and clips behind it must not take them.
    """

    def __init__(self, window_bytes: int) -> None:
        self._window_bytes, self.bytes_in_flight = window_bytes, 0
        self._returned: list[Item] = []
        self._waiting: deque[Item] = deque()
        self._submitted: deque[Item] = deque()  # and not popped
        self._decoded: dict[int, Decoded] = {}
        self._in_flight: set[int] = set()
        self._num_held = 0

    def submit(self, items: Iterable[Item]) -> None:
        """Put items at the end of the line."""
        for item in items:
            self._waiting.append(item)
            self._submitted.append(item)

    def next(self, beyond: bool) -> Item | None:
        """Return the item that a decoder may be given now, or None.

        Args:
            beyond: whether the window may be exceeded where nothing else moves.
        """
        if self._returned:
            return self._returned[0]
        if not self._waiting:
            return None
        item = self._waiting[0]
        fits = self.bytes_in_flight + item.num_bytes <= self._window_bytes
        nothing_moves = len(self._in_flight) == self._num_held
        return item if fits or (beyond and nothing_moves) else None

    def give(self) -> Item:
        """Take the next item out of the line, for a decoder."""
        if self._returned:
            return self._returned.pop(0)
        item = self._waiting.popleft()
        self._in_flight.add(item.ticket)
        self.bytes_in_flight += item.num_bytes
        return item

    def give_back(self, items: Iterable[Item]) -> None:
        """Put items whose decoder was lost back to the head of the line."""
        self._returned = sorted([*self._returned, *items], key=lambda item: item.ticket)

    def finish(self, item: Item, decoded: Decoded) -> None:
        """Note what a decoder found; it waits for those submitted before it."""
        self._decoded[item.ticket] = decoded

    def pop(self) -> tuple[Item, Decoded] | None:
        """Return the oldest item not popped yet if it is decoded, or None."""
        if not self._submitted or self._submitted[0].ticket not in self._decoded:
            return None
        item = self._submitted.popleft()
        self._num_held += 1
        return item, self._decoded.pop(item.ticket)

    def release(self, item: Item) -> None:
        """Take a popped item's bytes out of the window."""
        self._in_flight.remove(item.ticket)
        self._num_held -= 1
        self.bytes_in_flight -= item.num_bytes
