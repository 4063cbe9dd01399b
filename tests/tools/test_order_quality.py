"""Figures of orders whose figures are known."""

import sys

import numpy as np
import pytest

from tools import order_quality
from tools.order_quality import EvenShards, buffered, measure, same_shard_share, windowed

DATA = EvenShards(num_shards=40, shard_size=50)


@pytest.fixture(autouse=True)
def few_pairs(monkeypatch):
    monkeypatch.setattr(order_quality, "NUM_PAIRS", 200_000)


def test_the_order_of_storage_is_not_mixed_at_all():
    quality = measure(np.arange(DATA.num_rows), DATA, 50, 0)
    assert quality.all_pairs == pytest.approx(1)
    assert quality.in_a_shard == pytest.approx(1)
    assert quality.neighbours == 1
    assert quality.spread == pytest.approx((50 + 1) / (2000 + 1), rel=0.01)


def test_a_full_shuffle_has_nothing_left_of_storage():
    order = np.random.default_rng(0).permutation(DATA.num_rows)
    quality = measure(order, DATA, 50, 0)
    assert quality.all_pairs == pytest.approx(0, abs=0.04)
    assert quality.in_a_shard == pytest.approx(0, abs=0.04)
    assert quality.neighbours == pytest.approx(49 / 1999, rel=0.1)
    assert quality.spread == pytest.approx(1, rel=0.05)


def test_a_window_mixes_its_shards_like_a_full_shuffle_of_them():
    quality = measure(windowed(DATA, 50, 10, 0), DATA, 50, 0)
    assert quality.in_a_shard == pytest.approx(0, abs=0.04)
    assert quality.neighbours == pytest.approx(49 / 499, rel=0.1)
    assert quality.spread == pytest.approx(501 / 2001, rel=0.05)


def test_all_orders_hold_every_row_once():
    for name, _, order in order_quality.orders(DATA, 48, [1, 7], 100, epoch=3):
        assert sorted(order.tolist()) == list(range(2000)), name


def test_a_buffer_of_one_row_leaves_shards_as_they_are():
    order = buffered(DATA, 1, 1, 0)
    shards = order.reshape(40, 50) // 50
    assert (shards == shards[:, :1]).all()
    assert (np.diff(order.reshape(40, 50)) == 1).all()
    assert (np.diff(shards[:, 0]) != 1).any()


def test_batch_mates_of_one_shard_are_counted_in_pairs():
    # First batch: 3 of shard 7 make 6 ordered pairs of 12; second: none; the rest fills no batch.
    shards = np.array([7, 7, 1, 7, 1, 2, 3, 4, 5, 5])
    assert same_shard_share(shards, 4) == 6 / 24


def test_the_table_names_its_settings(monkeypatch, capsys):
    command = ["order_quality", "--shards", "8", "--shard-size", "20", "--global-batch", "10"]
    monkeypatch.setattr(sys, "argv", [*command, "--windows", "2", "--epochs", "2"])
    order_quality.main()
    printed = capsys.readouterr().out
    assert "160 rows in 8 shards of 20, global batch 10, mean of 2 epochs" in printed
    for name in ("storage", "full shuffle", "windows of 2 shards", "webdataset, buffer 40 "):
        assert name in printed
