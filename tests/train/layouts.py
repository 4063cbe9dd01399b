"""Data sets of nothing but buckets, for the tests of the order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from hypothesis import strategies as st

from train.data.stream import GlobalBatch

NOT_USABLE = 255


class ShardBuckets:
    """A layout given by the bucket of every row; notes which shards were looked into."""

    def __init__(self, shards: Sequence[Sequence[int]], num_buckets: int) -> None:
        self._shards = [np.array(shard, dtype=np.uint8) for shard in shards]
        self.first_rows = np.cumsum([0, *map(len, shards)], dtype=np.int64)
        self.counts = np.array(
            [np.bincount(s[s < num_buckets], minlength=num_buckets) for s in self._shards],
            dtype=np.int32,
        )
        self.seen: list[int] = []

    def __repr__(self) -> str:
        return f"{[shard.tolist() for shard in self._shards]}"

    def buckets_of(self, shard: int) -> np.ndarray:
        self.seen.append(shard)
        return self._shards[shard]

    def usable(self, bucket: int | None = None) -> list[int]:
        """Return the usable rows, of one bucket or of all."""
        buckets = np.concatenate(self._shards)
        wanted = buckets != NOT_USABLE if bucket is None else buckets == bucket
        return np.flatnonzero(wanted).tolist()

    @property
    def totals(self) -> list[int]:
        return self.counts.sum(axis=0).tolist()


def uniform_shards(num_shards: int, rows: int) -> ShardBuckets:
    return ShardBuckets([[0] * rows] * num_shards, 1)


@st.composite
def layouts(draw: st.DrawFn, num_buckets: int | None = None) -> ShardBuckets:
    """Uneven shards, some of 1 row, some without a usable one, of 1 to 3 buckets."""
    if num_buckets is None:
        num_buckets = draw(st.integers(1, 3))
    bucket = st.sampled_from([*range(num_buckets), 0, 0, NOT_USABLE])
    shard = st.lists(bucket, min_size=1, max_size=9)
    shards = draw(st.lists(shard, min_size=1, max_size=12))
    shards[draw(st.integers(0, len(shards) - 1))][0] = 0  # none is empty
    return ShardBuckets(shards, num_buckets)


def content(batches: Sequence[GlobalBatch]) -> list[tuple]:
    """Return batches as values that compare."""
    return [(b.first_sample, b.part, b.bucket, b.rows.tolist(), b.cursor) for b in batches]
