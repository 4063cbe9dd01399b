"""What a container says of its picture and its sound: sizes, times, and when they should end.

Numpy and the standard library only. Times are presentation times in seconds, as the container
counts them.
"""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipeline.tracks import Track


@dataclass(frozen=True)
class VideoProbe:
    """What demuxing says of the picture.

    Attributes:
        codec: FFmpeg's name of it.
        width, height: of a coded frame in pixels, before it is turned.
        pixel_aspect: width of a pixel by its height.
        rotation: degrees by which frames are turned counter-clockwise to be upright.
        mirrored: whether they are flipped left to right before that.
        pts_s: float64 [frames], sorted times of the frames that are shown.
        end_s: when the last of them ends.
        length_s: of the whole stream.
        declared_end_s: when the stream should end by the container's count or index.
        holes: (time of a frame beside it, frames lost).
        track: the packets.
    """

    codec: str
    width: int
    height: int
    pixel_aspect: float
    rotation: int
    mirrored: bool
    pts_s: np.ndarray
    end_s: float
    length_s: float
    declared_end_s: float
    holes: list[tuple[float, int]]
    track: Track = field(repr=False)

    @property
    def start_s(self) -> float:
        """When the first frame that was read is shown."""
        return float(self.pts_s[0])


@dataclass(frozen=True)
class AudioProbe:
    """What demuxing says of the sound.

    Attributes:
        codec: FFmpeg's name of it.
        sample_rate: in Hz.
        channels: how many.
        start_s: when the stream begins; of a long file too, of which the middle is read.
        end_s: when what was read of it ends.
        length_s: of the whole stream.
        declared_end_s: when the stream should end by the container's count or index.
        track: the packets.
    """

    codec: str
    sample_rate: int
    channels: int
    start_s: float
    end_s: float
    length_s: float
    declared_end_s: float
    track: Track = field(repr=False)


def video_probe(
    track: Track,
    orientation: tuple[int, bool],
    torn_s: list[tuple[float, float]],
    missing_s: float,
) -> VideoProbe:
    """Say what a track of pictures is.

    Args:
        track: all of its packets, or those of a part.
        orientation: rotation and whether it is mirrored.
        torn_s: (from, to) of where the file is known to be damaged.
        missing_s: see ``missing_s``.
    """
    stream = track.stream
    declared_end_s, length_s = _declared(track, missing_s)
    if track.whole and stream.frames and len(track.timings) > 1:
        declared_end_s = track.start_s + stream.frames / len(track.timings) * length_s
    return VideoProbe(
        codec=stream.codec_context.name,
        width=stream.width,
        height=stream.height,
        pixel_aspect=float(stream.sample_aspect_ratio or 1) or 1.0,
        rotation=orientation[0],
        mirrored=orientation[1],
        pts_s=np.array(sorted(timing.pts for timing in track.shown)) * track.tick_s,
        end_s=track.end_s,
        length_s=length_s,
        declared_end_s=declared_end_s,
        holes=track.holes(torn_s),
        track=track,
    )


def audio_probe(track: Track, start_s: float, missing_s: float) -> AudioProbe:
    """Say what a track of sound is, whose stream begins at ``start_s``."""
    stream, context = track.stream, track.stream.codec_context
    declared_end_s, length_s = _declared(track, missing_s)
    if track.whole and stream.frames and context.frame_size:  # in packets, priming and padding too
        declared_end_s = start_s + stream.frames / len(track.timings) * length_s
    elif track.whole and stream.frames:  # PCM is counted in samples
        declared_end_s = start_s + stream.frames / context.sample_rate
    return AudioProbe(
        codec=context.name,
        sample_rate=context.sample_rate,
        channels=context.channels,
        start_s=start_s,
        end_s=track.end_s,
        length_s=length_s,
        declared_end_s=declared_end_s,
        track=track,
    )


def describe(container: Any) -> str:
    """Name the streams of a file: "video h264, audio of a codec that FFmpeg can't decode"."""
    names = [
        f"{stream.type} {stream.codec_context.name}"
        if stream.codec_context
        else f"{stream.type} of a codec that FFmpeg can't decode"
        for stream in container.streams
    ]
    return ", ".join(names) or "no stream"


def header_s(container: Any) -> float:
    """Return the length of a file by its header, 0 where it says none."""
    return (container.duration or 0) / 1e6


def missing_s(container: Any, tracks: list[Track]) -> float:
    """Return how much earlier all streams end than a Matroska header says; it counts no frames.

    Where there are others, such as subtitles, the length may be theirs.
    """
    if not _is_matroska(container) or len(container.streams) > len(tracks):
        return 0.0
    return max(header_s(container) - max(track.end_s for track in tracks), 0.0)


def _declared(track: Track, missing_s: float) -> tuple[float, float]:
    """Return when a stream should end by the container's header or index, and its length."""
    if track.whole:
        return _header_end_s(track, missing_s), track.end_s - track.start_s
    entries = track.stream.index_entries
    declared_end_s = entries[-1].timestamp * track.tick_s if len(entries) else -math.inf
    duration = track.stream.duration
    length_s = duration * track.tick_s if duration else header_s(track.stream.container)
    return declared_end_s, length_s


def _header_end_s(track: Track, missing_s: float) -> float:
    """Return when a stream ends by its own length in a Matroska header, or by the file's.

    In other containers the same tag may be there, copied from a longer Matroska file.
    """
    if _is_matroska(track.stream.container):
        hours, _, rest = track.stream.metadata.get("DURATION", "").partition(":")
        minutes, _, seconds = rest.partition(":")
        with suppress(ValueError):
            return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    return track.end_s + missing_s


def _is_matroska(container: Any) -> bool:
    return "matroska" in container.format.name
