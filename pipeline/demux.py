"""What a media file says of itself: streams and timestamps, by demuxing, decoding next to nothing.

Second 0 of a file is the instant of its first shown frame (of its first sample where there is no
picture). All times below are presentation times in seconds, as the container counts them.

A short file is demuxed whole. Of a long one, of which a clip is a small part, the beginning is
demuxed for second 0, then the clip's span behind a seek.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np

from pipeline.media import Clip, ClipError

# Containers whose index makes a seek land on the keyframe that was asked for.
INDEXED_FORMATS = frozenset(("mov", "matroska"))
# Containers that store no presentation times: FFmpeg counts packets in the order of decoding.
UNTIMED_FORMATS = frozenset(("avi",))
# A file that goes on for longer than this behind a clip is not demuxed whole.
LONG_S = 30.0
# Enough of a long file's beginning to know its first shown frame: frames are stored out of order
# by up to 16, and sound and picture up to a second apart.
HEAD_S = 2.0
# How far before a clip to seek: keyframes are 1 to 10 s apart, and some demuxers miss by more.
RUN_UPS_S = (1.0, 12.0, 60.0)
TAIL_S = 10.0
# One packet holds a frame, but for fields, and frames that are never shown.
FIRST_PACKETS = 3
OPEN_OPTIONS = {"protocol_whitelist": "file"}
# A gap of more frames than this in a film of constant rate is a hole where nothing counts frames.
HOLE_FRAMES = 2.5
UNSPECIFIED_MATRIX = 2  # of AVColorSpace

av.logging.set_level(None)


@dataclass(frozen=True)
class VideoProbe:
    """What demuxing says of the picture.

    Attributes:
        rotation: degrees by which frames are turned counter-clockwise to be upright.
        mirrored: whether they are flipped left to right before that.
        matrix_tagged: whether frames say how their colours are coded.
        pts_s: float64 [frames], sorted times of the frames that are shown.
        end_s: when the last of them ends.
        length_s: of the whole stream.
        declared_end_s: when the stream should end by the container's index; -inf: it doesn't say.
        hidden_frames: frames needed for decoding only (an edit list cuts them off).
        exact_seek: whether decoding can start at every keyframe, and no earlier frame comes out.
        in_order: frames are known by their order of presentation, not by their timestamps.
        shown_at_most_s: a frame that is presented for longer is followed by a hole in the file.
        seek_s: where to seek before decoding a part of a long file; -inf: nowhere; None: the
            whole file was read.
        encrypted: by a DRM scheme.
    """

    codec: str
    width: int
    height: int
    pixel_aspect: float
    rotation: int
    mirrored: bool
    matrix_tagged: bool
    pts_s: np.ndarray
    end_s: float
    length_s: float
    declared_end_s: float
    hidden_frames: int
    exact_seek: bool
    in_order: bool
    shown_at_most_s: float
    seek_s: float | None
    encrypted: bool


@dataclass(frozen=True)
class AudioProbe:
    """What demuxing says of the sound; attributes as in ``VideoProbe``."""

    codec: str
    sample_rate: int
    channels: int
    start_s: float
    end_s: float
    length_s: float
    declared_end_s: float
    encrypted: bool


@dataclass(frozen=True)
class Probe:
    """Both streams of a file; None where there is none that can be decoded.

    Attributes:
        zero_s: presentation time of the file's second 0.
        content_hash: of the packets of both streams that belong to the clip, "" without one.
        streams: what the file holds, for messages.
    """

    video: VideoProbe | None
    audio: AudioProbe | None
    zero_s: float
    content_hash: str
    streams: str


class _Packet(NamedTuple):
    """One packet's times in ticks of its stream, and what else is asked of it later."""

    pts: int
    dts: int
    duration: int
    hidden: bool
    keyframe: bool
    encrypted: bool
    digest: bytes


