"""Rows are written into their shards beside the encoder's loop, by one thread, in their order."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

from pipeline.jobs import ShardTask
from pipeline.open_shard import OpenShard, Row

# Latents that wait to be written, at most, but a row at least.
MAX_WAITING_BYTES = 64_000_000


@contextmanager
def naming(task: ShardTask) -> Iterator[None]:
    """Have an error name the shard over which it was raised, in its attribute ``task``."""
    try:
        yield
    except Exception as error:
        vars(error)["task"] = task.name  # goes along where the error is sent to another process
        raise


class WriteBehind:
    """The thread that writes. What goes wrong there is raised by the next call."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="write")
        self._waiting: deque[tuple[Row, int, Future[None]]] = deque()
        self._waiting_bytes = 0

    def add(self, row: Row) -> float:
        """Have a row written that is complete; wait where too much waits already.

        Returns:
            Seconds that were waited.

        Raises:
            NoRoomError: the disk is full.
            OSError, FormatError: a row can't be written; see `naming`.
        """
        num_bytes = sum(latent.nbytes for latent in row.latents.values())
        started = time.perf_counter()
        while self._waiting and self._waiting_bytes + num_bytes > MAX_WAITING_BYTES:
            self._take_one()
        waited_s = time.perf_counter() - started
        self._waiting_bytes += num_bytes
        self._waiting.append((row, num_bytes, self._thread.submit(row.shard.write, row)))
        return waited_s

    def check(self) -> None:
        """Forget what is written; raises what `add` does."""
        while self._waiting and self._waiting[0][2].done():
            self._take_one()

    def of(self, shard: OpenShard) -> list[Future[None]]:
        """Return the rows of a shard that may not be written yet."""
        return [future for row, _, future in self._waiting if row.shard is shard]

    def close(self) -> None:
        """Leave unwritten what waits."""
        self._thread.shutdown(cancel_futures=True)

    def _take_one(self) -> None:
        row, num_bytes, future = self._waiting[0]
        with naming(row.shard.task):
            future.result()
        self._waiting.popleft()
        self._waiting_bytes -= num_bytes
