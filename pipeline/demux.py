"""What a media file says of itself: streams and timestamps, by demuxing, decoding next to nothing.

Second 0 of a file is the instant of its first shown frame (of its first sample where there is no
picture). All times below are presentation times in seconds, as the container counts them.

A short file is demuxed whole. Of a long one, of which a clip is a small part, the beginning is
demuxed for second 0, then the clip's span behind a seek.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import av
import numpy as np

from pipeline.geometry import orientation
from pipeline.media import Clip, ClipError
from pipeline.tracks import AudioProbe, Track, VideoProbe

# A file that goes on for longer than this behind a clip is not demuxed whole.
LONG_S = 30.0
# Enough of a long file's beginning to know its first shown frame: frames are stored out of order
# by up to 16, and sound and picture up to a second apart.
HEAD_S = 2.0
# How far before a clip to seek: keyframes are 1 to 10 s apart, and some demuxers miss by more.
RUN_UPS_S = (1.0, 12.0, 60.0)
TAIL_S = 10.0
UNSPECIFIED_MATRIX = 2  # of AVColorSpace

av.logging.set_level(None)


@dataclass(frozen=True)
class Probe:
    """Both streams of a file; None where there is none that can be decoded.

    Attributes:
        path: of the file.
        zero_s: presentation time of the file's second 0.
        content_hash: of the packets of both streams that belong to the clip, "" without one.
        streams: what the file holds, for messages.
        window: of a long file: index of the stream and time to seek to, to read it again.
    """

    path: Path
    video: VideoProbe | None
    audio: AudioProbe | None
    zero_s: float
    content_hash: str
    streams: str
    window: tuple[int, float | None] | None

    def packets(self, track: Track, place: int) -> Iterator[tuple[Any, av.Packet | None]]:
        """Yield (codec context, packet) from a place on, then None for what the codec holds back.

        The packets that the probe read are given, or read again where they were too many.
        """
        if track.kept is not None:
            context = track.stream.codec_context
            if context.is_open:
                context.flush_buffers()
            for packet in track.kept[place:]:
                yield context, packet
            yield context, None
            return
        with open_media(self.path) as container:
            stream = container.streams[track.stream.index]
            stream.codec_context.thread_count = 1
            if self.window and self.window[1] is not None:
                _seek(container, container.streams[self.window[0]], self.window[1])
            for packet in islice(_packets(container, stream), place, None):
                if packet.size:
                    yield stream.codec_context, packet
            yield stream.codec_context, None


def open_media(path: Path) -> Any:
    """Open a file with PyAV. Titles in another encoding than UTF-8 are none of our business.

    FFmpeg gets a file descriptor and may open nothing else: a playlist that poses as a clip leads
    to no other file or address.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        options = {"fd": str(descriptor), "protocol_whitelist": "fd"}
        return av.open("fd:", metadata_errors="replace", options=options)
    finally:
        os.close(descriptor)  # FFmpeg has its own copy


def probe(path: Path, clip: Clip | None = None) -> Probe:
    """Read the timestamps of a file, or of the part of a long file that holds a clip.

    Raises:
        ClipError: ``missing`` or ``unreadable``.
    """
    with probing(path, clip) as probed:
        return probed


@contextmanager
def probing(path: Path, clip: Clip | None = None) -> Iterator[Probe]:
    """Probe as ``probe`` does, and keep the file open, to decode what was read."""
    with ExitStack() as stack:
        container = stack.enter_context(_open(path))
        probed = None
        if clip and _header_s(container) > clip.start_s + clip.duration_s + LONG_S:
            probed = _probe_window(path, container, clip)
            if probed is None:
                container = stack.enter_context(_open(path))
        yield probed or _probe_whole(path, container, clip)


def media_length(path: Path) -> float:
    """Return the seconds from second 0 to where the first of picture and sound ends.

    Headers are not believed: a long file's end is demuxed behind a seek, others whole.

    Raises:
        ClipError: ``missing`` or ``unreadable``.
    """
    with _open(path) as container:
        header_s = _header_s(container)
        if header_s > LONG_S + TAIL_S:
            heads = _read_head(container, HEAD_S)
            there = [track.stream for track in heads if track.usable]
            zero_s = _zero_s(heads)
            if there and _seek(container, there[0], zero_s + header_s - TAIL_S):
                tails = _read(container, there)
                if all(track.usable for track in tails):
                    return min(track.end_s for track in tails) - zero_s
    probed = probe(path)
    ends_s = [stream.end_s for stream in (probed.video, probed.audio) if stream]
    return min(ends_s) - probed.zero_s