class _Track:
    """A stream and the packets read of it."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.tick_s = float(stream.time_base)
        self.is_video = stream.type == "video"
        self.in_order = not UNTIMED_FORMATS.isdisjoint(stream.container.format.name.split(","))
        self.packets: list[_Packet] = []
        self.first: list[av.Packet] = []  # for a look at the first frame

    def add(self, packet: av.Packet) -> None:
        """Note a packet; without any timestamp nothing can be done with it."""
        pts, dts = packet.pts, packet.dts
        if pts is None or (self.in_order and dts is not None):
            pts = dts
        if pts is None or not packet.size:
            return
        if self.is_video and len(self.first) < FIRST_PACKETS:
            self.first.append(packet)
        self.packets.append(
            _Packet(
                pts,
                pts if dts is None else dts,
                packet.duration or 0,
                packet.is_discard,
                packet.is_keyframe,
                packet.has_sidedata("encryption_info"),
                hashlib.blake2b(packet, digest_size=16).digest(),
            )
        )

    def finish(self) -> None:
        """Hide what can't be decoded: frames before the first keyframe, in the file or in time.

        A recording that starts between keyframes, or with an open group, has such frames.
        """
        places = [place for place, packet in enumerate(self.packets) if packet.keyframe]
        if not places or not self.is_video:
            return
        first_pts = self.packets[places[0]].pts
        for place, packet in enumerate(self.packets):
            if place < places[0] or packet.pts < first_pts:
                self.packets[place] = packet._replace(hidden=True)

    @property
    def shown(self) -> list[_Packet]:
        """The packets that are shown; all where that would leave no sound."""
        shown = [packet for packet in self.packets if not packet.hidden]
        return shown if shown or self.is_video else self.packets

    @property
    def usable(self) -> bool:
        """Whether there is anything to decode."""
        if self.is_video:
            return bool(self.stream.width and self.stream.height and self.shown)
        context = self.stream.codec_context
        return bool(context.sample_rate and context.channels and self.packets)

    @property
    def start_s(self) -> float:
        """When the stream begins; sound: later than its first packet by the encoder's priming."""
        start = min(packet.pts for packet in self.shown)
        if not self.is_video and self.stream.start_time is not None:
            start = max(start, self.stream.start_time)
        return start * self.tick_s

    @property
    def end_s(self) -> float:
        """When what was read of the stream ends."""
        shown = self.shown
        if not self.is_video:
            return max(packet.pts + packet.duration for packet in shown) * self.tick_s
        last, duration = max((packet.pts, packet.duration) for packet in shown)
        step = self.step  # some headers give every frame 1 ms
        return (last + (duration if duration >= step / 2 else step)) * self.tick_s

    @property
    def step(self) -> float:
        """The usual ticks from one shown frame to the next."""
        pts = sorted(packet.pts for packet in self.shown)
        return float(np.median(np.diff(pts))) if len(pts) > 1 else 0.0

    @property
    def read_to_s(self) -> float:
        """All that is presented before this time has been read."""
        return self.packets[-1].dts * self.tick_s if self.packets else -math.inf


def open_media(path: Path) -> Any:
    """Open a file with PyAV. Titles in another encoding than UTF-8 are none of our business.

    A playlist that poses as a clip can't make FFmpeg open addresses.
    """
    return av.open(str(path), metadata_errors="replace", options=OPEN_OPTIONS)


def packets_of(container: Any, *streams: Any) -> Iterator[av.Packet]:
    """Demux to the end of the file, or to where it can't be read on."""
    try:
        yield from container.demux(*streams)
    except (av.FFmpegError, OSError, ValueError):
        return  # what is missing behind is found by comparing with what the index promises


def probe(path: Path, clip: Clip | None = None) -> Probe:
    """Read the timestamps of a file, or of the part of a long file that holds a clip.

    Raises:
        ClipError: ``missing`` or ``unreadable``.
    """
    with _opened(path) as (container, streams):
        if clip and _header_s(container) > clip.start_s + clip.duration_s + LONG_S:
            probed = _probe_window(container, streams, clip)
            if probed:
                return probed
    with _opened(path) as (container, streams):
        tracks = _read(container, streams)
        return _probed(container, tracks, _zero_s(tracks), clip, seek_s=None)


def media_length(path: Path) -> float:
    """Return the seconds from second 0 to where the first of picture and sound ends.

    Headers are not believed: a long file's end is demuxed behind a seek, others whole.

    Raises:
        ClipError: ``missing`` or ``unreadable``.
    """
    with _opened(path) as (container, streams):
        header_s = _header_s(container)
        if header_s > LONG_S + TAIL_S:
            heads = _read(container, streams, _begins_s(streams) + HEAD_S)
            there = [track.stream for track in heads if track.usable]
            zero_s = _zero_s(heads)
            if there and _seek(container, there[0], zero_s + header_s - TAIL_S):
                tails = _read(container, there)
                if all(track.usable for track in tails):
                    return min(track.end_s for track in tails) - zero_s
    probed = probe(path)
    ends_s = [stream.end_s for stream in (probed.video, probed.audio) if stream]
    return min(ends_s) - probed.zero_s


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, list[Any]]]:
    """Open a file; yield it and its streams that can be decoded, the picture first."""
    try:
        with open_media(path) as container:
            best = [container.streams.best(kind) for kind in ("video", "audio")]
            # A stream of a codec that this FFmpeg can't decode has no codec context.
            yield container, [stream for stream in best if stream and stream.codec_context]
    except FileNotFoundError:
        raise ClipError("missing", f"found no file {path.name}, expected a media file") from None
    except (av.FFmpegError, OSError, ValueError) as error:
        raise ClipError(
            "unreadable", f"FFmpeg can't open it: {_reason(error)}; expected a media file"
        ) from None


