"""Which size a picture gets, and how: scaled, turned upright, then cropped or padded."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from pipeline.media import DecodeSettings
from pipeline.streams import VideoProbe


@dataclass(frozen=True)
class Geometry:
    """How a coded frame becomes an output frame: scaled, turned, then cropped or padded."""

    scaled_width: int  # of the coded frame, before it is turned
    scaled_height: int
    mirrored: bool  # left to right, before it is turned
    quarter_turns: int  # counter-clockwise
    height: int
    width: int


def fit_geometry(video: VideoProbe, settings: DecodeSettings) -> Geometry:
    """Choose the size of nearest aspect ratio, and how the shown picture gets there."""
    shown = (video.width * video.pixel_aspect, float(video.height))
    turned = video.rotation % 180 == 90
    shown_width, shown_height = reversed(shown) if turned else shown
    height, width = min(
        settings.sizes,
        key=lambda size: abs(math.log(size[1] / size[0]) - math.log(shown_width / shown_height)),
    )
    ratios = width / shown_width, height / shown_height
    scale = min(ratios) if settings.fit == "pad" else max(ratios)
    scaled_width = max(1, round(shown_width * scale))
    scaled_height = max(1, round(shown_height * scale))
    if turned:
        scaled_width, scaled_height = scaled_height, scaled_width
    turns = video.rotation // 90
    return Geometry(scaled_width, scaled_height, video.mirrored, turns, height, width)


def paint(target: np.ndarray, source: np.ndarray) -> None:
    """Copy the middle of a picture [..., h, w] to the middle of another one [..., H, W]."""
    rows, to_rows = _centred(source.shape[-2], target.shape[-2])
    columns, to_columns = _centred(source.shape[-1], target.shape[-1])
    target[..., to_rows, to_columns] = source[..., rows, columns]


def _centred(have: int, want: int) -> tuple[slice, slice]:
    """Return which part of ``have`` pixels goes to which part of ``want``, both in the middle."""
    size = min(have, want)
    source, target = (have - size) // 2, (want - size) // 2
    return slice(source, source + size), slice(target, target + size)


def orientation(display_matrix: bytes) -> tuple[int, bool]:
    """Return (degrees counter-clockwise, whether mirrored left to right before).

    A coded point (x, y) is shown at (a x + c y, b x + d y), y downwards; mirroring negates x.

    Args:
        display_matrix: int32 [3, 3] of FFmpeg's side data; its first rows start a, b and c, d.
    """
    a, b, _, c, d = np.frombuffer(display_matrix, dtype="<i4")[:5].astype(float)
    mirrored = bool(a * d - b * c < 0)
    if mirrored:
        a, b = -a, -b
    clockwise = math.degrees(math.atan2(b, a))
    return round(-clockwise / 90) * 90 % 360, mirrored