def _open(path: Path) -> Any:
    try:
        return open_media(path)
    except FileNotFoundError:
        raise ClipError("missing", f"found no file {path.name}, expected a media file") from None
    except (av.FFmpegError, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        message = f"FFmpeg can't open it: {reason.lower()}; expected a media file"
        raise ClipError("unreadable", message) from None


def _streams(container: Any) -> list[Any]:
    """Return the streams that can be decoded: the best picture, then the best sound."""
    best = [container.streams.best(kind) for kind in ("video", "audio")]
    # A stream of a codec that this FFmpeg can't decode has no codec context.
    streams: list[Any] = [stream for stream in best if stream and stream.codec_context]
    for stream in streams:
        stream.codec_context.thread_count = 1
    return streams


def _packets(container: Any, *streams: Any) -> Iterator[av.Packet]:
    """Demux to the end of the file, or to where it can't be read on."""
    try:
        yield from container.demux(*streams)
    except (av.FFmpegError, OSError, ValueError, LookupError):
        # A damaged transport stream may lose a stream (LookupError). What is missing behind is
        # found by comparing with what the index promises.
        return


def _seek(container: Any, stream: Any, to_s: float) -> bool:
    """Go to the keyframe of ``stream`` at or before a time; False where that fails."""
    try:
        container.seek(int(to_s / float(stream.time_base)), stream=stream)
    except (av.FFmpegError, OSError, ValueError):
        return False
    return True


def _header_s(container: Any) -> float:
    return (container.duration or 0) / 1e6


def _zero_s(tracks: list[Track]) -> float:
    """Return when the first stream starts: that of the picture where there is one."""
    return next((track.start_s for track in tracks if track.usable), 0.0)


def _read(container: Any, streams: list[Any], to_s: float = math.inf) -> list[Track]:
    """Read the packets of all that is presented before ``to_s``.

    A stream that lags behind by more than ``LONG_S`` has nothing there.
    """
    tracks = [Track(stream) for stream in streams]
    by_index = {track.stream.index: track for track in tracks}
    for packet in _packets(container, *streams) if streams else ():
        by_index[packet.stream.index].add(packet)
        if to_s < math.inf:
            read_to_s = [track.read_to_s for track in tracks]
            if min(read_to_s) >= to_s or max(read_to_s) >= to_s + LONG_S:
                break
    for track in tracks:
        track.finish()
        if track.leading:
            track.hide_leading(_decodable(track))
    return tracks


def _decodable(track: Track) -> set[int]:
    """Return which frames come out whole of a stream's first group, by their timestamps.

    Frames that are shown before the first keyframe refer to a group before it, or do not.
    """
    context, decoded = track.stream.codec_context, set[int]()
    for packet in (*(track.kept or [])[: track.leading[-1] + 1], None):
        with suppress(av.FFmpegError):
            decoded |= {frame.pts for frame in context.decode(packet) if not frame.is_corrupt}
    context.flush_buffers()
    return decoded


def _read_head(container: Any, length_s: float) -> list[Track]:
    streams = _streams(container)
    begins_s = float((streams[0].start_time or 0) * streams[0].time_base) if streams else 0.0
    return _read(container, streams, begins_s + length_s)


def _probe_whole(path: Path, container: Any, clip: Clip | None) -> Probe:
    tracks = _read(container, _streams(container))
    return _probed(path, container, tracks, _zero_s(tracks), clip)


def _probe_window(path: Path, container: Any, clip: Clip) -> Probe | None:
    """Probe the part of a long file that holds a clip; None where no seek leads there."""
    near = clip.start_s <= RUN_UPS_S[-1]
    heads = _read_head(container, HEAD_S + (clip.start_s + clip.duration_s if near else 0.0))
    heads = [track for track in heads if track.usable]
    zero_s = _zero_s(heads)
    if near and heads:
        return _probed(path, container, heads, zero_s, clip, (heads[0].stream.index, None))
    for run_up_s in RUN_UPS_S if heads else ():
        seek_s = zero_s + clip.start_s - run_up_s
        if not _seek(container, heads[0].stream, seek_s):
            return None
        end_s = zero_s + clip.start_s + clip.duration_s
        tracks = _read(container, [track.stream for track in heads], end_s + HEAD_S)
        for place, track in enumerate(tracks):
            if not track.usable:  # it has ended before
                tracks[place] = heads[place]
        if tracks[0].start_s <= zero_s + clip.start_s:
            window = (heads[0].stream.index, seek_s)
            return _probed(path, container, tracks, zero_s, clip, window)
    return None


def _probed(
    path: Path,
    container: Any,
    tracks: list[Track],
    zero_s: float,
    clip: Clip | None,
    window: tuple[int, float | None] | None = None,
) -> Probe:
    usable = {track.is_video: track for track in tracks if track.usable}
    if not usable:
        message = f"found {_describe(container)}, expected picture or sound that can be decoded"
        raise ClipError("unreadable", message)
    missing_s = 0.0 if window else _missing_s(container, list(usable.values()))
    content = hashlib.blake2b(digest_size=16)
    for track in tracks if clip else ():
        from_s = zero_s + clip.start_s if clip else 0.0
        content.update(track.content(from_s, from_s + clip.duration_s if clip else 0.0))
    return Probe(
        path=path,
        video=_video_probe(usable[True], window is None, missing_s) if True in usable else None,
        audio=_audio_probe(usable[False], window is None, missing_s) if False in usable else None,
        zero_s=zero_s,
        content_hash=content.hexdigest() if clip else "",
        streams=_describe(container),
        window=window,
    )


def _describe(container: Any) -> str:
    """Name the streams of a file: "video h264, audio of a codec that FFmpeg can't decode"."""
    names = [
        f"{stream.type} {stream.codec_context.name}"
        if stream.codec_context
        else f"{stream.type} of a codec that FFmpeg can't decode"
        for stream in container.streams
    ]
    return ", ".join(names) or "no stream"


def _declared_end_s(track: Track, missing_s: float) -> float:
    """Return when a stream ends by its own length in the header (Matroska), or by the file's."""
    hours, _, rest = track.stream.metadata.get("DURATION", "").partition(":")
    minutes, _, seconds = rest.partition(":")
    try:
        return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    except ValueError:
        return track.end_s + missing_s


def _missing_s(container: Any, tracks: list[Track]) -> float:
    """Return how much earlier all streams end than a Matroska header says; it counts no frames.

    Where there are others, such as subtitles, the length may be theirs.
    """
    matroska = "matroska" in container.format.name and container.duration
    if not matroska or len(container.streams) > len(tracks):
        return 0.0
    return max(_header_s(container) - max(track.end_s for track in tracks), 0.0)


def _video_probe(track: Track, whole: bool, missing_s: float) -> VideoProbe:
    stream = track.stream
    length_s = track.end_s - track.start_s
    declared_end_s = _declared_end_s(track, missing_s)
    if not whole:
        declared_end_s, length_s = _by_index(track)
    elif stream.frames and len(track.timings) > 1:
        declared_end_s = track.start_s + stream.frames / len(track.timings) * length_s
    rotation, mirrored, matrix_tagged = _look(track)
    return VideoProbe(
        codec=stream.codec_context.name,
        width=stream.width,
        height=stream.height,
        pixel_aspect=float(stream.sample_aspect_ratio or 1) or 1.0,
        rotation=rotation,
        mirrored=mirrored,
        matrix_tagged=matrix_tagged,
        pts_s=np.array(sorted(timing.pts for timing in track.shown)) * track.tick_s,
        end_s=track.end_s,
        length_s=length_s,
        declared_end_s=declared_end_s,
        hidden_frames=len(track.timings) - len(track.shown),
        holes=track.holes(),
        whole=whole,
        track=track,
    )


def _audio_probe(track: Track, whole: bool, missing_s: float) -> AudioProbe:
    stream, context = track.stream, track.stream.codec_context
    length_s = track.end_s - track.start_s
    declared_end_s = _declared_end_s(track, missing_s)
    if not whole:
        declared_end_s, length_s = _by_index(track)
    elif stream.frames and context.frame_size:  # counted in packets, priming and padding too
        declared_end_s = track.start_s + stream.frames / len(track.timings) * length_s
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
        track=track,
    )


def _by_index(track: Track) -> tuple[float, float]:
    """Return when a stream of which a part was read ends at least, and its length."""
    entries = track.stream.index_entries
    declared_end_s = entries[-1].timestamp * track.tick_s if len(entries) else -math.inf
    duration = track.stream.duration
    length_s = duration * track.tick_s if duration else _header_s(track.stream.container)
    return declared_end_s, length_s


def _look(track: Track) -> tuple[int, bool, bool]:
    """Decode a first frame: rotation, mirrored, and whether its colours are tagged."""
    context = track.stream.codec_context
    for count in sorted({1, len(track.first)}):
        frames = []
        for packet in (*track.first[:count], None):
            with suppress(av.FFmpegError):
                frames += context.decode(packet)
        context.flush_buffers()
        for frame in frames:
            matrix = frame.side_data.get("DISPLAYMATRIX")
            rotation, mirrored = orientation(bytes(matrix)) if matrix else (0, False)
            return rotation, mirrored, frame.colorspace != UNSPECIFIED_MATRIX
    return 0, False, False  # nothing decodes: the frame count will tell
