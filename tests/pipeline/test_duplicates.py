"""Duplicates are found among all clips, and dropped as if they had never been encoded."""

from __future__ import annotations

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.checks import facts_row, write_facts
from pipeline.config import CheckSettings
from pipeline.duplicates import (
    drop_rows,
    find_duplicates,
    forget_settled,
    read_settled,
    settle_duplicates,
)
from pipeline.format import Column, FormatError
from pipeline.media import Clip, Decoded
from pipeline.shards import ShardWriter
from tests.train.columns import Dataset

DROP, FLAG = CheckSettings(duplicate="drop"), CheckSettings(duplicate="flag")
# Clips 9 and 30 show what clip 3 shows, 31 what 30 shows under another name.
CONTENTS = {9: 3, 30: 3, 31: 3, 17: 16}
COSTS = {"ok": (), "no_audio": ("audio",), "no_video": ("video",)}
CRASH_EVENTS = {"open", "os.rename", "os.link", "os.remove"}


def write_all_facts(folder, statuses, contents, shard_size):
    """Write the facts of clips with these statuses, by number, and contents (any number)."""
    folder.mkdir(parents=True, exist_ok=True)
    for first in range(0, len(statuses), shard_size):
        rows = []
        for clip in range(first, min(first + shard_size, len(statuses))):
            status = (statuses[clip], "why")
            problems = dict.fromkeys(COSTS.get(status[0], ("video", "audio")), status)
            content = None if contents[clip] is None else f"{contents[clip]:032x}"
            found = Decoded(None, None, problems, {"content_hash": content})
            rows.append(facts_row(clip - first, Clip(f"clip{clip:05d}", "", 0, 10), found))
        write_facts(folder, first // shard_size, rows)


def pairs(table):
    """Return (clip, first clip) by number."""
    names = zip(table["key"].to_pylist(), table["first_key"].to_pylist(), strict=True)
    return [(int(key[4:]), int(first[4:])) for key, first in names]


@pytest.fixture
def dataset(tmp_path):
    dataset = Dataset(tmp_path / "shards", failed={5: "decode_timeout"}).build()
    statuses = [dataset.failed.get(clip, "ok") for clip in range(dataset.num_clips)]
    contents = [CONTENTS.get(clip, clip) for clip in range(dataset.num_clips)]
    write_all_facts(tmp_path / "facts", statuses, contents, dataset.shard_size)
    return dataset


def columns_of(dataset, *modalities):
    specs = {modality: dataset.spec(modality) for modality in modalities or ("video", "audio")}
    return {
        modality: Column(dataset.root / spec.directory, spec, dataset.plan.plan_id)
        for modality, spec in specs.items()
    }


def settle(dataset, checks=DROP, columns=None):
    columns = columns or columns_of(dataset)
    return settle_duplicates(dataset.plan, columns, dataset.root.parent / "facts", checks)


def contents_of(root):
    """Return path -> bytes, and of commit records what does not tell of their writer."""
    found = {}
    for path in sorted(root.glob("*@*/0*")):
        found[path.relative_to(root)] = path.read_bytes()
        if path.suffix == ".json":
            record = json.loads(path.read_bytes())
            record.pop("attempt")
            found[path.relative_to(root)] = record
    return found


def never_encoded(dataset, folder):
    """Build the same data set with tombstones where the duplicates are."""
    failed = dataset.failed | dict.fromkeys(CONTENTS, "duplicate")
    return contents_of(replace(dataset, root=folder, failed=failed).build().root)


# A film without sound, or sound without a picture, is a clip like others.
@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["ok", "ok", "no_audio", "no_video", "silent"]),
            st.none() | st.integers(0, 9),
        ),
        min_size=1,
        max_size=60,
    ),
    st.integers(1, 20),
)
def test_a_clip_is_a_duplicate_exactly_when_an_earlier_one_has_its_hash(
    tmp_path_factory, clips, shard_size
):
    folder = tmp_path_factory.mktemp("facts")
    statuses, contents = zip(*clips, strict=True)
    # Large numbers that share their first or last half.
    contents = [None if c is None else (c // 3 << 64) + c % 3 for c in contents]
    write_all_facts(folder, statuses, contents, shard_size)
    expected, seen = [], {}
    for clip, (status, content) in enumerate(zip(statuses, contents, strict=True)):
        if status != "silent" and content is not None:
            if content in seen:
                expected.append((clip, seen[content]))
            seen.setdefault(content, clip)
    num_shards = -(-len(clips) // shard_size)
    table = find_duplicates(folder, list(range(num_shards)))
    assert pairs(table) == expected
    places = zip(table["shard"].to_pylist(), table["row"].to_pylist(), strict=True)
    assert [shard * shard_size + row for shard, row in places] == [clip for clip, _ in expected]


def test_flag_lists_them_and_touches_no_column(dataset):
    before = contents_of(dataset.root)
    settled = settle(dataset, FLAG)
    assert settled.flagged["duplicate"] == len(CONTENTS) and settled.complaint is None
    table = pq.read_table(dataset.root.parent / "facts" / "duplicates.parquet")
    assert pairs(table) == sorted(CONTENTS.items())
    assert contents_of(dataset.root) == before


def test_drivers_that_settle_at_once_leave_what_one_does(dataset, tmp_path):
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(settle, [dataset, dataset]))
    assert [settled.complaint for settled in both] == [None, None]
    assert contents_of(dataset.root) == never_encoded(dataset, tmp_path / "never")


def test_shard_that_another_replaces_meanwhile_is_an_error(dataset, monkeypatch):
    monkeypatch.setattr(ShardWriter, "commit", lambda *_, **__: False)
    with pytest.raises(FormatError, match="another run replaced this shard"):
        settle(dataset)


def test_drop_leaves_the_bytes_and_sums_of_never_having_encoded_them(dataset, tmp_path):
    assert settle(dataset).complaint is None
    assert contents_of(dataset.root) == never_encoded(dataset, tmp_path / "other")


def test_drop_can_be_done_again_and_does_nothing_then(dataset):
    settle(dataset)

    def times():
        return {path: path.stat().st_mtime_ns for path in dataset.root.parent.rglob("*.*")}

    before = times()
    settle(dataset)
    assert times() == before


def test_what_came_out_is_noted_for_these_columns_until_it_is_forgotten(dataset):
    folder, columns = dataset.root.parent / "facts", columns_of(dataset)
    assert read_settled(folder, columns.values()) is None
    settled = settle(dataset, columns=columns_of(dataset, "video"))
    assert read_settled(folder, columns_of(dataset, "video", "text").values()) == settled
    assert read_settled(folder, columns.values()) is None
    settled = settle(dataset)
    assert read_settled(folder, columns.values()) == settled
    assert settled.num_dropped == len(CONTENTS)
    forget_settled(folder)
    assert read_settled(folder, columns.values()) is None
    forget_settled(folder)


def test_complaint_is_not_noted(dataset):
    folder = dataset.root.parent / "facts"
    (folder / "000002.parquet").unlink()
    assert settle(dataset).complaint is not None
    assert read_settled(folder, columns_of(dataset).values()) is None


def test_failed_row_keeps_its_failure(dataset):
    """Another codec may fail on a clip that the facts call ok."""
    failing = replace(dataset, failed=dataset.failed | {9: "nonfinite"}, video_name="other")
    column = failing.write_column("video")
    settle_duplicates(dataset.plan, {"video": column}, dataset.root.parent / "facts", DROP)
    assert column.committed(1)["status_counts"] == {"ok": 7, "nonfinite": 1}
    assert column.committed(3)["status_counts"] == {"ok": 6, "duplicate": 2}


def test_columns_are_not_dropped_from_while_facts_are_lacking(dataset):
    (dataset.root.parent / "facts" / "000004.parquet").unlink()
    before = contents_of(dataset.root)
    assert "lacks 1 of 5 shards" in str(settle(dataset).complaint)
    assert contents_of(dataset.root) == before


def test_clip_whose_first_copy_failed_later_is_encoded_again(dataset, tmp_path):
    settle(dataset)
    statuses = ["missing" if clip == 16 else "ok" for clip in range(dataset.num_clips)]
    contents = [CONTENTS.get(clip, clip) for clip in range(dataset.num_clips)]
    write_all_facts(tmp_path / "facts", statuses, contents, dataset.shard_size)
    assert "1 shards lack clips" in str(settle(dataset).complaint)
    for column in columns_of(dataset).values():
        assert column.committed_shards() == {0, 1, 3, 4}
        assert dataset.write_shard(column, 2)
    assert settle(dataset).complaint is None
    for column in columns_of(dataset).values():
        assert column.committed(2)["ok"] == 8


def test_damaged_payload_is_named_and_not_copied(dataset):
    column = columns_of(dataset)["video"]
    index = column.index(1, 8)
    with (column.path / "000001.tar").open("r+b") as tar:
        tar.seek(int(index["offset"][4]))
        tar.write(b"\xff\xff")
    with pytest.raises(FormatError, match=r"000001.tar row 4 \(clip00012\): crc32c is another"):
        settle(dataset)
    assert column.committed(1)["ok"] == 8
    assert not list(column.path.glob(".*"))


def crash_while_dropping(dataset, step):
    """Drop in a child that dies before its ``step``-th change of the folder; did it finish?"""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    steps = 0

    def die(event, arguments):
        nonlocal steps
        if event in CRASH_EVENTS and str(dataset.root) in str(arguments):
            steps += 1
            if steps > step:
                os._exit(9)

    try:
        sys.addaudithook(die)
        settle(dataset, columns=columns_of(dataset, "video"))
        os._exit(0)
    finally:
        os._exit(1)


def test_crash_at_any_step_comes_to_the_same_bytes_later(tmp_path):
    """What the crash took the commit of is encoded again, then the pass is repeated."""
    whole = replace(Dataset(tmp_path / "whole"), num_clips=10, shard_size=4)
    contents = [1 if clip in (0, 5, 6) else clip for clip in range(10)]
    write_all_facts(tmp_path / "facts", ["ok"] * 10, contents, 4)
    whole.build()
    settle(whole, columns=columns_of(whole, "video"))
    expected = contents_of(whole.root)
    step, lost, finished = 0, 0, False
    while not finished:
        dataset = replace(whole, root=tmp_path / f"step{step}").build()
        finished = crash_while_dropping(dataset, step)
        column = columns_of(dataset, "video")["video"]
        for shard in set(range(3)) - column.committed_shards():
            lost += 1
            assert dataset.write_shard(column, shard, "again")
        assert settle(dataset, columns={"video": column}).complaint is None
        assert contents_of(dataset.root) == expected
        left = {path.suffixes[-2] for path in dataset.root.glob("*@*/.*")}
        assert left <= {".json"}, "more than a record's temporary is left of the dead"
        step += 1
        assert step < 60
    assert step > 10 and lost >= 2


def test_hashes_of_many_clips_are_compared_as_numbers(tmp_path):
    """100,000 clips in 20 shards, one in four a copy."""
    generator = np.random.default_rng(0)
    contents = [*range(75_000), *generator.integers(0, 75_000, 25_000).tolist()]
    generator.shuffle(contents)
    write_all_facts(tmp_path, ["ok"] * len(contents), contents, 5_000)
    table = find_duplicates(tmp_path, list(range(20)))
    assert len(table) == 25_000
    for clip, first in pairs(table)[::500]:
        assert contents[first] == contents[clip] and contents.index(contents[clip]) == first


def test_data_set_without_facts_or_clips_has_nothing_to_drop(dataset, tmp_path):
    column = columns_of(dataset)["video"]
    nothing = settle_duplicates(dataset.plan, {"text": column}, tmp_path / "facts", DROP)
    assert nothing == settle_duplicates(dataset.plan, {"video": column}, tmp_path / "no", DROP)
    assert nothing.complaint is None and not nothing.flagged
    assert drop_rows(column, tmp_path, {}, [8] * 5) == set()
