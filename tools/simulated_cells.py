"""Cells of a cluster, simulated clip by clip: when clips are decoded and encoded, shards safe.

A cell works as ``pipeline.encoder`` does: n decoders take clips in order as they get free, no
further ahead of the encoder than the window; the encoder takes them in that order, one at a time;
a shard's tar goes up in the background while the next shard is encoded. The driver hands out whole
shards: to a cell whose decoders run out of clips, or, where few shards are left, to one that has
encoded all. A cell that is lost loses the shards it has not committed; they are given out again.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

MAX_ATTEMPTS = 3  # as the driver's


@dataclass(frozen=True, kw_only=True)
class CellModel:
    """One cell: seconds that each stage takes, and what may go wrong.

    Attributes:
        decode_s: mean seconds of one decoder for a clip.
        decode_cv: standard deviation of these over their mean; log-normal.
        encode_s: seconds of the encoder for a clip.
        window_clips: clips decoded or being decoded, and not yet encoded.
        read_s, write_s: seconds of the cell's whole network for a clip's file, and for its latents.
        commit_s: seconds of a commit besides the transfer.
        start_s: until the first clip can be decoded, also after a loss.
        fault_every_s: mean seconds between losses of the cell; 0 is never.
        detect_s: until a loss is noticed and its shards are given out again.
    """

    num_decoders: int
    decode_s: float
    encode_s: float
    window_clips: int
    decode_cv: float = 0.0
    read_s: float = 0.0
    write_s: float = 0.0
    commit_s: float = 0.0
    start_s: float = 0.0
    fault_every_s: float = 0.0
    detect_s: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """What a simulated run came to.

    Attributes:
        num_clips: in committed shards.
        seconds: to the last commit; the horizon, where there is one.
        tail_s: from the first cell that got no more work to the last commit.
        busy: share of the run that decoders, encoders and networks worked, by stage; work that a
            lost cell had to leave counts.
        num_faults: cells lost.
        num_given_up: shards lost three times.
    """

    num_clips: int
    seconds: float
    tail_s: float
    busy: dict[str, float]
    num_faults: int
    num_given_up: int


class SimulatedCell:
    """The clocks of one cell: from when on each decoder, the encoder and the network are free."""

    def __init__(self, model: CellModel, rng: np.random.Generator) -> None:
        self._model, self._rng = model, rng
        self.decode_busy_s = self.encode_busy_s = self.network_busy_s = 0.0
        self.restart(0.0)

    def restart(self, at_s: float) -> None:
        """Start with empty hands; draw when the cell will be lost."""
        model = self._model
        ready_s = at_s + model.start_s
        self._decoders = [ready_s] * model.num_decoders
        self._encoder_s = self._network_s = ready_s
        self._encoded: deque[float] = deque(maxlen=model.window_clips)
        wait_s = self._rng.exponential(model.fault_every_s) if model.fault_every_s else math.inf
        self.fault_s = at_s + wait_s

    @property
    def decoders_free_s(self) -> float:
        """When the first decoder has no clip any more."""
        return self._decoders[0]

    @property
    def encoder_free_s(self) -> float:
        """When the encoder has done all it was given."""
        return self._encoder_s

    def encode(self, num_clips: int, given_s: float) -> float:
        """Work through a shard given at a time; return when it is committed."""
        model, decoders, encoded = self._model, self._decoders, self._encoded
        encoder_s = self._encoder_s
        for seconds in self._decode_seconds(num_clips):
            starts_s = max(decoders[0], given_s)
            if len(encoded) == model.window_clips:
                starts_s = max(starts_s, encoded[0])
            done_s = starts_s + seconds
            heapq.heapreplace(decoders, done_s)
            self.decode_busy_s += seconds
            encoder_s = max(encoder_s, done_s) + model.encode_s
            encoded.append(encoder_s)
        self._encoder_s = encoder_s
        upload_s = num_clips * model.write_s
        committed_s = max(self._network_s, encoder_s) + upload_s + model.commit_s
        self._network_s = committed_s
        self.encode_busy_s += num_clips * model.encode_s
        self.network_busy_s += num_clips * (model.read_s + model.write_s)
        return committed_s

    def _decode_seconds(self, num_clips: int) -> list[float]:
        """Draw how long each clip holds its decoder: reading, at its share of the network, too."""
        model = self._model
        read_s = model.read_s * model.num_decoders
        if not model.decode_cv:
            return [model.decode_s + read_s] * num_clips
        variance = math.log(1 + model.decode_cv**2)
        mean = math.log(model.decode_s) - variance / 2
        drawn = self._rng.lognormal(mean, math.sqrt(variance), num_clips)
        return (drawn + read_s).tolist()


@dataclass(order=True)
class _Lease:
    """A shard that can be given out, from a time on."""

    from_s: float
    shard: int
    num_clips: int
    attempt: int = 1


class _Cluster:
    """The driver: gives shards to the cell that wants one first, and takes lost ones back."""

    def __init__(
        self, model: CellModel, num_cells: int, leases: Iterator[_Lease], seed: int
    ) -> None:
        seeds = np.random.SeedSequence(seed).spawn(num_cells)
        self.cells = [SimulatedCell(model, np.random.default_rng(each)) for each in seeds]
        self._detect_s, self._leases = model.detect_s, leases
        self._fresh = next(leases, None)
        self._returned: list[_Lease] = []
        self._wants = [(0.0, number) for number in range(num_cells)]  # (when, cell)
        self._idle: list[tuple[float, int]] = []
        self.first_idle_s = math.inf
        self.last_commit_s = 0.0
        self.num_clips = self.num_faults = self.num_given_up = 0

    def run(self, num_left: float, horizon_s: float) -> None:
        """Let the cells work until nothing is left, or the horizon is reached."""
        while self._wants:
            wanted_s, number = heapq.heappop(self._wants)
            if wanted_s >= horizon_s:
                continue
            lease = self._next(wanted_s)
            if lease is None:
                self.first_idle_s = min(self.first_idle_s, wanted_s)
                heapq.heappush(self._idle, (wanted_s, number))
                continue
            num_left -= lease.attempt == 1
            few_left = num_left < len(self.cells)
            self._work(number, lease, max(wanted_s, lease.from_s), few_left, horizon_s)

    def _next(self, now_s: float) -> _Lease | None:
        """Return what to do next: what was lost first, but no later than there is other work."""
        if self._returned and (self._fresh is None or self._returned[0].from_s <= now_s):
            return heapq.heappop(self._returned)
        lease, self._fresh = self._fresh, next(self._leases, None)
        return lease

    def _work(
        self, number: int, lease: _Lease, given_s: float, few_left: bool, horizon_s: float
    ) -> None:
        cell = self.cells[number]
        while cell.fault_s < given_s:  # it was lost while it had nothing to lose
            cell.restart(cell.fault_s)
        committed_s = cell.encode(lease.num_clips, given_s)
        if committed_s <= cell.fault_s:
            if committed_s <= horizon_s:
                self.num_clips += lease.num_clips
                self.last_commit_s = max(self.last_commit_s, committed_s)
            wants_s = cell.encoder_free_s if few_left else cell.decoders_free_s
            heapq.heappush(self._wants, (max(wants_s, given_s), number))
            return
        lost_s = cell.fault_s
        if lost_s < horizon_s:
            self.num_faults += 1
        cell.restart(lost_s + self._detect_s)
        heapq.heappush(self._wants, (lost_s + self._detect_s, number))
        if lease.attempt == MAX_ATTEMPTS:
            self.num_given_up += 1
            return
        again = _Lease(lost_s + self._detect_s, lease.shard, lease.num_clips, lease.attempt + 1)
        heapq.heappush(self._returned, again)
        if self._idle:
            idle_s, other = heapq.heappop(self._idle)
            heapq.heappush(self._wants, (max(idle_s, again.from_s), other))


def simulate(
    model: CellModel,
    num_cells: int,
    num_clips: int | None,
    shard_size: int,
    seed: int,
    horizon_s: float = math.inf,
) -> Outcome:
    """Simulate a run.

    Args:
        model: of every cell.
        num_cells: encoders in the cluster.
        num_clips: to encode; None is work without end, until the horizon.
        shard_size: clips to a shard, but for the last.
        seed: of all that is drawn; cell k draws the same whatever the number of cells.
        horizon_s: nothing after it counts.
    """
    num_shards = math.inf if num_clips is None else math.ceil(num_clips / shard_size)
    cluster = _Cluster(model, num_cells, _shards(num_clips, shard_size), seed)
    cluster.run(num_shards, horizon_s)
    seconds = cluster.last_commit_s if num_clips is not None else horizon_s
    total_s = max(seconds, 1e-9) * num_cells
    cells = cluster.cells
    return Outcome(
        num_clips=cluster.num_clips,
        seconds=seconds,
        tail_s=max(0.0, seconds - cluster.first_idle_s),
        busy={
            "decoders": sum(c.decode_busy_s for c in cells) / total_s / model.num_decoders,
            "encoders": sum(c.encode_busy_s for c in cells) / total_s,
            "network": sum(c.network_busy_s for c in cells) / total_s,
        },
        num_faults=cluster.num_faults,
        num_given_up=cluster.num_given_up,
    )


def _shards(num_clips: int | None, shard_size: int) -> Iterator[_Lease]:
    shard = 0
    while num_clips is None or shard * shard_size < num_clips:
        left = shard_size if num_clips is None else num_clips - shard * shard_size
        yield _Lease(0.0, shard, min(shard_size, left))
        shard += 1
