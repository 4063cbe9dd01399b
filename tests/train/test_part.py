"""Properties of a part: rows are the plan's, read when needed, and no change goes unnoticed."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest

from pipeline.format import FormatError, open_column
from tests.train.columns import Dataset
from train.data.census import NOT_USABLE
from train.data.committed import MissingFileError
from train.data.config import DataConfig
from train.data.part import Part
from train.data.view import open_view


def part_of(dataset: Dataset, **config: Any) -> Part:
    cache = str(dataset.root.parent)
    config = {"root": str(dataset.root), "cache_dir": cache, "missing": "drop"} | config
    return open_view(DataConfig(**config), "all").parts[0]


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return Dataset(tmp_path / "shards", num_clips=37, failed={9: "silent", 10: "silent"}).build()


def rewrite(dataset: Dataset, shard: int, change: Callable[[np.ndarray], None]) -> None:
    """Change an index of video and its checksum in the commit record, as a faulty writer would."""
    path = dataset.column_path("video") / f"{shard:06d}.idx.npy"
    index = np.load(path)
    change(index)
    data = io.BytesIO()
    np.save(data, index)
    path.write_bytes(data.getvalue())
    record = path.with_name(f"{shard:06d}.json")
    fields = json.loads(record.read_text())
    record.write_text(json.dumps(fields | {"index_crc32c": google_crc32c.value(data.getvalue())}))


def test_rows_are_those_of_the_plan(dataset: Dataset) -> None:
    part = part_of(dataset)
    assert part.first_rows.tolist() == [0, 8, 16, 24, 32, 37]
    assert part.counts.tolist() == [[8], [6], [8], [8], [5]] and part.num_clips == 35
    for shard in range(5):
        clips, rows = dataset.shard_clips(shard), part.shard_rows(shard)
        assert rows.keys == [dataset.key(clip) for clip in clips]
        assert rows.text_rows.tolist() == [dataset.text_row(clip) for clip in clips]
        usable = [clip not in dataset.failed for clip in clips]
        assert (part.buckets_of(shard) != NOT_USABLE).tolist() == usable
        for modality in ("video", "audio"):
            column = open_column(
                dataset.root, dataset.spec(modality).directory, dataset.plan.plan_id
            )
            np.testing.assert_array_equal(rows.index[modality], column.index(shard, len(clips)))
            assert rows.has[modality].tolist() == usable
            path = column.path / rows.tars[modality]
            assert path.stat().st_size == rows.tar_bytes[modality]
            assert google_crc32c.value(path.read_bytes()) == rows.tar_crc32c[modality]
        assert part.shard_rows(shard) is rows


def test_nth_usable_clip(dataset: Dataset) -> None:
    part = part_of(dataset)
    expected = [clip for clip in range(37) if clip not in dataset.failed]
    assert part.nth(np.arange(35)).tolist() == expected
    assert part.nth(np.array([34, 8, 7])).tolist() == [36, 8, 7]
    assert part.nth(np.array([], np.int64)).tolist() == []


def test_captions_are_found_by_their_row(dataset: Dataset) -> None:
    part = part_of(dataset)
    for row in range(dataset.num_captions):
        found = part.caption_record(row)
        assert (found.shard, found.row) == divmod(row, dataset.captions_per_shard)
        data = (part.opened["text"].path / found.tar).read_bytes()
        start = int(found.record["offset"])
        payload = data[start : start + int(found.record["nbytes"])]
        assert payload == dataset.text(row).tobytes()
        assert (len(data), google_crc32c.value(data)) == (found.tar_bytes, found.tar_crc32c)


def test_one_clip_shards(tmp_path: Path) -> None:
    built = Dataset(tmp_path / "shards", num_clips=5, shard_size=1, captions_per_shard=1).build()
    part = part_of(built)
    assert [part.shard_rows(shard).keys for shard in range(5)] == [[built.key(c)] for c in range(5)]
    assert part.nth(np.arange(5)).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("modality", ["video", "audio"])
def test_shard_encoded_again_meanwhile_is_an_error(dataset: Dataset, modality: str) -> None:
    part = part_of(dataset)
    column = open_column(dataset.root, dataset.spec(modality).directory, dataset.plan.plan_id)
    (column.path / "000002.json").unlink()
    dataclasses.replace(dataset, clip_s=9.0).write_shard(column, 2, "again")
    with pytest.raises(FormatError, match="encoded again since the view was opened"):
        part.shard_rows(2)
    part.shard_rows(3)


def test_caption_encoded_again_meanwhile_is_an_error(dataset: Dataset) -> None:
    part = part_of(dataset)
    column = open_column(dataset.root, dataset.spec("text").directory, dataset.plan.plan_id)
    (column.path / "000001.json").unlink()
    dataclasses.replace(dataset, text_width=7).write_shard(column, 1, "again")
    with pytest.raises(FormatError, match="encoded again since the view was opened"):
        part.caption_record(4)


@pytest.mark.parametrize("name", ["000001.json", "000001.tar", "000001.idx.npy"])
def test_file_that_is_away_may_come_back(dataset: Dataset, name: str) -> None:
    part, path = part_of(dataset), dataset.column_path("audio") / name
    path.rename(path.with_suffix(".away"))
    with pytest.raises(MissingFileError, match=name) as caught:
        part.shard_rows(1)
    assert isinstance(caught.value, FormatError) and isinstance(caught.value, OSError)
    path.with_suffix(".away").rename(path)
    assert part.shard_rows(1).keys[0] == dataset.key(8)


def test_tar_cut_short_meanwhile_is_found(dataset: Dataset) -> None:
    part, path = part_of(dataset), dataset.column_path("video") / "000002.tar"
    path.write_bytes(path.read_bytes()[:-512])
    with pytest.raises(FormatError, match=r"000002.tar: \d+ bytes, expected \d+ as committed"):
        part.shard_rows(2)


def test_index_of_another_shard_meanwhile_is_found(dataset: Dataset) -> None:
    part, folder = part_of(dataset), dataset.column_path("video")
    shutil.copy(folder / "000002.idx.npy", folder / "000003.idx.npy")
    with pytest.raises(FormatError, match=r"000003.idx.npy: crc32c is"):
        part.shard_rows(3)


def test_all_files_of_another_shard_are_found(dataset: Dataset) -> None:
    part, folder = part_of(dataset), dataset.column_path("video")
    for name in ("tar", "idx.npy", "json"):
        shutil.copy(folder / f"000002.{name}", folder / f"000003.{name}")
    with pytest.raises(FormatError, match=r"000003.json: shard is 2, expected 3"):
        part.shard_rows(3)


def set_field(name: str, value: Any) -> Callable[[np.ndarray], None]:
    def change(index: np.ndarray) -> None:
        index[name][1] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_field("offset", 2**40), "doesn't fit"),
        (set_field("offset", 2**64 - 1), "doesn't fit"),
        (set_field("nbytes", 2**63), "doesn't fit"),
        (set_field("shape", [40, 2, 3, 4]), "doesn't fit"),
        (set_field("shape", [40, 2, 9, 0]), r"row 1: shape is \[40, 2, 9, 0\]"),
        (set_field("status", 99), "doesn't fit"),
        (set_field("status", 1), "statuses are"),
    ],
)
def test_index_that_leads_astray_is_refused(dataset: Dataset, change: Any, message: str) -> None:
    rewrite(dataset, 4, change)
    with pytest.raises(FormatError, match=message):
        part_of(dataset)


def test_pickled_index_is_refused(dataset: Dataset) -> None:
    path = dataset.column_path("video") / "000004.idx.npy"
    data = io.BytesIO()
    np.save(data, np.array([{"a": 1}] * 5, object), allow_pickle=True)
    path.write_bytes(data.getvalue())
    record = path.with_name("000004.json")
    fields = json.loads(record.read_text())
    record.write_text(json.dumps(fields | {"index_crc32c": google_crc32c.value(data.getvalue())}))
    with pytest.raises(FormatError, match="can't be read"):
        part_of(dataset)
