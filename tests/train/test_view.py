"""Properties of a view: which clips it holds, what the model is told, which damage it names."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.format import FormatError, open_column
from pipeline.settings import ConfigError
from tests.train.columns import Dataset
from train.data.view import DataConfig, View, open_view


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return Dataset(tmp_path / "shards").build()


def view_of(dataset: Dataset, subset: Any = "all", **config: Any) -> View:
    return open_view(dataset.root, DataConfig(**config), subset)


def column_path(dataset: Dataset, modality: str) -> Path:
    return dataset.root / dataset.spec(modality).directory


def test_crops_are_whole_latents_in_multiples_of_the_patch(dataset: Dataset) -> None:
    config = DataConfig(seconds=3.3)
    view = open_view(dataset.root, config, "all", {"video": 4, "audio": 5})
    assert view.video.shape == (12, 2, 3, 3)  # 13.2 latents at 4 Hz
    assert view.audio.shape == (80, 4, 2)  # 82.5 at 25 Hz
    assert view.text_width == dataset.text_width
    np.testing.assert_array_equal(view.null_text.numpy(), dataset.text(0))


def test_crop_below_one_patch_is_an_error(dataset: Dataset) -> None:
    with pytest.raises(ConfigError, match="at least 4 seconds"):
        open_view(dataset.root, DataConfig(seconds=3), "all", {"video": 16})


def test_statistics_are_those_of_the_column(dataset: Dataset) -> None:
    values = np.concatenate([dataset.audio(clip) for clip in range(40)]).astype(np.float64)
    view = view_of(dataset)
    np.testing.assert_allclose(view.audio.mean, values.mean(axis=(0, 1)), atol=1e-9)
    np.testing.assert_allclose(view.audio.std, values.std(axis=(0, 1)), rtol=1e-9)


def test_train_and_heldout_part_the_clips(tmp_path: Path) -> None:
    built = Dataset(tmp_path / "shards", num_clips=200, splits={3: "test", 50: "test"}).build()
    train, heldout, everything = (
        set(view_of(built, subset, heldout_share=0.2).clips.keys)
        for subset in ("train", "heldout", "all")
    )
    assert train | heldout == everything and not train & heldout
    assert {built.key(3), built.key(50)} <= heldout
    assert 20 <= len(heldout) <= 65
    larger = set(view_of(built, "heldout", heldout_share=0.4).clips.keys)
    assert heldout <= larger


def test_failed_and_short_clips_are_an_error_unless_dropped(tmp_path: Path) -> None:
    built = Dataset(
        tmp_path / "shards", failed={1: "silent", 2: "silent", 9: "missing"}, short_s={20: 5.0}
    ).build()
    with pytest.raises(FormatError) as caught:
        view_of(built)
    text = str(caught.value)
    assert "4 of 40" in text and "data.missing=drop" in text
    assert "missing 1" in text and "silent 2" in text and "shorter than 8 s 1" in text
    view = view_of(built, missing="drop")
    dropped = {built.key(clip) for clip in (1, 2, 9, 20)}
    assert set(view.clips.keys) == {built.key(clip) for clip in range(40)} - dropped
    assert view.rows_per_shard.tolist() == [6, 7, 7, 8, 8]
    assert view_of(built, missing="drop", seconds=5.0).num_clips == 37


def test_one_percent_of_failed_clips_is_let_pass(tmp_path: Path) -> None:
    built = Dataset(tmp_path / "shards", num_clips=100, failed={7: "silent"}).build()
    assert view_of(built).num_clips == 99


def test_no_clip_left_is_an_error(dataset: Dataset) -> None:
    with pytest.raises(FormatError, match="none is left"):
        view_of(dataset, seconds=11.0, missing="drop")


def test_view_id_names_what_changes_the_stream(dataset: Dataset, tmp_path: Path) -> None:
    same = Dataset(tmp_path / "copy").build()
    other = dataclasses.replace(dataset, video_name="other")
    other.write_column("video")
    ids = [
        view_of(dataset, video="test").view_id,
        view_of(dataset, video="other").view_id,
        view_of(dataset, video="test", seconds=4.0).view_id,
        view_of(dataset, video="test", window_shards=2).view_id,
        view_of(dataset, "train", video="test").view_id,
    ]
    assert len(set(ids)) == len(ids)
    assert view_of(same, read_threads=1, prefetch_steps=9, verify_crc=False).view_id == ids[0]


def test_several_columns_need_a_name(dataset: Dataset) -> None:
    dataclasses.replace(dataset, video_name="other").write_column("video")
    with pytest.raises(FormatError, match="fits several columns"):
        view_of(dataset)


def test_folder_without_a_data_set_is_named(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"is missing; is .* a data set"):
        open_view(tmp_path / "nowhere", DataConfig())


def test_missing_column_is_named(dataset: Dataset) -> None:
    shutil.rmtree(column_path(dataset, "audio"))
    with pytest.raises(FormatError, match="has no audio column"):
        view_of(dataset)


def test_plan_rows_of_another_plan_are_refused(dataset: Dataset) -> None:
    path = dataset.root / "plan.parquet"
    pq.write_table(pq.read_table(path).slice(1), path)
    with pytest.raises(FormatError, match="39 clips, not the 40"):
        view_of(dataset)


@pytest.mark.parametrize("modality", ["video", "audio", "text"])
def test_uncommitted_shards_are_counted_and_named(dataset: Dataset, modality: str) -> None:
    (column_path(dataset, modality) / "000001.json").unlink()
    with pytest.raises(FormatError, match=r"1 of \d shards .*000001.*run pipeline.encode again"):
        view_of(dataset)


def test_index_of_another_shard_is_found(dataset: Dataset) -> None:
    folder = column_path(dataset, "video")
    shutil.copy(folder / "000001.idx.npy", folder / "000000.idx.npy")
    with pytest.raises(FormatError, match="000000: index_crc32c is"):
        view_of(dataset)


def test_record_of_another_shard_is_found(dataset: Dataset) -> None:
    folder = column_path(dataset, "video")
    shutil.copy(folder / "000001.json", folder / "000000.json")
    with pytest.raises(FormatError, match="000000: shard is 1, expected 0"):
        view_of(dataset)


def test_record_with_other_clips_is_found(dataset: Dataset) -> None:
    path = column_path(dataset, "audio") / "000002.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "keys_hash": "0" * 16}))
    with pytest.raises(FormatError, match=r"000002: keys_hash is 0{16}"):
        view_of(dataset)


@pytest.mark.parametrize("name", ["000003.tar", "000003.idx.npy"])
def test_vanished_file_is_named(dataset: Dataset, name: str) -> None:
    (column_path(dataset, "video") / name).unlink()
    with pytest.raises(FormatError, match=f"{name} is missing though committed"):
        view_of(dataset)


def test_truncated_tar_is_found(dataset: Dataset) -> None:
    path = column_path(dataset, "video") / "000002.tar"
    path.write_bytes(path.read_bytes()[:-512])
    with pytest.raises(FormatError, match="000002: tar_bytes is"):
        view_of(dataset)


def test_clips_of_different_sizes_are_refused(tmp_path: Path) -> None:
    built = Dataset(tmp_path / "shards").build()
    folder = column_path(built, "video")
    (folder / "000004.json").unlink()
    larger = dataclasses.replace(built, video_size=(2, 4, 3))
    column = open_column(built.root, folder.name, built.plan.plan_id)
    larger.write_shard(column, 4, "larger")
    with pytest.raises(FormatError, match="clips differ along"):
        view_of(built)
