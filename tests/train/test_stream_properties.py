"""The stream is the same for every layout of ranks, and goes on exactly from anywhere."""

from __future__ import annotations

from itertools import islice

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.train.layouts import content, layouts
from train.data.stream import Cursor, Place, Stream

PROPERTY = settings(max_examples=60, derandomize=True, deadline=None)
WEIGHTS, SIZES = st.floats(0.1, 10.0), st.integers(1, 12)


@st.composite
def settings_of_streams(draw, sizes=SIZES):
    num_buckets = draw(st.integers(1, 3))
    parts = draw(st.lists(layouts(num_buckets), min_size=1, max_size=3))
    return {
        "parts": parts,
        "weights": [draw(WEIGHTS) for _ in parts],
        "global_batch": draw(sizes),
        "window_shards": draw(st.integers(1, 14)),
        "tail": draw(st.sampled_from(["drop", "wrap"])),
        "seed": draw(st.integers(0, 2**31)),
    }


def take(stream, start, num_steps):
    return list(islice(stream.batches(start), num_steps))


def read_by_ranks(chosen, start, num_steps, num_ranks, micro_batch):
    """Return each step's (part, bucket, rows) as ranks with a stream of their own would read it.

    Micro-batch m of rank r holds the samples [(m·R + r)·B, (m·R + r + 1)·B) of the step.
    """
    ranks = [take(Stream(**chosen), start, num_steps) for _ in range(num_ranks)]
    accumulation = chosen["global_batch"] // (num_ranks * micro_batch)
    steps = []
    for step in range(num_steps):
        shapes = {(rank[step].part, rank[step].bucket) for rank in ranks}
        assert len(shapes) == 1  # or they would hang, or add up different things
        samples = {}
        for rank, batches in enumerate(ranks):
            for micro_step in range(accumulation):
                first = (micro_step * num_ranks + rank) * micro_batch
                rows = batches[step].rows[first : first + micro_batch]
                samples |= dict(zip(range(first, first + micro_batch), rows.tolist(), strict=True))
        steps.append((*shapes.pop(), [samples[place] for place in sorted(samples)]))
    return steps


@PROPERTY
@given(settings_of_streams(sizes=st.sampled_from([24, 48])), st.data())
def test_any_ranks_and_micro_batches_read_the_same_global_batches(chosen, data):
    whole = read_by_ranks(chosen, Stream(**chosen).start(), 6, 1, chosen["global_batch"])
    assert all(len(rows) == chosen["global_batch"] for _, _, rows in whole)
    done = data.draw(st.integers(0, 5))
    start = Stream(**chosen).start()
    if done:
        start = take(Stream(**chosen), start, done)[-1].cursor
    for num_ranks in (1, 2, 3, 4, 8):
        share = chosen["global_batch"] // num_ranks
        micro_batch = data.draw(st.sampled_from([b for b in range(1, share + 1) if not share % b]))
        assert read_by_ranks(chosen, start, 6 - done, num_ranks, micro_batch) == whole[done:]


@PROPERTY
@given(settings_of_streams(), st.integers(0, 40))
def test_going_on_gives_exactly_the_rest(chosen, done):
    whole = take(Stream(**chosen), Stream(**chosen).start(), done + 20)
    start = Stream(**chosen).start()
    if done:
        start = Cursor.from_json(whole[done - 1].cursor.to_json())
    assert content(take(Stream(**chosen), start, 20)) == content(whole[done:])


@PROPERTY
@given(settings_of_streams(), SIZES, st.integers(0, 20), st.sampled_from([0, 1]))
def test_another_global_batch_goes_on_at_the_same_sample(chosen, other, done, epoch):
    """Both parts of the epoch together hold every row once, but for what neither fills up."""
    chosen |= {"parts": chosen["parts"][:1], "weights": [1.0]}
    (part,), old = chosen["parts"], chosen["global_batch"]
    zeros = (0,) * part.counts.shape[1]
    start = Cursor(1000, 10, (Place(epoch, zeros),))
    before = [
        batch
        for batch in take(Stream(**chosen), start, done)
        if batch.cursor.places[0].epoch == epoch
    ]
    cursor = before[-1].cursor if before else start
    stream = Stream(**{**chosen, "global_batch": other})
    after = take(stream, cursor, len(part.usable()) // other + 4)
    assert after[0].first_sample == 1000 + old * len(before)
    after = [batch for batch in after if batch.cursor.places[0].epoch == epoch]
    for bucket, total in enumerate(part.totals):
        rows = [batch.rows for batch in (*before, *after) if batch.bucket == bucket]
        rows = np.concatenate([*rows, np.empty(0, np.int64)])
        own = set(part.usable(bucket))
        used = cursor.places[0].consumed[bucket]
        left = (total - used) % other
        is_whole = chosen["tail"] == "wrap" or max(part.totals) < other
        assert set(rows.tolist()) <= own
        assert len(set(rows.tolist())) == (total if is_whole else total - left)
        repeated = len(rows) - len(set(rows.tolist()))
        of_old = old * sum(batch.bucket == bucket for batch in before) - used
        assert repeated == of_old + (-left % other if is_whole else 0)


@PROPERTY
@given(settings_of_streams())
def test_every_epoch_of_every_data_set_has_its_rows_once(chosen):
    stream = Stream(**chosen)
    size = chosen["global_batch"]
    seen = {}
    for batch in take(stream, stream.start(), 60):
        place = batch.cursor.places[batch.part]
        seen.setdefault((batch.part, place.epoch), []).append(batch)
    for (number, epoch), batches in seen.items():
        part, steps = chosen["parts"][number], stream.steps_per_epoch[number]
        assert len(batches) <= steps
        if len(batches) < steps:  # the last epoch, which was cut off
            assert (number, epoch + 1) not in seen
            continue
        for bucket, total in enumerate(part.totals):
            rows = [row for b in batches if b.bucket == bucket for row in b.rows.tolist()]
            is_whole = chosen["tail"] == "wrap" or max(part.totals) < size
            assert len(set(rows)) == (total if is_whole else total - total % size)
            assert len(rows) == (-(-total // size) * size if is_whole else len(set(rows)))


@PROPERTY
@given(settings_of_streams())
def test_rows_of_a_batch_are_of_its_bucket(chosen):
    for batch in take(Stream(**chosen), Stream(**chosen).start(), 20):
        assert set(batch.rows.tolist()) <= set(chosen["parts"][batch.part].usable(batch.bucket))
