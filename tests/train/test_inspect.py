"""What is shown of a data set before training on it."""

import json
import os
import sys

import pytest

from tests.train.columns import AUDIO_RATE_HZ, VIDEO_RATE_HZ, Dataset
from train.config import load_train_config
from train.data import inspect
from train.data.loader import LatentLoader
from train.data.view import open_view


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """40 clips of two splits; one failed, one is too short: more than 1 %."""
    return Dataset(
        tmp_path_factory.mktemp("data") / "shards",
        failed={3: "missing"},
        short_s={5: 1.0},
        splits=dict.fromkeys(range(30, 40), "test"),
    ).build()


@pytest.fixture
def call(dataset, tmp_path, monkeypatch, capsys):
    """Run the command; returns what it printed."""

    def run(*arguments, data=dataset.root):
        fixed = ["--data", str(data), "--global-batch", "8", f"data.cache_dir={tmp_path}"]
        settings = ["data.seconds=2", "data.heldout_share=0", "model.video_patch=[2, 0, 0]"]
        monkeypatch.setattr(sys, "argv", ["inspect", *fixed, *settings, *arguments])
        inspect.main()
        return capsys.readouterr().out

    return run


def test_everything_that_training_would_see_is_there(call, dataset):
    found = json.loads(call("--json", "data.missing=drop"))
    (part,) = found["parts"]
    assert part["columns"] == {m: dataset.spec(m).directory for m in ("video", "audio", "text")}
    assert part["clips"] == {
        "planned": 40,
        "heldout": 0,
        "outside": 10,
        "filtered": 0,
        "wanted": 30,
        "complete": 28,
        "video_only": 0,
        "audio_only": 0,
    }
    assert part["reasons"] == {"missing": 1, "short": 1}
    assert part["steps_per_epoch"] == 28 // 8
    assert found["tasks"] == {"T2AV": 28, "V2A": 28, "A2V": 28}
    (bucket,) = found["buckets"]
    assert bucket["video"] == [2 * VIDEO_RATE_HZ, *dataset.video_size]
    assert bucket["audio"] == [2 * AUDIO_RATE_HZ, *dataset.audio_size]
    assert bucket["clips"] == 28
    assert not found["is_refused"]
    video = found["statistics"]["video"]
    assert len(video["mean"]) == len(video["std"]) == dataset.video_size[0]
    assert video["std"] == pytest.approx([1, 1], abs=0.05)


def test_first_batches_are_those_that_the_loader_gives(call, dataset, tmp_path):
    found = json.loads(call("--json", "data.missing=drop"))
    overrides = ["data.missing=drop", "data.seconds=2", "data.heldout_share=0"]
    config = load_train_config(
        None, [f"data.root={dataset.root}", f"data.cache_dir={tmp_path}", *overrides]
    )
    view = open_view(config.data, "train", {"video": 2})
    assert found["view_id"] == view.view_id
    with LatentLoader(view, seed=config.seed, global_batch=8) as loader:
        for batch in found["batches"]:
            assert batch["keys"] == list(next(loader).keys[: inspect.KEYS_SHOWN])


def test_a_data_set_that_training_refuses_is_shown_with_the_reason(call):
    printed = call()
    assert "not whole          missing 1, shorter than 2 s 1" in printed
    assert "training refuses this: more than 1%" in printed
    assert "T2AV 28, V2A 28, A2V 28" in printed
    assert "3 steps of 8 clips" in printed
    assert "refuses" not in call("data.missing=drop")


def test_clips_that_lack_a_modality_count_for_the_tasks_they_serve(call, tmp_path):
    data = Dataset(
        tmp_path / "shards", failed_audio={1: "no_audio", 2: "silent"}, failed_video={7: "still"}
    ).build()
    found = json.loads(call("--json", "data.missing=mask", data=data.root))
    assert found["tasks"] == {"T2AV": 40, "V2A": 37, "A2V": 37}
    assert found["parts"][0]["clips"]["video_only"] == 2
    found = json.loads(call("--json", "data.missing=drop", data=data.root))
    assert found["tasks"] == {"T2AV": 37, "V2A": 37, "A2V": 37}


def test_data_sets_that_are_mixed_are_shown_one_by_one(tmp_path, monkeypatch, capsys):
    for seed, name in enumerate("ab"):
        Dataset(tmp_path / name, seed=seed, wide=frozenset(range(10))).build()
    mix = f"data.mix=[{{root: {tmp_path / 'a'}, weight: 3}}, {{root: {tmp_path / 'b'}}}]"
    settings = ["data.seconds=2", "data.heldout_share=0", "model.video_patch=[2, 0, 3]"]
    cache = f"data.cache_dir={tmp_path}"
    monkeypatch.setattr(sys, "argv", ["inspect", mix, cache, "global_batch=8", *settings])
    inspect.main()
    printed = capsys.readouterr().out
    assert f"data set 0: {tmp_path / 'a'}, weight 0.75" in printed
    assert f"data set 1: {tmp_path / 'b'}, weight 0.25" in printed
    assert (
        "bucket 0             video [8, 2, 3, 3], audio [50, 4, 2]: 60 clips of 55 tokens"
        in printed
    )
    assert (
        "bucket 1             video [8, 2, 3, 6], audio [50, 4, 2]: 20 clips of 59 tokens"
        in printed
    )
    assert "4 steps of 8 clips of data set 1" in printed


def test_a_model_that_does_not_fit_hides_no_data(call):
    printed = call("data.missing=drop", "model.video_patch=[2, 2, 2]")
    assert "training refuses this: the model does not fit bucket 0 (28 clips" in printed
    assert "bucket 0             video [8, 2, 3, 3], audio [50, 4, 2]: 28 clips\n" in printed
    found = json.loads(call("--json", "data.missing=drop", "model.video_patch=[2, 2, 2]"))
    assert "does not fit" in found["misfit"] and found["buckets"][0]["tokens"] is None
    assert json.loads(call("--json", "data.missing=drop"))["misfit"] is None


def test_a_reader_that_has_seen_enough_is_no_error(call, monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        call()


def test_held_out_clips_are_counted_whatever_the_subset(call):
    for subset in ("train", "heldout"):
        found = json.loads(call("--json", "--subset", subset, "data.heldout_share=0.5"))
        (part,) = found["parts"]
        assert 5 <= part["clips"]["heldout"] <= 25
        assert part["clips"]["outside"] == (
            part["clips"]["heldout"] + 10 if subset == "train" else 30 - part["clips"]["heldout"]
        )


def test_errors_are_one_line_and_exit_status_1(call, tmp_path):
    for arguments, data, expected in (
        ((), tmp_path / "nowhere", "error: .*plan.json is missing"),
        (("--video", "dct"), None, "error: .*has no video column 'dct'"),
        (("data.second=3",), None, "error: .*did you mean 'data.seconds'"),
        (("--global-batch", "1000000000000"), None, "error: global_batch=10+: expected at most"),
    ):
        with pytest.raises(SystemExit, match=expected) as ended:
            call(*arguments, **({"data": data} if data else {}))
        assert "\n" not in str(ended.value.code)


def test_channels_are_printed_one_by_one_up_to_a_limit():
    found = {"mean": [float(n) for n in range(10)], "std": [1.0] * 33, "rate_hz": 4.0, "axes": []}
    _, first, second, last = inspect.statistic_lines("video", found)
    assert first.split() == ["mean", *"01234567"]
    assert second.split() == ["8", "9"]
    assert last.split("std")[1].strip() == "from 1 to 1, 1 on average"
