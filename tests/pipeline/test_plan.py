"""A plan is made once, the same by anyone, and never changed by a later run."""

import dataclasses
import os
import random

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import format as fmt
from pipeline.config import EncodeConfig
from pipeline.media import Clip
from pipeline.plan import (
    ensure_plan,
    make_plan,
    read_captions,
    read_clips,
    shuffled,
    unique_captions,
    write_clips,
)
from pipeline.settings import ConfigError
from pipeline.sources import Source, open_source


def source_of(root, num_clips=10, captions=3):
    clips = [
        Clip(f"clip{i:03d}", f"clip{i:03d}.mp4", 0.0, 10.0, f"caption {i % captions}", "thing")
        for i in range(num_clips)
    ]
    return Source("folder", str(root), clips)


def changed(source, **fields):
    """The same source with another value in the fields of its third clip."""
    clips = list(source.clips)
    clips[2] = dataclasses.replace(clips[2], **fields)
    return dataclasses.replace(source, clips=clips)


def test_plan_does_not_depend_on_the_order_of_listing(tmp_path):
    source = source_of(tmp_path, 40)
    turned = list(source.clips)
    random.Random(1).shuffle(turned)
    first, clips = make_plan(source, EncodeConfig())
    second, other_clips = make_plan(dataclasses.replace(source, clips=turned), EncodeConfig())
    assert first == second and clips == other_clips
    assert sorted(clips, key=lambda clip: clip.key) == source.clips


def test_plan_does_not_depend_on_where_the_source_is(tmp_path):
    first, _ = make_plan(source_of(tmp_path / "a"), EncodeConfig())
    second, _ = make_plan(source_of(tmp_path / "b"), EncodeConfig())
    assert first.plan_id == second.plan_id


def test_another_seed_is_another_order_and_another_plan(tmp_path):
    source = source_of(tmp_path, 40)
    orders = [make_plan(source, EncodeConfig(seed=seed)) for seed in range(4)]
    assert len({plan.plan_id for plan, _ in orders}) == 4
    assert len({tuple(clip.key for clip in clips) for _, clips in orders}) == 4


@pytest.mark.parametrize(
    "fields",
    [
        {"key": "another"},
        {"uri": "another.mp4"},
        {"start_s": 1.0},
        {"duration_s": 9.0},
        {"caption": "another"},
        {"label": "another"},
        {"split": "test"},
    ],
)
def test_plan_id_knows_every_field_of_every_clip(tmp_path, fields):
    source = source_of(tmp_path)
    plans = [make_plan(s, EncodeConfig())[0] for s in (source, changed(source, **fields))]
    assert plans[0].plan_id != plans[1].plan_id


def test_plan_id_knows_the_windows(tmp_path, shared_clips):
    films = str(shared_clips / "folders" / "dog")
    configs = [EncodeConfig(windows=windows) for windows in ({}, {"seconds": 4}, {"seconds": 5})]
    plans = [make_plan(open_source(films, config), config)[0] for config in configs]
    assert len({plan.plan_id for plan in plans}) == 3
    assert plans[0].source == {"kind": "folder", "root": films}


def test_key_that_a_tar_cannot_hold_is_refused(tmp_path):
    with pytest.raises(fmt.FormatError, match=r"a\.b"):
        make_plan(changed(source_of(tmp_path), key="a.b"), EncodeConfig())


@given(st.integers(1, 50), st.integers(1, 20), st.integers(0, 3), st.integers(1, 7))
@settings(max_examples=30, deadline=None)
def test_every_clip_is_read_back_from_its_row(tmp_path_factory, num_clips, shard_size, seed, texts):
    root = tmp_path_factory.mktemp("plan")
    config = EncodeConfig(shard_size=shard_size, seed=seed)
    source = source_of(root, num_clips, texts)
    plan = ensure_plan(root, source, config)
    rows = plan.shard_rows()
    read = [read_clips(root, shard) for shard in range(len(rows))]
    assert [len(clips) for clips in read] == rows.tolist()
    assert [clip for clips in read for clip in clips] == shuffled(source.clips, seed)
    assert sum(plan.shard_rows(text=True)) == len(read_captions(root)) == min(texts, num_clips) + 1


