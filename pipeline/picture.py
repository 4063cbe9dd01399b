"""Frames of a clip by presentation timestamp, decoded by decord or PyAV, in the wanted geometry.

decord drops start offsets, and on clips cut between keyframes it repeats the last frame under
wrong timestamps, so its table is compared with the demuxed one. After a seek it counts frames
instead of reading their times: up to 3 frames off in open groups of pictures (x265's default), a
whole group off in transport streams. Where the tables differ, where a seek may land elsewhere,
where the file carries frames that must not be shown, or where it is rotated, PyAV decodes.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch  # noqa: F401  decord before torch can crash (sam2#465)

from pipeline.demux import VideoProbe, open_media
from pipeline.media import ClipError, DecodeSettings

import decord  # isort: skip

# Two clocks agree when they differ by less; the finest frame interval seen is 8 ms.
CLOCK_TOLERANCE_S = 0.002

os.environ.setdefault("DECORD_LOG_LEVEL", "3")
decord.logging.set_level(decord.logging.QUIET)
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Picture:
    """Decoded frames of a span.

    Attributes:
        frames: uint8 [T, height, width, 3] RGB.
        pts_s: float64 [T], presentation times of the frames that were chosen.
        decoded_share: share of the chosen frames that could be decoded.
        decoder: "decord" or "pyav".
    """

    frames: np.ndarray
    pts_s: np.ndarray
    decoded_share: float
    decoder: str


@dataclass(frozen=True)
class Geometry:
    """How a coded frame becomes an output frame: scaled, turned, then cropped or padded."""

    scaled_width: int  # of the coded frame, before it is turned
    scaled_height: int
    quarter_turns: int  # counter-clockwise
    height: int
    width: int


def decode_picture(
    path: Path, video: VideoProbe, first_s: float, count: int, settings: DecodeSettings
) -> Picture:
    """Decode the frames presented at ``count`` instants 1 / fps apart.

    Args:
        path: the media file.
        video: its picture, see ``pipeline.demux``.
        first_s: presentation time of the first instant.
        count: number of instants, at least one.
        settings: frame rate, sizes, fit.

    Raises:
        ClipError: ``truncated``: not one frame can be decoded.
    """
    instants = first_s + np.arange(count) / settings.fps
    chosen = np.searchsorted(video.pts_s, instants + CLOCK_TOLERANCE_S, side="right") - 1
    chosen = np.maximum(chosen, 0)
    geometry = fit_geometry(video, settings)
    if video.exact_seek and video.hidden_frames == 0 and video.rotation == 0:
        frames = _decord_frames(path, video, chosen, geometry)
        if frames is not None:
            return Picture(place(frames, geometry), video.pts_s[chosen], 1.0, "decord")
    frames, share = _pyav_frames(path, video, chosen, geometry)
    return Picture(frames, video.pts_s[chosen], share, "pyav")


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
    return Geometry(scaled_width, scaled_height, video.rotation // 90, height, width)


def place(frames: np.ndarray, geometry: Geometry) -> np.ndarray:
    """Crop the centre of frames [..., h, w, 3], or put them in the middle of black ones."""
    height, width = geometry.height, geometry.width
    top, left = (frames.shape[-3] - height) // 2, (frames.shape[-2] - width) // 2
    frames = frames[..., max(top, 0) : max(top, 0) + height, max(left, 0) : max(left, 0) + width, :]
    if frames.shape[-3:-1] == (height, width):
        return np.ascontiguousarray(frames)
    padded = np.zeros((*frames.shape[:-3], height, width, 3), dtype=np.uint8)
    top, left = (height - frames.shape[-3]) // 2, (width - frames.shape[-2]) // 2
    padded[..., top : top + frames.shape[-3], left : left + frames.shape[-2], :] = frames
    return padded


def _decord_frames(
    path: Path, video: VideoProbe, chosen: np.ndarray, geometry: Geometry
) -> np.ndarray | None:
    """Decode by index; None where decord fails or its clock differs from the demuxed one."""
    try:
        reader = decord.VideoReader(
            str(path), width=geometry.scaled_width, height=geometry.scaled_height, num_threads=1
        )
        if len(reader) != len(video.pts_s):
            return None
        shown_s = reader.get_frame_timestamp(range(len(reader)))[:, 0]
        difference = (shown_s - shown_s[0]) - (video.pts_s - video.pts_s[0])
        if np.abs(difference).max() > CLOCK_TOLERANCE_S:
            return None
        unique, places = np.unique(chosen, return_inverse=True)
        frames = reader.get_batch(unique.tolist()).asnumpy()
        return frames if len(unique) == len(chosen) else frames[places]
    except (decord.DECORDError, RuntimeError, IndexError) as error:
        log.debug("decord fails on %s, PyAV decodes it: %s", path, error)
        return None


def _pyav_frames(
    path: Path, video: VideoProbe, chosen: np.ndarray, geometry: Geometry
) -> tuple[np.ndarray, float]:
    """Decode up to the last chosen frame; return the frames and the share that was decoded."""
    wanted = np.unique(chosen)
    kept: dict[int, np.ndarray] = {}
    size = {"width": geometry.scaled_width, "height": geometry.scaled_height}
    for index, frame in _decoded_frames(path, video, wanted):
        picture = frame.reformat(**size, format="rgb24", threads=1).to_ndarray()
        kept[index] = place(np.rot90(picture, k=geometry.quarter_turns), geometry)
    if not kept:
        raise ClipError("truncated", f"none of {len(wanted)} frames can be decoded")
    there = np.array(sorted(kept))
    places = np.maximum(np.searchsorted(there, chosen, side="right") - 1, 0)
    frames = np.stack([kept[int(there[place])] for place in places])
    return frames, len(kept) / len(wanted)


def _decoded_frames(
    path: Path, video: VideoProbe, wanted: np.ndarray
) -> Iterator[tuple[int, av.VideoFrame]]:
    """Yield (index, frame) for the wanted indices, seeking past what comes before them.

    The seek goes a second further back: some demuxers compare decoding times, which are earlier.
    """
    with open_media(path) as container:
        stream: Any = container.streams.best("video")
        stream.thread_count = 1
        if video.exact_seek and wanted[0] > 0:
            target = Fraction(float(video.pts_s[wanted[0]]) - 1.0) / stream.time_base
            container.seek(int(target), stream=stream)
        for packet in container.demux(stream):
            try:
                frames = packet.decode()
            except av.FFmpegError:
                continue  # a damaged packet: the frames it should have given are counted above
            for frame in frames:
                if frame.pts is None:
                    continue
                pts_s = float(frame.pts * stream.time_base)
                index = int(np.searchsorted(video.pts_s, pts_s - CLOCK_TOLERANCE_S))
                if index > wanted[-1]:
                    return
                if index in wanted:
                    yield index, frame
