"""Hands whole shards to cells until all are committed, whatever happens to the cells.

Knows nothing of Ray, and of a shard nothing but its name and how many rows are written. Nothing
here waits without a deadline, and a cell that is not heard from is as good as dead: should it
write on, unseen, its attempt has names of its own and the first commit of a shard wins.
"""

from __future__ import annotations

import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic

from pipeline.child import START_TIMEOUT_S
from pipeline.config import EncodeConfig
from pipeline.fleet import AnyCell, Cells, Lost, Watch
from pipeline.jobs import Job, ShardTask, ShardUpdate
from pipeline.leases import MAX_LOSSES, GivenUp, Lease, Queue, blamed
from pipeline.pool import MAX_CLIP_ATTEMPTS
from pipeline.settings import ConfigError

POLL_S = 1.0
WAIT_NOTICE_S = 15.0  # without a place for any cell, before people are told
# So many shards given up mean that it is not the shards' fault.
MAX_GIVEN_UP = 3
# A cell that was lost as often before it said anything, or to a sick node, without a commit in
# between, is not started again.
MAX_FAILED_STARTS = 3


def encode_shards(
    job: Job,
    tasks: Iterable[ShardTask],
    config: EncodeConfig,
    watch: Watch,
    address: str | None = None,
) -> list[GivenUp]:
    """Encode and commit shards on this machine, or on the Ray cluster at ``address``.

    SIGTERM ends it as Ctrl-C does: with a KeyboardInterrupt, once all that was started is ended.

    Args:
        job: what the shards have in common.
        tasks: pulled when cells can take them. What it raises ends the run and is raised.
        config: how many cells, of what.
        watch: is told what goes on.
        address: of the cluster, such as "auto".

    Returns:
        The shards that were given up; the other ones are committed unless these are
        ``MAX_GIVEN_UP``, which ends the run.

    Raises:
        ConfigError: the cluster can't be reached, its nodes don't hold a cell or don't see the
            data set, or no cell can be kept alive.
        FormatError: the data set is damaged.
        NoRoomError: a disk is full.
        OSError: the data set can't be written.
    """
    from pipeline.cluster import connected  # Ray is loaded only where there is work

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    watch.event("starting", address=address)
    try:
        with connected(job, config, address) as cells:
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # Ray has set its own
            return Driver(cells, tasks, job, watch).run()
    except SystemExit:  # by Ray's own, while it started
        raise KeyboardInterrupt from None


def complaint(given_up: Sequence[GivenUp]) -> str:
    """Say which shards were given up and what to do; for the one line at the end of a run."""
    shards = ", ".join(
        f"shard {lost.task[1]} of {lost.task[0]} ({lost.reason})" for lost in given_up
    )
    stopped = "; so many point to the machine: stopped" if len(given_up) >= MAX_GIVEN_UP else ""
    return (
        f"given up after {MAX_LOSSES} lost cells each: {shards}{stopped}. Committed shards are "
        "safe: mend the cause and run the same command again"
    )


@dataclass
class _Member(Generic[AnyCell]):
    """A cell of the run, since when it has a place, and when it was heard from and got on, last."""

    number: int
    cell: AnyCell
    placed_at: float | None = None
    heard_at: float | None = None
    progress_at: float = 0.0
    leases: list[Lease] = field(default_factory=list)