@given(st.lists(st.text(max_size=8), min_size=1, max_size=30))
@settings(deadline=None, max_examples=50)
def test_captions_are_stored_once_with_the_empty_one_first(tmp_path_factory, captions):
    root = tmp_path_factory.mktemp("plan")
    clips = [Clip(f"c{i}", "", 0, 1, caption) for i, caption in enumerate(captions)]
    unique = unique_captions(clips)
    assert unique[0] == "" and len(unique) == len(set(unique))
    assert set(unique) == {"", *captions}
    plan = fmt.Plan("p", 0, {}, (fmt.PlanSegment(0, len(clips), 4),), ())
    write_clips(root / "plan.parquet", plan, clips)
    assert read_captions(root) == unique
    table = pq.read_table(root / "plan.parquet")
    rows = zip(table["caption"].to_pylist(), table["text_row"].to_pylist(), strict=True)
    assert all(unique[text_row] == caption for caption, text_row in rows)


def test_same_plan_again_changes_nothing(tmp_path):
    config = EncodeConfig(shard_size=4)
    plan = ensure_plan(tmp_path, source_of(tmp_path), config)
    before = {
        path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.iterdir()
    }
    assert ensure_plan(tmp_path, source_of(tmp_path), config) == plan == fmt.read_plan(tmp_path)
    after = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.iterdir()}
    assert before == after


@pytest.mark.parametrize(
    ("source", "config", "message"),
    [
        ({}, {"seed": 3}, "seed 0 there, 3 now"),
        ({}, {"shard_size": 5}, "shard_size 4 there, 5 now"),
        ({"num_clips": 12}, {}, "num_clips 10 there, 12 now; 2 clips new (such as clip010)"),
        ({"num_clips": 8}, {}, "num_clips 10 there, 8 now; 2 clips gone (such as clip008)"),
        ({"captions": 2}, {}, "captions, labels, splits or lengths of clips differ"),
    ],
)
def test_another_plan_in_the_folder_says_how_it_differs(tmp_path, source, config, message):
    out = tmp_path / "out"
    ensure_plan(out, source_of(tmp_path), EncodeConfig(shard_size=4))
    before = (out / "plan.json").read_bytes(), (out / "plan.parquet").read_bytes()
    with pytest.raises(ConfigError) as error:
        ensure_plan(out, source_of(tmp_path, **source), EncodeConfig(**{"shard_size": 4, **config}))
    assert message in str(error.value) and str(out) in str(error.value)
    assert before == ((out / "plan.json").read_bytes(), (out / "plan.parquet").read_bytes())


def test_folder_with_other_files_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match=r"thesis\.tex"):
        ensure_plan(tmp_path, source_of(tmp_path), EncodeConfig())
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_out_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(ConfigError, match="--out"):
        ensure_plan(tmp_path / "out", source_of(tmp_path), EncodeConfig())


@pytest.mark.parametrize("left", [["plan.parquet"], [".plan.parquet.tmp"], [".plan.json.1.tmp"]])
def test_plan_stopped_half_way_is_made_again(tmp_path, left):
    """plan.json is written last, so what a killed run left is replaced."""
    for name in left:
        (tmp_path / name).write_bytes(os.urandom(40))
    ensure_plan(tmp_path, source_of(tmp_path), EncodeConfig(shard_size=4))
    assert len(read_clips(tmp_path, 2)) == 2


def test_damaged_plan_is_not_replaced(tmp_path):
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(fmt.FormatError, match="not JSON"):
        ensure_plan(tmp_path, source_of(tmp_path), EncodeConfig())
    assert (tmp_path / "plan.json").read_text() == "{"