def _reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).lower()


def _header_s(container: Any) -> float:
    return (container.duration or 0) / 1e6


def _begins_s(streams: list[Any]) -> float:
    """Return when a file begins by its header."""
    begin = streams[0].start_time if streams else None
    return float((begin or 0) * streams[0].time_base) if streams else 0.0


def _zero_s(tracks: list[_Track]) -> float:
    """Return when the first stream starts: that of the picture where there is one."""
    return next((track.start_s for track in tracks if track.usable), 0.0)


def _read(container: Any, streams: list[Any], to_s: float = math.inf) -> list[_Track]:
    """Read the packets of all that is presented before ``to_s``.

    A stream that lags behind by more than ``LONG_S`` has nothing there.
    """
    tracks = [_Track(stream) for stream in streams]
    by_index = {track.stream.index: track for track in tracks}
    for packet in packets_of(container, *streams) if streams else ():
        by_index[packet.stream.index].add(packet)
        if to_s < math.inf:
            read_to_s = [track.read_to_s for track in tracks]
            if min(read_to_s) >= to_s or max(read_to_s) >= to_s + LONG_S:
                break
    for track in tracks:
        track.finish()
    return tracks


def _seek(container: Any, stream: Any, to_s: float) -> bool:
    """Go to the keyframe of ``stream`` at or before a time; False where that fails."""
    try:
        container.seek(int(to_s / float(stream.time_base)), stream=stream)
    except (av.FFmpegError, OSError, ValueError):
        return False
    return True


def _probe_window(container: Any, streams: list[Any], clip: Clip) -> Probe | None:
    """Probe the part of a long file that holds a clip; None where no seek leads there."""
    near = clip.start_s <= RUN_UPS_S[-1]
    head_s = clip.start_s + clip.duration_s if near else 0.0
    heads = _read(container, streams, _begins_s(streams) + head_s + HEAD_S)
    there = [track.stream for track in heads if track.usable]
    zero_s = _zero_s(heads)
    if near and there:
        return _probed(container, heads, zero_s, clip, seek_s=-math.inf)
    for run_up_s in RUN_UPS_S if there else ():
        seek_s = zero_s + clip.start_s - run_up_s
        if not _seek(container, there[0], seek_s):
            return None
        tracks = _read(container, there, zero_s + clip.start_s + clip.duration_s + HEAD_S)
        usable_heads = [head for head in heads if head.usable]
        for track, head in zip(tracks, usable_heads, strict=True):
            track.first = head.first
            if not track.usable:  # it has ended before
                track.packets = head.packets
        if tracks[0].usable and tracks[0].start_s <= zero_s + clip.start_s:
            return _probed(container, tracks, zero_s, clip, seek_s=seek_s)
    return None


def _probed(
    container: Any, tracks: list[_Track], zero_s: float, clip: Clip | None, seek_s: float | None
) -> Probe:
    usable = {track.is_video: track for track in tracks if track.usable}
    if not usable:
        message = f"found {_describe(container)}, expected picture or sound that can be decoded"
        raise ClipError("unreadable", message)
    missing_s = _missing_s(container, list(usable.values())) if seek_s is None else 0.0
    return Probe(
        video=_video_probe(usable[True], seek_s, missing_s) if True in usable else None,
        audio=_audio_probe(usable[False], seek_s, missing_s) if False in usable else None,
        zero_s=zero_s,
        streams=_describe(container),
        content_hash=_content_hash(tracks, zero_s + clip.start_s, clip.duration_s) if clip else "",
    )


def _describe(container: Any) -> str:
    """Name the streams of a file: "video h264, audio of a codec that FFmpeg doesn't know"."""
    names = [
        f"{stream.type} {stream.codec_context.name}"
        if stream.codec_context
        else f"{stream.type} of a codec that FFmpeg can't decode"
        for stream in container.streams
    ]
    return ", ".join(names) or "no stream"


def _missing_s(container: Any, tracks: list[_Track]) -> float:
    """Return how much earlier all streams end than a Matroska header says; it counts no frames."""
    if "matroska" not in container.format.name or not container.duration:
        return 0.0
    return max(_header_s(container) - max(track.end_s for track in tracks), 0.0)


def _shown_at_most_s(track: _Track, pts_s: np.ndarray) -> float:
    """Return after which time a frame is overdue; inf: the rate varies, or frames are counted."""
    steps_s = np.diff(pts_s)
    if track.stream.frames or len(steps_s) < 10:
        return math.inf
    step_s = float(np.median(steps_s))
    regular = np.abs(steps_s - step_s) <= max(0.1 * step_s, 0.0015)
    return HOLE_FRAMES * step_s if regular.mean() >= 0.9 else math.inf


