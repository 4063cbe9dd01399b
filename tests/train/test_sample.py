"""Sampling from a checkpoint: which clips are drawn, what is given, which files are left."""

import json
import tempfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pipeline.data_root import open_root
from pipeline.files import write_json
from pipeline.format import FormatError
from tests.train.columns import AUDIO_RATE_HZ, VIDEO_RATE_HZ, Dataset
from train import sample
from train.checkpoint import STATE_VERSION, load_model_for_sampling
from train.checkpoint_folders import checkpoint_folder, mark_complete
from train.config import load_train_config
from train.data.drawn import draw
from train.data.view import open_view
from train.identity import describe_data, describe_run
from train.new_model import new_model

WIDE = frozenset(range(0, 40, 3))


class Films(Dataset):
    """Latents that say how to play what is decoded from them."""

    def spec(self, modality):
        rates = {"video": {"fps": VIDEO_RATE_HZ}, "audio": {"sample_rate": 16000}}
        return replace(super().spec(modality), preprocessing=rates.get(modality, {}))


class Grey:
    """Decodes latents [T, ...] of any codec to a grey picture, or to a quiet tone."""

    def __init__(self, codec, preprocessing):
        self.is_video = "fps" in preprocessing

    def decode(self, latents):
        length = len(latents[0])
        if self.is_video:
            return [np.full((length, 16, 16 * latents[0].shape[-1] // 3, 3), 128, np.uint8)]
        return [np.full((1, int(length / AUDIO_RATE_HZ * 16000)), 0.1, np.float32)]


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    return Films(tmp_path_factory.mktemp("data") / "shards", wide=WIDE).build()


def settings(root, cache, *more):
    return load_train_config(
        None,
        [
            f"data.root={root}",
            f"data.cache_dir={cache}",
            "data.seconds=2",
            "data.heldout_share=0.3",
            "model.width=32",
            "model.depth=1",
            "model.heads=2",
            "model.video_patch=[2, 0, 3]",
            *more,
        ],
    )


@pytest.fixture(scope="module")
def trained(films, tmp_path_factory):
    """A checkpoint with initial weights."""
    run_dir = tmp_path_factory.mktemp("run")
    config = settings(films.root, tmp_path_factory.mktemp("cache"))
    view = open_view(config.data, "train", config.model.time_patches)
    folder = checkpoint_folder(run_dir, 3)
    (folder / "ema").mkdir(parents=True)
    save_file(new_model(config, view).state_dict(), folder / "ema.safetensors")
    described = {"run": describe_run(config, view), "data": describe_data(config, view)}
    write_json(folder / "state.json", {"version": STATE_VERSION, "step": 3, **described})
    for name in ("mp_rank_00_model_states.pt", "ema/rank_00000.safetensors"):
        (folder / name).write_bytes(b"not needed here")
    mark_complete(folder, num_ranks=1, has_shards=False)
    return run_dir


@pytest.fixture
def call(trained, tmp_path, monkeypatch):
    """Sample into one folder; returns samples.json."""
    monkeypatch.setattr(sample, "build_codec", Grey)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # of the view's tables

    def run(task, *more):
        out = tmp_path / "out"
        arguments = ["--checkpoint", str(trained), "--task", task, "--out", str(out)]
        page = sample.run(sample.parse([*arguments, "--steps", "2", "--device", "cpu", *more]))
        assert page == out / "index.html"
        return json.loads((out / "samples.json").read_text())

    return run


def files(folder):
    return {f"media/{path.name}" for path in (folder / "media").iterdir()}


def test_a_gallery_is_made_of_held_out_clips_of_both_sizes(call, films, tmp_path):
    listing = call("v2a", "--num", "40")
    view = open_view(settings(films.root, tmp_path).data, "heldout")
    keys = [clip["key"] for clip in listing["clips"]]
    assert len(keys) == len(set(keys)) == view.num_clips < 40
    assert {int(key[-5:]) in WIDE for key in keys} == {True, False}
    for clip in listing["clips"]:
        number = int(clip["key"][-5:])
        assert clip["uri"] == f"{clip['key']}.mp4"
        assert clip["caption"] == films.caption(films.text_row(number))
    assert files(tmp_path / "out") == sample.media_of(listing)
    page = (tmp_path / "out" / "index.html").read_text()
    assert all(key in page for key in keys)


def test_sampling_again_leaves_media_of_the_new_gallery_and_of_others_only(call, tmp_path):
    out = tmp_path / "out"
    call("v2a", "--num", "4")
    (out / "media" / "mine.mp4").write_bytes(b"not from here")
    (tmp_path / "elsewhere.mp4").write_bytes(b"not from here")
    listing = json.loads((out / "samples.json").read_text())
    listing["clips"].append({"source": "media/../../elsewhere.mp4", "generated": "media/gone.mp4"})
    (out / "samples.json").write_text(json.dumps(listing))
    again = call("t2av", "--num", "2", "--seed", "5")
    assert files(out) == {*sample.media_of(again), "media/mine.mp4"}
    assert (tmp_path / "elsewhere.mp4").exists()


def test_sampling_from_a_url_is_sampling_from_the_folder(call, films, tmp_path):
    remote = open_root(f"memory://{tmp_path.name}/shards")
    for path in films.root.rglob("*"):
        if path.is_file():
            (remote / str(path.relative_to(films.root))).write_bytes(path.read_bytes())
    assert call("v2a", "--data", str(remote)) == call("v2a")


@pytest.mark.parametrize("text", ["", "[]", '{"clips": 3}', '{"clips": [{"source": 1}]}'])
def test_a_listing_of_another_program_is_let_be(tmp_path, text):
    (tmp_path / "samples.json").write_text(text)
    assert sample.listed_media(tmp_path) == set()


def test_drawn_latents_are_those_stored_from_second_0(films, tmp_path):
    view = open_view(settings(films.root, tmp_path).data, "all")
    drawn = draw(view, 12, seed=1)
    assert [clip.key for clip in drawn] == [clip.key for clip in draw(view, 12, seed=1)]
    assert {clip.key for clip in drawn} != {clip.key for clip in draw(view, 12, seed=2)}
    for clip in drawn:
        number = int(clip.key[-5:])
        assert np.array_equal(clip.video, films.video(number)[: int(2 * VIDEO_RATE_HZ)])
        assert np.array_equal(clip.audio, films.audio(number)[: int(2 * AUDIO_RATE_HZ)])
        assert np.array_equal(clip.text, films.text(films.text_row(number)))
        assert clip.video.shape == view.buckets[clip.bucket].video.shape


def test_of_stored_moments_the_mean_is_given(tmp_path):
    data = Films(tmp_path / "shards", moments=frozenset({"video"})).build()
    view = open_view(settings(data.root, tmp_path).data, "all")
    (clip,) = draw(view, 1, seed=0)
    moments = data.video(int(clip.key[-5:]))
    assert clip.video.shape == view.video.shape
    assert np.array_equal(clip.video, moments[: int(2 * VIDEO_RATE_HZ), : moments.shape[1] // 2])


def test_clips_of_a_size_that_the_model_has_not_met_are_refused(call, tmp_path):
    other = Films(tmp_path / "other", video_size=(2, 3, 9)).build()
    with pytest.raises(FormatError, match=r"40 crops .* \(8, 2, 3, 9\) .* trained on \(8, 2, 3, "):
        call("v2a", "--data", str(other.root), "--subset", "all")


def test_a_trained_model_answers_for_every_shape(trained):
    model = load_model_for_sampling(trained)
    assert {video[-1] for video, _ in model.shapes} == {3, 6}
    built = model.build()
    for video, audio in model.shapes:
        latents = torch.randn(2, *video), torch.randn(2, *audio)
        zeros, tasks = torch.zeros(2), torch.zeros(2, dtype=torch.int64)
        text = torch.ones(2, 1, model.text_width)
        mask = torch.ones(2, 1, dtype=torch.bool)
        answers = built(*latents, zeros, zeros, tasks, text, mask, zeros, zeros)
        assert [answer.shape[1:] for answer in answers] == [video, audio]
