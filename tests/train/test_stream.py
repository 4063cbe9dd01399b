"""Cursors are checked; data sets share the steps by weight; what can't be streamed is an error."""

from __future__ import annotations

import copy
from itertools import islice

import numpy as np
import pytest

from pipeline.format import FormatError
from pipeline.settings import ConfigError
from tests.train.layouts import NOT_USABLE, ShardBuckets, content, uniform_shards
from train.data.stream import ROUND_STEPS, Cursor, Place, Stream
from train.errors import ResumeError

STATE = {"samples": 24, "steps": 3, "places": [{"epoch": 1, "consumed": [8, 0]}]}


def make_stream(parts, weights=None, global_batch=8, tail="drop", seed=0):
    weights = weights or [1.0] * len(parts)
    return Stream(parts, weights, global_batch=global_batch, window_shards=2, tail=tail, seed=seed)


def changed(**fields):
    return {**copy.deepcopy(STATE), **fields}


def of_place(**fields):
    return changed(places=[{**STATE["places"][0], **fields}])


def test_a_cursor_survives_json():
    cursor = Cursor(24, 3, (Place(1, (8, 0)),))
    assert cursor.to_json() == STATE
    assert Cursor.from_json(STATE) == cursor


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (None, "cursor None, expected the fields samples, steps, places"),
        ([1], r"cursor \[1\], expected the fields"),
        ({"samples": 24}, r"cursor \['samples'\], expected the fields samples, steps, places"),
        (changed(extra=1), "cursor .*'extra'.*, expected the fields"),
        (changed(samples=-8), "cursor.samples -8, expected a whole number"),
        (changed(samples=True), "cursor.samples True, expected a whole number"),
        (changed(steps=3.0), "cursor.steps 3.0, expected a whole number"),
        (changed(places={}), "cursor.places {}, expected a list"),
        (changed(places=[7]), r"cursor.places\[0\] 7, expected the fields epoch, consumed"),
        (changed(samples=2**62), "cursor.samples 46.*, expected a whole number"),
        (changed(samples=7), "cursor.samples 7, expected what 3 steps and 8 rows used"),
        (changed(samples=0, places=[]), "cursor.samples 0, expected what 3 steps and 0 rows"),
        (changed(steps=0), "cursor.samples 24, expected what 0 steps"),
        (changed(steps=25), "cursor.samples 24, expected what 25 steps"),
        (of_place(epoch=10**30), r"cursor.places\[0\].epoch 10+, expected a whole number"),
        (of_place(consumed=[20, 5]), "cursor.samples 24, expected what 3 steps and 25 rows used"),
        (of_place(epoch="1"), r"cursor.places\[0\].epoch '1', expected a whole number"),
        (of_place(consumed=8), r"cursor.places\[0\].consumed 8, expected a list"),
        (of_place(consumed=[8, None]), r"cursor.places\[0\].consumed\[1\] None, expected a whole"),
    ],
)
def test_a_damaged_cursor_is_named(state, message):
    with pytest.raises(ResumeError, match=message):
        Cursor.from_json(state)


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ((), "cursor.places 0, expected 2 places"),
        ((Place(0, (0,)), Place(0, (0, 0))), r"places\[1\].consumed \[0, 0\], expected 1 counts"),
        ((Place(0, (0,)), Place(0, (41,))), r"\[1\].consumed \[41\], expected no more than \[40\]"),
    ],
)
def test_a_cursor_of_other_data_is_named_before_anything_is_read(places, message):
    stream = make_stream([uniform_shards(4, 10), uniform_shards(4, 10)])
    with pytest.raises(ResumeError, match=message):
        stream.batches(Cursor(0, 0, places))


def test_epochs_follow_one_another_and_count_samples():
    stream = make_stream([uniform_shards(5, 4)])
    assert stream.steps_per_epoch == (2,)
    batches = list(islice(stream.batches(stream.start()), 6))
    assert [batch.first_sample for batch in batches] == [0, 8, 16, 24, 32, 40]
    assert [batch.cursor.places[0] for batch in batches] == [
        Place(epoch, (consumed,)) for epoch in range(3) for consumed in (8, 16)
    ]
    assert batches[-1].cursor.samples == 48
    assert len({str(batch.rows) for batch in batches}) == 6


