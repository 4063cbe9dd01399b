"""What was read of one stream: the times of its packets, and the packets themselves to decode.

Numpy and the standard library only. Times are presentation times in seconds, as the container
counts them; inside a track, in ticks of its stream.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any, NamedTuple

import numpy as np

# Containers whose index makes a seek land on the keyframe that was asked for.
INDEXED_FORMATS = frozenset(("mov", "matroska"))
# Containers that store no presentation times: FFmpeg counts packets in the order of decoding.
UNTIMED_FORMATS = frozenset(("avi",))
# Compressed bytes kept for decoding; a clip of more (ProRes) is read from the disk twice.
KEPT_BYTES = 64 * 2**20
FIRST_PACKETS = 3
# Two clocks agree when they differ by less; the finest frame interval seen is 8 ms.
CLOCK_TOLERANCE_S = 0.002
# Untagged colour is BT.709 above this height, as players have it.
SD_HEIGHT = 576
# Steps between frames that agree to this are those of a constant rate; Matroska rounds to 1 ms.
STEP_SHARE, STEP_S = 0.1, 0.0015
# Damage and the gap it leaves in the picture are at most this far apart in time: frames are stored
# out of order, and sound and picture of one instant one behind the other.
NEAR_S = 0.5
UNSPECIFIED_MATRIX = 2  # of AVColorSpace


class Timing(NamedTuple):
    """One packet's times in ticks, and what else is asked of it later."""

    pts: int
    dts: int
    duration: int
    hidden: bool  # decoded, but not shown
    keyframe: bool
    place: int  # among all packets read of the stream
    digest: bytes


