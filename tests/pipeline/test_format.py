"""A reader trusts a data set only as far as the contract goes."""

import json
import os
import threading
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.files import NoRoomError, write_json
from pipeline.format import (
    INDEX_DTYPE,
    OK,
    STATUS_CODE,
    STATUSES,
    Column,
    ColumnSpec,
    FormatError,
    Plan,
    PlanSegment,
    check_key,
    column_directories,
    find_column,
    keys_hash,
    open_column,
    read_json,
    read_plan,
    status_counts,
    write_plan,
)
from pipeline.records import sum_records
from tests.train.columns import Dataset

SPEC = ColumnSpec(
    modality="video",
    codec={"name": "dct", "channels": 16},
    preprocessing={"fps": 8.0, "size": 64},
    axes=("time", "channel", "height", "width"),
    rate_hz=8.0,
    offset_s=0.0,
    croppable=True,
)
OTHER_VALUES = {
    "modality": "audio",
    "codec": {"name": "dct", "channels": 17},
    "preprocessing": {"fps": 8.0, "size": 72},
    "axes": ("time", "height", "channel", "width"),
    "rate_hz": 8.5,
    "offset_s": 0.1,
    "croppable": False,
    "dtype": "float32",
    "format_version": 2,
    "weights": {"vae": "0123abcd"},
}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return Dataset(tmp_path_factory.mktemp("shards") / "data", failed={2: "no_video"}).build()


@pytest.fixture
def column(tmp_path):
    dataset = Dataset(tmp_path / "data", num_clips=8, failed={2: "no_video"})
    dataset.root.mkdir()
    dataset.write_plan()
    return dataset.write_column("video")


# -- columns


@pytest.mark.parametrize("name", [field.name for field in fields(ColumnSpec)])
def test_fingerprint_changes_with_every_field(name):
    other = replace(SPEC, **{name: OTHER_VALUES[name]})
    assert other.fingerprint != SPEC.fingerprint
    assert other.directory != SPEC.directory


def test_fingerprint_does_not_depend_on_the_order_of_settings():
    turned = replace(SPEC, codec=dict(reversed(SPEC.codec.items())))
    assert turned.fingerprint == SPEC.fingerprint


@pytest.mark.parametrize("name", [field.name for field in fields(ColumnSpec)])
def test_edited_column_json_is_refused(column, name):
    path = column.path / "column.json"
    value = read_json(path)
    write_json(path, {**value, name: OTHER_VALUES[name]})
    with pytest.raises(FormatError, match="hashes to"):
        open_column(column.path.parent, column.path.name, column.plan_id)


@pytest.mark.parametrize("name", [field.name for field in fields(ColumnSpec)])
@pytest.mark.parametrize("value", [None, 5, "x", [], [[1]], {"x": 1}])
def test_damaged_column_json_is_refused_whatever_is_in_it(column, name, value):
    path = column.path / "column.json"
    write_json(path, {**read_json(path), name: value})
    with pytest.raises(FormatError, match=column.path.name):
        open_column(column.path.parent, column.path.name, column.plan_id)


def test_column_json_survives_added_statistics(column):
    path = column.path / "column.json"
    write_json(path, {**read_json(path), "statistics": {"mean": [0.0]}})
    assert open_column(column.path.parent, column.path.name, "p").spec == column.spec


def test_moved_column_is_refused(column):
    moved = column.path.with_name("video@test-00000000")
    column.path.rename(moved)
    with pytest.raises(FormatError, match="edited or moved"):
        open_column(moved.parent, moved.name, column.plan_id)


def test_column_is_found_by_codec_fingerprint_and_directory(built):
    plan_id = built.plan.plan_id
    spec = built.spec("audio")
    for wanted in (None, "test", spec.fingerprint, f"test-{spec.fingerprint}", spec.directory):
        assert find_column(built.root, "audio", wanted, plan_id).path.name == spec.directory


def test_several_columns_that_fit_are_listed(tmp_path):
    names = []
    for codec in ("one", "two"):
        dataset = Dataset(tmp_path / "data", num_clips=2, video_name=codec)
        dataset.root.mkdir(exist_ok=True)
        names.append(dataset.write_column("video").path.name)
    with pytest.raises(FormatError) as error:
        find_column(dataset.root, "video", None, "p")
    assert all(name in str(error.value) for name in names)
    assert find_column(dataset.root, "video", "two", "p").path.name == names[1]


@pytest.mark.parametrize("wanted", ["nothing", "tes", "test-", "audio@test"])
def test_no_column_that_fits_lists_what_is_there(built, wanted):
    with pytest.raises(FormatError) as error:
        find_column(built.root, "video", wanted, built.plan.plan_id)
    assert wanted in str(error.value) and built.spec("video").directory in str(error.value)


