"""Colours and geometry of decoded clips, compared with what was painted."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from tests.pipeline import scene
from tests.pipeline.films import (
    AV1,
    MJPEG,
    PCM,
    Film,
    Picture,
    Sound,
)
from tests.pipeline.truth import (
    COLOUR_TOLERANCE,
    assert_true,
    decode,
)

# -- colour

COLOURS = {
    "BT.601": Picture(),
    "BT.709": Picture(matrix="bt709"),
    "BT.2020": Picture(matrix="bt2020"),  # its matrix; primaries and gamut stay as they are
    "untagged is BT.601": Picture(tagged=False),
    "full range BT.601": Picture(full_range=True),
    "full range BT.709": Picture(matrix="bt709", full_range=True),
    "4:4:4": Picture(pix_fmt="yuv444p", matrix="bt709"),
    "4:4:4 full range": Picture(pix_fmt="yuv444p", full_range=True),
    "4:2:2": Picture(pix_fmt="yuv422p", matrix="bt709"),
    "10 bit h264": Picture(pix_fmt="yuv420p10le", matrix="bt709"),
    "10 bit h264 4:4:4": Picture(pix_fmt="yuv444p10le", matrix="bt709", full_range=True),
    "10 bit hevc BT.2020": Picture("libx265", pix_fmt="yuv420p10le", matrix="bt2020"),
    "12 bit hevc": Picture("libx265", pix_fmt="yuv420p12le", matrix="bt709"),
    "hevc full range": Picture("libx265", matrix="bt709", full_range=True),
    "10 bit av1": Picture("libsvtav1", pix_fmt="yuv420p10le", matrix="bt709"),
    "av1 full range": Picture("libsvtav1", full_range=True),
    "vp9 BT.709": Picture("libvpx-vp9", matrix="bt709"),
    "vp9 4:4:4 full range": Picture("libvpx-vp9", pix_fmt="yuv444p", full_range=True),
    "prores 4:4:4": Picture("prores_ks", pix_fmt="yuv444p10le", matrix="bt709"),
    "full range jpeg": MJPEG,
}


@pytest.mark.parametrize("scaled", [False, True], ids=["as is", "scaled"])
@pytest.mark.parametrize("name", COLOURS)
def test_colour_is_the_one_painted(rendered, name, scaled):
    film = Film("mkv", replace(COLOURS[name], seconds=1.6), PCM)
    assert_true(film, rendered(film), 0.0, 1.5, sizes=((72, 72) if scaled else (96, 96),))


# -- geometry

SHAPES = {
    "square": Picture(width=128, height=128),
    "wide": Picture(width=256, height=144),
    "tall": Picture(width=144, height=256),
    "very wide": Picture(width=320, height=96),
    "wide pixels": Picture(width=144, height=144, pixel_aspect=Fraction(4, 3)),
    "narrow pixels": Picture(width=176, height=144, pixel_aspect=Fraction(12, 11)),
    "tall pixels": Picture(width=216, height=192, pixel_aspect=Fraction(1, 2)),
    "nearly square pixels": Picture(width=192, height=144, pixel_aspect=Fraction(448, 447)),
    "turned 90": Picture(width=192, height=144, rotation=90),
    "turned 180": Picture(width=192, height=144, rotation=180),
    "turned 270": Picture(width=192, height=144, rotation=270),
    "turned 90, wide pixels": Picture(
        width=192, height=144, rotation=90, pixel_aspect=Fraction(4, 3)
    ),
    "turned 270, tall pixels, B-frames": Picture(
        width=192, height=144, rotation=270, b_frames=2, pixel_aspect=Fraction(3, 4)
    ),
    "odd vp9": Picture("libvpx-vp9", width=201, height=151),
    "odd 4:4:4": Picture(width=197, height=147, pix_fmt="yuv444p"),
    "odd turned": Picture(width=197, height=147, pix_fmt="yuv444p", rotation=90),
    "odd mpeg4": Picture("mpeg4", width=175, height=149, tagged=False),
    "odd av1": Picture("libsvtav1", width=197, height=147),
    "height not of 16": Picture(width=240, height=180),
}


@pytest.mark.parametrize("fit", ["crop", "pad"])
@pytest.mark.parametrize("name", SHAPES)
def test_picture_is_in_the_centre_of_a_square(rendered, name, fit):
    suffix = "mkv" if "vp9" in name else "mp4"
    film = Film(suffix, replace(SHAPES[name], seconds=1.6), Sound(rate=48000))
    sizes = ((112, 112),) if fit == "crop" else ((176, 176),)
    decoded = assert_true(film, rendered(film), 0.0, 1.5, sizes=sizes, fit=fit)
    aspect = decoded.facts["pixel_aspect"]
    assert aspect == pytest.approx(float(film.picture.pixel_aspect), rel=0.001)
    assert decoded.facts["rotation"] == film.picture.rotation


BUCKETS = ((144, 144), (112, 192), (192, 112), (120, 168))


@pytest.mark.parametrize("fit", ["crop", "pad"])
@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("square", (144, 144)),
        ("wide", (112, 192)),
        ("tall", (192, 112)),
        ("very wide", (112, 192)),
        ("wide pixels", (120, 168)),
        ("tall pixels", (192, 112)),
        ("turned 90", (192, 112)),
        ("turned 180", (120, 168)),
        ("turned 90, wide pixels", (192, 112)),
        ("turned 270, tall pixels, B-frames", (144, 144)),
        ("odd 4:4:4", (120, 168)),
    ],
)
def test_nearest_bucket_is_taken(rendered, name, size, fit):
    film = Film("mp4", replace(SHAPES[name], seconds=1.6), Sound(rate=48000))
    decoded = assert_true(film, rendered(film), 0.0, 1.5, sizes=BUCKETS, fit=fit)
    assert decoded.frames.shape[1:3] == size


@pytest.mark.parametrize(
    ("suffix", "picture"),
    [
        ("mov", Picture(rotation=90)),
        ("mkv", Picture(rotation=270)),
        ("mkv", Picture(pixel_aspect=Fraction(4, 3))),
        ("ts", Picture(pixel_aspect=Fraction(4, 3))),
        ("mpg", Picture("mpeg2video", pixel_aspect=Fraction(4, 3), tagged=False)),
        ("avi", Picture("mpeg4", pixel_aspect=Fraction(4, 3), tagged=False)),
        ("mp4", Picture("libx265", pixel_aspect=Fraction(4, 3), rotation=90)),
        ("mp4", replace(AV1, rotation=180)),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.codec} {value.rotation}",
)
def test_every_container_says_how_its_picture_is_shown(rendered, suffix, picture):
    """Not webm: VP8 and VP9 leave the shape of pixels to it, and PyAV can't write it there."""
    sound = PCM if suffix == "avi" else Sound("ac3", 48000)
    film = Film(suffix, replace(picture, width=160, height=120, seconds=1.6), sound)
    assert_true(film, rendered(film), 0.0, 1.5, sizes=((96, 96), (160, 120), (96, 160)))


@pytest.mark.parametrize(("fit", "size"), [("crop", 96), ("pad", 128)])
def test_picture_that_needs_no_scaling_is_exactly_in_the_centre(rendered, fit, size):
    film = Film("mkv", Picture("ffv1", pix_fmt="yuv444p", seconds=1), None)
    decoded = decode(rendered(film), 0.0, 0.9, ["video"], sizes=((size, size),), fit=fit)
    regions = film.picture.decoded_regions(size, size, fit)
    for frame, number in zip(decoded.frames, [0, 3, 6, 9, 12, 15, 18], strict=True):
        off = np.abs(frame.astype(int) - scene.true_colours([number])[0][regions])
        assert off.max() <= COLOUR_TOLERANCE


def test_rotation_is_what_players_make_of_the_file(rendered):
    """ISO 14496-12: the matrix (0 1 / -1 0) turns the picture a quarter clockwise."""
    film = Film("mp4", Picture(rotation=270), None)
    content = rendered(film).read_bytes()
    header = content[content.index(b"tkhd") :]
    matrix = np.frombuffer(header[44 : 44 + 36], dtype=">i4").reshape(3, 3)
    np.testing.assert_array_equal(matrix[:2, :2] >> 16, [[0, 1], [-1, 0]])