class Track:
    """A stream and what was read of it.

    Attributes:
        in_order: frames are known by their order of presentation, not by their timestamps.
        timings: of all packets that have a time, in order of decoding.
        first: a few packets, for a look at the first frame: fields, and frames never shown, come
            in packets of their own.
        kept: the packets, None where they are too many bytes to keep.
        encrypted: by a DRM scheme.
        leading: places of the packets shown before the first keyframe they follow.
        lost_in_front: packets in front of the first keyframe.
        shown: the timings of what is shown; set by ``finish``.
        whole: whether all of the stream was read; set by ``finish``.
    """

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.tick_s = float(stream.time_base)
        self.is_video = stream.type == "video"
        formats = set(stream.container.format.name.split(","))
        self.in_order = bool(UNTIMED_FORMATS & formats)
        self.indexed = bool(INDEXED_FORMATS & formats)
        self.timings: list[Timing] = []
        self.shown: list[Timing] = []
        self.kept: list[Any] | None = []
        self.first: list[Any] = []
        self.leading: list[int] = []
        self.lost_in_front = 0
        self.encrypted = False
        self.whole = False
        self._kept_bytes, self._place = 0, 0

    def add(self, packet: Any) -> None:
        """Note a packet (``av.Packet``)."""
        size = packet.size
        if not size:
            return  # says "end of the stream"
        self._keep(packet, size)
        pts, dts, keyframe = packet.pts, packet.dts, packet.is_keyframe
        if pts is None or (self.in_order and dts is not None):
            pts = dts
        if pts is None:
            return
        if not self.timings or (keyframe and self.is_video):  # asking costs 5 us
            self.encrypted = self.encrypted or packet.has_sidedata("encryption_info")
        digest = hashlib.blake2b(packet, digest_size=16).digest()
        times = (pts, pts if dts is None else dts, packet.duration or 0)
        self.timings.append(Timing(*times, packet.is_discard, keyframe, self._place - 1, digest))

    def _keep(self, packet: Any, size: int) -> None:
        if len(self.first) < FIRST_PACKETS:
            self.first.append(packet)
        self._place += 1
        self._kept_bytes += size
        if self._kept_bytes > KEPT_BYTES:
            self.kept = None
        if self.kept is not None:
            self.kept.append(packet)

    def finish(self, whole: bool) -> None:
        """Find what is shown, when all has been read: all of the stream, or a part.

        A recording that starts between keyframes has frames that refer to what is not there.
        Nobody shows them.
        """
        self.whole = whole
        first = next((place for place, timing in enumerate(self.timings) if timing.keyframe), 0)
        if self.is_video and first:
            self.lost_in_front = sum(not timing.hidden for timing in self.timings[:first])
            hidden = [timing._replace(hidden=True) for timing in self.timings[:first]]
            self.timings[:first] = hidden
        if self.is_video and self.timings and not self.in_order:
            first_pts = self.timings[first].pts
            shown = [timing for timing in self.timings[first:] if not timing.hidden]
            self.leading = [timing.place for timing in shown if timing.pts < first_pts]
        self._find_shown()

    def hide_leading(self, decodable: set[int]) -> None:
        """Hide the frames shown before the first keyframe, but for those of these timestamps."""
        for place, timing in enumerate(self.timings):
            if timing.place in self.leading and timing.pts not in decodable:
                self.timings[place] = timing._replace(hidden=True)
        self._find_shown()

    def _find_shown(self) -> None:
        self.shown = [timing for timing in self.timings if not timing.hidden]
        if not self.is_video and not self.shown:
            self.shown = self.timings

    @property
    def usable(self) -> bool:
        """Whether there is anything to decode."""
        if self.is_video:
            return bool(self.stream.width and self.stream.height and self.shown)
        context = self.stream.codec_context
        return bool(context.sample_rate and context.channels and self.shown)

    @property
    def start_s(self) -> float:
        """When the stream begins; sound: later than its first packet by the encoder's priming."""
        start = min(timing.pts for timing in self.shown)
        if not self.is_video and self.stream.start_time is not None:
            start = max(start, self.stream.start_time)
        return start * self.tick_s

    @property
    def end_s(self) -> float:
        """When what was read of the stream ends."""
        if not self.is_video:
            return max(timing.pts + timing.duration for timing in self.shown) * self.tick_s
        pts = sorted(timing.pts for timing in self.shown)
        step = float(np.median(np.diff(pts))) if len(pts) > 1 else 0.0
        duration = max(self.shown, key=lambda timing: timing.pts).duration
        # Some headers give every frame 1 ms.
        return (pts[-1] + (duration if duration >= step / 2 else step)) * self.tick_s

    @property
    def read_to_s(self) -> float:
        """All that is presented before this time has been read."""
        return self.timings[-1].dts * self.tick_s if self.timings else -math.inf

    @property
    def has_exact_seek(self) -> bool:
        """Whether the container has an index, and no frame is shown before its keyframe."""
        keyframe_pts = math.inf
        for timing in self.timings:
            if timing.keyframe:
                keyframe_pts = timing.pts
            elif timing.pts < keyframe_pts:
                return False
        return self.indexed

    def place_before(self, pts_s: float) -> int:
        """Return at which packet to start decoding, to get all that is presented from a time on.

        That is the last keyframe that is not later; for the frames behind it in the file that
        are shown before it, the one before. Sound has a second of run-up.
        """
        if self.in_order:
            return 0
        if not self.is_video:
            pts_s -= 1.0
        pts = pts_s / self.tick_s + 0.5
        places = [timing.place for timing in self.timings if timing.keyframe and timing.pts <= pts]
        back = 1 if self.has_exact_seek or not self.is_video else 2
        return places[-back] if len(places) >= back else 0

    def holes(self, torn_s: list[tuple[float, float]]) -> list[tuple[float, int]]:
        """Return (time of a frame beside it, frames lost) of every hole in the picture.

        Where the container counts frames, those in front of the first keyframe are lost if by
        the index they begin with one. Elsewhere, gaps in a film of constant rate are holes where
        the file is known to be damaged: without that, a still second may have been left out.

        Args:
            torn_s: (from, to) of where it is.
        """
        if self.stream.frames:
            index = self.stream.index_entries
            damaged = self.lost_in_front and len(index) and index[0].is_keyframe
            return [(self.start_s, self.lost_in_front)] if damaged else []
        pts_s = np.array(sorted(timing.pts for timing in self.shown)) * self.tick_s
        steps_s = np.diff(pts_s)
        if not torn_s or len(steps_s) < 10:
            return []
        step_s = float(np.median(steps_s))
        regular = np.abs(steps_s - step_s) <= max(STEP_SHARE * step_s, STEP_S)
        if regular.mean() < 0.9:
            return []
        from_s, to_s = np.array(torn_s).T
        return [
            (float(pts_s[gap]), round(steps_s[gap] / step_s) - 1)
            for gap in np.flatnonzero(steps_s > 1.5 * step_s)
            if ((from_s < pts_s[gap + 1] + NEAR_S) & (to_s > pts_s[gap] - NEAR_S)).any()
        ]

    def gaps_s(self) -> list[tuple[float, float]]:
        """Return (from, to) of where packets do not follow each other; sound always should."""
        if self.is_video or len(self.timings) < 2:
            return []
        pts, _, durations = np.array([timing[:3] for timing in self.timings]).T
        ends, starts = (pts + durations)[:-1], pts[1:]
        typical = float(np.median(np.diff(pts)))
        gaps = np.flatnonzero(starts - pts[:-1] > np.maximum(durations[:-1], typical) * 1.5)
        return [(ends[gap] * self.tick_s, starts[gap] * self.tick_s) for gap in gaps]

    def content(self, from_s: float, to_s: float) -> bytes:
        """Return the digests of the packets that are presented in a span, in order of decoding."""
        first, last = from_s / self.tick_s, to_s / self.tick_s
        return b"".join(
            timing.digest
            for timing in self.timings
            if timing.pts < last and timing.pts + timing.duration > first
        )
