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

from pipeline.geometry import orientation
from pipeline.media import Clip, ClipError
from pipeline.streams import (
    AudioProbe,
    VideoProbe,
    audio_probe,
    describe,
    header_s,
    missing_s,
    video_probe,
)
from pipeline.tracks import Track

# A file that goes on for longer than this behind a clip is not demuxed whole.
LONG_S = 30.0
# Enough of a long file's beginning to know its first shown frame: frames are stored out of order
# by up to 16, and sound and picture up to a second apart.
HEAD_S = 2.0
# How far before a clip to seek: keyframes are 1 to 10 s apart, and some demuxers miss by more.
RUN_UPS_S = (1.0, 12.0, 60.0)
TAIL_S = 10.0
# FFmpeg has read up to so much of a file when it is open, and does not say where it found damage.
OPENING_S = 5.0

av.logging.set_level(None)
av.logging.set_skip_repeated(False)


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


@contextmanager
def probing(path: Path, clip: Clip | None = None) -> Iterator[Probe]:
    """Read the timestamps of a file, or of the part of a long file that holds a clip.

    The file stays open within the context, to decode what was read.

    Raises:
        ClipError: ``missing`` or ``unreadable``.
    """
    with ExitStack() as stack:
        probed = None
        with _complaints() as complaints:
            media = _Media(stack.enter_context(_open(path)), complaints)
            if clip and media.goes_on_behind(clip):
                probed = _probe_window(path, media, clip)
                if probed is None:
                    media = _Media(stack.enter_context(_open(path)), complaints)
            probed = probed or _probe_whole(path, media, clip)
        yield probed


def media_length(path: Path) -> float:
    """Return the seconds from second 0 to where the first of picture and sound ends.

    Headers are not believed: a long file's end is demuxed behind a seek, others whole.

    Raises:
        ClipError: ``missing`` or ``unreadable``.
    """
    with _open(path) as container:
        media = _Media(container, [])
        if header_s(container) > LONG_S + TAIL_S:
            heads = [track for track in media.read_head(HEAD_S) if track.usable]
            zero_s = _zero_s(heads)
            there = [track.stream for track in heads]
            if there and media.seek(there[0], zero_s + header_s(container) - TAIL_S):
                tails = media.read(there)
                if all(track.usable for track in tails):
                    return min(track.end_s for track in tails) - zero_s
    with probing(path) as probed:
        ends_s = [stream.end_s for stream in (probed.video, probed.audio) if stream]
        return min(ends_s) - probed.zero_s


@contextmanager
def _complaints() -> Iterator[list[tuple[int, str, str]]]:
    """Collect what FFmpeg warns of in this thread: (level, who, message).

    Only while demuxing: a decoder's own threads would wait for Python's lock, held by who waits
    for them.
    """
    av.logging.set_level(av.logging.WARNING)
    try:
        with av.logging.Capture() as complaints:
            yield complaints
    finally:
        av.logging.set_level(None)


