"""The bouncing world keeps its word: what the truth says is seen and heard."""

import json
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest

from pipeline.decode import read_sound
from pipeline.settings import ConfigError
from tools import make_clips
from tools.bouncing import (
    BACKGROUND,
    COLOURS,
    FLOOR_RESTITUTION,
    GRAVITY,
    RADIUS,
    ClipSettings,
    Leg,
    crowding,
    draw_frames,
    draw_sound,
    draw_world,
    fly,
    truth,
)

SETTINGS = ClipSettings()


def world(index, settings=SETTINGS):
    return draw_world(np.random.default_rng([settings.seed, index]), settings)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "clips"
    assert make_clips.main(["--out", str(out), "--count", "6"]) == 0
    return out


def test_fall_and_rebound_follow_the_closed_form():
    radius = 0.1
    legs, impacts = fly(Leg(0.0, 0.5, 0.6, 0.0, 0.0), radius, 3.0)
    fall_s, speed = np.sqrt(2 * 0.5 / GRAVITY), np.sqrt(2 * GRAVITY * 0.5)
    assert impacts[0] == pytest.approx((fall_s, speed))
    rebound = FLOOR_RESTITUTION * speed
    assert impacts[1] == pytest.approx((fall_s + 2 * rebound / GRAVITY, rebound))
    assert legs[1].position(fall_s + rebound / GRAVITY)[1] == pytest.approx(
        radius + rebound**2 / (2 * GRAVITY)
    )


@pytest.mark.parametrize("seconds", [2.0, 20.0])
def test_bodies_never_leave_the_box(seconds):
    for index in range(20):
        for body in world(index, ClipSettings(seconds=seconds)):
            places = np.array([body.position(time_s) for time_s in np.arange(0, seconds, 0.01)])
            radius = RADIUS[body.size]
            assert places.min() >= radius - 1e-9
            assert places.max() <= 1 - radius + 1e-9


def test_position_is_continuous_and_direction_turns_at_each_listed_impact():
    for index in range(10):
        for number, body in enumerate(world(index)):
            for impact in truth(world(index), SETTINGS)["impacts"]:
                if impact["object"] != number:
                    continue
                step = 1e-5
                before, at, after = (
                    np.array(body.position(impact["time_s"] + dt)) for dt in (-step, 0, step)
                )
                arriving, leaving = (at - before) / step, (after - at) / step
                turned = arriving * leaving < 0
                assert turned.any()
                assert np.abs(arriving[turned]) == pytest.approx(impact["speed"], rel=1e-2)


def test_shapes_are_seen_where_they_are_and_in_their_colour():
    settings = ClipSettings(max_shapes=1)
    for index in range(8):
        (body,) = world(index, settings)
        frames = draw_frames([body], settings)
        for number in (0, 11, 31):
            x, y = body.position(number / settings.fps)
            row, column = int((1 - y) * settings.size), int(x * settings.size)
            assert tuple(frames[number, row, column]) == COLOURS[body.colour]
            seen = np.abs(frames[number].astype(int) - BACKGROUND).sum(axis=-1) > 60
            columns = np.flatnonzero(seen.any(axis=0)) / settings.size
            assert columns.min() == pytest.approx(x - RADIUS[body.size], abs=0.04)
            assert columns.max() == pytest.approx(x + RADIUS[body.size], abs=0.04)


def test_sound_is_silent_until_the_first_impact_and_louder_for_faster_ones():
    for index in range(10):
        bodies = world(index)
        impacts = truth(bodies, SETTINGS)["impacts"]
        sound = draw_sound(bodies, SETTINGS)
        first = int(impacts[0]["time_s"] * SETTINGS.sample_rate)
        assert not sound[: first + 1].any()
        assert np.abs(sound[first : first + 800]).max() > 0.05
        assert np.abs(sound).max() < 1
        by_speed = sorted(impacts, key=lambda impact: impact["speed"])
        levels = [impact["loudness"] for impact in by_speed]
        assert levels == sorted(levels)


def test_impacts_are_few_and_apart():
    worlds = [world(index) for index in range(60)]
    counts = [sum(len(body.impacts) for body in bodies) for bodies in worlds]
    assert min(counts) >= 3
    assert max(counts) <= 5
    assert np.mean([crowding(bodies, SETTINGS.seconds) == 0 for bodies in worlds]) > 0.9


def test_files_hold_the_world(folder):
    for index in range(6):
        stem = folder / f"clip-{index:06d}"
        facts = json.loads(stem.with_suffix(".json").read_text())
        assert stem.with_suffix(".txt").read_text().strip() == facts["caption"]
        for thing in facts["objects"]:
            assert f"a {thing['size']} {thing['colour']} {thing['shape']}" in facts["caption"]
        assert facts | truth(world(index), SETTINGS) == facts
        with av.open(str(stem.with_suffix(".mp4"))) as container:
            pixels = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        drawn = draw_frames(world(index), SETTINGS)
        assert np.abs(np.stack(pixels).astype(float) - drawn).mean() < 4
        heard = read_sound(stem.with_suffix(".mp4"), 16000)[:32000]
        meant = draw_sound(world(index), SETTINGS)
        assert len(heard) == len(meant)
        assert np.corrcoef(heard, meant)[0, 1] > 0.95


def test_grown_folder_keeps_its_clips_and_equals_one_made_at_once(folder, tmp_path):
    out = tmp_path / "clips"
    assert make_clips.make_clips(out, SETTINGS, 2) == 2
    assert make_clips.make_clips(out, SETTINGS, 6) == 4
    assert make_clips.make_clips(out, SETTINGS, 6) == 0
    for path in folder.iterdir():
        assert path.read_bytes() == (out / path.name).read_bytes()


def test_other_seed_makes_other_clips():
    assert truth(world(0), SETTINGS) != truth(world(0, ClipSettings(seed=1)), SETTINGS)


def test_folder_of_other_settings_or_other_files_is_refused_untouched(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"seed 0.*choose another --out"):
        make_clips.make_clips(folder, ClipSettings(seed=5), 1)
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        make_clips.make_clips(tmp_path, SETTINGS, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--size", "33"],
        ["--seconds", "0"],
        ["--seconds", "nan"],
        ["--fps", "0"],
        ["--sample-rate", "17000"],
        ["--count", "0"],
        ["--max-shapes", "9"],
        ["--seed", "-1"],
    ],
)
def test_wrong_value_is_one_line_that_names_it(tmp_path, capsys, arguments):
    assert make_clips.main(["--out", str(tmp_path / "clips"), *arguments]) == 1
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1
    assert arguments[0] in printed.err
    assert not (tmp_path / "clips").exists()


def test_no_room_is_one_line(tmp_path):
    """A limit on the size of files, inherited by the workers, stands for the full disk."""
    program = """
import resource, sys
from tools.make_clips import main
if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_000, resource.RLIM_INFINITY))
    sys.exit(main(["--out", sys.argv[1], "--count", "2"]))
"""
    script = tmp_path / "limited.py"
    script.write_text(program)
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "clips")],
        capture_output=True, text=True, check=False, cwd=Path(make_clips.__file__).parents[1],
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("make_clips: ")
    assert done.stderr.count("\n") == 1
