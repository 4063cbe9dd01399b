"""Properties of the epoch order."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from train.data.order import epoch_batches, pass_order

SHARDS = st.lists(st.integers(0, 9), min_size=1, max_size=30).map(np.array)
SEEDS, WINDOWS, EPOCHS = st.integers(0, 2**31), st.integers(1, 40), st.integers(0, 1000)


@given(SHARDS, WINDOWS, SEEDS, EPOCHS)
def test_every_row_comes_exactly_once(rows_per_shard, window, seed, epoch) -> None:
    order = pass_order(rows_per_shard, window, seed, epoch)
    np.testing.assert_array_equal(np.sort(order), np.arange(rows_per_shard.sum()))


@given(SHARDS, WINDOWS, SEEDS, EPOCHS)
def test_a_window_mixes_no_more_than_its_shards(rows_per_shard, window, seed, epoch) -> None:
    shard_of = np.repeat(np.arange(len(rows_per_shard)), rows_per_shard)
    visited = shard_of[pass_order(rows_per_shard, window, seed, epoch)]
    first = {int(shard): place for place, shard in reversed(list(enumerate(visited)))}
    last = {int(shard): place for place, shard in enumerate(visited)}
    open_at = [sum(first[s] <= place <= last[s] for s in first) for place in range(len(visited))]
    assert max(open_at, default=0) <= window


def test_seed_and_epoch_each_change_the_order() -> None:
    rows_per_shard = np.full(10, 10)
    orders = [pass_order(rows_per_shard, 4, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len({order.tobytes() for order in orders}) == 4


def test_order_is_the_same_in_another_process() -> None:
    program = (
        "import numpy as np; from train.data.order import pass_order;"
        "print(pass_order(np.full(5, 4), 2, 7, 3).tolist())"
    )
    command = [sys.executable, "-c", program]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed.strip() == str(pass_order(np.full(5, 4), 2, 7, 3).tolist())


def test_dropped_rows_change_with_the_epoch() -> None:
    dropped = {tuple(sorted(pass_order(np.full(5, 4), 5, 0, epoch)[16:])) for epoch in range(10)}
    assert len(dropped) > 5


def test_an_epochs_batches_hold_no_row_twice_and_drop_less_than_a_batch() -> None:
    batches = epoch_batches(np.full(5, 4), 8, 5, seed=0, epoch=3)
    assert batches.shape == (2, 8)
    assert len(np.unique(batches)) == 16


@given(st.integers(1, 7), SEEDS, EPOCHS)
def test_fewer_rows_than_a_batch_are_repeated_evenly(num_rows, seed, epoch) -> None:
    (batch,) = epoch_batches(np.array([num_rows]), 8, 1, seed, epoch)
    counts = np.bincount(batch, minlength=num_rows)
    assert len(batch) == 8
    assert counts.max() - counts.min() <= 1
