"""What a run must keep to be continued, with the columns that its checkpoint names."""

from dataclasses import replace
from pathlib import Path

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
    chosen, found = run["view"]["settings"], run["view"]["data"]
    for number, part in enumerate(data["parts"]):
        assert chosen[f"data.mix.{number}.video"] == part["columns"]["video"]
        assert found[f"data.mix.{number}"]["root"] == part["root"]
    assert differences(run, run) == []


@pytest.fixture
def changing(tmp_path):
    """A data set with a clip that could not be read, and what describes a run on it."""
    built = Dataset(tmp_path / "shards", failed={3: "unreadable"}).build()

    def described(**settings):
        config = load_train_config(None, [])
        data = {"root": str(built.root), "cache_dir": str(tmp_path), "seconds": 2}
        view = open_view(DataConfig(**{**data, "missing": "drop", **settings}))
        return describe_run(config, view)

    return built, described


def refusal(before, now):
    with pytest.raises(ResumeError) as caught:
        check_continues(Path("step_7"), {"run": before, "layout": {}}, now, {})
    return str(caught.value)


def test_settings_that_leave_the_stream_alone_may_change(changing):
    _, described = changing
    before, layout = described(), {"run": described(), "layout": {}}
    assert before == layout["run"]
    check_continues(Path("step_7"), layout, described(read_threads=3), {})
    # All pass: the same clips, in the same order.
    check_continues(Path("step_7"), layout, described(filter='key != ""'), {})


def test_a_setting_that_changes_the_stream_is_named_with_both_values(changing):
    _, described = changing
    message = refusal(described(), described(seconds=1))
    assert message == (
        "step_7 is of another run: data.seconds was 2.0, is now 1.0. Restore the settings to "
        "continue it, or set another run_dir to start afresh"
    )
    filtered = refusal(described(), described(filter='key > "clip00005"'))
    assert """data.filter was None, is now 'key > "clip00005"'.""" in filtered


def test_data_that_were_encoded_further_are_not_called_other_settings(changing):
    built, described = changing
    before = described()
    mended = replace(built, failed={})
    for modality in ("video", "audio"):
        column = open_column(built.root, built.spec(modality).directory, built.plan.plan_id)
        (column.path / "000000.json").unlink()
        mended.write_shard(column, 0, "mended")
    now = described()
    clips = [each["view"]["data"]["data"]["usable clips"] for each in (before, now)]
    assert clips[1] == clips[0] + 1
    message = refusal(before, now)
    assert f"data.usable clips was {clips[0]}, is now {clips[1]}" in message
    assert "data.encoded shards was" in message and "encoded further" in message
    assert "Restore the settings" not in message
