"""The encoder of a cell: one loop that turns tasks into committed shards, decoders always busy.

While the last clips of a shard are encoded, decoders have those of the next one, and the shard
before is being committed in a thread; another writes rows, in plan order whatever happens.
"""

from __future__ import annotations

import itertools
import queue
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace

from pipeline.batching import Batcher, Encoded
from pipeline.codecs import build_codec
from pipeline.data_root import open_root
from pipeline.format import open_column
from pipeline.jobs import Job, ShardTask, ShardUpdate
from pipeline.open_shard import OpenShard, Row
from pipeline.pool import Pool
from pipeline.write_behind import WriteBehind, naming

HEARTBEAT_S = 5.0  # an encoder is never silent for longer, but in a codec
UPDATE_S = 0.5  # between two updates on the progress of a shard
COMMIT_WAIT_S = 0.05
# Shards with rows to write: the one being encoded, and the next, whose clips are decoded ahead.
MAX_OPEN_SHARDS = 2
# Rows that are made ready ahead of the encoder, and how many at a time: each may ask the disk.
ROWS_AHEAD = 512
ROWS_AT_ONCE = 64


def commit_after(writes: list[Future[None]], shard: OpenShard) -> ShardUpdate:
    """Commit a shard when its last rows are written; raises what kept one from being."""
    for write in writes:
        write.result()
    return shard.commit()


