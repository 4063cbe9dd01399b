"""Frames by decord, where it is asked for and can be trusted. Only this file imports decord.

decord drops start offsets, and on clips cut between keyframes it repeats the last frame under
wrong timestamps, so its table is compared with the demuxed one. After a seek it counts frames
instead of reading their times: up to 3 frames off in open groups of pictures (x265's default), a
whole group off in transport streams. It takes untagged colour for BT.601 at any size, and it
conceals damage.
"""

from __future__ import annotations

import logging
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.geometry import Geometry, paint
from pipeline.streams import VideoProbe
from pipeline.tracks import CLOCK_TOLERANCE_S, SD_HEIGHT, UNSPECIFIED_MATRIX

# How FFmpeg's own lines start: "[h264 @ 0x5642] error while decoding MB 5 9".
FFMPEG_LINE = re.compile(rb"\[[^\]]+ @ 0x[0-9a-f]+\]|    Last message repeated")

log = logging.getLogger(__name__)


def decord_frames(
    path: Path, video: VideoProbe, wanted: np.ndarray, geometry: Geometry
) -> np.ndarray | None:
    """Decode the wanted frames by index, uint8 [len(wanted), height, width, 3].

    Returns None where decord fails, or where what it does can't be trusted.
    """
    if not _is_trusted(video):
        return None
    import torch  # noqa: F401  decord before torch can crash (sam2#465)

    import decord  # isort: skip

    decord.logging.set_level(decord.logging.ERROR)
    size = {"width": geometry.scaled_width, "height": geometry.scaled_height}
    try:
        with FFmpegErrors() as errors:
            reader = decord.VideoReader(str(path), **size, num_threads=1)
            if not _same_clock(reader, video.pts_s):
                return None
            frames = reader.get_batch(wanted.tolist()).asnumpy()
    except (decord.DECORDError, RuntimeError, IndexError) as error:
        log.debug("decord fails on %s, PyAV decodes it: %s", path, error)
        return None
    return None if errors.found else _placed(frames, geometry)


def _is_trusted(video: VideoProbe) -> bool:
    track = video.track
    tagged = track.stream.codec_context.colorspace != UNSPECIFIED_MATRIX
    return (
        track.has_exact_seek
        and track.whole
        and len(track.shown) == len(track.timings)
        and video.rotation == 0
        and not video.mirrored
        and (tagged or video.height <= SD_HEIGHT)
    )


def _placed(frames: np.ndarray, geometry: Geometry) -> np.ndarray:
    """Crop frames [T, h, w, 3], or put black around them."""
    if frames.shape[1:3] == (geometry.height, geometry.width):
        return frames
    placed = np.zeros((len(frames), geometry.height, geometry.width, 3), dtype=np.uint8)
    paint(np.moveaxis(placed, -1, 1), np.moveaxis(frames, -1, 1))
    return placed


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
