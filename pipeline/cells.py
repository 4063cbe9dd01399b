"""The Ray side of encoding. Nothing else imports Ray.

A cell is one placement group: an encoder actor and, beside it on the same node, its decoder
actors. The driver hands whole shards to the cell and knows nothing smaller; frames go from
decoder to encoder through the node's shared memory and never further.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from pipeline.child import START_TIMEOUT_S, died, took_too_long
from pipeline.format import FormatError
from pipeline.jobs import Job, ShardTask, ShardUpdate
from pipeline.media import Clip, ClipError, Decoded, DecodeSettings
from pipeline.shards import NoRoomError
from pipeline.storage import MediaStore

HEARTBEAT_S = 5.0
# A clip whose decoder died or hung this often is quarantined.
MAX_CLIP_ATTEMPTS = 2
MAX_SHARD_ATTEMPTS = 3


class CellError(Exception):
    """The cell can't be kept alive."""


# Blocks from this size on go back to the system when they are freed; by default glibc raises the
# limit to the size of the frames. Peak at 1080p without Ray's shared memory: 394 MB, not 413; 315
# of them are torch, Ray and pyarrow, loaded.
DECODER_ENVIRONMENT = {"env_vars": {"MALLOC_MMAP_THRESHOLD_": "65536"}}


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
    """A clip that a decoder was given; ``fetched`` is None once its file is there."""

    row: int
    fetched: Any | None
    decoded: Any


@dataclass
class _Lane:
    """A decoder and the clips queued on it, oldest first; its deadline is the oldest's.

    ``starting`` resolves when the process has loaded its libraries, and is None from then on.
    ``clips_left`` more clips may be queued before the process is replaced.
    """

    actor: Any
    starting: Any | None
    clips_left: int
    queue: deque[_Queued] = field(default_factory=deque)
    head_since: float = 0.0


@dataclass
class _Shard:
    """The clips being decoded, rows not queued yet, and how often a row's decoder was lost."""

    clips: list[Clip]
    wanted: set[str]
    waiting: deque[int]
    failures: dict[int, int] = field(default_factory=dict)