class Driver(Generic[AnyCell]):
    """The loop of `encode_shards`, over whatever cells.

    Args:
        cells: where they come from.
        tasks: pulled when cells can take them.
        job: of the deadlines in it.
        watch: is told what goes on.
        clock: gives seconds.
    """

    def __init__(
        self,
        cells: Cells[AnyCell],
        tasks: Iterable[ShardTask],
        job: Job,
        watch: Watch,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cells, self._watch, self._clock = cells, watch, clock
        self._queue = Queue(tasks)
        self._members: list[_Member[AnyCell]] = []
        self._failed_starts: Counter[int] = Counter()
        self._last_failure = ""
        self._silence_s = job.encode_timeout_s
        # What a clip may take on its way to the encoder, in the worst case.
        clip_s = MAX_CLIP_ATTEMPTS * (job.decode_timeout_s + job.fetch_timeout_s)
        self._no_progress_s = job.encode_timeout_s + clip_s
        self._placed_at = clock()  # when a cell had a node, last
        self._told_waiting = False

    def run(self) -> list[GivenUp]:
        """Go on until every shard is committed or given up; return those given up."""
        try:
            while len(self._queue.given_up) < MAX_GIVEN_UP and self._keep_cells():
                self._give_out()
                for cell, news in self._cells.poll([m.cell for m in self._members], POLL_S):
                    member = next(m for m in self._members if m.cell is cell)
                    if isinstance(news, Lost):
                        self._lose(member, news)
                    else:
                        self._hear(member, news)
                self._check_deadlines()
        except KeyboardInterrupt:
            self._watch.event("stopping")
            raise
        finally:
            for member in self._members:
                member.cell.kill()
        return self._queue.given_up

    def _keep_cells(self) -> bool:
        """Have as many cells as there is work for; return whether there is any.

        Raises:
            ConfigError: no cell can be started.
        """
        held = sum(len(member.leases) for member in self._members)
        num_open = self._queue.look_ahead(self._cells.num_cells) + held
        idle = [member for member in self._members if not member.leases]
        for member in sorted(idle, key=lambda m: m.heard_at is None)[num_open - held :]:
            self._remove(member)  # its node is free for others
        numbers = [
            number
            for number in range(self._cells.num_cells)
            if self._failed_starts[number] < MAX_FAILED_STARTS
        ]
        if num_open and not numbers and not self._members:
            raise ConfigError(
                f"no cell can be started, tried {MAX_FAILED_STARTS} times: "
                f"{self._last_failure}; committed shards are safe"
            )
        taken = {member.number for member in self._members}
        free = [number for number in numbers if number not in taken]
        for number in free[: max(0, num_open - len(self._members))]:
            self._members.append(_Member(number, self._cells.start(number)))
        return num_open > 0

    def _give_out(self) -> None:
        """Give shards to the cells that can take one, those without work first."""
        alive = [member for member in self._members if member.heard_at is not None]
        for member in sorted(alive, key=lambda member: len(member.leases)):
            while task := self._queue.take(member.leases, len(self._members)):
                if not member.leases:
                    member.progress_at = self._clock()
                member.leases.append(Lease(task))
                member.cell.lease(task)

    def _hear(self, member: _Member[AnyCell], news: ShardUpdate) -> None:
        if member.heard_at is None:
            member.heard_at = self._clock()
            self._watch.event("cell_started", cell=member.cell.name)
            self._tell_cells()
        member.heard_at = self._clock()
        lease = next((lease for lease in member.leases if lease.task.name == news.task), None)
        if news.task is not None and lease is None:
            return  # of a lease it no longer has
        if lease is not None and lease.update(news):
            member.progress_at = member.heard_at
        if lease is not None and news.event == "committed":
            member.leases.remove(lease)
            self._failed_starts[member.number] = 0
        self._watch.update(replace(news, cell=member.cell.name))

    def _check_deadlines(self) -> None:
        now = self._clock()
        for member in list(self._members):
            if member.placed_at is None and member.cell.is_placed():
                member.placed_at = now
            if reason := self._overdue(member, now):
                self._lose(member, Lost(reason))
        if not self._members or any(m.placed_at is not None for m in self._members):
            self._placed_at, self._told_waiting = now, False
        elif now - self._placed_at > self._cells.place_timeout_s:
            raise ConfigError(
                f"no cell found a place in {self._cells.place_timeout_s:g} s: "
                f"{self._cells.shortage()}; committed shards are safe"
            )
        elif now - self._placed_at > WAIT_NOTICE_S and not self._told_waiting:
            self._told_waiting = True
            self._watch.event("waiting", reason=f"for a place: {self._cells.shortage()}")

    def _overdue(self, member: _Member[AnyCell], now: float) -> str | None:
        """Return why a cell counts as lost, or None."""
        if member.placed_at is None:
            return None  # waits for a node while others work
        if member.heard_at is None:
            limit_s = max(START_TIMEOUT_S, self._silence_s)
            late = now - member.placed_at > limit_s
            return f"the encoder did not start in {limit_s:g} s" if late else None
        if now - member.heard_at > self._silence_s:
            return f"nothing heard of the encoder for {self._silence_s:g} s (encode_timeout_s)"
        if member.leases and now - member.progress_at > self._no_progress_s:
            return (
                f"no row and no commit in {self._no_progress_s:g} s, which encode_timeout_s, "
                "decode_timeout_s and fetch_timeout_s allow"
            )
        return None

    def _lose(self, member: _Member[AnyCell], news: Lost) -> None:
        """Give a lost cell's shards back; the next round starts another cell."""
        name, reason = member.cell.name, news.reason
        self._watch.event("cell_lost", cell=name, reason=reason)
        if news.is_sick or member.heard_at is None:
            self._failed_starts[member.number] += 1
            self._last_failure = f"{name}: {reason}"
        guilty = None if news.is_sick else blamed(member.leases, news.task)
        for lease in member.leases:
            if lease is guilty or lease.started:
                self._watch.lost(lease.task.name, lease.task.attempt, reason, name)
        known = len(self._queue.given_up)
        self._queue.give_back(member.leases, guilty, reason)
        for lost in self._queue.given_up[known:]:
            self._watch.event(
                "given_up", shard=list(lost.task), attempts=lost.attempts, reason=lost.reason
            )
        self._remove(member)

    def _remove(self, member: _Member[AnyCell]) -> None:
        member.cell.kill()
        self._members.remove(member)
        self._tell_cells()

    def _tell_cells(self) -> None:
        alive = [member.cell for member in self._members if member.heard_at is not None]
        self._watch.set_cells(len(alive), sum(cell.num_decoders for cell in alive))
