"""The loader: an endless stream of micro-batches that can be continued at any layout of ranks.

The stream is one sequence of global batches; ranks and micro-batches only divide it up. So its
state is a place in that sequence, the samples consumed. Threads read ahead from the tars into the
memory of batches; there are no worker processes, and nothing is parsed.
"""

from __future__ import annotations

import itertools
import logging
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NoReturn

import torch

from pipeline.files import is_local
from train.data.background import Workers
from train.data.captions import MOST_COPIES, OPEN_TARS, CaptionCache, Captions
from train.data.loader_checks import check_counts, check_layout
from train.data.lookahead import Lookahead, shards_ahead
from train.data.micro_batch import Draft, Drafting
from train.data.progress import position, warn_of_few_clips
from train.data.ready_shard import ReadyShard, ShardPreparer
from train.data.retry import LoaderClosed, Patience
from train.data.row_reader import RowReader
from train.data.shard_files import TarStore, allow_open_files
from train.data.stream import Cursor, GlobalBatch, Stream
from train.data.view import View
from train.errors import ResumeError
from train.latents import LatentBatch

log = logging.getLogger(__name__)

NO_WORKERS = (
    "make one in the process that uses it: it reads ahead by threads and needs no worker processes "
    "(with a torch DataLoader, num_workers=0)"
)
FETCHES = 8  # remote shards copied at once: one connection to an object store brings 50-100 MB/s


