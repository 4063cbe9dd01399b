"""The stream walked some windows ahead of reading, so that shards are ready when they are needed.

What is ready stays until no batch on the way needs it. The stream is a pure function, so the walk
knows exactly what comes: rows that rare shapes left over from windows before, too.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Generic, NamedTuple, TypeVar

from train.data.background import Workers
from train.data.retry import LoaderClosed
from train.data.stream import Cursor, GlobalBatch, Stream
from train.data.view import View

Ready = TypeVar("Ready")


class ShardPlace(NamedTuple):
    """A shard of one of the data sets.

    Attributes:
        part: number of the data set.
        shard: number of the shard.
        is_behind: only a few of its rows are to be read: those of a rare shape, left over from a
            window that is past, or of a batch larger than what may be ready.
    """

    part: int
    shard: int
    is_behind: bool


class _Entry(Generic[Ready]):
    """A shard on its way: the last sample known to need it, and what came of it.

    What failed before anybody waited for it is tried once more when somebody does: the file may be
    back by then.
    """

    def __init__(self, place: ShardPlace) -> None:
        self.place = place
        self.needed_until = -1
        self.ready: Ready | None = None
        self.error: BaseException | None = None
        self.is_awaited = False


class Lookahead(Generic[Ready]):
    """Gives the batches of a stream, and gets their shards ready in the order of need.

    Args:
        stream: the stream.
        start: where it begins.
        prepare: gets a shard ready; called in a thread.
        num_ahead: shards of one data set that are ready or on their way, at most; beside those
            that are behind.
        rows_ahead: rows of batches that wait to be asked for, at most, but for the last.
        num_threads: shards being got ready at once.
    """

    def __init__(
        self,
        stream: Stream,
        start: Cursor,
        prepare: Callable[[ShardPlace], Ready],
        num_ahead: int,
        rows_ahead: int,
        num_threads: int,
    ) -> None:
        self._stream, self._prepare = stream, prepare
        self._num_ahead, self._rows_ahead = num_ahead, rows_ahead
        self._entries: dict[tuple[int, int], _Entry[Ready]] = {}
        self._batches: deque[GlobalBatch] = deque()
        self._is_full = False
        self._error: BaseException | None = None  # of the stream itself
        self._is_asked = self._is_closed = False
        # By data set: its epoch, and of each shard the last clip of the epoch that needed it.
        self._met: dict[int, tuple[int, dict[int, int]]] = {}
        self._changed = threading.Condition()
        self._workers = Workers(num_threads, "lookahead")
        self._walker = Workers(1, "stream")
        self._walker.put(partial(self._walk, start))

    def next_batch(self, is_needed: bool, timeout_s: float | None = None) -> GlobalBatch | None:
        """Return the next global batch; None where it isn't there yet.

        Args:
            is_needed: wait for it, and don't have it wait for room.
            timeout_s: seconds to wait; None: as long as it takes.

        Raises:
            Exception: what the stream raised, at every call.
            LoaderClosed: this was closed meanwhile.
        """
        with self._changed:
            if not self._batches and is_needed:
                self._is_asked = True
                self._changed.notify_all()
                self._changed.wait_for(
                    lambda: self._batches or self._error or self._is_closed, timeout_s
                )
            if self._is_closed:
                raise LoaderClosed("the loader was closed")
            if not self._batches:
                if self._error:
                    raise self._error
                return None
            batch, self._is_asked = self._batches.popleft(), False
            # Half of them at a time, so that the threads change places rarely.
            if self._is_full and 2 * len(self._batches) * len(batch.rows) <= self._rows_ahead:
                self._is_full = False
                self._changed.notify_all()
            return batch

    def get(self, part: int, shard: int) -> Ready:
        """Return a shard of a batch that was given; waits until it is ready.

        Raises:
            Exception: what getting it ready raised, at every call.
            LoaderClosed: this was closed meanwhile.
        """
        entry = self._entries.get((part, shard))
        if entry is None or entry.ready is None:
            return self._awaited(part, shard)
        return entry.ready

    def advance(self, sample: int) -> None:
        """Let go what no batch from the one of this first sample on is known to need."""
        with self._changed:
            done = [place for place, entry in self._entries.items() if entry.needed_until < sample]
            for place in done:
                del self._entries[place]
            if done:
                self._changed.notify_all()

    def close(self) -> None:
        """Let all go, wake up whoever waits, and end the threads."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._walker.close()
        self._workers.close()
        self._entries.clear()

    def _awaited(self, part: int, shard: int) -> Ready:
        with self._changed:
            while not self._is_closed:
                entry = self._entries[part, shard]
                if entry.ready is not None:
                    return entry.ready
                if entry.error is not None:
                    if entry.is_awaited:
                        raise entry.error
                    entry.is_awaited, entry.error = True, None
                    self._start(entry)
                self._changed.wait()
        raise LoaderClosed("the loader was closed")

    def _walk(self, start: Cursor) -> None:
        try:
            for batch in self._stream.batches(start):
                shards = self._stream.shards_of(batch)
                clip, met = self._met_before(batch)
                with self._changed:
                    for shard in shards:
                        # Those not needed for two windows of clips are behind.
                        is_behind = clip - met.get(shard, clip) > self._rows_ahead
                        self._ask(batch.part, shard, is_behind, batch.first_sample)
                        met[shard] = clip
                    if self._is_closed:
                        return
                    self._batches.append(batch)
                    if self._is_asked:
                        self._changed.notify_all()
                    self._is_full = len(self._batches) * len(batch.rows) >= self._rows_ahead
                    self._changed.wait_for(lambda: not self._is_full or self._is_closed)
        except BaseException as error:  # raised again where a batch is asked for
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _met_before(self, batch: GlobalBatch) -> tuple[int, dict[int, int]]:
        """Return the clip of the epoch behind a batch, and that at which each shard was needed."""
        part, now = batch.part, batch.cursor.places[batch.part]
        if self._met.get(part, (-1,))[0] != now.epoch:
            self._met[part] = (now.epoch, {})
        return sum(now.consumed), self._met[part][1]

    def _ask(self, part: int, shard: int, is_behind: bool, sample: int) -> None:
        """Note that a batch needs a shard, once there is room for it."""
        entry = self._entries.get((part, shard))
        # Of a shard of which few rows were left over, a new epoch needs all.
        if entry is None or (entry.place.is_behind and not is_behind):
            if not is_behind:
                self._changed.wait_for(lambda: self._has_room(part) or self._is_urgent())
                # Of the rest of a batch that can't wait for room, only its rows are read.
                is_behind = not self._has_room(part)
            entry = self._entries[part, shard] = _Entry(ShardPlace(part, shard, is_behind))
            self._start(entry)
        entry.needed_until = sample

    def _start(self, entry: _Entry[Ready]) -> None:
        self._workers.put(partial(self._make_ready, entry))

    def _is_urgent(self) -> bool:
        return self._is_closed or (self._is_asked and not self._batches)

    def _has_room(self, part: int) -> bool:
        taken = sum(
            entry.place.part == part and not entry.place.is_behind
            for entry in self._entries.values()
        )
        return taken < self._num_ahead

    def _make_ready(self, entry: _Entry[Ready]) -> None:
        place = entry.place
        if self._is_closed or self._entries.get((place.part, place.shard)) is not entry:
            return  # let go meanwhile
        try:
            entry.ready = self._prepare(place)
        except BaseException as error:  # raised again where the shard is asked for
            entry.error = error
        with self._changed:
            self._changed.notify_all()


def shards_ahead(view: View, global_batch: int) -> int:
    """Return how many shards of a data set are to be ready at once.

    The window that is read and the next; a global batch larger than a window needs several. Shards
    of which rows of rare shapes are left over come on top.
    """
    window, most = view.config.window_shards, 2
    for part in view.parts:
        rows_per_window = window * part.num_clips / len(part.counts)
        most = max(most, math.ceil(global_batch / rows_per_window) + 1)
    return window * most
