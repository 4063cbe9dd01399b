"""Which shards are open, given out, lost, given up: the bookkeeping of the driver.

A shard is leased to one cell at a time. It comes back when the cell is lost, as an attempt with a
name of its own; the shard that was being written then is the one to blame, and a shard that was
blamed has a cell to itself from then on, so that it can cost no other shard its attempts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from pipeline.jobs import ShardTask, ShardUpdate

# Shards of a cell that lack rows: the one being encoded, and the next, whose clips are prefetched.
MAX_UNWRITTEN = 2
# With those that wait for their commit only.
MAX_HELD = 3
# A shard that cost as many cells is given up.
MAX_LOSSES = 3

Name = tuple[str, int]


@dataclass(frozen=True)
class GivenUp:
    """A shard that lost its cell too often.

    Attributes:
        task: ``ShardTask.name``.
        attempts: how often it was given out.
        reasons: why each cell was lost.
    """

    task: Name
    attempts: int
    reasons: tuple[str, ...]

    @property
    def reason(self) -> str:
        """The reasons in one line, each once."""
        return "; ".join(dict.fromkeys(self.reasons))


@dataclass
class Lease:
    """A shard in a cell, and how many of its rows are written."""

    task: ShardTask
    started: bool = False
    rows: int = 0

    @property
    def is_written(self) -> bool:
        """Whether it only waits for its commit."""
        return self.rows >= len(self.task.clips or self.task.captions)

    def update(self, news: ShardUpdate) -> bool:
        """Note news of this shard; return whether it is progress."""
        if news.event == "started":
            self.started, self.rows = True, 0
        self.rows += news.statuses.total()
        return news.event != "progress" or bool(news.statuses)


def blamed(leases: Sequence[Lease], named: Name | None) -> Lease | None:
    """Return which of a lost cell's leases, oldest first, is to blame.

    The one that the cell named; else the one being written, or, where all are written, the one
    that waits longest for its commit.
    """
    for lease in leases:
        if lease.task.name == named:
            return lease
    return next((lease for lease in leases if not lease.is_written), next(iter(leases), None))


class Queue:
    """The shards that no cell has, in order; lost ones come first.

    Args:
        tasks: pulled as they are needed, for a long plan is not to be held in memory.
    """

    def __init__(self, tasks: Iterable[ShardTask]) -> None:
        self._tasks: Iterator[ShardTask] = iter(tasks)
        self._waiting: deque[ShardTask] = deque()
        self._reasons: dict[Name, list[str]] = {}
        self.given_up: list[GivenUp] = []

    def look_ahead(self, number: int) -> int:
        """Return how many shards wait, counted up to ``number`` at least."""
        while len(self._waiting) < number:
            task = next(self._tasks, None)
            if task is None:
                break
            self._waiting.append(task)
        return len(self._waiting)

    def take(self, held: Sequence[Lease], num_cells: int) -> ShardTask | None:
        """Return the next shard for a cell, or None where it had better not have another.

        Args:
            held: what the cell has.
            num_cells: that want work: the last shards are not given out ahead, so that all cells
                are busy to the end.
        """
        lacking = sum(not lease.is_written for lease in held)
        if lacking >= MAX_UNWRITTEN or len(held) >= MAX_HELD or not self.look_ahead(1):
            return None
        together = [*(lease.task for lease in held), self._waiting[0]]
        if held and any(task.name in self._reasons for task in together):
            return None  # a shard that was blamed has its cell to itself
        if lacking and self.look_ahead(num_cells) < num_cells:
            return None
        return self._waiting.popleft()

    def give_back(self, held: Sequence[Lease], guilty: Lease | None, reason: str) -> None:
        """Take back what a lost cell had; give the guilty shard up at its last loss.

        The attempt of each goes up, for the lost cell may live on, unseen, and write on.
        """
        for lease in reversed(held):
            task = lease.task
            if lease is guilty:
                reasons = self._reasons.setdefault(task.name, [])
                reasons.append(reason)
                if len(reasons) >= MAX_LOSSES:
                    self.given_up.append(GivenUp(task.name, task.attempt, tuple(reasons)))
                    continue
            self._waiting.appendleft(replace(task, attempt=task.attempt + 1))
