"""Properties of the walk ahead: shards are ready when a batch comes, few are, and none stays."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from train.data.captions import CaptionCache
from train.data.lookahead import Lookahead, ShardPlace, shards_ahead
from train.data.retry import LoaderClosed
from train.data.stream import Stream

NUM_SHARDS, ROWS, WINDOW = 20, 6, 2


class Layout:
    """A data set of equal shards; from one shard on, it fails."""

    counts = np.full((NUM_SHARDS, 1), ROWS)
    first_rows = np.arange(0, (NUM_SHARDS + 1) * ROWS, ROWS)
    num_asked = 0

    def __init__(self, fails_after: int = 10**9) -> None:
        self._fails_after = fails_after

    def buckets_of(self, shard: int) -> np.ndarray:
        self.num_asked += 1
        if self.num_asked > self._fails_after:
            raise OSError(f"no shard {shard}")
        return np.zeros(ROWS, np.uint8)


class Opened:
    """What a shard is when it is ready."""

    def __init__(self, place: ShardPlace) -> None:
        self.place = place


def stream_of(*parts: Layout, global_batch: int = 4) -> Stream:
    weights = [1.0] * len(parts)
    return Stream(
        parts, weights, global_batch=global_batch, window_shards=WINDOW, tail="drop", seed=3
    )


@contextmanager
def lookahead(stream: Stream, prepare: Any = Opened, **changes: Any) -> Iterator[Lookahead]:
    settings = {"num_ahead": 2 * WINDOW, "rows_ahead": 2 * WINDOW * ROWS, "num_threads": 3}
    shards = Lookahead(stream, stream.start(), prepare, **{**settings, **changes})
    try:
        yield shards
    finally:
        shards.close()


@pytest.mark.parametrize("num_parts", [1, 3])
def test_batches_are_those_of_the_stream_and_their_shards_are_ready(num_parts: int) -> None:
    stream = stream_of(*[Layout() for _ in range(num_parts)])
    expected = stream.batches(stream.start())
    with lookahead(stream) as shards:
        for _ in range(150):
            batch = shards.next_batch(is_needed=True)
            assert batch is not None
            want = next(expected)
            assert (batch.part, batch.first_sample) == (want.part, want.first_sample)
            np.testing.assert_array_equal(batch.rows, want.rows)
            for shard in stream.shards_of(batch):
                assert shards.get(batch.part, shard).place[:2] == (batch.part, shard)
            shards.advance(batch.cursor.samples)


def test_no_more_shards_are_open_than_allowed_and_those_behind_are_let_go() -> None:
    stream, alive, most = stream_of(Layout()), weakref.WeakSet[Opened](), []
    adding = threading.Lock()

    def prepare(place: ShardPlace) -> Opened:
        opened = Opened(place)
        with adding:
            alive.add(opened)
            most.append(len(alive))
        return opened

    with lookahead(stream, prepare) as shards:
        for _ in range(150):
            batch = shards.next_batch(is_needed=True)
            assert batch is not None
            for shard in stream.shards_of(batch):
                shards.get(batch.part, shard)
            shards.advance(batch.cursor.samples)
    assert len(most) > NUM_SHARDS  # over several epochs
    assert max(most) <= 2 * WINDOW
    gc.collect()
    assert not alive


def test_walk_ends_where_all_shards_are_open_but_enough_batches_wait() -> None:
    layout = Layout()
    with lookahead(stream_of(layout), num_ahead=10**6, rows_ahead=40) as shards:
        for _ in range(60):
            assert shards.next_batch(is_needed=True) is not None
            assert len(shards._batches) * 4 <= 40


def test_batch_larger_than_what_may_be_open_comes_when_it_is_needed() -> None:
    stream = stream_of(Layout(), global_batch=50)  # over four windows of 12
    with lookahead(stream) as shards:
        batch = shards.next_batch(is_needed=True)
        assert batch is not None
        needed = stream.shards_of(batch)
        assert len(needed) > 2 * WINDOW
        assert [shards.get(0, shard).place.shard for shard in needed] == needed
        # The next one isn't needed before this one is read, and has to wait for it.
        assert shards.next_batch(is_needed=False) is None


def test_shard_that_cannot_be_opened_fails_where_it_is_asked_for_each_time() -> None:
    stream = stream_of(Layout())

    def prepare(place: ShardPlace) -> Opened:
        raise ValueError(f"shard {place.shard}")

    with lookahead(stream, prepare) as shards:
        batch = shards.next_batch(is_needed=True)
        assert batch is not None
        shard = stream.shards_of(batch)[0]
        for _ in range(2):
            with pytest.raises(ValueError, match=f"shard {shard}"):
                shards.get(0, shard)


def test_shard_that_failed_ahead_of_time_is_tried_once_more_when_it_is_needed() -> None:
    stream, failed, tried = stream_of(Layout()), threading.Event(), []

    def prepare(place: ShardPlace) -> Opened:
        tried.append(place)
        if tried.count(place) == 1:
            failed.set()
            raise OSError("away for a moment")
        return Opened(place)

    with lookahead(stream, prepare) as shards:
        batch = shards.next_batch(is_needed=True)
        assert batch is not None and failed.wait(60)
        for shard in stream.shards_of(batch):
            assert shards.get(0, shard).place.shard == shard


def test_stream_that_fails_does_so_behind_its_batches_each_time() -> None:
    stream = stream_of(Layout(fails_after=2 * WINDOW))  # two windows of three batches each
    with lookahead(stream) as shards:
        for _ in range(6):
            batch = shards.next_batch(is_needed=True)
            assert batch is not None
            shards.advance(batch.cursor.samples)
        for _ in range(2):
            with pytest.raises(OSError, match="no shard"):
                shards.next_batch(is_needed=True)


def test_close_wakes_up_who_waits() -> None:
    stream, released = stream_of(Layout()), threading.Event()

    def prepare(place: ShardPlace) -> Opened:
        released.wait()
        return Opened(place)

    failures: list[BaseException] = []
    with lookahead(stream, prepare) as shards:
        batch = shards.next_batch(is_needed=True)
        assert batch is not None
        shard = stream.shards_of(batch)[0]

        def wait() -> None:
            try:
                shards.get(0, shard)
            except LoaderClosed as error:
                failures.append(error)

        waiter = threading.Thread(target=wait)
        waiter.start()
        threading.Timer(0.1, released.set).start()
        shards.close()
        waiter.join()
        with pytest.raises(LoaderClosed):
            shards.next_batch(is_needed=True)
    assert len(failures) <= 1  # or it was ready before the close


@pytest.mark.parametrize(
    ("counts", "global_batch", "expected"),
    [
        ([[100]] * 50, 64, 4),  # two windows
        ([[100]] * 50, 1000, 2 * 6),  # a batch larger than a window
        ([[100, 2]] * 50, 64, 4),  # rows of rare shapes are left over and come on top
    ],
)
def test_two_windows_are_ready_or_what_a_large_batch_needs(
    counts: list[list[int]], global_batch: int, expected: int
) -> None:
    part = SimpleNamespace(counts=np.array(counts, np.int32), num_clips=int(np.sum(counts)))
    view: Any = SimpleNamespace(parts=(part,), config=SimpleNamespace(window_shards=2))
    assert shards_ahead(view, global_batch) == expected


class RareLayout(Layout):
    """Each shard has one row of a second shape."""

    counts = np.tile([ROWS - 1, 1], (NUM_SHARDS, 1))

    def buckets_of(self, shard: int) -> np.ndarray:
        return np.array([0] * (ROWS - 1) + [1], np.uint8)


def test_shards_of_which_rows_were_left_over_are_told_from_those_of_a_window() -> None:
    stream, places = stream_of(RareLayout(), global_batch=10), []

    def prepare(place: ShardPlace) -> Opened:
        places.append(place)
        return Opened(place)

    with lookahead(stream, prepare) as shards:
        for _ in range(3 * stream.steps_per_epoch[0]):
            batch = shards.next_batch(is_needed=True)
            assert batch is not None
            for shard in stream.shards_of(batch):
                opened = shards.get(batch.part, shard)
                assert opened.place.shard == shard
                assert batch.bucket == 1 or not opened.place.is_behind
            shards.advance(batch.cursor.samples)
    # A batch of the rare shape needs ten shards, from five windows.
    assert any(place.is_behind for place in places)


# -- captions in memory


def test_captions_are_kept_up_to_a_limit_and_those_in_use_longest() -> None:
    cache = CaptionCache(100 * 64)
    captions = {(0, row): np.full(32, row, np.float16) for row in range(1000)}
    for name, caption in captions.items():
        cache.put(name, caption)
        cache.get((0, 0))
        assert cache.num_bytes <= 100 * 64
    kept = cache.get((0, 0))
    assert kept is not None and kept[0] == 0
    assert cache.get((0, 999)) is captions[0, 999]
    assert cache.get((0, 500)) is None
    assert cache.get((1, 999)) is None


def test_caption_larger_than_the_limit_is_no_error() -> None:
    cache = CaptionCache(100)
    cache.put((0, 1), np.zeros(1000, np.float16))
    cache.put((0, 2), np.zeros(10, np.float16))
    cache.put((0, 3), np.zeros(40, np.float16))
    assert cache.get((0, 3)) is not None
    assert cache.get((0, 1)) is None
