"""Decoders as Ray actors, and the pool that feeds them, watches them and replaces them.

The pool belongs to the encoder beside which its decoders run. It works when it is polled: frames
go from decoder to encoder through the node's shared memory and never further.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.exceptions import (
    GetTimeoutError,
    ObjectLostError,
    ObjectStoreFullError,
    OutOfDiskError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
)
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from pipeline.child import START_TIMEOUT_S, died, not_fetched, took_too_long
from pipeline.jobs import Job
from pipeline.media import Clip, ClipError, Decoded, DecodeSettings
from pipeline.pool import MAX_CLIP_ATTEMPTS, CellError, CellLostError, Item, Line
from pipeline.storage import MediaStore

# What was decoded may be lost in shared memory through no fault of the clip's.
MAX_OBJECT_ATTEMPTS = 3
OBJECT_ERRORS = (ObjectStoreFullError, OutOfDiskError, ObjectLostError, GetTimeoutError)
GET_TIMEOUT_S = 5.0  # of an object that is there: longer where shared memory was spilled to disk

# Blocks of 2 MB, such as frames, go back to the system when they are freed; by default glibc raises
# the limit to their size, and the peak with it. Those that are smaller, such as of sound, are kept,
# up to 32 MB: else the system has to clear their pages anew for every clip (a slow test in
# tests/pipeline/test_decoders.py prints the peak at 1080p).
DECODER_ENVIRONMENT = {
    "env_vars": {"MALLOC_MMAP_THRESHOLD_": "2097152", "MALLOC_TRIM_THRESHOLD_": "33554432"}
}


@ray.remote(num_cpus=1, max_restarts=0, runtime_env=DECODER_ENVIRONMENT)
class DecoderActor:
    """One process that decodes one clip at a time; killed from outside when it hangs.

    A clip whose media is not a local file is fetched by a call of its own before, so that the
    pool knows which of the two takes long. The copy is held until the clip is decoded.
    """

    def __init__(self, media: MediaStore, settings: DecodeSettings) -> None:
        from pipeline.decode import decode_clip  # slow to load: a part of the start, not of a clip

        self._decode_clip, self._media, self._settings = decode_clip, media, settings
        self._copy = contextlib.ExitStack()
        self._fetch_error: ClipError | None = None

    def fetch(self, clip: Clip) -> None:
        """Copy the file of the clip to be decoded next."""
        try:
            self._copy.enter_context(self._media.local(clip.uri))
        except ClipError as error:
            self._fetch_error = error

    def decode(self, clip: Clip, wanted: set[str]) -> Decoded:
        """Decode one clip; whatever is wrong with it is in the result."""
        started = time.perf_counter()
        decoded = self._decode(clip, wanted)
        return replace(decoded, seconds=time.perf_counter() - started)

    def _decode(self, clip: Clip, wanted: set[str]) -> Decoded:
        fetch_error, self._fetch_error = self._fetch_error, None
        try:
            if fetch_error:
                raise fetch_error
            with self._copy, self._media.local(clip.uri) as path:
                return self._decode_clip(path, clip, self._settings, wanted)
        except ClipError as error:
            return Decoded.failed(error.status, error.message)


@dataclass
class _Queued:
    """An item that a decoder was given; ``fetched`` is None once its file is there."""

    item: Item
    fetched: Any | None
    decoded: Any


@dataclass
class _Lane:
    """A decoder and the items queued on it, oldest first; its deadline is the oldest's.

    ``starting`` resolves when the process has loaded its libraries, and is None from then on.
    ``clips_left`` more clips may be queued before the process is replaced.
    """

    actor: Any
    starting: Any | None
    clips_left: int
    queue: deque[_Queued] = field(default_factory=deque)
    head_since: float = 0.0


class DecoderPool:
    """A ``pipeline.pool.Pool`` on several actors, which survives their deaths.

    Clips are queued ahead on the actors so that these never wait for the encoder. An actor works
    through its queue in order: the oldest clip is the one to blame for a death.

    Args:
        job: of the run.
        group: its bundle 0 is the encoder's, the next ones are the decoders'.
        num_decoders: how many.
    """

    def __init__(self, job: Job, group: PlacementGroup, num_decoders: int) -> None:
        self._job, self._group, self._media = job, group, job.media_store()
        self._line = Line(job.window_bytes)
        self._failures: Counter[int] = Counter()  # decoders that a ticket has cost
        self._losses: Counter[int] = Counter()  # objects of a ticket that were lost
        # What is decoded while a codec has one batch, and two more. Not all that the window
        # allows: a clip that takes long would keep those behind it from decoders that idle.
        largest = max(job.batch.get(modality, 1) for modality in ("video", "audio"))
        self._depth = 2 + -(-largest // num_decoders)
        self._lanes = [self._start(number) for number in range(num_decoders)]

    @property
    def bytes_in_flight(self) -> int:
        """Bytes of frames and sound, at most, in decoders and behind them."""
        return self._line.bytes_in_flight

    def submit(self, items: Iterable[Item]) -> None:
        """Put clips at the end of the line; none at all lets the decoders have those there."""
        self._line.submit(items)
        self._fill(beyond=False)  # the caller may have work that makes room

    def poll(self, timeout_s: float) -> tuple[Item, Decoded] | None:
        """Return the next clip in line; None where it does not come in time, or none is in line.

        Raises:
            CellError: decoders can't start, for which no clip is to blame.
            CellLostError: shared memory lost the same clip several times.
            ObjectStoreFullError, OutOfDiskError: it did for lack of room.
        """
        give_up_at = time.monotonic() + timeout_s
        while True:
            self._collect()
            self._fill(beyond=True)
            heads = [lane.queue[0].decoded for lane in self._lanes if lane.queue]
            found, left_s = self._line.pop(), give_up_at - time.monotonic()
            if found or left_s <= 0 or not heads:
                return found
            ray.wait(heads, timeout=min(left_s, self._job.decode_timeout_s / 4))

    def release(self, item: Item) -> None:
        """Tell the pool that frames and sound of an item are no longer held."""
        self._line.release(item)

    def _start(self, number: int) -> _Lane:
        strategy = PlacementGroupSchedulingStrategy(
            self._group, placement_group_bundle_index=1 + number
        )
        placed = DecoderActor.options(scheduling_strategy=strategy)
        actor: Any = placed.remote(self._media, self._job.decode)
        return _Lane(actor, actor.__ray_ready__.remote(), self._job.clips_per_decoder)

    def _fill(self, beyond: bool) -> None:
        """Queue clips ahead on the decoders that have the fewest.

        A clip that failed gets a decoder to itself: a process that dies can take the answer for
        the clip before with it, and that one must not be blamed twice.
        """

        def load(lane: _Lane) -> int:
            alone = lane.queue and lane.queue[0].item.ticket in self._failures
            return self._depth if alone or lane.clips_left == 0 else len(lane.queue)

        while item := self._line.next(beyond):
            lane = min(self._lanes, key=load)
            if load(lane) >= (1 if item.ticket in self._failures else self._depth):
                return
            self._queue(lane, self._line.give())

    def _queue(self, lane: _Lane, item: Item) -> None:
        if not lane.queue:
            lane.head_since = time.monotonic()
        lane.clips_left -= 1
        fetched = None
        if self._media.is_copied(item.clip.uri):
            fetched = lane.actor.fetch.remote(item.clip)
        decoded = lane.actor.decode.remote(item.clip, set(item.wanted))
        lane.queue.append(_Queued(item, fetched, decoded))

    def _collect(self) -> None:
        """Take what is decoded from all lanes, and replace the decoders that are lost or late."""
        pending = [queued.decoded for lane in self._lanes for queued in lane.queue]
        ready = set(ray.wait(pending, num_returns=len(pending), timeout=0)[0] if pending else [])
        for number, lane in enumerate(self._lanes):
            self._collect_lane(number, lane, ready)
            self._recycle(number)

    def _collect_lane(self, number: int, lane: _Lane, ready: set[Any]) -> None:
        while lane.queue and lane.queue[0].decoded in ready:
            head = lane.queue[0]
            try:
                decoded = self._result(head)
            except RayError as error:
                if isinstance(error, OBJECT_ERRORS):
                    raise
                self._replace(number, lane, died(_cause_of(error)))
                return
            lane.queue.popleft()
            lane.head_since = time.monotonic()
            if decoded is None:
                self._line.give_back([head.item])
            else:
                self._finish(head.item, decoded)
        if lane.queue and (late := self._late(lane)):
            self._replace(number, lane, late)

    def _result(self, queued: _Queued) -> Decoded | None:
        """Return what a decoder found; None where shared memory lost it.

        Raises:
            RayError: the decoder was lost.
            CellError, CellLostError, ObjectStoreFullError, OutOfDiskError: see ``poll``.
        """
        try:
            return ray.get(queued.decoded, timeout=GET_TIMEOUT_S)
        except RayTaskError as error:  # the decoder lives
            if not isinstance(error.cause, OBJECT_ERRORS):
                what = died(repr(error.cause))  # a bug in it
                return Decoded.failed(what.status, what.message)
            lost: RayError = error.cause
        except OBJECT_ERRORS as error:
            lost = error
        except RayActorError as error:
            if error.actor_init_failed:  # blame no clip for this
                reason = str(error).strip().splitlines()[-1]
                raise CellError(f"decoder processes can't start: {reason}") from None
            raise
        self._losses[queued.item.ticket] += 1
        if self._losses[queued.item.ticket] < MAX_OBJECT_ATTEMPTS:
            return None
        if isinstance(lost, ObjectStoreFullError | OutOfDiskError):
            raise lost
        raise CellLostError(f"shared memory loses frames: {type(lost).__name__}")

    def _late(self, lane: _Lane) -> ClipError | None:
        """Return what to say of the oldest clip where its decoder takes too long over it.

        Raises:
            CellError: it takes too long to start, for which no clip is to blame.
        """
        head, now = lane.queue[0], time.monotonic()
        if lane.starting is not None and _is_done(lane.starting):
            lane.starting, lane.head_since = None, now
        elif lane.starting is None and head.fetched is not None and _is_done(head.fetched):
            head.fetched, lane.head_since = None, now
        if lane.starting is not None:
            if now - lane.head_since > START_TIMEOUT_S:
                raise CellError(
                    f"decoder processes can't start: nothing heard in {START_TIMEOUT_S:g} s"
                )
            return None
        if head.fetched is not None:
            limit_s, late = self._job.fetch_timeout_s, not_fetched
        else:
            limit_s, late = self._job.decode_timeout_s, took_too_long
        # Asked again: it may have come while the caller was busy with another row.
        is_late = now - lane.head_since > limit_s and not _is_done(head.decoded)
        return late(limit_s) if is_late else None

    def _recycle(self, number: int) -> None:
        """Start a new decoder for one that has done its share and has nothing queued.

        What native libraries leak goes with the process; the other decoders work on meanwhile.
        """
        lane = self._lanes[number]
        if lane.clips_left == 0 and not lane.queue:
            ray.kill(lane.actor)
            self._lanes[number] = self._start(number)

    def _replace(self, number: int, lane: _Lane, error: ClipError) -> None:
        """Start a new decoder; blame the oldest clip, put the others back in line."""
        ray.kill(lane.actor)  # also one that is only out of reach: it would keep its CPU
        self._lanes[number] = self._start(number)
        items = [queued.item for queued in lane.queue]
        self._failures[items[0].ticket] += 1
        if self._failures[items[0].ticket] >= MAX_CLIP_ATTEMPTS:
            message = f"{error.message}; tried {MAX_CLIP_ATTEMPTS} times"
            self._finish(items.pop(0), Decoded.failed(error.status, message))
        self._line.give_back(items)

    def _finish(self, item: Item, decoded: Decoded) -> None:
        self._failures.pop(item.ticket, None)
        self._losses.pop(item.ticket, None)
        self._line.finish(item, decoded)


def _cause_of(error: RayError) -> str:
    if isinstance(error, OutOfMemoryError):
        return "Ray's memory monitor ended it: this node is out of memory; lower `decoders`"
    return type(error).__name__


def _is_done(ref: Any) -> bool:
    return bool(ray.wait([ref], timeout=0)[0])
