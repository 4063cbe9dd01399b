"""Properties of the epoch order."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.settings import ConfigError
from train.data.order import epoch_order, steps_per_epoch

SHARDS = st.lists(st.integers(0, 9), min_size=1, max_size=30).map(np.array)
SEEDS, WINDOWS, EPOCHS = st.integers(0, 2**31), st.integers(1, 40), st.integers(0, 1000)


@given(SHARDS, WINDOWS, SEEDS, EPOCHS)
def test_every_row_comes_exactly_once(rows_per_shard, window, seed, epoch) -> None:
    order = epoch_order(rows_per_shard, window, seed, epoch)
    np.testing.assert_array_equal(np.sort(order), np.arange(rows_per_shard.sum()))


@given(SHARDS, WINDOWS, SEEDS, EPOCHS)
def test_a_window_mixes_no_more_than_its_shards(rows_per_shard, window, seed, epoch) -> None:
    shard_of = np.repeat(np.arange(len(rows_per_shard)), rows_per_shard)
    visited = shard_of[epoch_order(rows_per_shard, window, seed, epoch)]
    first = {int(shard): place for place, shard in reversed(list(enumerate(visited)))}
    last = {int(shard): place for place, shard in enumerate(visited)}
    open_at = [sum(first[s] <= place <= last[s] for s in first) for place in range(len(visited))]
    assert max(open_at, default=0) <= window


def test_seed_and_epoch_each_change_the_order() -> None:
    rows_per_shard = np.full(10, 10)
    orders = [epoch_order(rows_per_shard, 4, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len({order.tobytes() for order in orders}) == 4


def test_order_is_the_same_in_another_process() -> None:
    program = (
        "import numpy as np; from train.data.order import epoch_order;"
        "print(epoch_order(np.full(5, 4), 2, 7, 3).tolist())"
    )
    command = [sys.executable, "-c", program]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed.strip() == str(epoch_order(np.full(5, 4), 2, 7, 3).tolist())


def test_dropped_rows_change_with_the_epoch() -> None:
    dropped = {tuple(sorted(epoch_order(np.full(5, 4), 5, 0, epoch)[16:])) for epoch in range(10)}
    assert len(dropped) > 5


def test_too_few_rows_for_one_batch_is_an_error() -> None:
    assert steps_per_epoch(17, 8) == 2
    with pytest.raises(ConfigError, match=r"7 usable clips.*lower global_batch"):
        steps_per_epoch(7, 8)