class ShardEncoder:
    """Encodes shards with the codecs of a job, which are built once."""

    def __init__(self, job: Job, pool: Pool) -> None:
        self._job, self._pool, self._media = job, pool, job.media_store()
        self._batchers = {
            modality: Batcher[Row](
                modality, build_codec(spec.codec, spec.preprocessing), job.batch.get(modality, 1)
            )
            for modality, spec in job.columns.items()
        }
        self._root = open_root(job.root)
        self._columns = {
            modality: open_column(self._root, spec.directory, job.plan_id)
            for modality, spec in job.columns.items()
        }
        self._tickets = itertools.count()
        self._open: list[OpenShard] = []
        self._ahead: deque[Row] = deque()  # in plan order, not judged yet
        self._unwritten: deque[Row] = deque()  # judged; of those that wait for a batch, the oldest
        self._held_bytes = 0  # of frames and sound behind these
        self._writes = WriteBehind()
        self._commits: deque[tuple[OpenShard, Future[ShardUpdate]]] = deque()
        self._updates: list[ShardUpdate] = []
        self._taken_s = 0.0  # when the last row was
        self._is_last, self._reported_s, self._heard_s = False, 0.0, 0.0

    def run(self, mailbox: queue.SimpleQueue[ShardTask | None]) -> Iterator[ShardUpdate]:
        """Encode and commit the tasks that come, until None comes; all wait for the first error.

        Yields:
            News of the tasks, see `ShardUpdate`, every `HEARTBEAT_S` seconds at least.

        Raises:
            NoRoomError: the disk is full; nothing of the shards not committed is published.
            OSError, FormatError: a shard can't be written.
            CellLostError: the GPU failed.

        Where it was raised over one shard, such as one that is being committed while the next is
        encoded, the error's attribute ``task`` is its ``ShardTask.name``.
        """
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="commit") as committer:
            try:
                while not self._is_last or self._open or self._commits:
                    self._receive(mailbox)
                    self._look_ahead()
                    self._work()
                    self._writes.check()
                    self._commit(committer)
                    yield from self._news()
            finally:
                self._writes.close()
                committer.shutdown(cancel_futures=True)
                for shard in (*self._open, *(shard for shard, _ in self._commits)):
                    shard.close()

    def _receive(self, mailbox: queue.SimpleQueue[ShardTask | None]) -> None:
        """Open the task that came; wait for one where there is nothing else to do."""
        if self._is_last:
            if not self._open:
                wait([future for _, future in self._commits], COMMIT_WAIT_S)
            return
        if len(self._open) == MAX_OPEN_SHARDS:
            return
        idle_s = COMMIT_WAIT_S if self._commits else HEARTBEAT_S
        try:
            task = mailbox.get(timeout=0 if self._open else idle_s)
        except queue.Empty:
            return
        if task is None:
            self._is_last = True
            return
        with naming(task):
            self._open.append(
                OpenShard(self._job, task, self._root, self._columns, self._media, self._tickets)
            )

    def _look_ahead(self) -> None:
        """Make rows ready, and give the decoders their clips."""
        copied_bytes = sum(row.copied_bytes for row in self._ahead)
        rows: list[Row] = []
        if len(self._ahead) < ROWS_AHEAD and 2 * copied_bytes < self._job.window_bytes:
            unread = (row for shard in self._open for row in iter(shard.next_row, None))
            rows = list(itertools.islice(unread, ROWS_AT_ONCE))
        self._ahead += rows
        self._pool.submit(row.item for row in rows if row.item)

    def _work(self) -> None:
        """Do one thing: encode a batch that is not full if it must be, or take the next row.

        It must be where no other row comes soon, or where frames that wait for neighbours keep
        the decoders from working.
        """
        while self._unwritten and not self._unwritten[0].waiting:
            self._unwritten.popleft()
        is_alone = not self._ahead or time.monotonic() - self._taken_s > HEARTBEAT_S
        if self._unwritten and (is_alone or 2 * self._held_bytes >= self._job.window_bytes):
            row = self._unwritten[0]
            for modality in tuple(row.waiting):
                self._settle(modality, self._batchers[modality].flush(row))
        elif self._ahead and self._is_decoded(self._ahead[0]):
            self._take(self._ahead.popleft())

    def _is_decoded(self, row: Row) -> bool:
        """Return whether the next row is there; wait for it a little."""
        if row.item and row.decoded is None and (found := self._pool.poll(UPDATE_S)):
            item, row.decoded = found
            assert item is row.item, "the pool keeps the order"
        return row.item is None or row.decoded is not None

    def _take(self, row: Row) -> None:
        if row.shard.started_s is None:
            row.shard.started_s = time.monotonic()
            self._updates.append(ShardUpdate("started", task=row.shard.task.name))
        self._taken_s = time.monotonic()
        self._unwritten.append(row)
        self._held_bytes += row.held_bytes
        media = row.shard.judge(row)
        for modality in tuple(media):
            self._settle(modality, self._batchers[modality].add(row, media.pop(modality)))
        self._write(row.shard)

    def _settle(self, modality: str, encoded: list[tuple[Row, Encoded]]) -> None:
        for row, result in encoded:
            row.shard.settle(row, modality, result)
        for shard in {id(row.shard): row.shard for row, _ in encoded}.values():
            self._write(shard)

    def _write(self, shard: OpenShard) -> None:
        for row in shard.take_complete():
            self._held_bytes -= row.held_bytes
            if row.item:
                self._pool.release(row.item)
            shard.note_wait(self._writes.add(row))

    def _commit(self, committer: ThreadPoolExecutor) -> None:
        """Commit the shards that are complete, in the background, and tell of those that are."""
        for shard in [shard for shard in self._open if shard.is_complete]:
            self._open.remove(shard)
            if update := shard.progress():  # the commit may take long
                self._updates.append(update)
            self._commits.append(
                (shard, committer.submit(commit_after, self._writes.of(shard), shard))
            )
        while self._commits and self._commits[0][1].done():
            shard, committed = self._commits[0]
            with naming(shard.task):
                self._updates.append(committed.result())
            self._commits.popleft()

    def _news(self) -> Iterator[ShardUpdate]:
        """Yield what happened, what moved since half a second ago, or a sign of life."""
        now = time.monotonic()
        updates, self._updates = self._updates, []
        if now - self._reported_s >= UPDATE_S:
            self._reported_s = now
            updates += self._progress()
        if not updates and now - self._heard_s >= HEARTBEAT_S:
            updates = [ShardUpdate("alive")]
        for update in updates:
            self._heard_s = now
            notes = [note for batcher in self._batchers.values() for note in batcher.take_notes()]
            in_flight = self._pool.bytes_in_flight
            yield replace(update, bytes_in_flight=in_flight, notes=tuple(notes))

    def _progress(self) -> Iterator[ShardUpdate]:
        """Yield what moved in the shards that are not being committed: these tell by themselves."""
        for shard in self._open:
            if update := shard.progress():
                yield update