def _open(path: Path) -> Any:
    try:
        return open_media(path)
    except FileNotFoundError:
        raise ClipError("missing", f"found no file {path.name}, expected a media file") from None
    except (av.FFmpegError, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        message = f"FFmpeg can't open it: {reason.lower()}; expected a media file"
        raise ClipError("unreadable", message) from None


class _Media:
    """An open file to read tracks from.

    Attributes:
        torn_s: (from, to) of where what was read is known to be damaged.
    """

    def __init__(self, container: Any, complaints: list[tuple[int, str, str]]) -> None:
        self.container = container
        self.torn_s: list[tuple[float, float]] = []
        self._complaints = complaints

    def streams(self) -> list[Any]:
        """Return the streams that can be decoded: the best picture, then the best sound."""
        best = [self.container.streams.best(kind) for kind in ("video", "audio")]
        # A stream of a codec that this FFmpeg can't decode has no codec context.
        streams: list[Any] = [stream for stream in best if stream and stream.codec_context]
        for stream in streams:
            stream.codec_context.thread_count = 1
        return streams

    def goes_on_behind(self, clip: Clip) -> bool:
        """Whether a clip is a small part of the file, and can be told without the rest.

        Frames that have no times are counted from the beginning where they are reordered: how
        many are shown before a keyframe that follows it in the file, only decoding tells.
        """
        long = header_s(self.container) > clip.start_s + clip.duration_s + LONG_S
        return long and not any(
            Track(stream).in_order and stream.type == "video" and stream.codec_context.has_b_frames
            for stream in self.streams()
        )

    def seek(self, stream: Any, to_s: float) -> bool:
        """Go to the keyframe of ``stream`` at or before a time; False where that fails."""
        return _seek(self.container, stream, to_s)

    def read_head(self, length_s: float) -> list[Track]:
        """Read the beginning of the file."""
        streams = self.streams()
        begins_s = float((streams[0].start_time or 0) * streams[0].time_base) if streams else 0.0
        return self.read(streams, begins_s + length_s)

    def read(self, streams: list[Any], to_s: float = math.inf) -> list[Track]:
        """Read the packets of all that is presented before ``to_s``.

        A stream that lags behind by more than ``LONG_S`` has nothing there.
        """
        tracks = [Track(stream) for stream in streams]
        by_index = {track.stream.index: track for track in tracks}
        before_s = -math.inf
        for packet in _packets(self.container, *streams) if streams else ():
            track = by_index[packet.stream.index]
            track.add(packet)
            if packet.is_corrupt or self._complains():
                reach_s = OPENING_S if before_s == -math.inf else 0.0
                self.torn_s.append((before_s, track.read_to_s + reach_s))
            before_s = track.read_to_s
            if to_s < math.inf:
                read_to_s = [track.read_to_s for track in tracks]
                if min(read_to_s) >= to_s or max(read_to_s) >= to_s + LONG_S:
                    break
        for track in tracks:
            track.finish(whole=to_s == math.inf)
            if track.leading:
                track.hide_leading(_decodable(track))
            self.torn_s += track.gaps_s()
        return tracks

    def _complains(self) -> bool:
        """Whether the demuxer has reported damage since it was asked last.

        Parsers that join packets of transport streams drop the flag of those that are corrupt.
        """
        name = self.container.format.name
        found = any(
            who == name and (level <= av.logging.ERROR or message.startswith("Packet corrupt"))
            for level, who, message in self._complaints
        )
        self._complaints.clear()
        return found


def _packets(container: Any, *streams: Any) -> Iterator[av.Packet]:
    """Demux to the end of the file, or to where it can't be read on."""
    try:
        yield from container.demux(*streams)
    except (av.FFmpegError, OSError, ValueError, LookupError):
        # A damaged transport stream may lose a stream (LookupError). What is missing behind is
        # found by comparing with what the index promises.
        return


def _seek(container: Any, stream: Any, to_s: float) -> bool:
    try:
        container.seek(int(to_s / float(stream.time_base)), stream=stream)
    except (av.FFmpegError, OSError, ValueError):
        return False
    return True


def _zero_s(tracks: list[Track]) -> float:
    """Return when the first stream starts: that of the picture where there is one."""
    return next((track.start_s for track in tracks if track.usable), 0.0)


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


def _probe_whole(path: Path, media: _Media, clip: Clip | None) -> Probe:
    tracks = [track for track in media.read(media.streams()) if track.usable]
    return _probed(path, media, tracks, tracks, clip)


def _probe_window(path: Path, media: _Media, clip: Clip) -> Probe | None:
    """Probe the part of a long file that holds a clip; None where no seek leads there."""
    near = clip.start_s <= RUN_UPS_S[-1]
    heads = media.read_head(HEAD_S + (clip.start_s + clip.duration_s if near else 0.0))
    heads = [track for track in heads if track.usable]
    if near and heads:
        return _probed(path, media, heads, heads, clip, (heads[0].stream.index, None))
    clip_s = _zero_s(heads) + clip.start_s
    for run_up_s in RUN_UPS_S if heads else ():
        seek_s = clip_s - run_up_s
        if not media.seek(heads[0].stream, seek_s):
            return None
        media.torn_s.clear()
        tracks = media.read([head.stream for head in heads], clip_s + clip.duration_s + HEAD_S)
        # One that is not usable has ended before.
        there = [track if track.usable else head for track, head in zip(tracks, heads, strict=True)]
        if there[0].start_s <= clip_s:
            return _probed(path, media, there, heads, clip, (heads[0].stream.index, seek_s))
    return None


def _probed(
    path: Path,
    media: _Media,
    tracks: list[Track],
    heads: list[Track],
    clip: Clip | None,
    window: tuple[int, float | None] | None = None,
) -> Probe:
    """Put together what was read; of a long file, ``heads`` are the tracks of its beginning."""
    if not tracks:
        message = f"found {describe(media.container)}, expected picture or sound to decode"
        raise ClipError("unreadable", message)
    lost_s = 0.0 if window else missing_s(media.container, tracks)
    zero_s = _zero_s(heads)
    video = audio = None
    content = hashlib.blake2b(digest_size=16)
    for track, head in zip(tracks, heads, strict=True):
        if track.is_video:
            video = video_probe(track, _orientation(track), media.torn_s, lost_s)
        else:
            audio = audio_probe(track, head.start_s, lost_s)
        if clip:
            from_s = zero_s + clip.start_s
            content.update(track.content(from_s, from_s + clip.duration_s))
    return Probe(
        path=path,
        video=video,
        audio=audio,
        zero_s=zero_s,
        content_hash=content.hexdigest() if clip else "",
        streams=describe(media.container),
        window=window,
    )


def _orientation(track: Track) -> tuple[int, bool]:
    """Decode a first frame: its rotation, and whether it is mirrored."""
    context = track.stream.codec_context
    for count in sorted({1, len(track.first)}):
        frames = []
        for packet in (*track.first[:count], None):
            with suppress(av.FFmpegError):
                frames += context.decode(packet)
        context.flush_buffers()
        for frame in frames:
            matrix = frame.side_data.get("DISPLAYMATRIX")
            return orientation(bytes(matrix)) if matrix else (0, False)
    return 0, False  # nothing decodes: the frame count will tell
