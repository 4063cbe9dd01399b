"""What a media file says of itself: streams and timestamps, by demuxing, decoding next to nothing.

Second 0 of a file is the instant of its first shown frame (of its first sample where there is no
picture). All times below are seconds from there, unless named ``pts_s``.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np

from pipeline.media import Clip, ClipError

# Containers whose index makes a seek land on the keyframe that was asked for.
INDEXED_FORMATS = frozenset(("mov", "matroska"))

av.logging.set_level(None)


@dataclass(frozen=True)
class VideoProbe:
    """What demuxing says of the picture.

    Attributes:
        pts_s: float64 [frames], sorted presentation times of the frames that are shown.
        end_s: presentation time at which the last frame ends.
        declared_s: length by the container's frame count, 0 where it has none.
        hidden_frames: frames needed for decoding only (an edit list cuts them off).
        exact_seek: whether decoding can start at every keyframe, and no earlier frame comes out.
    """

    codec: str
    width: int
    height: int
    pixel_aspect: float
    rotation: int
    pts_s: np.ndarray
    end_s: float
    declared_s: float
    hidden_frames: int
    exact_seek: bool


class _Packet(NamedTuple):
    """Timing of one packet, in ticks of its stream."""

    pts: int
    duration: int
    hidden: bool
    keyframe: bool


@dataclass(frozen=True)
class AudioProbe:
    """What demuxing says of the sound; times as in ``VideoProbe``."""

    codec: str
    sample_rate: int
    channels: int
    start_s: float
    end_s: float
    declared_s: float


@dataclass(frozen=True)
class Probe:
    """Both streams of a file; None where there is none that can be decoded."""

    video: VideoProbe | None
    audio: AudioProbe | None
    content_hash: str = ""

    @property
    def zero_s(self) -> float:
        """Presentation time of the file's second 0."""
        if self.video:
            return float(self.video.pts_s[0])
        return self.audio.start_s if self.audio else 0.0


def open_media(path: Path) -> Any:
    """Open a file with PyAV; titles in another encoding than UTF-8 are none of our business."""
    return av.open(str(path), metadata_errors="replace")


def probe(path: Path, clip: Clip | None = None) -> Probe:
    """Read every packet's timestamps, decoding no more than one frame.

    Raises:
        ClipError: ``missing`` or ``unreadable``.
    """
    try:
        with open_media(path) as container:
            video = container.streams.best("video")
            audio = container.streams.best("audio")
            # A stream of a codec that this FFmpeg can't decode has no codec context.
            streams: list[Any] = [s for s in (video, audio) if s is not None and s.codec_context]
            packets: dict[int, list[_Packet]] = {stream.index: [] for stream in streams}
            for packet in container.demux(streams) if streams else ():
                if packet.pts is not None:
                    timing = (packet.pts, packet.duration or 0, packet.is_discard)
                    packets[packet.stream.index].append(_Packet(*timing, packet.is_keyframe))
            digest = hashlib.blake2b(digest_size=16)
            found: dict[str, Any] = {"video": None, "audio": None}
            for stream in streams:
                timings = packets[stream.index]
                if timings and stream.type == "video":
                    found["video"] = _video_probe(path, stream, timings)
                elif timings:
                    found["audio"] = _audio_probe(stream, timings)
    except FileNotFoundError:
        raise ClipError("missing", f"no file {path.name}") from None
    except (av.FFmpegError, OSError, ValueError) as error:
        raise ClipError("unreadable", f"FFmpeg can't open it: {_reason(error)}") from None
    if not any(found.values()):
        raise ClipError("unreadable", "no stream of picture or sound that can be decoded")
    return Probe(**found, content_hash=digest.hexdigest())


def _reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).lower()


def _video_probe(path: Path, stream: Any, packets: list[_Packet]) -> VideoProbe | None:
    if not stream.width or not stream.height:
        return None
    shown = sorted((packet.pts, packet.duration) for packet in packets if not packet.hidden)
    if not shown:
        return None
    pts_s = np.array([float(pts * stream.time_base) for pts, _ in shown])
    steps_s = np.diff(pts_s)
    last_s = float(shown[-1][1] * stream.time_base)
    if last_s <= 0:
        last_s = float(np.median(steps_s)) if len(steps_s) else 0.0
    declared_s = 0.0
    if stream.frames and len(packets) > 1:
        declared_s = stream.frames / len(packets) * (pts_s[-1] + last_s - pts_s[0])
    return VideoProbe(
        codec=stream.codec_context.name,
        width=stream.width,
        height=stream.height,
        pixel_aspect=float(stream.sample_aspect_ratio or 1) or 1.0,
        rotation=_rotation(path),
        pts_s=pts_s,
        end_s=float(pts_s[-1] + last_s),
        declared_s=declared_s,
        hidden_frames=len(packets) - len(shown),
        exact_seek=_has_exact_seek(stream, packets),
    )


def _has_exact_seek(stream: Any, packets: list[_Packet]) -> bool:
    """Whether the container has an index and no frame is shown before the keyframe it follows."""
    if INDEXED_FORMATS.isdisjoint(stream.container.format.name.split(",")):
        return False
    keyframe_pts = packets[0].pts
    for packet in packets:
        if packet.keyframe:
            keyframe_pts = packet.pts
        elif packet.pts < keyframe_pts:
            return False
    return True


def _rotation(path: Path) -> int:
    """Read the display rotation of the first frame, degrees counter-clockwise in [0, 360)."""
    with open_media(path) as container:
        stream: Any = container.streams.best("video")
        try:
            return next(int(frame.rotation) % 360 for frame in container.decode(stream))
        except (av.FFmpegError, StopIteration):
            return 0  # nothing decodes: the frame count will tell


def _audio_probe(stream: Any, packets: list[_Packet]) -> AudioProbe | None:
    context = stream.codec_context
    if not context.sample_rate or not context.channels:
        return None
    shown = [packet for packet in packets if not packet.hidden] or packets
    start = min(packet.pts for packet in shown)
    if stream.start_time is not None:  # later than the first packet by the encoder's priming
        start = max(start, stream.start_time)
    end = max(packet.pts + packet.duration for packet in shown)
    if context.frame_size:  # counted in packets, priming and padding among them
        declared_s = stream.frames / len(packets) * float((end - start) * stream.time_base)
    else:  # PCM is counted in samples
        declared_s = stream.frames / context.sample_rate
    return AudioProbe(
        codec=context.name,
        sample_rate=context.sample_rate,
        channels=context.channels,
        start_s=float(start * stream.time_base),
        end_s=float(end * stream.time_base),
        declared_s=declared_s,
    )
