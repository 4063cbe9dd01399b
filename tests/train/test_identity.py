"""What a run must keep to be continued, with the columns that its checkpoint names."""

import dataclasses

import pytest

from pipeline.format import open_column
from tests.train.columns import Dataset
from train.config import load_train_config
from train.data.config import DataConfig, PartConfig
from train.data.view import open_view
from train.errors import ResumeError
from train.identity import (
    check_continues,
    describe_data,
    describe_run,
    differences,
    with_columns,
)

COLUMNS = {"video": "video@dct-1", "audio": "audio@logmel-1", "text": "text@hash-1"}
OTHERS = {"video": "video@dct-2", "audio": "audio@logmel-2", "text": "text@hash-2"}


def test_a_resumed_run_keeps_its_columns_where_the_settings_name_none():
    config = with_columns(DataConfig(root="a", audio="mine"), [COLUMNS])
    assert (config.root, config.video, config.audio) == ("a", "video@dct-1", "mine")
    mixed = DataConfig(mix=(PartConfig(root="a"), PartConfig(root="b", text="mine")))
    first, second = with_columns(mixed, [COLUMNS, OTHERS]).mix
    assert (first.video, first.text) == ("video@dct-1", "text@hash-1")
    assert (second.video, second.text) == ("video@dct-2", "mine")


def test_a_data_set_added_to_a_mixture_is_told_apart_by_the_view_and_not_here():
    mixed = DataConfig(mix=(PartConfig(root="a"), PartConfig(root="b")))
    first, second = with_columns(mixed, [COLUMNS]).mix
    assert first.video == "video@dct-1" and second == PartConfig(root="b")


def test_every_data_set_of_a_mixture_is_described(tmp_path):
    mix = tuple(
        PartConfig(root=str(Dataset(tmp_path / name, seed=seed).build().root))
        for seed, name in enumerate("ab")
    )
    config = load_train_config(None, ["data.seconds=2", "global_batch=8"])
    view = open_view(DataConfig(mix=mix, seconds=2, cache_dir=str(tmp_path)))
    data, run = describe_data(config, view), describe_run(config, view)
    assert [part["root"] for part in data["parts"]] == [part.root for part in mix]
    assert run["view"]["columns"] == {
        str(number): part["columns"] for number, part in enumerate(data["parts"])
    }
    other = {**run, "view": {**run["view"], "columns": {"0": data["parts"][0]["columns"]}}}
    assert differences(run, run) == []
    assert "view.columns.1 was" in differences(run, other)[0]


def test_a_view_that_changed_is_told_by_what_changed(tmp_path):
    def described(**settings):
        config = load_train_config(None, [])
        data = {"root": str(tmp_path / "shards"), "cache_dir": str(tmp_path), "seconds": 2}
        data |= {"missing": "drop", **settings}
        return describe_run(config, open_view(DataConfig(**data), "all"))

    built = Dataset(tmp_path / "shards", failed={3: "unreadable"}).build()
    before = described()
    assert differences(before, described(read_threads=3)) == []
    first, second = differences(before, described(seconds=1))
    assert first == "view.seconds was 2.0, is now 1.0" and second.startswith("view.view_id was")
    mended = dataclasses.replace(built, failed={})
    for modality in ("video", "audio"):
        name = built.spec(modality).directory
        column = open_column(built.root, name, built.plan.plan_id)
        (column.path / "000000.json").unlink()
        mended.write_shard(column, 0, "mended")
    with pytest.raises(ResumeError) as caught:
        check_continues(tmp_path, {"run": before}, described(), {})
    assert "view.clips.0 was 39, is now 40" in str(caught.value)
    assert "view.content.0 was" in str(caught.value) and "encoded again" in str(caught.value)