def _content_hash(tracks: list[_Track], from_s: float, duration_s: float) -> str:
    """Hash the packets that are presented in a span, stream by stream in order of decoding."""
    content = hashlib.blake2b(digest_size=16)
    for track in tracks:
        first, last = from_s / track.tick_s, (from_s + duration_s) / track.tick_s
        for packet in track.packets:
            if packet.pts < last and packet.pts + packet.duration > first:
                content.update(packet.digest)
    return content.hexdigest()


def _video_probe(track: _Track, seek_s: float | None, missing_s: float) -> VideoProbe:
    stream, shown = track.stream, track.shown
    pts_s = np.array(sorted(packet.pts for packet in shown)) * track.tick_s
    length_s = track.end_s - track.start_s
    declared_end_s = track.end_s + missing_s
    if seek_s is not None:
        declared_end_s, length_s = _by_index(track)
    elif stream.frames and len(track.packets) > 1:
        declared_end_s = track.start_s + stream.frames / len(track.packets) * length_s
    rotation, mirrored, matrix_tagged = _look(track)
    return VideoProbe(
        codec=stream.codec_context.name,
        width=stream.width,
        height=stream.height,
        pixel_aspect=float(stream.sample_aspect_ratio or 1) or 1.0,
        rotation=rotation,
        mirrored=mirrored,
        matrix_tagged=matrix_tagged,
        pts_s=pts_s,
        end_s=track.end_s,
        length_s=length_s,
        declared_end_s=declared_end_s,
        hidden_frames=len(track.packets) - len(shown),
        exact_seek=_has_exact_seek(track),
        in_order=track.in_order,
        shown_at_most_s=_shown_at_most_s(track, pts_s),
        seek_s=seek_s,
        encrypted=any(packet.encrypted for packet in track.packets),
    )


def _audio_probe(track: _Track, seek_s: float | None, missing_s: float) -> AudioProbe:
    stream, context = track.stream, track.stream.codec_context
    length_s = track.end_s - track.start_s
    declared_end_s = track.end_s + missing_s
    if seek_s is not None:
        declared_end_s, length_s = _by_index(track)
    elif stream.frames and context.frame_size:  # counted in packets, priming and padding too
        declared_end_s = track.start_s + stream.frames / len(track.packets) * length_s
    elif stream.frames:  # PCM is counted in samples
        declared_end_s = track.start_s + stream.frames / context.sample_rate
    return AudioProbe(
        codec=context.name,
        sample_rate=context.sample_rate,
        channels=context.channels,
        start_s=track.start_s,
        end_s=track.end_s,
        length_s=length_s,
        declared_end_s=declared_end_s,
        encrypted=any(packet.encrypted for packet in track.packets),
    )


def _by_index(track: _Track) -> tuple[float, float]:
    """Return when a stream of which a part was read ends at least, and its length."""
    entries = track.stream.index_entries
    declared_end_s = entries[-1].timestamp * track.tick_s if len(entries) else -math.inf
    duration = track.stream.duration
    length_s = duration * track.tick_s if duration else _header_s(track.stream.container)
    return declared_end_s, length_s


def _has_exact_seek(track: _Track) -> bool:
    """Whether the container has an index and no frame is shown before the keyframe it follows."""
    if INDEXED_FORMATS.isdisjoint(track.stream.container.format.name.split(",")):
        return False
    keyframe_pts = math.inf
    for packet in track.packets:
        if packet.keyframe:
            keyframe_pts = packet.pts
        elif packet.pts < keyframe_pts:
            return False
    return True


def _look(track: _Track) -> tuple[int, bool, bool]:
    """Decode a first frame: rotation, mirrored, and whether its colours are tagged.

    The container is not read again: its decoder gets the first packets, and is flushed.
    """
    context = track.stream.codec_context
    context.thread_count = 1
    for count in {1, len(track.first)}:
        try:
            frames = [frame for packet in track.first[:count] for frame in context.decode(packet)]
            frames += context.decode(None)
            context.flush_buffers()
        except av.FFmpegError:
            context.flush_buffers()
            continue
        for frame in frames:
            return *_orientation(frame), frame.colorspace != UNSPECIFIED_MATRIX
    return 0, False, False  # nothing decodes: the frame count will tell


def _orientation(frame: av.VideoFrame) -> tuple[int, bool]:
    """Return (degrees counter-clockwise, whether mirrored before) of a frame's display matrix.

    A coded point (x, y) is shown at (a x + c y, b x + d y), y downwards; mirroring negates x.
    """
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return 0, False
    a, b, _, c, d = np.frombuffer(bytes(data), dtype="<i4")[:5].astype(float)
    mirrored = bool(a * d - b * c < 0)
    if mirrored:
        a, b = -a, -b
    clockwise = math.degrees(math.atan2(b, a))
    return round(-clockwise / 90) * 90 % 360, mirrored
