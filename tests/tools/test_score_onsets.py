"""The score tells sound made for the picture from sound made for another."""

import json

import numpy as np
import pytest

from pipeline.mux import write_mp4
from tools import make_clips, score_onsets
from tools.bouncing import ClipSettings, draw_frames, draw_sound, draw_world

SETTINGS = ClipSettings(seed=3)
NUM_CLIPS = 8


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    out = tmp_path_factory.mktemp("truth") / "clips"
    make_clips.make_clips(out, SETTINGS, NUM_CLIPS)
    return out


def write_samples(out, shift=0, start_s=0.0, task="v2a"):
    """Write what train.sample would: clip i "generated" with the sound of clip i + shift."""
    (out / "media").mkdir(parents=True)
    worlds = [draw_world(np.random.default_rng([3, i]), SETTINGS) for i in range(NUM_CLIPS)]
    first, first_frame = round(start_s * 16000), round(start_s * SETTINGS.fps)
    sounds = [draw_sound(bodies, SETTINGS)[first:] for bodies in worlds]
    listed = []
    for index, bodies in enumerate(worlds):
        frames = draw_frames(bodies, SETTINGS)[first_frame:]
        paths = {"source": f"media/k{index}.source.mp4", "generated": f"media/k{index}.v2a.mp4"}
        other = sounds[(index + shift) % NUM_CLIPS]
        write_mp4(out / paths["source"], frames, SETTINGS.fps, sounds[index], 16000)
        write_mp4(out / paths["generated"], frames, SETTINGS.fps, other, 16000)
        uri = f"clip-{index:06d}.mp4"
        listed.append({"key": f"k{index}", "uri": uri, "start_s": start_s, **paths})
    (out / "samples.json").write_text(json.dumps({"task": task, "clips": listed}))
    return out


def run(samples, truth, tmp_path):
    report = tmp_path / "report.json"
    command = ["--samples", str(samples), "--truth", str(truth), "--json", str(report)]
    assert score_onsets.main(command) == 0
    return json.loads(report.read_text())


def test_sound_of_the_right_clip_scores_high_and_of_another_at_chance(truth, tmp_path, capsys):
    right = run(write_samples(tmp_path / "right"), truth, tmp_path)
    assert right["generated"]["f1"] > 0.95
    assert right["codec_round_trip"]["f1"] > 0.95
    assert right["chance"]["f1"] < 0.45
    assert right["ratio"] == pytest.approx(right["generated"]["f1"] / right["chance"]["f1"])
    printed = capsys.readouterr().out
    assert f"{right['generated']['f1']:.3f}" in printed
    assert "codec round trip" in printed
    wrong = run(write_samples(tmp_path / "wrong", shift=1), truth, tmp_path)
    assert wrong["generated"]["f1"] < 0.5
    assert wrong["codec_round_trip"] == right["codec_round_trip"]


def test_truth_is_cut_to_the_sampled_span(truth, tmp_path):
    late = run(write_samples(tmp_path / "late", start_s=0.5), truth, tmp_path)
    impacts = [
        impact["time_s"]
        for path in sorted(truth.glob("clip-*.json"))
        for impact in json.loads(path.read_text())["impacts"]
    ]
    assert late["generated"]["num_true"] == sum(time_s >= 0.5 for time_s in impacts)
    assert late["generated"]["f1"] > 0.9


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda listing: {**listing, "task": "a2v"}, "expected 'v2a'"),
        (lambda listing: {**listing, "clips": [{"key": "k0"}]}, "lacks a field"),
        (lambda listing: {**listing, "clips": listing["clips"][:1]}, "two clips or more"),
        (lambda listing: {"task": "v2a", "clips": []}, "two clips or more"),
        (
            lambda listing: {
                **listing,
                "clips": [{**listing["clips"][0], "generated": "media/none.mp4"}],
            },
            "none.mp4",
        ),
        (
            lambda listing: {
                **listing,
                "clips": [{**listing["clips"][0], "uri": "clip-999999.mp4"}],
            },
            "clip-999999.json",
        ),
    ],
)
def test_what_can_not_be_scored_is_one_line(truth, tmp_path, capsys, edit, message):
    out = write_samples(tmp_path / "samples")
    listing = json.loads((out / "samples.json").read_text())
    (out / "samples.json").write_text(json.dumps(edit(listing)))
    assert score_onsets.main(["--samples", str(out), "--truth", str(truth)]) == 1
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1


def test_folder_without_samples_is_one_line(truth, tmp_path, capsys):
    assert score_onsets.main(["--samples", str(tmp_path), "--truth", str(truth)]) == 1
    assert "samples.json is missing" in capsys.readouterr().err
