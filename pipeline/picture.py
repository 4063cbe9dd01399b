"""Frames of a clip by presentation timestamp, in the wanted geometry and colours.

PyAV decodes; decord does where it is asked for and can be trusted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import av
import numpy as np
from av.video.frame import PictureType
from av.video.reformatter import Colorspace, Interpolation, VideoReformatter

from pipeline.decord_picture import decord_frames
from pipeline.demux import Probe
from pipeline.geometry import Geometry, fit_geometry, paint
from pipeline.media import ClipError, DecodeSettings
from pipeline.streams import VideoProbe
from pipeline.tracks import CLOCK_TOLERANCE_S, SD_HEIGHT, UNSPECIFIED_MATRIX


@dataclass(frozen=True)
class Picture:
    """Decoded frames of a span.

    Attributes:
        frames: uint8 [T, height, width, 3] RGB.
        pts_s: float64 [T], presentation times of the frames that were chosen.
        decoded_share: share of the frames up to the picture's end that are undamaged.
        decoder: "decord" or "pyav".
    """

    frames: np.ndarray
    pts_s: np.ndarray
    decoded_share: float
    decoder: str


def decode_picture(
    probed: Probe, video: VideoProbe, first_s: float, count: int, settings: DecodeSettings
) -> Picture:
    """Decode the frames presented at ``count`` instants 1 / fps apart.

    Args:
        probed: the media file, still open (``pipeline.demux.probing``).
        video: its picture.
        first_s: presentation time of the first instant.
        count: number of instants, at least one.
        settings: frame rate, sizes, fit.

    Raises:
        ClipError: ``unreadable``: it is encrypted. ``truncated``: not one frame can be decoded.
    """
    if video.track.encrypted:
        raise ClipError(
            "unreadable", "the picture is encrypted (DRM), expected an unprotected file"
        )
    instants = first_s + np.arange(count) / settings.fps
    chosen = np.searchsorted(video.pts_s, instants + CLOCK_TOLERANCE_S, side="right") - 1
    chosen = np.maximum(chosen, 0)
    wanted, places = np.unique(chosen, return_inverse=True)
    unbroken_share = _unbroken_share(video, first_s, first_s + count / settings.fps)
    geometry = fit_geometry(video, settings)
    if settings.decoder == "decord":
        frames = decord_frames(probed.path, video, wanted, geometry)
        if frames is not None:
            return Picture(_repeat(frames, places), video.pts_s[chosen], unbroken_share, "decord")
    frames, share = _pyav_frames(probed, video, wanted, geometry)
    return Picture(_repeat(frames, places), video.pts_s[chosen], share * unbroken_share, "pyav")


def _repeat(frames: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Show a frame for as many instants as it was chosen; a copy of all only if need be."""
    return frames if len(frames) == len(places) else frames[places]


def _unbroken_share(video: VideoProbe, from_s: float, to_s: float) -> float:
    """Return the share of a span's frames that are in the file, by its holes."""
    lost = sum(count for pts_s, count in video.holes if from_s <= pts_s < to_s)
    there = int(((video.pts_s >= from_s) & (video.pts_s < to_s)).sum())
    return there / (there + lost) if lost else 1.0


def _pyav_frames(
    probed: Probe, video: VideoProbe, wanted: np.ndarray, geometry: Geometry
) -> tuple[np.ndarray, float]:
    """Decode up to the last wanted frame; return the frames and the share that is undamaged.

    A frame that can't be decoded is replaced by the one before it.
    """
    frames = np.zeros((len(wanted), geometry.height, geometry.width, 3), dtype=np.uint8)
    decoded, whole = np.zeros(len(wanted), dtype=bool), np.zeros(len(wanted), dtype=bool)
    scaler = VideoReformatter()
    place_of = {int(index): place for place, index in enumerate(wanted)}
    for index, frame, damaged in _decoded_frames(probed, video, wanted):
        place = place_of[index]
        for channel, plane in enumerate(_scaled(scaler, frame, video, geometry)):
            paint(frames[place, :, :, channel], plane)
        decoded[place], whole[place] = True, not damaged
    if not whole.any():
        raise ClipError("truncated", f"found no undamaged frame, expected {len(wanted)}")
    if not decoded.all():
        nearest = np.maximum.accumulate(np.where(decoded, np.arange(len(wanted)), 0))
        nearest[: int(np.argmax(decoded))] = np.argmax(decoded)
        frames = frames[nearest]
    return frames, float(whole.mean())


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


def _plane_pixels(plane: Any) -> np.ndarray:
    pixels = np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)
    return pixels[:, : plane.width]


class _Taint:
    """Which decoded frames are damaged, by what they refer to."""

    def __init__(self) -> None:
        self._torn_pts = set[int | None]()
        self._spreads = False

    def see(self, packet: av.Packet) -> None:
        """Note a packet before it is decoded: the demuxer may know that it is damaged."""
        if packet.is_corrupt:
            self._torn_pts.add(packet.pts)

    def lose(self) -> None:
        """Note that a packet could not be decoded."""
        self._spreads = True

    def is_on(self, frame: av.VideoFrame) -> bool:
        """Whether a frame is damaged; what follows it refers to it, up to the next keyframe."""
        torn = frame.is_corrupt or frame.pts in self._torn_pts
        self._spreads = self._spreads and not frame.key_frame
        damaged = self._spreads or torn
        self._spreads = self._spreads or (torn and frame.pict_type != PictureType.B)
        return damaged


def _decoded_frames(
    probed: Probe, video: VideoProbe, wanted: np.ndarray
) -> Iterator[tuple[int, av.VideoFrame, bool]]:
    """Yield (index, frame, damaged) for the wanted indices."""
    track, indices = video.track, set(wanted.tolist())
    wanted_s = set(video.pts_s[wanted].tolist())
    taint, order = _Taint(), 0
    for context, packet in probed.packets(track, track.place_before(min(wanted_s))):
        if packet is not None:
            taint.see(packet)
            if packet.pts is not None and not track.in_order:
                _skip_unneeded(context, packet.pts * track.tick_s in wanted_s)
        try:
            frames = context.decode(packet)
        except av.FFmpegError:
            taint.lose()
            order += 1
            continue
        for frame in frames:
            index = order if track.in_order else _index(video.pts_s, frame, track.tick_s)
            if index > wanted[-1]:
                return
            order += 1
            damaged = taint.is_on(frame)
            if index in indices:
                yield index, frame, damaged


def _skip_unneeded(context: Any, is_wanted: bool) -> None:
    """Have the next frame decoded if it is wanted or others refer to it: a quarter of the time."""
    context.skip_frame = "DEFAULT" if is_wanted else "NONREF"


def _index(pts_s: np.ndarray, frame: av.VideoFrame, tick_s: float) -> int:
    """Return a frame's place in the demuxed table, -1 where it has none."""
    if frame.pts is None:
        return -1
    index = int(np.searchsorted(pts_s, frame.pts * tick_s - CLOCK_TOLERANCE_S))
    if index < len(pts_s) and pts_s[index] - frame.pts * tick_s > CLOCK_TOLERANCE_S:
        return -1
    return index
