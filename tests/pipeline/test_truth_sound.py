"""Sound of decoded clips at every rate, with every channel, late or early, as it was recorded."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.pipeline.films import (
    B_FRAMES,
    VP9,
    Film,
    Picture,
    Sound,
)
from tests.pipeline.truth import (
    CLICK_TOLERANCE_S,
    SETTINGS,
    assert_sound_true,
    assert_true,
    decode,
)

MAX_LAG = 100  # samples


@pytest.mark.parametrize(
    ("suffix", "sound"),
    [
        ("mp4", Sound(rate=8000)),
        ("mp4", Sound(rate=11025)),
        ("mp4", Sound(rate=16000)),
        ("mp4", Sound(rate=22050)),
        ("mp4", Sound(rate=32000)),
        ("mp4", Sound(rate=48000)),
        ("ts", Sound(rate=22050)),
        ("mkv", Sound(rate=11025)),
        ("mkv", Sound("libmp3lame", 16000)),
        ("mkv", Sound("libmp3lame", 22050)),
        ("mp4", Sound("libmp3lame", 48000)),
        ("mkv", Sound("libopus", 16000)),
        ("mkv", Sound("libopus", 48000)),
        ("mkv", Sound("vorbis", 44100, 2)),
        ("mkv", Sound("pcm_s16le", 11025)),
        ("mov", Sound("pcm_s16be", 8000)),
        ("avi", Sound("pcm_s16le", 32000)),
        ("mkv", Sound("pcm_f32le", 44100)),
        ("mkv", Sound("flac", 32000)),
        ("mp4", Sound("ac3", 32000)),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.codec} {value.rate}",
)
@pytest.mark.parametrize("out_rate", [16000, 44100])
def test_click_is_in_place_at_every_sample_rate(rendered, suffix, sound, out_rate):
    film = Film(suffix, Picture(width=64, height=64), sound)
    path = rendered(film)
    for start_s, duration_s in ((0.0, 3.0), (0.8, 2.0)):
        decoded = decode(path, start_s, duration_s, sample_rate=out_rate)
        assert decoded.problems == {}
        used = replace(SETTINGS, sample_rate=out_rate)
        assert_sound_true(film, decoded, start_s, duration_s, used)


@pytest.mark.parametrize("out_channels", [1, 2])
@pytest.mark.parametrize("channels", [1, 2, 6])
@pytest.mark.parametrize(
    ("suffix", "codec"),
    [("mp4", "aac"), ("mkv", "pcm_s16le"), ("webm", "libopus"), ("ts", "ac3"), ("mkv", "flac")],
)
def test_channels_are_averaged_or_kept(rendered, suffix, codec, channels, out_channels):
    """Mono is the mean of all channels, without the +3 dB of FFmpeg's downmix."""
    picture = Picture("libvpx" if suffix == "webm" else "libx264", 64, 64)
    film = Film(suffix, picture, Sound(codec, 48000, channels))
    decoded = decode(rendered(film), channels=out_channels)
    assert decoded.problems == {} and decoded.facts["channels"] == channels
    assert_sound_true(film, decoded, 0.0, 3.0, replace(SETTINGS, channels=out_channels))


@pytest.mark.parametrize("suffix", ["mp4", "mov", "mkv", "webm", "ts", "flv"])
@pytest.mark.parametrize(
    ("picture_frames", "sound_s"),
    [(0, 0.5), (0, 1.25), (10, 0.0), (50, 2.0), (75, 2.5)],
    ids=["late", "very late", "early", "both later", "both later, early"],
)
def test_sound_keeps_its_distance_to_the_picture(rendered, suffix, picture_frames, sound_s):
    codec = "libopus" if suffix == "webm" else "aac"
    picture = replace(VP9 if suffix == "webm" else B_FRAMES, start_frames=picture_frames)
    film = Film(suffix, picture, Sound(codec, 48000, start_s=sound_s, seconds=4))
    path = rendered(film)
    decoded = assert_true(film, path)
    offset_s = sound_s - picture_frames / 25
    # Where priming isn't declared, it is sound that starts a little earlier.
    assert offset_s - 0.03 <= decoded.facts["audio_offset_s"] <= offset_s + 0.002
    assert_true(film, path, 1.4, 1.5)


@pytest.mark.parametrize("out_channels", [1, 2])
@pytest.mark.parametrize(
    ("suffix", "codec", "rate"),
    [
        ("mkv", "flac", 16000), ("mkv", "flac", 44100), ("mp4", "flac", 22050),
        ("mkv", "pcm_s16le", 44100), ("mov", "pcm_s24le", 48000), ("avi", "pcm_s16le", 11025),
    ],
)  # fmt: skip
def test_lossless_sound_comes_back_sample_by_sample(rendered, suffix, codec, rate, out_channels):
    """Timestamps of whole milliseconds (Matroska) may move it by less than one, not tear it."""
    film = Film(suffix, Picture(width=64, height=64, seconds=2.2), Sound(codec, rate, 2))
    truth = film.sound.samples()
    if out_channels == 1:
        truth = truth.mean(axis=0, keepdims=True)
    truth = np.pad(truth, ((0, 0), (MAX_LAG, MAX_LAG)))
    inexact = suffix == "mkv" and rate % 1000
    for start_s, duration_s in ((0.0, 2.0), (0.4, 1.0)):
        decoded = decode(
            rendered(film),
            start_s,
            duration_s,
            ["audio"],
            sample_rate=rate,
            channels=out_channels,
        )
        start = MAX_LAG + round(start_s * rate)
        lag = best_lag(decoded.sound[0], truth[0], start)
        assert abs(lag) <= (CLICK_TOLERANCE_S * rate if inexact else 0)
        expected = truth[:, start + lag : start + lag + decoded.sound.shape[1]]
        inner = slice(max(0, -lag), None)  # a film that seems later begins with silence
        np.testing.assert_allclose(decoded.sound[:, inner], expected[:, inner], atol=2**-14)


def best_lag(part, whole, start):
    """By how many samples ``part`` is off from ``start`` in ``whole``."""
    lags = range(-MAX_LAG, MAX_LAG + 1)
    errors = [np.abs(part - whole[start + lag : start + lag + len(part)]).sum() for lag in lags]
    return lags[int(np.argmin(errors))]