class DecoderPool:
    """Decodes the clips of a shard on several actors, in any order, surviving their deaths.

    Clips are queued ahead on the actors so that these never wait for the encoder. The actor
    works through its queue in order: the oldest clip is the one to blame for a death.
    """

    def __init__(self, job: Job, group: PlacementGroup, num_decoders: int) -> None:
        self._job, self._group, self._media = job, group, job.media_store()
        self._depth = -(-job.window_clips // num_decoders)
        self._lanes = [self._start(i) for i in range(num_decoders)]

    def _start(self, number: int) -> _Lane:
        strategy = PlacementGroupSchedulingStrategy(
            self._group, placement_group_bundle_index=1 + number
        )
        placed = DecoderActor.options(scheduling_strategy=strategy)
        actor: Any = placed.remote(self._media, self._job.decode)
        return _Lane(actor, actor.__ray_ready__.remote(), self._job.clips_per_decoder)

    def decode(
        self, clips: list[Clip], rows: list[int], wanted: set[str]
    ) -> Iterator[tuple[int, Decoded] | None]:
        """Yield (row, decoded) as they come; None every few seconds in which none came.

        No clip is decoded that is ``window_clips`` rows or more beyond the oldest one missing, so
        that a caller who needs them in order holds no more than the window.
        """
        shard = _Shard(clips, wanted, deque(rows))
        while shard.waiting or any(lane.queue for lane in self._lanes):
            self._fill(shard)
            heads = [lane.queue[0].decoded for lane in self._lanes if lane.queue]
            ray.wait(heads, timeout=min(HEARTBEAT_S, self._job.decode_timeout_s / 4))
            pending = [queued.decoded for lane in self._lanes for queued in lane.queue]
            ready, _ = ray.wait(pending, num_returns=len(pending), timeout=0)
            came = False
            for number, lane in enumerate(self._lanes):
                for row, decoded in self._collect(number, lane, set(ready), shard):
                    came = True
                    yield row, decoded
                self._recycle(number)
            if not came:
                yield None

    def _fill(self, shard: _Shard) -> None:
        """Queue clips ahead, never further than the window beyond the oldest one not decoded.

        A clip that failed gets a decoder to itself: a process that dies can take the answer for
        the clip before with it, and that one must not be blamed twice.
        """

        def load(lane: _Lane) -> int:
            alone = lane.queue and lane.queue[0].row in shard.failures
            return self._depth if alone or lane.clips_left == 0 else len(lane.queue)

        rows = [queued.row for lane in self._lanes for queued in lane.queue]
        end = min([*rows, *shard.waiting], default=0) + self._job.window_clips
        while shard.waiting and shard.waiting[0] < end:
            lane = min(self._lanes, key=load)
            if load(lane) >= (1 if shard.waiting[0] in shard.failures else self._depth):
                return
            row = shard.waiting.popleft()
            if not lane.queue:
                lane.head_since = time.monotonic()
            lane.clips_left -= 1
            clip, fetched = shard.clips[row], None
            if self._media.is_copied(clip.uri):
                fetched = lane.actor.fetch.remote(clip)
            decoded = lane.actor.decode.remote(clip, shard.wanted)
            lane.queue.append(_Queued(row, fetched, decoded))

    def _collect(
        self, number: int, lane: _Lane, ready: set[Any], shard: _Shard
    ) -> Iterator[tuple[int, Decoded]]:
        while lane.queue and lane.queue[0].decoded in ready:
            head = lane.queue[0]
            try:
                decoded: Any = ray.get(head.decoded, timeout=START_TIMEOUT_S)
            except RayTaskError as error:  # a bug in the decoder, not a lost process
                what = died(repr(error.cause))
                decoded = Decoded.failed(what.status, what.message)
            except RayError as error:
                if isinstance(error, RayActorError) and error.actor_init_failed:
                    reason = str(error).strip().splitlines()[-1]  # blame no clip for this
                    raise CellError(f"decoder processes can't start: {reason}") from None
                yield from self._replace(number, lane, died(type(error).__name__), shard)
                return
            lane.queue.popleft()
            lane.head_since = time.monotonic()
            yield head.row, decoded
        if lane.queue and (late := self._late(lane)):
            ray.kill(lane.actor)
            yield from self._replace(number, lane, late, shard)

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
            limit_s, late = self._job.fetch_timeout_s, _not_fetched
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

    def _replace(
        self, number: int, lane: _Lane, error: ClipError, shard: _Shard
    ) -> Iterator[tuple[int, Decoded]]:
        """Start a new decoder; blame the oldest clip, queue the others again."""
        rows = [queued.row for queued in lane.queue]
        self._lanes[number] = self._start(number)
        shard.failures[rows[0]] = shard.failures.get(rows[0], 0) + 1
        if shard.failures[rows[0]] >= MAX_CLIP_ATTEMPTS:
            message = f"{error.message}; tried {MAX_CLIP_ATTEMPTS} times"
            yield rows.pop(0), Decoded.failed(error.status, message)
        shard.waiting.extendleft(reversed(rows))


def _is_done(ref: Any) -> bool:
    return bool(ray.wait([ref], timeout=0)[0])


def _not_fetched(timeout_s: float) -> ClipError:
    return ClipError(
        "unreadable",
        f"not fetched in {timeout_s:g} s and stopped, expected less: slow network or server, or "
        "fetch_timeout_s is too short for it",
    )


@ray.remote(num_cpus=1, max_restarts=0)
class EncoderActor:
    """The head of a cell: encodes a shard at a time and owns the decoders beside it."""

    def __init__(self, job: Job, group: PlacementGroup, num_decoders: int) -> None:
        from pipeline.encoder import ShardEncoder  # what decoders, too, would load

        self._encoder = ShardEncoder(job)
        self._pool = DecoderPool(job, group, num_decoders)

    def encode(self, task: ShardTask) -> Iterator[ShardUpdate]:
        """Encode and commit one shard, telling the driver about every clip."""
        yield from self._encoder.encode(task, self._pool.decode)


class Cell:
    """The driver's handle on one cell; a lost cell is started again."""

    def __init__(self, job: Job, num_decoders: int) -> None:
        self._job, self._num_decoders = job, num_decoders
        self._start()

    def _start(self) -> None:
        self._group = placement_group([{"CPU": 1}] * (1 + self._num_decoders), "STRICT_PACK")
        if not self._group.wait(START_TIMEOUT_S):
            raise CellError(
                f"Ray has no node with {1 + self._num_decoders} free CPUs after "
                f"{START_TIMEOUT_S:g} s; lower `decoders`, or free the cluster"
            )
        strategy = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=0)
        self._actor: Any = EncoderActor.options(scheduling_strategy=strategy).remote(
            self._job, self._group, self._num_decoders
        )

    def close(self) -> None:
        """End the cell's processes."""
        with contextlib.suppress(RayError, ValueError):
            ray.kill(self._actor)
            remove_placement_group(self._group)

    def encode(self, task: ShardTask) -> Iterator[ShardUpdate]:
        """Encode one shard; a lost cell starts it again, at most three times.

        Raises:
            CellError: the cell was lost three times over this shard.
            NoRoomError: the disk is full.
        """
        for attempt in range(1, MAX_SHARD_ATTEMPTS + 1):
            try:
                yield ShardUpdate("started", task.shard)
                yield from self._updates(replace(task, attempt=attempt))
                return
            except (RayActorError, GetTimeoutError) as error:
                reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
                self.close()
                if attempt == MAX_SHARD_ATTEMPTS:
                    raise CellError(
                        f"shard {task.shard} lost its encoder {attempt} times, last by {reason}; "
                        "committed shards are safe: mend the node and run the same command again"
                    ) from None
                self._start()

    def _updates(self, task: ShardTask) -> Iterator[ShardUpdate]:
        stream = self._actor.encode.options(num_returns="streaming").remote(task)
        # The encoder reports at least every few seconds while it waits for decoders, so a longer
        # silence than two decode deadlines means that it is lost or stuck itself.
        silence_s = START_TIMEOUT_S + 2 * self._job.decode_timeout_s
        while True:
            ready, _ = ray.wait([stream], timeout=silence_s)
            if not ready:
                raise GetTimeoutError(f"no sign of the encoder for {silence_s:g} s")
            try:
                ref = next(stream)
            except StopIteration:
                return
            try:
                yield ray.get(ref, timeout=START_TIMEOUT_S)
            except RayTaskError as error:
                if isinstance(error.cause, (CellError, NoRoomError, OSError, FormatError)):
                    raise error.cause from None
                raise


@contextlib.contextmanager
def local_cluster(num_cpus: int, object_store_bytes: int) -> Iterator[None]:
    """Start Ray on this machine for the length of a block, on loopback and without dashboard."""
    ray.init(
        address="local",  # never a cluster that happens to run here
        num_cpus=num_cpus,
        object_store_memory=object_store_bytes,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        configure_logging=False,
        _node_ip_address="127.0.0.1",
    )
    try:
        yield
    finally:
        ray.shutdown()
