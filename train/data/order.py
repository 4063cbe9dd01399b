"""The order of an epoch: a pure function of (seed, epoch), the same on every rank.

Shards are permuted, then rows are permuted inside windows of shards, so that reading stays near
a few files at a time. Each bucket, the rows of one shape, has a queue through the whole epoch; a
global batch comes when its bucket's queue holds enough rows, at the place of its last row. So a
state of the epoch is one number per bucket, the rows used: what comes behind is cut from there
without walking what came before, with the same or another global batch.

Memory grows with the number of shards (a permutation, and counts per window) and with the rows of
a window, never with the rows of the data set.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, Protocol

import numpy as np

from pipeline.format import FormatError
from train.rng import seed_of

Tail = Literal["drop", "wrap"]


class Layout(Protocol):
    """What the order needs to know of a data set. Rows are numbered in plan order."""

    @property
    def counts(self) -> np.ndarray:
        """Integer [num_shards, num_buckets], usable rows of each shard by bucket."""
        ...

    @property
    def first_rows(self) -> np.ndarray:
        """Int64 [num_shards + 1], the number of each shard's first row, and of all rows."""
        ...

    def buckets_of(self, shard: int) -> np.ndarray:
        """Return the bucket of each row of a shard, uint8; num_buckets or above: not usable."""
        ...


class EpochOrder:
    """The global batches of one epoch of one data set, from ``consumed`` rows of every bucket on.

    Over an epoch every usable row comes exactly once, but for those at the end of a bucket that do
    not fill a batch. They are dropped, or, with "wrap", come in one more batch per bucket at the
    end of the epoch, in the order of buckets, filled cyclically from the start of the bucket's
    rows. "drop" would give nothing at all where no bucket has rows for a batch: it wraps there.

    Args:
        part: the data set.
        global_batch: G, rows of a batch.
        window_shards: shards whose rows are mixed with one another.
        seed: seed of the data set's order.
        epoch: number of the epoch.
        tail: what becomes of rows that do not fill a batch.
        consumed: rows of each bucket that were used before, in the order of the epoch.
    """

    def __init__(
        self,
        part: Layout,
        global_batch: int,
        window_shards: int,
        seed: int,
        epoch: int,
        tail: Tail,
        consumed: Sequence[int],
    ) -> None:
        self._part, self._global_batch, self._window_shards = part, global_batch, window_shards
        self._seed, self._epoch = seed, epoch
        self._shards = permutation(len(part.counts), seed, "shards", epoch)
        starts = np.arange(0, len(self._shards), window_shards)
        per_window = np.add.reduceat(part.counts[self._shards], starts, axis=0, dtype=np.int64)
        # [num_windows + 1, num_buckets]: rows of each bucket in the windows before.
        self._before = np.concatenate([np.zeros_like(per_window[:1]), per_window.cumsum(axis=0)])
        totals = self._before[-1]
        self._wraps = wraps(totals, global_batch, tail)
        self._consumed = np.asarray(consumed, dtype=np.int64)
        left = totals - self._consumed
        self._end = totals if self._wraps else totals - left % global_batch

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the bucket and the rows, int64 [G], of each global batch.

        Raises:
            FormatError: a shard's rows are not those of its counts.
        """
        size = self._global_batch
        queues = [np.empty(0, dtype=np.int64) for _ in self._end]
        for window in self._windows(self._consumed, self._end):
            full: list[tuple[int, int, np.ndarray]] = []
            for bucket, (places, rows) in self._by_bucket(window).items():
                before = self._before[window, bucket]
                begin, end = self._consumed[bucket] - before, self._end[bucket] - before
                wanted = slice(max(0, begin), max(0, end))
                held, places = len(queues[bucket]), places[wanted]
                queue = np.concatenate([queues[bucket], rows[wanted]])
                for stop in range(size, len(queue) + 1, size):
                    full.append((int(places[stop - held - 1]), bucket, queue[stop - size : stop]))
                queues[bucket] = queue[len(queue) // size * size :]
            full.sort(key=lambda batch: batch[0])
            yield from ((bucket, rows) for _, bucket, rows in full)
        if self._wraps:
            for bucket, queue in enumerate(queues):
                if len(queue):
                    yield bucket, np.concatenate([queue, self._refill(bucket, size - len(queue))])

    def _windows(self, first: np.ndarray, end: np.ndarray) -> list[int]:
        """Return the windows that hold, of any bucket, rows number [first, end) of the epoch."""
        first, end = np.maximum(self._before[:-1], first), np.minimum(self._before[1:], end)
        return np.flatnonzero((first < end).any(axis=1)).tolist()

    def _by_bucket(self, window: int) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """Return the rows of each bucket in a window, and their places in it, in mixed order."""
        begin = window * self._window_shards
        shards = self._shards[begin : begin + self._window_shards].tolist()
        buckets = np.concatenate([self._part.buckets_of(shard) for shard in shards])
        rows = np.concatenate([self._rows_of(shard) for shard in shards])
        expected = self._before[window + 1] - self._before[window]
        usable = buckets < len(expected)
        found = np.bincount(buckets[usable], minlength=len(expected))
        if len(buckets) != len(rows) or not np.array_equal(found, expected):
            raise FormatError(
                f"the census of usable clips is damaged: window {window} of {len(shards)} shards "
                f"({shards[:5]} …) holds {found.tolist()} clips of each shape, expected "
                f"{expected.tolist()} as counted; remove it from data.cache_dir, it is made anew"
            )
        mixed = permutation(int(usable.sum()), self._seed, "rows", self._epoch, window)
        rows, buckets = rows[usable][mixed], buckets[usable][mixed]
        places = {int(bucket): np.flatnonzero(buckets == bucket) for bucket in found.nonzero()[0]}
        return {bucket: (own, rows[own]) for bucket, own in places.items()}

    def _rows_of(self, shard: int) -> np.ndarray:
        first, end = self._part.first_rows[shard : shard + 2].tolist()
        return np.arange(first, end)

    def _refill(self, bucket: int, num_rows: int) -> np.ndarray:
        """Return the first rows of a bucket in this epoch, all of them again and again if few."""
        end = np.zeros_like(self._end)
        end[bucket] = num_rows
        windows = self._windows(np.zeros_like(end), end)
        found = [self._by_bucket(window)[bucket][1] for window in windows]
        return np.resize(np.concatenate(found)[:num_rows], num_rows)


def shards_of(first_rows: np.ndarray, rows: np.ndarray | Sequence[int]) -> np.ndarray:
    """Return the shard of each row, int64 [n].

    Args:
        first_rows: of the data set, see ``Layout``.
        rows: n rows of it.
    """
    return np.searchsorted(first_rows, rows, side="right") - 1


def wraps(totals: np.ndarray, global_batch: int, tail: Tail) -> bool:
    """Return whether an epoch of so many rows by bucket ends with batches that are filled up."""
    return tail == "wrap" or int(totals.max()) < global_batch


def permutation(size: int, *key: int | str) -> np.ndarray:
    """Return 0 … size − 1 in an order that is the same with every version of numpy.

    numpy promises the bits of Philox, but not what ``Generator.permutation`` makes of them.
    """
    draws = np.random.Philox(key=seed_of(*key)).random_raw(size)
    return np.argsort(draws, kind="stable")
