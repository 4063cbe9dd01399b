"""Damage to a data set, one kind after the other: found and named, and none trains silently.

The view is opened before the damage, as a run's is, or after it, where its start finds it.
"""

from __future__ import annotations

import itertools
import json
import os
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest

from pipeline.format import Column, FormatError
from tests.train.batches import (
    GLOBAL_BATCH,
    clip_of,
    global_batches,
    loader_of,
    rows_of,
    view_of,
)
from tests.train.columns import Dataset
from train.data.retry import LoaderClosed
from train.data.view import View

CLIPS = 24  # three shards


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return Dataset(tmp_path / "shards", num_clips=CLIPS).build()


def column_of(dataset: Dataset, modality: str = "video") -> Column:
    return Column(dataset.column_path(modality), dataset.spec(modality), dataset.plan.plan_id)


def read_epochs(view: View, num: int = 1, **changes: Any) -> list[list[tuple]]:
    with loader_of(view, **changes) as loader:
        (steps,) = loader.steps_per_epoch
        return [rows_of(batch) for batch in itertools.islice(loader, num * steps)]


def flip(dataset: Dataset, clip: int, modality: str = "video") -> Path:
    """Flip one bit of a clip's payload."""
    column, (shard, row) = column_of(dataset, modality), divmod(clip, dataset.shard_size)
    path, record = column.tar_path(shard), column.index(shard, dataset.shard_size)[row]
    data = bytearray(path.read_bytes())
    data[int(record["offset"]) + int(record["nbytes"]) // 2] ^= 16
    path.write_bytes(data)
    return path


def rewrite_record(column: Column, shard: int, **values: Any) -> None:
    path = column.path / f"{shard:06d}.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def rewrite_index(column: Column, shard: int, data: bytes) -> None:
    """Put another index there, with a commit record that fits it."""
    (column.path / column.committed(shard)["index"]).write_bytes(data)
    rewrite_record(column, shard, index_crc32c=google_crc32c.value(data))


# -- damage of files that is found by names, sizes and checksums, at the start or while it runs


def cut_tar(column: Column) -> str:
    path = column.tar_path(1)
    path.write_bytes(path.read_bytes()[:-1024])
    return rf"{path}: \d+ bytes, expected \d+ as committed"


def remove_tar(column: Column) -> str:
    path = column.tar_path(1)
    path.unlink()
    return f"{path}"


def remove_commit(column: Column) -> str:
    path = column.path / "000001.json"
    path.unlink()
    return rf"{column.path}: 1 of 3 shards are not committed \(000001\)"


def put_index_of_another_shard(column: Column) -> str:
    first, second = (column.committed(shard)["index"] for shard in (0, 1))
    (column.path / second).write_bytes((column.path / first).read_bytes())
    return rf"{column.path / second}.*crc32c"


def put_commit_of_another_shard(column: Column) -> str:
    first = json.loads((column.path / "000000.json").read_text())
    (column.path / "000001.json").write_text(json.dumps(first))
    return rf"{column.path}/000001.*shard is 0, expected 1"


def point_outside(column: Column) -> str:
    index = column.index(1, 8).copy()
    index["offset"][4] = column.committed(1)["tar_bytes"] - 8
    write_index(column, index)
    return r"000001.*idx\.npy row 4: .*doesn't fit"


def point_outside_by_overflow(column: Column) -> str:
    index = column.index(1, 8).copy()
    index["offset"][4] = np.iinfo(np.uint64).max - 100
    write_index(column, index)
    return r"000001.*idx\.npy row 4: .*doesn't fit"


def write_index(column: Column, index: np.ndarray) -> None:
    path = column.path / "made.npy"
    np.save(path, index)
    rewrite_index(column, 1, path.read_bytes())
    path.unlink()


class Trap:
    """Unpickled, it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def pickle_index(column: Column) -> str:
    index = np.array([Trap(column.path / "trap")] * 8, dtype=object)
    path = column.path / "made.npy"
    np.save(path, index, allow_pickle=True)
    rewrite_index(column, 1, path.read_bytes())
    path.unlink()
    return r"000001.*idx\.npy can't be read"


def put_a_pickle(column: Column) -> str:
    rewrite_index(column, 1, pickle.dumps(Trap(column.path / "trap")))
    return r"000001.*idx\.npy can't be read"


DAMAGES = (
    *(cut_tar, remove_tar, remove_commit, put_index_of_another_shard, put_commit_of_another_shard),
    *(point_outside, point_outside_by_overflow, pickle_index, put_a_pickle),
)


@pytest.mark.parametrize("modality", ["video", "audio"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_before_the_start_is_named(
    dataset: Dataset, damage: Callable[[Column], str], modality: str
) -> None:
    column = column_of(dataset, modality)
    pattern = damage(column)
    with pytest.raises(FormatError, match=f"(?s){pattern}"):
        read_epochs(view_of(dataset))
    assert not (column.path / "trap").exists()


@pytest.mark.parametrize("modality", ["video", "audio"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_after_the_view_was_opened_is_named_at_every_call(
    dataset: Dataset, damage: Callable[[Column], str], modality: str
) -> None:
    view, column = view_of(dataset), column_of(dataset, modality)
    damage(column)
    with loader_of(view) as loader:
        with pytest.raises(FormatError, match=rf"{column.path}/?\S*(0001|:)"):
            list(itertools.islice(loader, *loader.steps_per_epoch))
        state = loader.state_dict()
        for _ in range(2):
            with pytest.raises(FormatError, match=f"{column.path}"):
                loader.wait_step()
            with pytest.raises(FormatError, match=f"{column.path}"):
                next(loader)
        assert loader.state_dict() == state
    assert not (column.path / "trap").exists()


FILES = ("plan.json", "plan.parquet", "column.json", "000001.json", "index", "tar")


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", FILES)
def test_pipe_in_place_of_a_file_is_named_and_waited_for_by_nobody(
    dataset: Dataset, name: str, when: str
) -> None:
    column = column_of(dataset)
    record = column.committed(1)
    path = column.path / record.get(name, name)
    if name.startswith("plan"):
        path = dataset.root / name
    view = view_of(dataset) if when == "after" else None
    path.unlink()
    os.mkfifo(path)
    if when == "after" and name in ("plan.json", "plan.parquet", "column.json"):
        assert len(read_epochs(view)[0]) == 8  # they were read when the view was opened
        return
    with pytest.raises((FormatError, OSError), match=path.name):
        read_epochs(view or view_of(dataset))


# -- damage inside of payloads


def test_clip_with_a_flipped_bit_is_replaced_the_same_by_all_ranks(
    dataset: Dataset, caplog: pytest.LogCaptureFixture
) -> None:
    view = view_of(dataset)
    sound = global_batches(view, 6)
    path = flip(dataset, 13)
    found = global_batches(view, 6)
    assert [global_batches(view, 6, *layout) for layout in ((2, 4), (2, 2), (4, 1), (8, 1))] == [
        found
    ] * 4
    for before, after in zip(sound, found, strict=True):
        keys = [row[1] for row in before]
        expected = [key if clip_of(key) != 13 else following(keys, key) for key in keys]
        assert [row[1] for row in after] == expected
        for old, new in zip(before, after, strict=True):
            assert new == old or clip_of(old[1]) == 13
    assert f"{path} row 5 (clip00013): crc32c is" in caplog.text


def following(keys: list[str], key: str) -> str:
    return keys[(keys.index(key) + 1) % len(keys)]


@pytest.mark.parametrize("seconds", [6.0, 10.0])
@pytest.mark.parametrize("modality", ["video", "audio"])
def test_damaged_payload_never_comes_is_counted_and_logged_once(
    dataset: Dataset, caplog: pytest.LogCaptureFixture, modality: str, seconds: float
) -> None:
    view = view_of(dataset, seconds=seconds)
    flip(dataset, 13, modality)
    with loader_of(view) as loader:
        batches = [next(loader) for _ in range(6)]
        loader.wait_step()
    assert "clip00013" not in {key for batch in batches for key in batch.keys}
    assert 2 <= loader.num_substituted <= 4  # of two epochs, and of what was read ahead
    assert caplog.text.count("clip00013") == 1


@pytest.mark.parametrize(("verify_crc", "is_found"), [("first", False), ("always", True)])
def test_payloads_are_checked_when_they_are_first_read_or_always(
    dataset: Dataset, verify_crc: str, is_found: bool
) -> None:
    with loader_of(view_of(dataset, verify_crc=verify_crc)) as loader:
        for _ in range(CLIPS // GLOBAL_BATCH + 1):
            next(loader)
        index, path = column_of(dataset).index(1, 8), column_of(dataset).tar_path(1)
        with path.open("r+b") as file:  # the file that is open already
            file.seek(int(index["offset"][5]))
            file.write(b"\xff\xff")
        for _ in range(3 * CLIPS // GLOBAL_BATCH):
            next(loader)
        assert bool(loader.num_substituted) == is_found


def test_neighbours_that_are_damaged_too_are_passed_over(dataset: Dataset) -> None:
    view = view_of(dataset)
    keys = [row[1] for row in global_batches(view, 1)[0]]
    for key in keys[2:5]:
        flip(dataset, clip_of(key))
    found = [row[1] for row in global_batches(view, 1)[0]]
    assert found == [*keys[:2], *[keys[5]] * 3, *keys[5:]]


def test_last_clip_of_a_batch_is_replaced_by_its_first(dataset: Dataset) -> None:
    view = view_of(dataset)
    keys = [row[1] for row in global_batches(view, 1)[0]]
    flip(dataset, clip_of(keys[-1]))
    found = global_batches(view, 1, num_ranks=8, micro_batch=1)[0]
    assert [row[1] for row in found] == [*keys[:-1], keys[0]]
    assert [row[0] for row in found] == list(range(GLOBAL_BATCH))


def test_resume_replaces_the_same(dataset: Dataset) -> None:
    view = view_of(dataset)
    flip(dataset, 13)
    expected = global_batches(view, 6)
    with loader_of(view) as loader:
        next(loader)
        state = loader.state_dict()
    assert global_batches(view, 5, 2, 4, state=state) == expected[1:]


def test_damaged_caption_is_replaced_with_its_clip(dataset: Dataset) -> None:
    view, column = view_of(dataset), column_of(dataset, "text")
    path, record = column.tar_path(1), column.index(1, 3)[0]  # caption 3
    data = bytearray(path.read_bytes())
    data[int(record["offset"])] ^= 1
    path.write_bytes(data)
    keys = {row[1] for rows in global_batches(view, 3) for row in rows}
    assert keys and all(dataset.text_row(clip_of(key)) != 3 for key in keys)


def test_damaged_caption_of_many_clips_counts_for_each(dataset: Dataset) -> None:
    column = column_of(dataset, "text")
    path, record = column.tar_path(1), column.index(1, 3)[0]  # caption 3, of clips 2, 8, 14, 20
    data = bytearray(path.read_bytes())
    data[int(record["offset"])] ^= 1
    path.write_bytes(data)
    read_epochs(view_of(dataset, max_damaged=4), num=5)
    with pytest.raises(FormatError, match=r"4 clips are damaged.*row 0 \(caption 3\)"):
        read_epochs(view_of(dataset, max_damaged=3))


@pytest.mark.parametrize("max_damaged", [0, 2])
def test_more_damage_than_allowed_stops_and_names_the_last_and_the_remedy(
    dataset: Dataset, max_damaged: int
) -> None:
    view = view_of(dataset, max_damaged=max_damaged)
    paths = [flip(dataset, clip) for clip in (2, 9, 10, 20)]
    pattern = (
        rf"{max_damaged + 1} clips are damaged, more than data.max_damaged={max_damaged}; the "
        rf"last: ({'|'.join(map(str, paths))}) row \d \(clip000\d\d\): crc32c is .*remove .*"
        rf"pipeline.encode again.*pipeline.verify {dataset.root} --full"
    )
    with pytest.raises(FormatError, match=pattern):
        read_epochs(view)


def test_zeroed_tail_is_replaced_or_stops_and_no_zeros_come(dataset: Dataset) -> None:
    view, column = view_of(dataset, max_damaged=3), column_of(dataset)
    path = column.tar_path(1)
    data, start = path.read_bytes(), int(column.index(1, 8)["offset"][6]) + 50

    path.write_bytes(data[:start] + bytes(len(data) - start))
    keys = {row[1] for row in itertools.chain(*read_epochs(view))}
    assert not keys & {"clip00014", "clip00015"}

    path.write_bytes(bytes(len(data)))
    with pytest.raises(FormatError, match=rf"4 clips are damaged.*{path}"):
        read_epochs(view)


def test_batch_of_nothing_but_damage_stops(tmp_path: Path) -> None:
    dataset = Dataset(tmp_path / "shards", num_clips=8).build()
    view = view_of(dataset)
    for clip in range(8):
        flip(dataset, clip, "audio")
    with pytest.raises(FormatError, match="all 8 clips of a batch are damaged"):
        read_epochs(view)


def test_swapped_tars_of_equal_size_are_named_as_that(dataset: Dataset) -> None:
    view, column = view_of(dataset), column_of(dataset)
    first, second = column.tar_path(0), column.tar_path(1)
    one, two = first.read_bytes(), second.read_bytes()
    assert len(one) == len(two)
    first.write_bytes(two)
    second.write_bytes(one)
    with pytest.raises(
        FormatError, match=rf"({first} begins with 'clip00008|{second} begins with 'clip00000)"
    ):
        read_epochs(view)


def test_tars_of_video_and_audio_that_changed_places_are_named(tmp_path: Path) -> None:
    size = {"video_size": (2, 5, 10), "audio_size": (4, 4)}  # 4 Hz × 100 and 25 Hz × 16 values
    dataset = Dataset(tmp_path / "shards", num_clips=8, **size).build()
    view = view_of(dataset)
    video, audio = (column_of(dataset, name).tar_path(0) for name in ("video", "audio"))
    one, two = video.read_bytes(), audio.read_bytes()
    assert len(one) == len(two)
    video.write_bytes(two)
    audio.write_bytes(one)
    with pytest.raises(FormatError, match=r"begins with 'clip00000\.(audio|video)\.npy'"):
        read_epochs(view)


# -- files that go while a run reads


def test_shard_that_vanishes_stops_clearly_after_trying_again(tmp_path: Path) -> None:
    dataset = Dataset(tmp_path / "shards", num_clips=96, shard_size=4).build()
    with loader_of(view_of(dataset, window_shards=1, retry_s=0.3), global_batch=4) as loader:
        before = [rows_of(next(loader)) for _ in range(2)]
        state, column = loader.state_dict(), column_of(dataset)
        tars = [column.tar_path(shard) for shard in range(24)]
        for path in tars:
            path.rename(path.with_suffix(".gone"))
        with pytest.raises(FormatError, match=rf"{column.path}\S+\.tar.*(missing|can't be read)"):
            for _ in range(24):
                before.append(rows_of(next(loader)))
                state = loader.state_dict()
        for path in tars:  # put back: the next run goes on where this one ended
            path.with_suffix(".gone").rename(path)
    view = view_of(dataset, window_shards=1)
    with loader_of(view, global_batch=4) as loader:
        loader.load_state_dict(state)
        after = [rows_of(next(loader)) for _ in range(5)]
    expected = global_batches(view, len(before) + 5, micro_batch=4, global_batch=4)
    assert before + after == expected


def test_shard_that_comes_back_in_time_is_not_noticed(tmp_path: Path) -> None:
    dataset = Dataset(tmp_path / "shards", num_clips=96, shard_size=4).build()
    view = view_of(dataset, window_shards=1, retry_s=60)
    expected = global_batches(view, 24, micro_batch=4, global_batch=4)
    folder = column_of(dataset).path
    with loader_of(view, global_batch=4) as loader:
        found = [rows_of(next(loader))]
        folder.rename(folder.with_name("away"))
        timer = threading.Timer(0.5, lambda: folder.with_name("away").rename(folder))
        timer.start()
        found += [rows_of(next(loader)) for _ in range(23)]
        timer.join()
    assert found == expected


def test_waiting_for_a_lost_file_ends_with_close(tmp_path: Path) -> None:
    dataset = Dataset(tmp_path / "shards", num_clips=8).build()
    view = view_of(dataset, retry_s=3600)
    folder = column_of(dataset).path
    folder.rename(folder.with_name("away"))
    with loader_of(view) as loader:
        threads = threading.active_count()
        timer = threading.Timer(0.3, loader.close)
        timer.start()
        with pytest.raises(LoaderClosed):
            next(loader)
        timer.join()
    assert threading.active_count() < threads