def test_only_columns_count_as_columns(built, tmp_path):
    for name in ("facts@probe-12345678", "runs", "video", ".video@x-12345678"):
        (tmp_path / name).mkdir()
    (tmp_path / "video@file-12345678").touch()
    assert column_directories(tmp_path) == []
    assert len(column_directories(built.root)) == 3


# -- commits and index


def test_commit_of_another_plan_or_column_is_refused(column):
    path = column.path / "000000.json"
    record = read_json(path)
    for name in ("plan_id", "column"):
        write_json(path, {**record, name: "another"})
        with pytest.raises(FormatError, match=f"{name} is 'another'"):
            column.commit(0)
        with pytest.raises(FormatError):
            column.index(0, 8)


def test_uncommitted_shard_has_no_index_and_no_tar(column):
    (column.path / "000000.json").unlink()
    assert column.commit(0) is None and column.committed_shards() == set()
    with pytest.raises(FormatError, match="not committed"):
        column.index(0, 8)
    with pytest.raises(FormatError, match="not committed"):
        column.tar_path(0)


def test_index_delimits_the_payloads(built):
    column = Column(built.root / built.spec("video").directory, built.spec("video"), "")
    column = replace(column, plan_id=built.plan.plan_id)
    index = column.index(0, built.shard_size)
    tar = column.tar_path(0).read_bytes()
    assert index["status"][2] == STATUS_CODE["no_video"] and index["nbytes"][2] == 0
    for row, clip in enumerate(built.shard_clips(0)):
        if clip in built.failed:
            continue
        offset, nbytes = int(index["offset"][row]), int(index["nbytes"][row])
        shape = [size for size in index["shape"][row] if size]
        payload = np.frombuffer(tar[offset : offset + nbytes], np.float16).reshape(shape)
        np.testing.assert_array_equal(payload, built.video(clip))


def damaged(index, row, **values):
    index = index.copy()
    for name, value in values.items():
        index[name][row] = value
    return index


@pytest.mark.parametrize(
    "values",
    [
        {"offset": 2**63},
        {"offset": 2**64 - 8},  # offset + nbytes wraps around
        {"nbytes": 2**64 - 8},
        {"nbytes": 2**64 - 8, "offset": 16},
        {"nbytes": 2},
        {"status": len(STATUSES)},
        {"status": 2**32 - 1},
        {"shape": (7, 7, 7, 7)},
        {"shape": (2**16, 2**16, 2**16, 2**16), "nbytes": 0},  # the product wraps around to 0
        {"shape": (2**31, 2**31, 4, 0), "nbytes": 0},
    ],
)
@pytest.mark.parametrize("row", [0, 7])
def test_index_that_does_not_fit_its_tar_is_refused(column, row, values):
    path = column.path / read_json(column.path / "000000.json")["index"]
    np.save(path, damaged(np.load(path), row, **values))
    with pytest.raises(FormatError, match=f"row {row}"):
        column.index(0, 8)


def test_index_past_a_shortened_tar_record_is_refused(column):
    path = column.path / "000000.json"
    write_json(path, {**read_json(path), "tar_bytes": 600})
    with pytest.raises(FormatError, match="600 bytes of tar"):
        column.index(0, 8)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x93NUMPY",
        b"garbage that is no array at all",
        "another length",
        "another type",
        "objects",
        "two axes",
    ],
)
def test_unreadable_index_is_refused(column, content):
    path = column.path / read_json(column.path / "000000.json")["index"]
    arrays = {
        "another length": np.zeros(7, INDEX_DTYPE),
        "another type": np.zeros(8),
        "objects": np.array([{}] * 8, dtype=object),
        "two axes": np.zeros((8, 1), INDEX_DTYPE),
    }
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.save(path, arrays[content], allow_pickle=True)
    with pytest.raises(FormatError, match="encode the shard again"):
        column.index(0, 8)


def test_missing_index_is_refused(column):
    (column.path / read_json(column.path / "000000.json")["index"]).unlink()
    with pytest.raises(FormatError, match="encode the shard again"):
        column.index(0, 8)


def test_statistics_are_those_of_all_payloads(built):
    column = find_column(built.root, "audio", None, built.plan.plan_id)
    clips = [clip for clip in range(built.num_clips) if clip not in built.failed]
    values = np.concatenate([built.audio(clip).astype(np.float64) for clip in clips])
    found = sum_records(column).statistics()
    assert found["count"] == values.size // values.shape[-1]
    np.testing.assert_allclose(found["mean"], values.mean(axis=(0, 1)), atol=1e-6)
    np.testing.assert_allclose(found["std"], values.std(axis=(0, 1)), rtol=1e-6)


