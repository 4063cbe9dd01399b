"""Compare what `decode_clip` makes of a film with the scene that the film shows.

Tolerances: frames that change within 2 ms of an instant may be shown before or after it
(Matroska and FLV round timestamps to 1 ms); clicks within 1 ms; colours within 3 of 255.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from pipeline.decode import decode_clip
from pipeline.media import Clip, Decoded, DecodeSettings
from tests.pipeline import scene

RATE = 16000
SETTINGS = DecodeSettings(
    fps=8, sizes=((96, 96),), fit="crop", decoder="pyav", sample_rate=RATE, channels=1
)
FRAME_TOLERANCE_S, CLICK_TOLERANCE_S, COLOUR_TOLERANCE = 0.0021, 0.001, 3
LOSSLESS_SOUND = ("pcm", "flac")
# Encoders of sound leave the clicks' level within this share; +3 dB would be 41 % more.
LEVEL_TOLERANCE, LOSSLESS_LEVEL_TOLERANCE = 0.12, 0.04


def decode(path, start_s=0.0, duration_s=3.0, wanted=("video", "audio"), **settings) -> Decoded:
    clip = Clip("key", path.name, start_s, duration_s)
    return decode_clip(path, clip, replace(SETTINGS, **settings), set(wanted))


def assert_true(film, path, start_s=0.0, duration_s=3.0, **settings) -> Decoded:
    """Decode a span and compare all of it with the scene."""
    decoded = decode(path, start_s, duration_s, **settings)
    used = replace(SETTINGS, **settings)
    assert decoded.problems == {}
    assert decoded.facts["duration_s"] == duration_s
    assert_picture_true(film, decoded, start_s, duration_s, used)
    assert_sound_true(film, decoded, start_s, duration_s, used)
    return decoded


def assert_picture_true(film, decoded, start_s, duration_s, settings):
    assert 0.98 <= decoded.facts["video_decoded_share"] <= 1
    count = int(duration_s * settings.fps + 0.2)
    height, width = decoded.frames.shape[1:3]
    assert decoded.frames.shape == (count, height, width, 3) and decoded.frames.dtype == np.uint8
    assert (height, width) in settings.sizes
    regions = film.picture.decoded_regions(height, width, settings.fit)
    across, _, aspect = film.picture.upright
    scale = max(1, width / float(across * aspect))
    colours = scene.region_colours(decoded.frames, regions, border=round(2 * scale + 0.4))
    numbers = scene.numbers_shown(colours)
    instants_s = film.zero + start_s + np.arange(count) / settings.fps
    early, late = (
        np.searchsorted(film.picture.times_s[:-1], instants_s + shift, side="right") - 1
        for shift in (-FRAME_TOLERANCE_S, FRAME_TOLERANCE_S)
    )
    right = (numbers == np.maximum(late, 0)) | (numbers == np.maximum(early, 0))
    assert right.all(), f"shown {numbers.tolist()}, expected {late.tolist()}"
    assert not np.isnan(colours[:, : scene.FIRST_CORNER]).any()
    error = np.abs(colours - scene.true_colours(numbers))
    worst = np.unravel_index(np.nanargmax(error), error.shape)
    assert error[worst] <= COLOUR_TOLERANCE, (
        f"frame {worst[0]} region {worst[1]}: {colours[worst[:2]]}, "
        f"expected {scene.true_colours(numbers)[worst[:2]]}"
    )


def assert_sound_true(film, decoded, start_s, duration_s, settings):
    assert 0.98 <= decoded.facts["audio_decoded_share"] <= 1
    rate, sound = settings.sample_rate, film.sound
    assert decoded.sound.dtype == np.float32
    assert decoded.sound.shape == (settings.channels, round(duration_s * rate))
    shift_s = film.sound_late_s - film.zero - start_s  # from the scene's seconds to the clip's
    starts_s, ends_s = sound.start_s + shift_s, sound.start_s + sound.seconds + shift_s
    clicks_s = scene.CLICKS_S + shift_s
    margin_s = 0.03
    there = (clicks_s > max(starts_s, 0) + margin_s) & (
        clicks_s < min(ends_s, duration_s) - margin_s
    )
    assert there.sum() >= 2
    gains = scene.click_gains(sound.channels)
    if settings.channels == 2 and sound.channels == 6:  # FL FR FC LFE BL BR
        gains = np.stack([gains[[0, 2, 4]].mean(axis=0), gains[[1, 2, 5]].mean(axis=0)])
    elif settings.channels == 1 or sound.channels != 2:
        gains = np.repeat(gains.mean(axis=0, keepdims=True), settings.channels, axis=0)
    lossless = sound.codec.startswith(LOSSLESS_SOUND)
    tolerance = LOSSLESS_LEVEL_TOLERANCE if lossless else LEVEL_TOLERANCE
    for channel, gain in zip(decoded.sound, gains[:, there], strict=True):
        found_s, levels = scene.find_clicks(channel, rate, clicks_s[there])
        off_s = (found_s - clicks_s[there])[gain > 0]
        assert np.abs(off_s).max(initial=0) <= CLICK_TOLERANCE_S, f"clicks are off by {off_s} s"
        assert np.abs(levels - gain).max() <= tolerance * gain.max(), f"{levels} for {gain}"
        assert_heard_while_recorded(channel, rate, starts_s, min(ends_s, duration_s))


def assert_heard_while_recorded(channel, rate, starts_s, ends_s):
    """The noise is there all the time that was recorded, and silence before."""
    step = rate // 20
    blocks = channel[: len(channel) // step * step].reshape(-1, step)
    loudness = np.sqrt((blocks**2).mean(axis=1))
    seconds = np.arange(len(blocks)) / 20
    inside = (seconds >= starts_s + 0.01) & (seconds + 0.05 <= ends_s - 0.01)
    assert (loudness[inside] > 0.05 * scene.NOISE_LEVEL).all(), "holes in the sound"
    before = channel[: max(round((starts_s - 0.06) * rate), 0)]  # codecs' run-up is some ms long
    assert not before.any(), "sound where none was recorded"
