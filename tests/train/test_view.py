"""Properties of a view: which clips it holds, what the model is told, which damage it names."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.data_root import open_root
from pipeline.files import write_json
from pipeline.format import INDEX_DTYPE, FormatError, open_column
from pipeline.settings import ConfigError
from tests.pipeline.servers import s3_bucket
from tests.train.columns import Dataset
from train.data.census import NOT_USABLE
from train.data.config import DataConfig, PartConfig
from train.data.view import View, open_view


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return Dataset(tmp_path / "shards").build()


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)


def view_of(dataset: Dataset, subset: Any = "all", **config: Any) -> View:
    return open_view(DataConfig(root=str(dataset.root), **config), subset)


def mix_of(*parts: Dataset | PartConfig, subset: Any = "all", **config: Any) -> View:
    configs = [
        part if isinstance(part, PartConfig) else PartConfig(root=str(part.root)) for part in parts
    ]
    return open_view(DataConfig(mix=tuple(configs), **config), subset)


def keys_of(view: View, bucket: int | None = None) -> set[str]:
    """Return the keys of the usable clips, of one bucket or of all."""
    keys = set()
    for part in view.parts:
        for shard in range(len(part.counts)):
            buckets = part.buckets_of(shard)
            wanted = buckets != NOT_USABLE if bucket is None else buckets == bucket
            rows = part.shard_rows(shard)
            keys |= {rows.keys[row] for row in np.flatnonzero(wanted)}
    return keys


def keys_but(dataset: Dataset, *left_out: int) -> set[str]:
    return {dataset.key(clip) for clip in range(dataset.num_clips) if clip not in left_out}


# -- what the model is told


def test_crops_are_whole_latents_in_multiples_of_the_patch(dataset: Dataset) -> None:
    config = DataConfig(root=str(dataset.root), seconds=3.3)
    view = open_view(config, "all", {"video": 4, "audio": 5})
    assert view.video.shape == (12, 2, 3, 3)  # 13.2 latents at 4 Hz
    assert view.audio.shape == (80, 4, 2)  # 82.5 at 25 Hz
    assert view.text_width == dataset.text_width
    np.testing.assert_array_equal(view.null_text.numpy(), dataset.text(0))


def test_crop_below_one_patch_is_an_error(dataset: Dataset) -> None:
    with pytest.raises(ConfigError, match="at least 4 seconds"):
        open_view(DataConfig(root=str(dataset.root), seconds=3), "all", {"video": 16})


def test_statistics_are_those_of_the_column(dataset: Dataset) -> None:
    values = np.concatenate([dataset.audio(clip) for clip in range(40)]).astype(np.float64)
    view = view_of(dataset)
    np.testing.assert_allclose(view.audio.mean, values.mean(axis=(0, 1)), atol=1e-9)
    np.testing.assert_allclose(view.audio.std, values.std(axis=(0, 1)), rtol=1e-9)


def test_statistics_of_a_mixture_are_those_of_all_its_clips(tmp_path: Path) -> None:
    one = Dataset(tmp_path / "one", num_clips=30).build()
    two = Dataset(tmp_path / "two", num_clips=9, clip_s=9.0, seed=1).build()
    clips = [one.video(clip) for clip in range(30)] + [two.video(clip) for clip in range(9)]
    values = np.concatenate(clips).astype(np.float64)
    view = mix_of(one, two)
    np.testing.assert_allclose(view.video.mean, values.mean(axis=(0, 2, 3)), atol=1e-9)
    np.testing.assert_allclose(view.video.std, values.std(axis=(0, 2, 3)), rtol=1e-9)


def test_model_gets_half_the_channels_of_moments(tmp_path: Path) -> None:
    built = Dataset(tmp_path / "shards", moments=frozenset(["video"])).build()
    view = view_of(built)
    assert view.video.shape == (32, 2, 3, 3) and len(view.video.mean) == 2
    assert view.parts[0].shard_rows(0).index["video"]["shape"][0].tolist() == [40, 4, 3, 3]


# -- which clips


def test_train_and_heldout_part_the_clips(tmp_path: Path) -> None:
    built = Dataset(tmp_path / "shards", num_clips=200, splits={3: "test", 50: "test"}).build()
    train, heldout, everything = (
        keys_of(view_of(built, subset, heldout_share=0.2)) for subset in ("train", "heldout", "all")
    )
    assert train | heldout == everything and not train & heldout
    assert {built.key(3), built.key(50)} <= heldout
    assert 20 <= len(heldout) <= 65
    larger = keys_of(view_of(built, "heldout", heldout_share=0.4))
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
    assert keys_of(view) == keys_but(built, 1, 2, 9, 20)
    assert view.parts[0].counts.tolist() == [[6], [7], [7], [8], [8]]
    assert view_of(built, missing="drop", seconds=5.0).num_clips == 37


def test_one_percent_of_failed_clips_is_let_pass(tmp_path: Path) -> None:
    built = Dataset(tmp_path / "shards", num_clips=100, failed={7: "silent"}).build()
    assert view_of(built).num_clips == 99


def test_no_clip_left_is_an_error(dataset: Dataset) -> None:
    with pytest.raises(FormatError, match="none is left"):
        view_of(dataset, seconds=11.0, missing="drop")


def test_nothing_wanted_is_told_from_nothing_usable(tmp_path: Path) -> None:
    built = Dataset(tmp_path / "shards", failed={1: "silent"}, splits={3: "test"}).build()
    with pytest.raises(FormatError, match=r"no clips of subset 'heldout': of its 40, 40 are outs"):
        view_of(Dataset(tmp_path / "two").build(), "heldout", heldout_share=0.0)
    with pytest.raises(FormatError) as caught:
        view_of(built, "train", heldout_share=0.0, filter="start_s > 1" + " or start_s > 1" * 600)
    text = str(caught.value)
    assert "no clips of subset 'train' that pass data.filter 'start_s > 1 or" in text
    assert "of its 40, 1 are outside" in text and "39 don't pass" in text and len(text) < 600


def test_clips_of_a_failed_caption_are_not_usable(tmp_path: Path) -> None:
    built = Dataset(tmp_path / "shards", failed_text={2: "encode_error"}).build()
    with_it = [clip for clip in range(40) if built.text_row(clip) == 2]
    for missing in ("drop", "mask"):
        assert keys_of(view_of(built, missing=missing)) == keys_but(built, *with_it)


def test_clips_with_one_modality_are_kept_when_masked(tmp_path: Path) -> None:
    built = Dataset(
        tmp_path / "shards",
        failed={1: "unreadable"},
        failed_video={2: "no_video"},
        failed_audio={3: "no_audio", 4: "silent"},
    ).build()
    with pytest.raises(FormatError, match=r"4 of 40 .*no_video 1, no_audio 1, silent 1"):
        view_of(built)
    assert keys_of(view_of(built, missing="drop")) == keys_but(built, 1, 2, 3, 4)
    view = view_of(built, missing="mask")
    assert keys_of(view) == keys_but(built, 1)
    rows = view.parts[0].shard_rows(0)
    assert rows.has["video"].tolist() == [True, False, False, *[True] * 5]
    assert rows.has["audio"].tolist() == [True, False, True, False, False, *[True] * 3]
    tally = view.parts[0].census.head.tally
    assert (tally.complete, tally.video_only, tally.audio_only) == (36, 2, 1)
    assert tally.statuses["audio"] == {"ok": 37, "unreadable": 1, "no_audio": 1, "silent": 1}


# -- shapes


def test_clips_of_one_size_share_a_bucket(tmp_path: Path) -> None:
    wide = frozenset(range(12))
    built = Dataset(tmp_path / "shards", wide=wide).build()
    view = view_of(built)
    assert [bucket.num_clips for bucket in view.buckets] == [28, 12]
    assert [bucket.video.shape for bucket in view.buckets] == [(32, 2, 3, 3), (32, 2, 3, 6)]
    assert {bucket.video.mean for bucket in view.buckets} == {view.video.mean}
    assert keys_of(view, 1) == {built.key(clip) for clip in wide}
    assert view.parts[0].counts.tolist() == [[0, 8], [4, 4], [8, 0], [8, 0], [8, 0]]


def test_masked_clip_goes_where_its_size_is(tmp_path: Path) -> None:
    built = Dataset(
        tmp_path / "shards",
        wide=frozenset({0, 1, 2}),
        failed_audio={0: "no_audio"},
        failed_video={30: "no_video"},
    ).build()
    view = view_of(built, missing="mask")
    assert keys_of(view, 1) == {built.key(clip) for clip in (0, 1, 2)}
    assert built.key(30) in keys_of(view, 0)


def test_masked_clips_of_a_size_that_no_whole_clip_has_get_a_bucket(tmp_path: Path) -> None:
    built = Dataset(
        tmp_path / "shards", wide=frozenset({0, 1}), failed_audio={0: "no_audio", 1: "silent"}
    ).build()
    view = view_of(built, missing="mask")
    assert view.buckets[1].video.shape == (32, 2, 3, 6) and view.buckets[1].num_clips == 2
    assert view.buckets[1].audio == view.audio
    assert len(view_of(built, missing="drop").buckets) == 1


def test_size_of_sound_that_no_clip_has_is_not_known(tmp_path: Path) -> None:
    failed = dict.fromkeys(range(40), "no_audio")
    built = Dataset(tmp_path / "shards", failed_audio=failed).build()
    with pytest.raises(FormatError, match=r"no clip has audio.*encode audio"):
        view_of(built, missing="mask")


# -- several data sets


def test_mixture_has_the_buckets_of_all_its_parts(tmp_path: Path) -> None:
    one = Dataset(tmp_path / "one", num_clips=10, wide=frozenset(range(8))).build()
    two = Dataset(tmp_path / "two", num_clips=9, seed=1).build()
    view = mix_of(
        PartConfig(root=str(one.root), weight=3.0), PartConfig(root=str(two.root), weight=1.0)
    )
    assert [bucket.num_clips for bucket in view.buckets] == [11, 8]
    assert [part.weight for part in view.parts] == [0.75, 0.25]
    assert [part.counts.tolist() for part in view.parts] == [[[0, 8], [2, 0]], [[8, 0], [1, 0]]]
    assert keys_of(view, 1) == {one.key(clip) for clip in range(8)}
    assert view.plan_id == f"{one.plan.plan_id}+{two.plan.plan_id}"
    np.testing.assert_array_equal(view.null_text.numpy(), one.text(0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"video_name": "other"}, r"codec is .*'other'.*but .*'test'"),
        ({"moments": frozenset(["audio"])}, r"codec is .*'moments'"),
        ({"video_size": (3, 3, 3)}, "3 channels, but 2"),
        ({"text_width": 5}, "5 wide, but 6"),
    ],
)
def test_parts_that_do_not_fit_together_are_named(
    dataset: Dataset, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    other = Dataset(tmp_path / "other", seed=1, **change).build()
    with pytest.raises(FormatError, match=message) as caught:
        mix_of(dataset, other)
    assert str(dataset.root) in str(caught.value) and str(other.root) in str(caught.value)


def test_part_without_usable_clips_is_named(dataset: Dataset, tmp_path: Path) -> None:
    short = Dataset(tmp_path / "short", clip_s=5.0, seed=1).build()
    with pytest.raises(FormatError, match=f"{short.root}: .*none is left"):
        mix_of(dataset, short, missing="drop")


# -- names


def test_view_id_names_what_changes_the_stream(dataset: Dataset, tmp_path: Path) -> None:
    same = Dataset(tmp_path / "copy").build()
    other = dataclasses.replace(dataset, video_name="other")
    other.write_column("video")
    ids = [
        view_of(dataset, video="test").view_id,
        view_of(dataset, video="other").view_id,
        view_of(dataset, video="test", seconds=4.0).view_id,
        view_of(dataset, video="test", window_shards=2).view_id,
        view_of(dataset, video="test", tail="wrap").view_id,
        view_of(dataset, video="test", missing="mask").view_id,
        view_of(dataset, video="test", filter="key != 'clip00000'").view_id,
        view_of(dataset, "train", video="test").view_id,
        mix_of(PartConfig(root=str(dataset.root), video="test"), same).view_id,
        mix_of(PartConfig(root=str(dataset.root), video="test", weight=2.0), same).view_id,
    ]
    assert len(set(ids)) == len(ids)
    others = view_of(same, read_threads=1, prefetch_steps=9, verify_crc="always", missing="drop")
    assert others.view_id == ids[0]


def test_view_id_follows_the_content_of_shards(dataset: Dataset) -> None:
    before = view_of(dataset).view_id
    shard = dataset.column_path("video") / "000004.json"
    shard.unlink()
    column = open_column(dataset.root, shard.parent.name, dataset.plan.plan_id)
    dataset.write_shard(column, 4, "again")
    assert view_of(dataset).view_id == before
    shard.unlink()
    dataclasses.replace(dataset, clip_s=9.0).write_shard(column, 4, "longer")
    assert view_of(dataset).view_id != before


def test_several_columns_need_a_name(dataset: Dataset) -> None:
    dataclasses.replace(dataset, video_name="other").write_column("video")
    with pytest.raises(FormatError, match="fits several columns"):
        view_of(dataset)


def test_folder_without_a_data_set_is_named(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"is missing; is .* a data set"):
        open_view(DataConfig(root=str(tmp_path / "nowhere")))


def test_missing_column_is_named(dataset: Dataset) -> None:
    shutil.rmtree(dataset.column_path("audio"))
    with pytest.raises(FormatError, match="has no audio column"):
        view_of(dataset)


# -- damage


@pytest.mark.parametrize(
    ("modality", "change"),
    [
        ("video", {"axes": ("channel", "time", "height", "width")}),
        ("audio", {"axes": ("time", "channel", "x", "y", "z")}),
        ("audio", {"rate_hz": "25"}),
        ("audio", {"rate_hz": 0.0}),
        ("video", {"rate_hz": 1e308}),
        ("text", {"axes": ("token", "word", "channel")}),
        ("text", {"dtype": "float32"}),
    ],
)
def test_columns_that_no_batch_can_be_made_of_are_named(
    dataset: Dataset, modality: str, change: dict[str, Any]
) -> None:
    spec = dataclasses.replace(dataset.spec(modality), **change)
    shutil.rmtree(dataset.column_path(modality))
    (dataset.root / spec.directory).mkdir()
    write_json(dataset.root / spec.directory / "column.json", dataclasses.asdict(spec))
    with pytest.raises(FormatError, match="encode it again"):
        view_of(dataset)


def test_plan_without_clips_is_an_error(tmp_path: Path) -> None:
    built = Dataset(tmp_path / "shards", num_clips=0).build()
    with pytest.raises(FormatError, match=r"no clips of subset 'all': of its 0, 0 are outside"):
        view_of(built)


def test_plan_rows_of_another_plan_are_refused(dataset: Dataset) -> None:
    path = dataset.root / "plan.parquet"
    pq.write_table(pq.read_table(path).slice(1), path, row_group_size=8)
    with pytest.raises(FormatError, match="of its size; restore both"):
        view_of(dataset)


def test_missing_plan_rows_are_named(dataset: Dataset) -> None:
    (dataset.root / "plan.parquet").unlink()
    with pytest.raises(FormatError, match=r"plan.parquet is missing; restore it"):
        view_of(dataset)


def test_plan_rows_that_count_captions_in_fractions_are_refused(dataset: Dataset) -> None:
    path = dataset.root / "plan.parquet"
    table = pq.read_table(path)
    text_rows = [row + 0.5 for row in table["text_row"].to_pylist()]
    table = table.set_column(table.column_names.index("text_row"), "text_row", [text_rows])
    pq.write_table(table, path, row_group_size=8)
    with pytest.raises(FormatError, match="text row outside the 7 captions; restore it"):
        view_of(dataset)


def test_plan_rows_in_another_order_are_refused(dataset: Dataset) -> None:
    path = dataset.root / "plan.parquet"
    table = pq.read_table(path)
    key = table["key"].to_pylist()
    key[3:5] = key[4], key[3]
    table = table.set_column(table.column_names.index("key"), "key", [key])
    pq.write_table(table, path, row_group_size=8)
    with pytest.raises(FormatError, match=r"000000.json: keys_hash is .* as planned"):
        view_of(dataset)


@pytest.mark.parametrize("modality", ["video", "audio", "text"])
def test_uncommitted_shards_are_counted_and_named(dataset: Dataset, modality: str) -> None:
    (dataset.column_path(modality) / "000001.json").unlink()
    with pytest.raises(FormatError, match=r"1 of \d shards .*000001.*run pipeline.encode again"):
        view_of(dataset)


def test_record_of_another_column_is_found(dataset: Dataset) -> None:
    other = dataclasses.replace(dataset, video_name="other")
    other.write_column("video")
    source = other.column_path("video") / "000002.json"
    shutil.copy(source, dataset.column_path("video") / "000002.json")
    with pytest.raises(FormatError, match=r"column is 'video@other.*copied from another"):
        view_of(dataset, video="test")


def test_record_of_another_plan_is_found(dataset: Dataset, tmp_path: Path) -> None:
    other = Dataset(tmp_path / "other", num_clips=48).build()
    source = other.column_path("audio") / "000002.json"
    shutil.copy(source, dataset.column_path("audio") / "000002.json")
    with pytest.raises(FormatError, match="plan_id is"):
        view_of(dataset)


def test_index_of_another_shard_is_found(dataset: Dataset) -> None:
    folder = dataset.column_path("video")
    shutil.copy(folder / "000001.idx.npy", folder / "000000.idx.npy")
    with pytest.raises(FormatError, match=r"000000.idx.npy: crc32c is"):
        view_of(dataset)


def test_record_of_another_shard_is_found(dataset: Dataset) -> None:
    folder = dataset.column_path("video")
    shutil.copy(folder / "000001.json", folder / "000000.json")
    with pytest.raises(FormatError, match=r"000000.json: shard is 1, expected 0"):
        view_of(dataset)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keys_hash": "0" * 16}, r"000002.json: keys_hash is 0{16}"),
        ({"tar": "../../other.tar"}, r"000002.json: tar is '../../other.tar'"),
        ({"channels": {"count": 1, "sum": [0.0], "sum_of_squares": [0.0]}}, "of 1 channels"),
        (
            {"channels": {"count": 9, "sum": [0.0] * 2, "sum_of_squares": [1.0, -1.0]}},
            "channel 1 has the sum 0.0 and the sum of squares -1.0, which no 9 values have",
        ),
        (
            {"channels": {"count": 9, "sum": [4.0] * 2, "sum_of_squares": [1.0, 1.0]}},
            "channel 0 has the sum 4.0 and",
        ),
        (
            {"channels": {"count": 9, "sum": [1e308] * 2, "sum_of_squares": [1e308] * 2}},
            r"channel 0 has the sum 1e\+308",
        ),
        ({"tar_bytes": 512}, "doesn't fit 512 bytes of tar"),
    ],
)
def test_record_that_was_changed_is_found(
    dataset: Dataset, change: dict[str, Any], message: str
) -> None:
    path = dataset.column_path("audio") / "000002.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(FormatError, match=message):
        view_of(dataset)


@pytest.mark.parametrize("name", ["000003.tar", "000003.idx.npy"])
def test_vanished_file_is_named(dataset: Dataset, name: str) -> None:
    (dataset.column_path("video") / name).unlink()
    with pytest.raises(FormatError, match=f"{name} is missing though committed"):
        view_of(dataset)


def test_truncated_tar_is_found(dataset: Dataset) -> None:
    path = dataset.column_path("video") / "000002.tar"
    path.write_bytes(path.read_bytes()[:-512])
    with pytest.raises(FormatError, match=r"000002.tar: \d+ bytes, expected \d+ as committed"):
        view_of(dataset)


def test_damaged_empty_caption_is_found(dataset: Dataset) -> None:
    path = dataset.column_path("text") / "000000.tar"
    data = bytearray(path.read_bytes())
    index = np.load(path.with_name("000000.idx.npy"))
    data[int(index["offset"][0])] ^= 1
    path.write_bytes(data)
    with pytest.raises(FormatError, match=r"empty caption.*crc32c"):
        view_of(dataset)


def test_captions_of_another_width_are_found(dataset: Dataset) -> None:
    path = dataset.column_path("text")
    column = open_column(dataset.root, path.name, dataset.plan.plan_id)
    (path / "000001.json").unlink()
    dataclasses.replace(dataset, text_width=5).write_shard(column, 1, "other")
    with pytest.raises(FormatError, match=r"shard 1: tokens are \[5, 6\] wide, expected one"):
        view_of(dataset)


def test_index_that_tells_of_more_rows_than_memory_holds_is_named(dataset: Dataset) -> None:
    path = dataset.column_path("video") / "000001"
    header = io.BytesIO()
    facts = {"descr": INDEX_DTYPE.descr, "fortran_order": False, "shape": (10**13,)}
    np.lib.format.write_array_header_1_0(header, facts)
    path.with_name("000001.idx.npy").write_bytes(header.getvalue())
    record = json.loads(path.with_name("000001.json").read_text())
    record["index_crc32c"] = google_crc32c.value(header.getvalue())
    path.with_name("000001.json").write_text(json.dumps(record))
    with pytest.raises(FormatError, match=r"000001.idx.npy can't be read .*memory"):
        view_of(dataset)


def test_failed_empty_caption_is_an_error(tmp_path: Path) -> None:
    built = Dataset(tmp_path / "shards", failed_text={0: "encode_error"}).build()
    with pytest.raises(FormatError, match="caption 0, the empty one"):
        view_of(built)


# -- object stores


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with s3_bucket(tmp_path_factory.mktemp("s3"), "data") as files:
        yield files


def test_view_of_an_object_store_is_that_of_a_local_folder(bucket: Any, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "wide": frozenset({3, 4}),
        "failed_audio": {5: "silent"},
        "facts": {"motion": lambda clip: clip / 40},
    }
    local = Dataset(tmp_path / "local", **settings).build()
    bucket.put(str(local.root), "data/", recursive=True)
    remote = Dataset(open_root("s3://data/local"), **settings)
    config: dict[str, Any] = {"missing": "mask", "filter": "facts.motion > 0.05"}
    one, two = (view_of(dataset, **config) for dataset in (local, remote))
    assert two.view_id == one.view_id and keys_of(two) == keys_of(one)
    np.testing.assert_array_equal(two.null_text.numpy(), one.null_text.numpy())
    for shard in range(5):
        here, there = (view.parts[0].shard_rows(shard) for view in (one, two))
        np.testing.assert_array_equal(here.index["audio"], there.index["audio"])
    bucket.rm("data/local/" + local.spec("video").directory + "/000002.json")
    with pytest.raises(FormatError, match=r"1 of 5 shards .*000002"):
        view_of(remote, **config)
