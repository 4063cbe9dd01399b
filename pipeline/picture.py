"""Frames of a clip by presentation timestamp, in the wanted geometry and colours.

PyAV decodes; decord does where it is asked for and can be trusted. decord drops start offsets,
and on clips cut between keyframes it repeats the last frame under wrong timestamps, so its table
is compared with the demuxed one. After a seek it counts frames instead of reading their times: up
to 3 frames off in open groups of pictures (x265's default), a whole group off in transport
streams. It takes untagged colour for BT.601 at any size. Damage it conceals.
"""

from __future__ import annotations

import logging
import math
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch  # noqa: F401  decord before torch can crash (sam2#465)
from av.video.frame import PictureType
from av.video.reformatter import Colorspace, Interpolation, VideoReformatter

from pipeline.demux import UNSPECIFIED_MATRIX, VideoProbe, open_media, packets_of
from pipeline.media import ClipError, DecodeSettings

import decord  # isort: skip

# Two clocks agree when they differ by less; the finest frame interval seen is 8 ms.
CLOCK_TOLERANCE_S = 0.002
# Untagged colour is BT.709 above this height, as players have it; decord takes it for BT.601.
SD_HEIGHT = 576
# How FFmpeg's own lines start: "[h264 @ 0x5642] error while decoding MB 5 9".
FFMPEG_LINE = re.compile(rb"\[[^\]]+ @ 0x[0-9a-f]+\]|    Last message repeated")

os.environ.setdefault("DECORD_LOG_LEVEL", "3")
decord.logging.set_level(decord.logging.ERROR)
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Picture:
    """Decoded frames of a span.

    Attributes:
        frames: uint8 [T, height, width, 3] RGB.
        pts_s: float64 [T], presentation times of the frames that were chosen.
        decoded_share: share of the frames that are there and undamaged.
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
    mirrored: bool  # left to right, before it is turned
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
    if video.encrypted:
        raise ClipError("truncated", "the picture is encrypted (DRM), expected an unprotected file")
    instants = first_s + np.arange(count) / settings.fps
    chosen = np.searchsorted(video.pts_s, instants + CLOCK_TOLERANCE_S, side="right") - 1
    chosen = np.maximum(chosen, 0)
    there_share = float((instants - video.pts_s[chosen] <= video.shown_at_most_s).mean())
    geometry = fit_geometry(video, settings)
    if settings.decoder == "decord" and _suits_decord(video):
        frames = _decord_frames(path, video, chosen, geometry)
        if frames is not None:
            return Picture(frames, video.pts_s[chosen], there_share, "decord")
    try:
        frames, share = _pyav_frames(path, video, chosen, geometry)
    except (av.FFmpegError, OSError, ValueError) as error:
        message = f"the picture can't be decoded, expected {count} frames: {error}"
        raise ClipError("truncated", message) from None
    return Picture(frames, video.pts_s[chosen], share * there_share, "pyav")


def _suits_decord(video: VideoProbe) -> bool:
    return (
        video.exact_seek
        and video.seek_s is None
        and video.hidden_frames == 0
        and video.rotation == 0
        and not video.mirrored
        and (video.matrix_tagged or video.height <= SD_HEIGHT)
    )


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


def centred(have: int, want: int) -> tuple[slice, slice]:
    """Return which part of ``have`` pixels goes to which part of ``want``, both in the middle."""
    size = min(have, want)
    source, target = (have - size) // 2, (want - size) // 2
    return slice(source, source + size), slice(target, target + size)


def place(frames: np.ndarray, geometry: Geometry) -> np.ndarray:
    """Crop the centre of frames [T, h, w, 3], or put them in the middle of black ones."""
    if frames.shape[1:3] == (geometry.height, geometry.width):
        return frames
    rows, to_rows = centred(frames.shape[1], geometry.height)
    columns, to_columns = centred(frames.shape[2], geometry.width)
    placed = np.zeros((len(frames), geometry.height, geometry.width, 3), dtype=np.uint8)
    placed[:, to_rows, to_columns] = frames[:, rows, columns]
    return placed


def _decord_frames(
    path: Path, video: VideoProbe, chosen: np.ndarray, geometry: Geometry
) -> np.ndarray | None:
    """Decode by index; None where decord fails, or what it does can't be trusted."""
    unique, places = np.unique(chosen, return_inverse=True)
    try:
        with FFmpegErrors() as errors:
            reader = decord.VideoReader(
                str(path), width=geometry.scaled_width, height=geometry.scaled_height, num_threads=1
            )
            if not _same_clock(reader, video.pts_s):
                return None
            frames = reader.get_batch(unique.tolist()).asnumpy()
    except (decord.DECORDError, RuntimeError, IndexError) as error:
        log.debug("decord fails on %s, PyAV decodes it: %s", path, error)
        return None
    if errors.found:
        return None
    frames = place(frames, geometry)
    return frames if len(unique) == len(chosen) else frames[places]


def _same_clock(reader: Any, pts_s: np.ndarray) -> bool:
    """Whether decord's table of frames is the demuxed one."""
    if len(reader) != len(pts_s):
        return False
    shown_s = reader.get_frame_timestamp(range(len(reader)))[:, 0]
    difference = (shown_s - shown_s[0]) - (pts_s - pts_s[0])
    return bool(np.abs(difference).max() <= CLOCK_TOLERANCE_S)


