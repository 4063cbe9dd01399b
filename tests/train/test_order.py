"""Properties of the epoch order."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.format import FormatError
from tests.train.layouts import NOT_USABLE, ShardBuckets, layouts, uniform_shards
from train.data.order import EpochOrder, permutation

SEEDS, WINDOWS, EPOCHS = st.integers(0, 2**31), st.integers(1, 14), st.integers(0, 1000)
SIZES, TAILS = st.integers(1, 12), st.sampled_from(["drop", "wrap"])
PROPERTY = settings(max_examples=100, derandomize=True, deadline=None)


def epoch(part, size, window=4, seed=0, number=0, tail="drop", consumed=None):
    """Return the batches of an epoch as (bucket, rows)."""
    consumed = consumed or [0] * part.counts.shape[1]
    order = EpochOrder(part, size, window, seed, number, tail, consumed)
    return [(bucket, rows.tolist()) for bucket, rows in order]


def row_order(part, **choices):
    """Return (bucket, row) in the order of an epoch: its batches of one row."""
    return [(bucket, rows[0]) for bucket, rows in epoch(part, 1, **choices)]


def queued(order, totals, size, tail, consumed):
    """Cut batches from the order of rows one row at a time, as the definition says."""
    rows_of = {b: [row for bucket, row in order if bucket == b] for b in range(len(totals))}
    queues = {bucket: [] for bucket in rows_of}
    skipped = dict.fromkeys(rows_of, 0)
    for bucket, row in order:
        if skipped[bucket] < consumed[bucket]:
            skipped[bucket] += 1
            continue
        queues[bucket].append(row)
        if len(queues[bucket]) == size:
            yield bucket, queues[bucket]
            queues[bucket] = []
    if tail == "wrap" or max(totals) < size:
        for bucket, queue in queues.items():
            if queue:
                again = rows_of[bucket] * size
                yield bucket, queue + again[: size - len(queue)]


@PROPERTY
@given(layouts(), WINDOWS, SEEDS, EPOCHS)
def test_every_usable_row_comes_exactly_once(part, window, seed, number):
    order = row_order(part, window=window, seed=seed, number=number)
    assert sorted(row for _, row in order) == part.usable()
    assert all(row in part.usable(bucket) for bucket, row in order)


@PROPERTY
@given(layouts(), SIZES, WINDOWS, SEEDS, TAILS, st.data())
def test_batches_are_cut_where_a_bucket_has_enough_rows(part, size, window, seed, tail, data):
    consumed = [data.draw(st.integers(0, total)) for total in part.totals]
    order = row_order(part, window=window, seed=seed)
    expected = list(queued(order, part.totals, size, tail, consumed))
    assert epoch(part, size, window, seed, tail=tail, consumed=consumed) == expected


@PROPERTY
@given(layouts(), SIZES, WINDOWS, SEEDS)
def test_drop_leaves_out_less_than_a_batch_of_each_bucket(part, size, window, seed):
    if max(part.totals) < size:
        return
    rows = [row for _, batch in epoch(part, size, window, seed) for row in batch]
    assert len(set(rows)) == len(rows)
    for bucket, total in enumerate(part.totals):
        assert len(set(part.usable(bucket)) & set(rows)) == total - total % size


@PROPERTY
@given(layouts(), SIZES, WINDOWS, SEEDS)
def test_wrap_repeats_no_more_than_fills_the_last_batch_of_each_bucket(part, size, window, seed):
    batches = epoch(part, size, window, seed, tail="wrap")
    assert all(len(batch) == size for _, batch in batches)
    for bucket, total in enumerate(part.totals):
        rows = [row for b, batch in batches for row in batch if b == bucket]
        assert len(rows) == -(-total // size) * size
        assert set(rows) == set(part.usable(bucket))
        assert rows[total:] == (rows[:total] * size)[: len(rows) - total]


@PROPERTY
@given(st.integers(1, 7), TAILS, SEEDS, EPOCHS)
def test_fewer_rows_than_a_batch_are_repeated_evenly(num_rows, tail, seed, number):
    part = ShardBuckets([[0] * num_rows], 1)
    ((_, batch),) = epoch(part, 8, 1, seed, number, tail)
    counts = np.bincount(batch, minlength=num_rows)
    assert len(batch) == 8
    assert counts.max() - counts.min() <= 1


@PROPERTY
@given(layouts(), WINDOWS, SEEDS)
def test_a_window_mixes_no_more_than_its_shards(part, window, seed):
    order = np.array([row for _, row in row_order(part, window=window, seed=seed)])
    visited = (np.searchsorted(part.first_rows, order, side="right") - 1).tolist()
    first = {shard: visited.index(shard) for shard in set(visited)}
    last = {shard: len(visited) - 1 - visited[::-1].index(shard) for shard in set(visited)}
    open_at = [sum(first[s] <= place <= last[s] for s in first) for place in range(len(visited))]
    assert max(open_at) <= window


def test_seed_and_epoch_each_change_the_order():
    part = uniform_shards(10, 10)
    orders = [row_order(part, seed=seed, number=number) for seed in (0, 1) for number in (0, 1)]
    assert len({str(order) for order in orders}) == 4


def test_dropped_rows_change_with_the_epoch():
    part = uniform_shards(5, 4)
    dropped = set()
    for number in range(10):
        rows = {row for _, batch in epoch(part, 16, 5, number=number) for row in batch}
        dropped.add(tuple(set(range(20)) - rows))
    assert len(dropped) > 5


def test_the_order_is_the_same_on_every_machine():
    assert permutation(8, 7, "rows", 3).tolist() == [6, 0, 1, 7, 3, 2, 4, 5]
    part = ShardBuckets([[0, 1, 0], [0], [NOT_USABLE], [1, 0, 0]], 2)
    expected = [(0, 3), (1, 1), (1, 5), (0, 7), (0, 6), (0, 2), (0, 0)]
    assert row_order(part, window=2, seed=7, number=3) == expected


def test_going_on_walks_no_window_that_was_used_up():
    # One row of bucket 1 in each of the shards 0 to 9, 40 of bucket 0 in each of 100.
    part = ShardBuckets([[0] * 40 + [1] * (shard < 10) for shard in range(100)], 2)
    whole = EpochOrder(part, 8, 2, 0, 0, "drop", (0, 0))
    batches = list(whole)
    half = batches[: len(batches) // 2]
    consumed = [8 * sum(bucket == b for bucket, _ in half) for b in range(2)]
    part.seen.clear()
    _, rows = next(iter(EpochOrder(part, 8, 2, 0, 0, "drop", consumed)))
    assert rows.tolist() == batches[len(half)][1].tolist()
    # The windows of bucket 0's next rows, and those where rows of bucket 1 wait for others.
    assert len(part.seen) <= 2 * (2 + 7)


def test_shards_that_are_not_as_counted_are_an_error():
    part = uniform_shards(3, 4)
    part.counts = part.counts + 1
    with pytest.raises(FormatError, match=r"window 0 of 3 shards .* holds \[12\] clips .* \[15\]"):
        epoch(part, 4)