class LatentLoader:
    """Yields this rank's micro-batches for ever, epoch after epoch; an iterator.

    Micro-batch m of rank r holds the samples [(m·R + r)·B, (m·R + r + 1)·B) of the stream, with R
    ranks of micro-batch B: over all ranks and accumulation steps they are the global batch.
    A batch stays valid as long as it, or a tensor over its memory, is referenced; the memory is
    used again afterwards. Call ``close`` (or use ``with``) to end the threads.

    Args:
        view: the clips.
        seed: seed of the run: keys order, crops, and what is drawn from posteriors.
        global_batch: samples per optimiser step over all ranks.
        micro_batch: samples per batch; None: all of a rank's share at once.
        rank: this rank.
        num_ranks: all ranks.
        device: where batches go; on a GPU by way of pinned memory.

    Raises:
        ConfigError: ranks and batches don't fit together, or so many shards can't be open.
    """

    def __init__(
        self,
        view: View,
        *,
        seed: int,
        global_batch: int,
        micro_batch: int | None = None,
        rank: int = 0,
        num_ranks: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        self._micro_batch = check_layout(global_batch, micro_batch, rank, num_ranks)
        config = view.config
        self._view, self._seed, self._global_batch = view, seed, global_batch
        self._rank, self._num_ranks = rank, num_ranks
        self._accumulation = global_batch // (self._micro_batch * num_ranks)
        self._stream = Stream(
            view.parts,
            [part.weight for part in view.parts],
            global_batch=global_batch,
            window_shards=config.window_shards,
            tail=config.tail,
            seed=seed,
        )
        if rank == 0:
            warn_of_few_clips(view, self._stream, global_batch)
        self._num_ahead = shards_ahead(view, global_batch)
        num_open = sum(min(self._num_ahead, len(part.counts)) for part in view.parts)
        is_remote = not all(is_local(part.root) for part in view.parts)
        self._num_fetches = FETCHES if is_remote else 1
        # Video and audio of each; of a remote one captions, and what holds each copy.
        num_files = num_open * (2 * (2 + MOST_COPIES) if is_remote else 2)
        if len(view.buckets) > 1:  # and of shards behind, the rows of this rank
            num_files += 2 * (config.prefetch_steps + 1) * (global_batch // num_ranks)
        allow_open_files(num_files + OPEN_TARS * len(view.parts))
        self._process = os.getpid()
        self._closing = threading.Event()
        patience = Patience(config.retry_s, self._closing)
        cache_bytes = int(min(config.cache_gb * 1e9, 2**62))
        self._tars = TarStore(config.cache_dir, cache_bytes, self._closing)
        cache = CaptionCache(config.text_cache_mb << 20)
        self._captions = [
            Captions(part, number, cache, self._tars, patience)
            for number, part in enumerate(view.parts)
        ]
        self._preparer = ShardPreparer(view, self._tars, self._captions, patience, self._num_ahead)
        self._reader = RowReader(view, seed, self._captions)
        self._drafting = Drafting(view, seed, torch.device(device))
        self._workers = Workers(config.read_threads, "loader")
        self._closers: list[Workers | Lookahead[ReadyShard]] = [self._workers]
        self._pending: deque[Draft] = deque()
        self._cursor = self._stream.start()  # behind the last step that was yielded whole
        self._num_yielded = 0  # micro-batches of the step since
        self._shards: Lookahead[ReadyShard] | None = None
        self._failure: Exception | None = None
        # Of a loader that nobody closes, too: threads must not outlive the interpreter.
        self._end = weakref.finalize(self, end, self._closing, self._closers)

    # -- batches

    def __enter__(self) -> LatentLoader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the threads and close the tars; those that wait for a file are left alone."""
        self._end()
        # Others may wait for what no thread reads any more.
        pending, self._pending = self._pending, deque()
        for draft in pending:
            draft.give_up(LoaderClosed("the loader was closed"))
        for captions in self._captions:
            captions.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"a LatentLoader can't be sent to another process; {NO_WORKERS}")

    def __iter__(self) -> Iterator[LatentBatch]:
        return self

    def __next__(self) -> LatentBatch:
        """Return the next micro-batch.

        Raises:
            FormatError: a file of a shard can't be read, or is not what was committed; or too
                many payloads are damaged. Again at every call.
            ConfigError: remote shards don't fit into the cache.
        """
        pending = self._wait(1, None)
        assert pending is not None
        draft = pending.popleft()
        self._num_yielded += 1
        if self._num_yielded == self._accumulation:
            self._num_yielded, self._cursor = 0, draft.batch.cursor
            assert self._shards is not None
            self._shards.advance(self._cursor.samples)
        self._read_ahead(is_needed=False)
        return self._drafting.finish(draft)

    def wait_step(self, timeout_s: float | None = None) -> bool:
        """Wait until all that this rank still has to get of the step is read.

        ``next`` doesn't wait then. Raises as ``next``.

        Args:
            timeout_s: seconds to wait; None: as long as it takes.

        Returns:
            Whether it is read.
        """
        return self._wait(self._accumulation - self._num_yielded, timeout_s) is not None

    @property
    def steps_per_epoch(self) -> tuple[int, ...]:
        """Optimiser steps in an epoch of each data set."""
        return self._stream.steps_per_epoch

    @property
    def num_substituted(self) -> int:
        """Samples of this rank so far for which another clip stood in, as a payload is damaged."""
        return self._reader.num_substituted

    @property
    def num_fetched_bytes(self) -> int:
        """Bytes of remote shards that this process has copied."""
        return self._tars.num_fetched_bytes

    # -- state

    def state_dict(self) -> dict[str, Any]:
        """Return where the stream is, after the last global batch that was yielded whole."""
        return {
            "samples_consumed": self._cursor.samples,
            "global_batch": self._global_batch,
            "cursor": self._cursor.to_json(),
            **self._identity(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue the stream of a saved state, whatever ranks and micro-batches it had.

        With another global batch it goes on at the same sample.

        Raises:
            ResumeError: the state is of another stream, or damaged; names what differs.
            FormatError: as ``position``, which is logged.
        """
        if not isinstance(state, dict):
            raise ResumeError(f"the saved state is {state!r:.80}, expected what state_dict() gave")
        for name, expected in self._identity().items():
            if state.get(name) != expected:
                raise ResumeError(
                    f"the saved stream of samples has {name} {state.get(name)!r}, this run has "
                    f"{expected!r}; restore the setting, or start in another run_dir"
                )
        cursor = Cursor.from_json(state.get("cursor"))
        check_counts(cursor, state.get("samples_consumed"), state.get("global_batch"))
        self._stream.batches(cursor)  # refuses one of other data
        self._forget()
        self._cursor = cursor
        if state.get("global_batch") != self._global_batch:
            log.info(
                "the global batch was %s and is %d now; data goes on at the same sample",
                state.get("global_batch"),
                self._global_batch,
            )
        log.info("data continues at %s", self.position())

    def position(self) -> str:
        """Return where the stream is, for people: epoch, clip within it and the next keys.

        Raises:
            FormatError: the census was damaged meanwhile.
        """
        return position(self._view, self._stream, self._cursor)

    def _identity(self) -> dict[str, Any]:
        view = self._view
        return {"view_id": view.view_id, "plan_id": view.plan_id, "seed": self._seed}

    # -- reading ahead

    def _wait(self, num_drafts: int, timeout_s: float | None) -> deque[Draft] | None:
        """Wait until the next micro-batches are read; return all on their way, None if too late."""
        if os.getpid() != self._process:
            raise RuntimeError(
                f"this LatentLoader was made in process {self._process} and its threads are there, "
                f"not in {os.getpid()}, which was forked from it; {NO_WORKERS}"
            )
        pending, begin, is_read = self._pending, time.monotonic(), False
        if not self._closing.is_set():
            self._read_ahead(is_needed=True, timeout_s=timeout_s)
            is_read = True
            for draft in itertools.islice(pending, num_drafts):
                left_s = timeout_s and max(0.0, begin + timeout_s - time.monotonic())
                is_read = is_read and draft.wait(left_s)
            if is_read and len(pending) < num_drafts:
                if self._failure is not None:  # behind what could be read
                    raise self._failure
                is_read = False
        if self._closing.is_set():
            raise LoaderClosed("the loader was closed")
        return pending if is_read else None

    def _read_ahead(self, is_needed: bool, timeout_s: float | None = None) -> None:
        """Have threads read until enough steps are on their way.

        Args:
            is_needed: wait for a first one; what is not needed yet must neither hold up a batch nor
                claim more shards than may be ready at once.
            timeout_s: seconds to wait for it.
        """
        if self._shards is None:
            self._shards = self._look_ahead()
        num_drafts = self._view.config.prefetch_steps * self._accumulation
        while len(self._pending) + self._accumulation <= num_drafts and self._failure is None:
            try:
                is_first = is_needed and not self._pending
                batch = self._shards.next_batch(is_first, timeout_s)
            except Exception as error:  # of the stream; raised in its place, behind what is there
                self._failure = error
                return
            if batch is None:
                return
            self._submit(batch, self._shards)

    def _look_ahead(self) -> Lookahead[ReadyShard]:
        rows_ahead = self._num_ahead * max(
            int(part.counts.sum(axis=1).max()) for part in self._view.parts
        )
        shards = Lookahead(
            self._stream,
            self._cursor,
            self._preparer.prepare,
            num_ahead=self._num_ahead,
            rows_ahead=rows_ahead,
            num_threads=self._num_fetches,
        )
        self._closers.insert(0, shards)
        if self._closing.is_set():  # by another thread, which may have missed it
            shards.close()
        return shards

    def _submit(self, batch: GlobalBatch, shards: Lookahead[ReadyShard]) -> None:
        """Have threads read this rank's share of a global batch."""
        size = self._micro_batch
        num_rows = -(-size // self._view.config.read_threads)  # for each thread
        for micro_step in range(self._accumulation):
            first = (micro_step * self._num_ranks + self._rank) * size
            draft = self._drafting.begin(batch, first, size)
            self._pending.append(draft)
            for begin in range(0, size, num_rows):
                end = min(begin + num_rows, size)
                self._workers.put(partial(self._reader.fill, draft, begin, end, shards))

    def _forget(self) -> None:
        """Drop what was read ahead."""
        self._pending.clear()
        self._num_yielded, self._failure = 0, None
        if self._shards is not None:
            self._shards.close()
            self._closers.remove(self._shards)
            self._shards = None


def end(closing: threading.Event, closers: Sequence[Workers | Lookahead[ReadyShard]]) -> None:
    """End what is read, and the threads that read it."""
    closing.set()
    for closer in closers:
        closer.close()