class FFmpegErrors:
    """Whether the FFmpeg inside decord complains meanwhile: decord itself conceals all damage.

    FFmpeg writes to the process's stderr; other lines that come there are passed on.

    Attributes:
        found: whether it did; set at the end.
    """

    def __enter__(self) -> FFmpegErrors:
        self.found = False
        self._file = tempfile.TemporaryFile()
        self._stderr = os.dup(2)
        os.dup2(self._file.fileno(), 2)
        return self

    def __exit__(self, *_: object) -> None:
        os.dup2(self._stderr, 2)
        os.close(self._stderr)
        self._file.seek(0)
        for line in self._file.read().splitlines(keepends=True):
            if FFMPEG_LINE.match(line):
                self.found = True
            else:
                os.write(2, line)
        self._file.close()


def _pyav_frames(
    path: Path, video: VideoProbe, chosen: np.ndarray, geometry: Geometry
) -> tuple[np.ndarray, float]:
    """Decode up to the last chosen frame; return the frames and the share that is undamaged.

    A frame that can't be decoded is replaced by the one before it.
    """
    wanted, places = np.unique(chosen, return_inverse=True)
    frames = np.zeros((len(wanted), geometry.height, geometry.width, 3), dtype=np.uint8)
    decoded, whole = np.zeros(len(wanted), dtype=bool), np.zeros(len(wanted), dtype=bool)
    scaler = VideoReformatter()
    for index, frame, damaged in _decoded_frames(path, video, wanted):
        at = int(np.searchsorted(wanted, index))
        _paint(frames[at], _scaled(scaler, frame, video, geometry))
        decoded[at], whole[at] = True, not damaged
    if not whole.any():
        raise ClipError("truncated", f"found no undamaged frame, expected {len(wanted)}")
    nearest = np.maximum.accumulate(np.where(decoded, np.arange(len(wanted)), 0))
    nearest[: int(np.argmax(decoded))] = np.argmax(decoded)
    if not decoded.all():
        frames = frames[nearest]
    return (frames if len(wanted) == len(chosen) else frames[places]), float(whole.mean())


def _scaled(
    scaler: VideoReformatter, frame: av.VideoFrame, video: VideoProbe, geometry: Geometry
) -> list[np.ndarray]:
    """Return a frame's planes of red, green and blue, scaled and upright.

    swscale writes planes with vector instructions and packed RGB without: 0.4 against 0.8 ms
    for a frame of 360p.
    """
    assumed = Colorspace.ITU709 if video.height > SD_HEIGHT else Colorspace.ITU601
    scaled = scaler.reformat(
        frame,
        geometry.scaled_width,
        geometry.scaled_height,
        "gbrp",
        src_colorspace=assumed if frame.colorspace == UNSPECIFIED_MATRIX else None,
        interpolation=Interpolation.BILINEAR,
        threads=1,
    )
    green, blue, red = (_plane_pixels(plane) for plane in scaled.planes)
    planes = [red, green, blue]
    if geometry.mirrored:
        planes = [plane[:, ::-1] for plane in planes]
    return [np.rot90(plane, k=geometry.quarter_turns) for plane in planes]


def _paint(picture: np.ndarray, planes: list[np.ndarray]) -> None:
    """Copy the middle of three planes into a black picture [height, width, 3]."""
    rows, to_rows = centred(planes[0].shape[0], picture.shape[0])
    columns, to_columns = centred(planes[0].shape[1], picture.shape[1])
    for channel, plane in enumerate(planes):
        picture[to_rows, to_columns, channel] = plane[rows, columns]


def _plane_pixels(plane: Any) -> np.ndarray:
    pixels = np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)
    return pixels[:, : plane.width]


def _decoded_frames(
    path: Path, video: VideoProbe, wanted: np.ndarray
) -> Iterator[tuple[int, av.VideoFrame, bool]]:
    """Yield (index, frame, damaged) for the wanted indices, seeking past what comes before.

    The seek goes a second further back: some demuxers compare decoding times, which are earlier.
    Frames that no other frame refers to and that no one wants are not decoded: a quarter of the
    time. What follows a damaged frame refers to it, up to the next keyframe.
    """
    wanted_s, last = set(video.pts_s[wanted].tolist()), int(wanted[-1])
    indices = set(wanted.tolist())
    with open_media(path) as container:
        stream: Any = container.streams.best("video")
        stream.thread_count = 1
        seek_s = -math.inf if video.seek_s is None else video.seek_s
        if video.seek_s is None and video.exact_seek and wanted[0] > 0:
            seek_s = float(video.pts_s[wanted[0]]) - 1.0
        tick_s, order, tainted, skip = float(stream.time_base), 0, False, ""
        if seek_s > -math.inf:
            container.seek(int(seek_s / tick_s), stream=stream)
        for packet in packets_of(container, stream):
            if packet.pts is not None and not video.in_order:
                needed = packet.pts * tick_s in wanted_s
                if skip != (skip := "DEFAULT" if needed else "NONREF"):
                    stream.codec_context.skip_frame = skip
            try:
                frames = packet.decode()
            except av.FFmpegError:
                tainted, order = True, order + 1
                continue
            for frame in frames:
                index = order if video.in_order else _index(video.pts_s, frame, tick_s)
                if index > last:
                    return
                order += 1
                tainted = tainted and not frame.key_frame
                if index in indices:
                    yield index, frame, tainted or frame.is_corrupt
                tainted = tainted or (frame.is_corrupt and frame.pict_type != PictureType.B)


def _index(pts_s: np.ndarray, frame: av.VideoFrame, tick_s: float) -> int:
    """Return a frame's place in the demuxed table, -1 where it has none."""
    if frame.pts is None:
        return -1
    index = int(np.searchsorted(pts_s, frame.pts * tick_s - CLOCK_TOLERANCE_S))
    if index < len(pts_s) and pts_s[index] - frame.pts * tick_s > CLOCK_TOLERANCE_S:
        return -1
    return index
