"""Every frame of a decoded clip is the one presented then, and every click is at its second.

The films are rendered here and their truth is known; no decoder is asked what is right. Sound is
tried further in ``test_truth_sound``, colour and geometry in ``test_truth_picture``.
"""

from __future__ import annotations

import os
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from tests.pipeline import films
from tests.pipeline.films import (
    AV1,
    B_FRAMES,
    MJPEG,
    MP3,
    MPEG2,
    MPEG4,
    OPUS,
    PCM,
    PRORES,
    VORBIS,
    VP8,
    VP9,
    X265,
    Film,
    Picture,
    Sound,
)
from tests.pipeline.truth import (
    RATE,
    SETTINGS,
    assert_picture_true,
    assert_sound_true,
    assert_true,
    decode,
)

NTSC = 1001
FRAGMENTS = {"movflags": "frag_keyframe+empty_moov"}
# What libmp3lame puts in front; mp4, mov, mkv and flv keep the sound in place, AVI can't say it.
MP3_PRIMING = 1105
AAC_PRIMING = 1024

CONTAINERS = {
    "mp4 h264 aac": Film(),
    "mp4 h264 with B-frames, aac stereo": Film(picture=B_FRAMES, sound=Sound(channels=2)),
    "mp4 index in front": Film(options={"movflags": "faststart"}),
    "mp4 hevc ac3": Film(picture=X265, sound=Sound("ac3", 48000, 2)),
    "mp4 av1 opus": Film(picture=AV1, sound=OPUS),
    "mp4 vp9 flac": Film(picture=VP9, sound=Sound("flac")),
    "mp4 mpeg4 mp3": Film(picture=MPEG4, sound=MP3),
    "mp4 mpeg4 with B-frames": Film(picture=replace(MPEG4, b_frames=2)),
    # Without an edit list the muxer lets frame 0 begin with the priming of the sound.
    "mp4 fragments": Film(options=FRAGMENTS, zero_s=-AAC_PRIMING / 44100),
    "mp4 fragments, B-frames": Film(picture=B_FRAMES, options=FRAGMENTS),
    "mp4 fragments with an edit list": Film(
        picture=B_FRAMES, options={"movflags": "frag_keyframe+empty_moov+delay_moov"}
    ),
    "mov h264 pcm": Film("mov", sound=PCM),
    "mov prores pcm": Film("mov", PRORES, Sound("pcm_s24le", 48000)),
    "mov mjpeg": Film("mov", MJPEG, PCM),
    "mkv h264 vorbis": Film("mkv", B_FRAMES, VORBIS),
    "mkv h264 aac": Film("mkv"),
    "mkv hevc flac": Film("mkv", X265, Sound("flac")),
    "mkv av1 opus": Film("mkv", AV1, OPUS),
    "mkv ffv1 pcm": Film("mkv", Picture("ffv1"), PCM),
    "mkv mpeg4 mp3": Film("mkv", MPEG4, MP3),
    "webm vp8 vorbis": Film("webm", VP8, VORBIS),
    "webm vp9 opus": Film("webm", VP9, OPUS),
    "webm av1 opus": Film("webm", AV1, OPUS),
    "ts h264 aac": Film("ts", B_FRAMES),
    "ts hevc ac3": Film("ts", X265, Sound("ac3", 48000)),
    "ts mpeg2 mp2": Film("ts", MPEG2, Sound("mp2", 48000)),
    "mpg mpeg2 mp2": Film("mpg", MPEG2, Sound("mp2")),
    "flv h264 aac": Film("flv", B_FRAMES),
    "flv flv1 mp3": Film("flv", Picture("flv", tagged=False), MP3),
    "avi mpeg4 pcm": Film("avi", MPEG4, PCM),
    "avi mjpeg pcm": Film("avi", MJPEG, PCM),
    # AVI has no timestamps: sound starts with the encoder's priming.
    "avi mpeg4 mp3": Film("avi", MPEG4, MP3, sound_late_s=MP3_PRIMING / 44100),
    "avi mjpeg aac": Film("avi", MJPEG, sound_late_s=AAC_PRIMING / 44100),
    # Nor does it say which frame is first: FFmpeg has these start one frame late, our probe not.
    "avi mpeg4 with B-frames": Film("avi", replace(MPEG4, b_frames=2), PCM),
    "avi h264 pcm": Film("avi", sound=Sound("pcm_u8", 22050)),
    "avi h264 with B-frames": Film("avi", B_FRAMES, PCM),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_film_is_decoded_as_recorded_in_every_container(rendered, name):
    film = CONTAINERS[name]
    decoded = assert_true(film, rendered(film))
    assert decoded.facts["sample_rate"] == film.sound.rate
    assert decoded.facts["channels"] == film.sound.channels
    assert decoded.facts["width"] == film.picture.width
    assert decoded.facts["fps"] == pytest.approx(25, rel=0.02)


# -- spans of longer files

LONG_GOP = {"gop": 60, "seconds": 24}
LONG = {
    "mp4": Film("mp4", replace(B_FRAMES, **LONG_GOP), Sound(seconds=24)),
    "mp4 fragments": Film("mp4", replace(B_FRAMES, **LONG_GOP), Sound(seconds=24), FRAGMENTS),
    "mp4 hevc": Film("mp4", replace(X265, **LONG_GOP), Sound("ac3", 48000, seconds=24)),
    "mkv hevc": Film("mkv", replace(X265, **LONG_GOP), Sound("libmp3lame", seconds=24)),
    "webm vp9": Film("webm", replace(VP9, **LONG_GOP), Sound("libopus", 48000, seconds=24)),
    "ts h264": Film("ts", replace(B_FRAMES, **LONG_GOP), Sound(seconds=24)),
    "ts hevc": Film("ts", replace(X265, **LONG_GOP), Sound(seconds=24)),
    "avi mpeg4": Film(
        "avi", replace(MPEG4, **LONG_GOP), Sound("libmp3lame", seconds=24),
        sound_late_s=MP3_PRIMING / 44100,
    ),
    "mpg": Film("mpg", replace(MPEG2, **LONG_GOP), Sound("mp2", seconds=24)),
    "flv": Film("flv", replace(B_FRAMES, **LONG_GOP), Sound(seconds=24)),
}  # fmt: skip


@pytest.mark.parametrize("name", LONG)
@pytest.mark.parametrize("start_s", [0.04, 2.37, 4.8, 9.5, 19.99])
def test_span_starts_anywhere(rendered, name, start_s):
    film = LONG[name]
    assert_true(film, rendered(film), start_s, 2.5)


@pytest.mark.parametrize("name", ["mp4", "mkv hevc", "ts h264"])
def test_windows_side_by_side_are_the_whole(rendered, name):
    """No frame and no sample is lost or repeated where one window ends and the next begins.

    Matroska's timestamps, rounded to 1 ms, place the sound of every window a little differently.
    """
    film = LONG[name]
    path = rendered(film)
    whole = decode(path, 6.0, 6.0)
    parts = [decode(path, start_s, 2.0) for start_s in (6.0, 8.0, 10.0)]
    np.testing.assert_array_equal(np.concatenate([part.frames for part in parts]), whole.frames)
    if film.suffix == "mkv":
        return
    sound = np.concatenate([part.sound for part in parts], axis=1)
    inner = np.abs(sound - whole.sound)[:, RATE // 10 :]
    assert np.quantile(inner, 0.98) < 1e-3  # the resampler sees zeros beyond the window's ends


@pytest.mark.parametrize(
    ("suffix", "codec", "seconds"),
    [
        *(("mp4", "libx264", 75), ("mkv", "libx264", 75), ("ts", "libx264", 75)),
        *(("avi", "mpeg4", 110), ("avi", "libx264", 110)),  # long enough to be read in parts
    ],
)
@pytest.mark.parametrize("b_frames", [0, 2])
def test_window_is_found_a_minute_into_a_file(rendered, suffix, codec, seconds, b_frames):
    picture = Picture(codec, 96, 96, seconds, gop=60, b_frames=b_frames, tagged=codec != "mpeg4")
    sound = Sound("pcm_s16le" if suffix == "avi" else "aac", rate=22050, seconds=seconds)
    film = Film(suffix, picture, sound)
    for start_s in (0.0, 41.3, 68.0):
        assert_true(film, rendered(film), start_s, 4.0, sizes=((96, 96),))


# -- frame rates


@pytest.mark.parametrize("out_fps", [1, 8, 12.5, 30])
@pytest.mark.parametrize(
    "film_fps",
    [
        Fraction(7), Fraction(10), Fraction(15), Fraction(24000, NTSC), Fraction(24),
        Fraction(30000, NTSC), Fraction(30), Fraction(50), Fraction(60000, NTSC),
    ],
)  # fmt: skip
def test_constant_rate(rendered, film_fps, out_fps):
    # Four B-frames always, some of which others need.
    pyramid = {"refs": "4", "b-pyramid": "normal", "b_strategy": "0"}
    film = Film(picture=Picture(fps=film_fps, seconds=3.5, b_frames=4, options=pyramid))
    assert_true(film, rendered(film), fps=out_fps)


def varying(seed: int) -> tuple[int, ...]:
    """Starts of frames of 9 to 250 ms and two of a second, and the last one's end; in ms."""
    generator = np.random.default_rng(seed)
    steps = generator.choice([9, 20, 33, 34, 40, 100, 250], size=200)
    steps[[7, 15]] = 1000
    times = np.concatenate([[0], np.cumsum(steps)])
    times = times[times < 4500]
    return (*times.tolist(), int(times[-1]) + 40)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("suffix", "picture"),
    [
        ("mp4", Picture(b_frames=2)),
        ("mp4", Picture()),
        ("mkv", Picture("libx265", b_frames=2)),
        ("webm", VP9),
        ("mov", MJPEG),
        ("ts", Picture(b_frames=1)),
    ],
    ids=["mp4 B-frames", "mp4", "mkv hevc", "webm", "mov", "ts"],
)
def test_varying_rate(rendered, suffix, picture, seed):
    sound = Sound("libopus" if suffix == "webm" else "aac", 48000, seconds=5)
    film = Film(suffix, replace(picture, pts=varying(seed)), sound)
    path = rendered(film)
    assert_true(film, path, 0.0, 4.2, fps=20)
    assert_true(film, path, 1.7, 2.5, fps=8)


# -- edit lists and cuts


CUT_SOURCES = {
    "h264": Film(picture=replace(B_FRAMES, gop=50, seconds=8), sound=Sound(seconds=8)),
    "h264 without B-frames": Film(picture=Picture(gop=50, seconds=8), sound=Sound(seconds=8)),
    "hevc": Film(picture=replace(X265, gop=50, seconds=8), sound=Sound(seconds=8)),
    "mpeg4 mp3": Film(picture=replace(MPEG4, gop=50, seconds=8), sound=replace(MP3, seconds=8)),
    "vp9 opus": Film(picture=replace(VP9, gop=50, seconds=8), sound=replace(OPUS, seconds=8)),
}


@pytest.mark.parametrize("start_s", [0.0, 1.3])
@pytest.mark.parametrize("from_frame", [50, 63, 77, 98])
@pytest.mark.parametrize("source", CUT_SOURCES)
def test_frames_before_a_cut_are_not_shown(rendered, tmp_path, source, from_frame, start_s):
    """Copied from the keyframe before: the edit list hides what is needed for decoding only."""
    whole = CUT_SOURCES[source]
    path = tmp_path / "cut.mp4"
    films.cut(rendered(whole), path, from_frame / 25)
    assert_true(replace(whole, zero_s=from_frame / 25), path, start_s, 2.5)


def test_cut_between_two_frames_starts_with_the_next(rendered, tmp_path):
    """FFmpeg's reader shows the first whole frame from second 0 on, here 24 ms early.

    The sound, cut to the sample, seems that much later. Up to one frame: nothing in what the
    reader gives out tells it.
    """
    whole = CUT_SOURCES["h264"]
    films.cut(rendered(whole), tmp_path / "cut.mov", 63.4 / 25)
    film = replace(whole, zero_s=64 / 25, sound_late_s=0.6 / 25)
    assert_true(film, tmp_path / "cut.mov", 0.0, 2.5)


def test_cut_in_an_open_group_starts_with_its_keyframe(rendered, tmp_path):
    """Frame 99 is shown before keyframe 100 but needs the group before, which isn't copied."""
    whole = CUT_SOURCES["hevc"]
    films.cut(rendered(whole), tmp_path / "cut.mp4", 99 / 25)
    for start_s in (0.0, 1.3):
        assert_true(replace(whole, zero_s=100 / 25), tmp_path / "cut.mp4", start_s, 2.5)


@pytest.mark.parametrize("suffix", ["ts", "mkv", "mp4"])
def test_recording_that_starts_between_keyframes_begins_with_the_first(rendered, tmp_path, suffix):
    """As broadcasts are recorded: no frame before the first keyframe can be shown."""
    whole = CUT_SOURCES["h264"]
    path = tmp_path / f"cut.{suffix}"
    films.cut(rendered(whole), path, 63 / 25, with_group=False)
    for start_s in (0.0, 1.3):
        assert_true(replace(whole, zero_s=100 / 25), path, start_s, 2.5)


@pytest.mark.parametrize("suffix", ["mkv", "ts", "flv"])
def test_cut_without_an_edit_list_starts_at_the_keyframe(rendered, tmp_path, suffix):
    """These containers can't hide frames: what was copied is what is shown."""
    whole = CUT_SOURCES["h264"]
    path = tmp_path / f"cut.{suffix}"
    films.cut(rendered(whole), path, 77 / 25)
    assert_true(replace(whole, zero_s=50 / 25), path, 0.0, 2.5)
    assert_true(replace(whole, zero_s=50 / 25), path, 1.3, 2.5)


# -- lengths


@pytest.mark.parametrize(("seconds", "sound_s"), [(3.0, 2.0), (2.0, 3.0), (2.6, 2.6)])
@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts", "avi"])
def test_both_end_where_the_first_ends(rendered, suffix, seconds, sound_s):
    film = Film(
        suffix,
        Picture(seconds=seconds),
        Sound("pcm_s16le" if suffix == "avi" else "aac", seconds=sound_s),
    )
    if suffix in ("mp4", "ts"):
        film = replace(film, sound=replace(film.sound, codec="ac3", rate=48000))
    decoded = decode(rendered(film), 0.0, 10.0)
    assert decoded.problems == {}
    # The last frame of ac3 has 32 ms, that of AAC 23 ms.
    length_s = decoded.facts["duration_s"]
    assert min(seconds, sound_s) - 0.001 <= length_s <= min(seconds, sound_s + 0.033) + 0.001
    assert len(decoded.frames) == int(length_s * 8 + 0.2)
    assert decoded.sound.shape == (1, round(length_s * RATE))
    assert_picture_true(film, decoded, 0.0, length_s, SETTINGS)
    assert_sound_true(film, decoded, 0.0, length_s, SETTINGS)


def test_recording_leaves_the_priority_of_the_tests_alone(tmp_path):
    before = os.sched_getscheduler(0), os.sched_getparam(0)
    films.record(tmp_path / "a.mp4", AV1, None)
    assert (os.sched_getscheduler(0), os.sched_getparam(0)) == before


# -- decord

TRUSTED = [
    ("mp4 h264 aac", 0.0), ("mp4 h264 with B-frames, aac stereo", 0.36), ("mkv h264 vorbis", 0.0),
    ("webm vp9 opus", 0.5), ("mp4 av1 opus", 0.0), ("mp4 mpeg4 mp3", 1.0),
]  # fmt: skip
DOUBTFUL = [
    ("ts h264 aac", 0.5), ("ts hevc ac3", 0.0), ("mkv hevc flac", 0.44), ("mpg mpeg2 mp2", 0.2),
    ("avi mpeg4 with B-frames", 0.0), ("mp4 fragments", 0.1), ("avi mpeg4 mp3", 0.5),
]  # fmt: skip


@pytest.mark.parametrize(("name", "start_s"), [*TRUSTED, *DOUBTFUL])
def test_decord_shows_the_same_or_is_not_asked(rendered, name, start_s):
    film = CONTAINERS[name]
    decoded = assert_true(film, rendered(film), start_s, 2.0, decoder="decord")
    if (name, start_s) in TRUSTED:
        assert decoded.facts["decoder"] == "decord"


@pytest.mark.parametrize("name", ["mp4", "mp4 hevc", "ts h264", "webm vp9"])
def test_decord_or_its_substitute_seeks_to_the_right_frame(rendered, name):
    film = LONG[name]
    for start_s in (2.37, 9.5):
        assert_true(film, rendered(film), start_s, 2.5, decoder="decord")


def test_decord_is_not_asked_for_frames_before_a_cut(rendered, tmp_path):
    whole = CUT_SOURCES["h264"]
    films.cut(rendered(whole), tmp_path / "cut.mp4", 63 / 25)
    film = replace(whole, zero_s=63 / 25)
    decoded = assert_true(film, tmp_path / "cut.mp4", 0.0, 2.5, decoder="decord")
    assert decoded.facts["decoder"] == "pyav"