def test_a_wrapped_batch_counts_its_own_rows_only_and_can_be_gone_on_from():
    part = ShardBuckets([[0, 0, 0, 1, 1]] * 4, 2)  # 12 and 8 rows
    stream = make_stream([part], tail="wrap", global_batch=5)
    batches = list(islice(stream.batches(stream.start()), 8))
    assert stream.steps_per_epoch == (3 + 2,)
    assert [batch.bucket for batch in batches[3:5]] == [0, 1]  # the two tails
    assert batches[3].cursor.places == (Place(0, (12, 5)),)
    assert batches[4].cursor.places == (Place(0, (12, 8)),)
    assert batches[5].cursor.places[0].epoch == 1
    for place in (3, 4, 5):
        rest = islice(stream.batches(batches[place - 1].cursor), 8 - place)
        assert content(list(rest)) == content(batches[place:])


def test_an_epoch_without_a_whole_batch_has_one_of_repeated_rows_for_each_bucket():
    part = ShardBuckets([[0, 0, 1], [NOT_USABLE]], 2)
    stream = make_stream([part], tail="drop")
    assert stream.steps_per_epoch == (2,)
    first, second = islice(stream.batches(stream.start()), 2)
    assert np.bincount(first.rows).tolist() == [4, 4]
    assert second.rows.tolist() == [2] * 8


def test_shares_of_the_steps_are_exact_where_they_divide_a_round():
    stream = make_stream([uniform_shards(4, 10)] * 3, [1.0, 2.0, 1.0])
    for first in (0, ROUND_STEPS, 7 * ROUND_STEPS):
        parts = [stream.part_of(step) for step in range(first, first + ROUND_STEPS)]
        assert np.bincount(parts).tolist() == [256, 512, 256]


def test_a_share_of_less_than_a_step_a_round_gets_its_steps_in_time():
    # 1/5 of a step a round: 40 steps of 200 rounds are expected, with a deviation of 5.7.
    stream = make_stream([uniform_shards(4, 10)] * 2, [5 * ROUND_STEPS - 1, 1])
    parts = np.concatenate([stream._parts_of_round(number) for number in range(200)])
    assert len(parts) == 200 * ROUND_STEPS
    assert 20 < parts.sum() < 60


def test_data_sets_keep_their_own_place():
    parts = [uniform_shards(4, 10), ShardBuckets([[0] * 7] * 3, 1)]
    stream = make_stream(parts, [3.0, 1.0], global_batch=4)
    batches = list(islice(stream.batches(stream.start()), 100))
    for number, part in enumerate(parts):
        steps = stream.steps_per_epoch[number]
        own = [batch for batch in batches if batch.part == number]
        for first in range(0, len(own) - steps, steps):
            rows = np.concatenate([batch.rows for batch in own[first : first + steps]])
            assert len(set(rows.tolist())) == 4 * steps == len(part.usable()) // 4 * 4
    assert [batch.part for batch in batches] == [stream.part_of(step) for step in range(100)]


def test_the_same_data_set_twice_comes_in_two_orders():
    stream = make_stream([uniform_shards(4, 10)] * 2)
    firsts = {}
    for batch in islice(stream.batches(stream.start()), 40):
        firsts.setdefault(batch.part, batch.rows.tolist())
    assert firsts[0] != firsts[1]


def test_a_batch_names_the_shards_that_it_needs():
    part = ShardBuckets([[0], [NOT_USABLE, 0, 0], [0] * 4], 1)
    stream = make_stream([part], global_batch=7)
    batch = next(stream.batches(stream.start()))
    shard_of = [0, 1, 1, 1, 2, 2, 2, 2]
    expected = dict.fromkeys(shard_of[row] for row in batch.rows)
    assert stream.shards_of(batch) == list(expected)


def test_a_batch_beyond_reason_is_refused_before_any_row_is_taken():
    make_stream([uniform_shards(4, 10)], global_batch=2**20)
    with pytest.raises(ConfigError, match=r"global_batch=1048577: expected at most 1048576"):
        make_stream([uniform_shards(4, 10)], global_batch=2**20 + 1)


def test_a_data_set_without_a_usable_clip_is_an_error():
    empty = ShardBuckets([[NOT_USABLE] * 3], 1)
    with pytest.raises(FormatError, match=r"data set 1 \(of 2\) has no usable clip"):
        make_stream([uniform_shards(4, 10), empty])