def test_column_without_a_payload_has_no_statistics(tmp_path):
    dataset = Dataset(tmp_path / "data", num_clips=2, failed={0: "missing", 1: "missing"})
    dataset.root.mkdir()
    assert sum_records(dataset.write_column("video")).statistics() is None


# -- plan


def num_shards(segment):
    return -(-segment.num_clips // segment.shard_size)


@st.composite
def segments(draw):
    found, first = [], 0
    for _ in range(draw(st.integers(1, 4))):
        segment = PlanSegment(first, draw(st.integers(1, 60)), draw(st.integers(1, 20)))
        found.append(segment)
        first += num_shards(segment)
    return tuple(found)


@given(segments(), segments())
def test_shard_rows_cover_every_clip(clips, captions):
    plan = Plan("p", 0, {}, clips, captions)
    for text, parts in ((False, clips), (True, captions)):
        rows = plan.shard_rows(text=text)
        assert rows.sum() == sum(part.num_clips for part in parts)
        assert len(rows) == sum(num_shards(part) for part in parts)
        for part in parts:
            own = rows[part.first_shard : part.first_shard + num_shards(part)]
            assert (own[:-1] == part.shard_size).all() and 1 <= own[-1] <= part.shard_size


def test_plan_is_read_as_written(tmp_path):
    plan = Plan("abcd", 3, {"kind": "folder"}, (PlanSegment(0, 9, 4), PlanSegment(3, 1, 4)), (), 1)
    write_plan(tmp_path, plan)
    assert read_plan(tmp_path) == plan


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "3", '{"format_version": 1}', '{"format_version": 1, "clips": 3}'],
)
def test_damaged_plan_is_refused(tmp_path, text):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(FormatError, match=r"plan\.json"):
        read_plan(tmp_path)


@pytest.mark.parametrize("name", ["plan_id", "seed", "source", "clips", "captions"])
def test_plan_that_lacks_a_field_is_refused(built, tmp_path, name):
    value = read_json(built.root / "plan.json")
    del value[name]
    write_json(tmp_path / "plan.json", value)
    with pytest.raises(FormatError, match="damaged"):
        read_plan(tmp_path)


def test_plan_of_a_newer_version_is_refused(built, tmp_path):
    write_json(tmp_path / "plan.json", {**read_json(built.root / "plan.json"), "format_version": 2})
    with pytest.raises(FormatError, match="format version 2"):
        read_plan(tmp_path)


def test_missing_plan_says_what_is_missing(tmp_path):
    with pytest.raises(FormatError, match=r"plan\.json is missing"):
        read_plan(tmp_path)


# -- small files


def test_reader_never_sees_a_part_of_a_json(tmp_path):
    path = tmp_path / "value.json"
    write_json(path, {"values": [0] * 2000})
    stop = threading.Event()

    def rewrite():
        number = 0
        while not stop.is_set():
            number += 1
            write_json(path, {"values": [number] * 2000})

    writer = threading.Thread(target=rewrite)
    writer.start()
    try:
        for _ in range(300):
            values = json.loads(path.read_bytes())["values"]
            assert len(values) == 2000 and len(set(values)) == 1
    finally:
        stop.set()
        writer.join()
    assert [entry.name for entry in tmp_path.iterdir()] == ["value.json"]


def test_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "value.json"
    write_json(path, {"old": 1})

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(NoRoomError, match="No space"):
        write_json(path, {"new": 2})
    assert read_json(path) == {"old": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["value.json"]


def test_value_that_json_cannot_hold_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "value.json", {"mean": float("nan")})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key", ["", "a.b", "a b", "ä", "a/b", "x" * 81, "a\n"])
def test_key_that_a_tar_cannot_hold_is_refused(key):
    with pytest.raises(FormatError, match="must match"):
        check_key(key)


@given(st.lists(st.integers(0, len(STATUSES) - 1)))
def test_status_counts_add_up(codes):
    counts = status_counts(codes)
    assert sum(counts.values()) == len(codes)
    assert all(counts[name] == codes.count(STATUS_CODE[name]) for name in counts)
    assert STATUSES[OK] == "ok"


@given(st.lists(st.from_regex(r"[A-Za-z0-9_-]{1,5}", fullmatch=True), min_size=2, unique=True))
def test_keys_hash_knows_the_order(keys):
    assert keys_hash(keys) != keys_hash(reversed(keys))
    assert keys_hash(keys) == keys_hash(iter(keys))
