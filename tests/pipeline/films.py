"""Films of the scene: what is recorded of it and how, written with PyAV to any container.

A `Picture` and a `Sound` say which span of `tests.pipeline.scene` is recorded and how; `record`
writes them, `cut` copies a part. YUV is computed by formula and goes to the encoders nearly
without loss: neither the code under test nor a filter of FFmpeg takes part in the truth.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc

from tests.pipeline.scene import (
    CLICK_LEVEL,
    CLICK_SPREAD_S,
    CLICKS_S,
    NOISE_LEVEL,
    click,
    click_gains,
    region_map,
    true_colours,
)

LUMA_WEIGHTS = {"bt601": (0.299, 0.114), "bt709": (0.2126, 0.0722), "bt2020": (0.2627, 0.0593)}
COLOUR_TAGS = {
    "bt601": (Colorspace.ITU601, ColorPrimaries.SMPTE170M, ColorTrc.SMPTE170M),
    "bt709": (Colorspace.ITU709, ColorPrimaries.BT709, ColorTrc.BT709),
    "bt2020": (Colorspace.BT2020, ColorPrimaries.BT2020, ColorTrc.BT2020_10),
}
LAYOUTS = {1: "mono", 2: "stereo", 6: "5.1"}
# Nearly without loss, quick, one thread: what is off is off by the decoder.
VIDEO_OPTIONS: dict[str, dict[str, str]] = {
    "libx264": {"preset": "veryfast", "qp": "8"},
    "libx265": {"preset": "ultrafast", "x265-params": "qp=6:b-adapt=0:log-level=none:pools=none"},
    "libvpx": {"deadline": "realtime", "cpu-used": "8", "crf": "4", "b": "8M", "qmax": "8"},
    "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8", "crf": "4", "b": "0", "qmax": "10"},
    "libsvtav1": {"preset": "5", "qp": "4", "svtav1-params": "lp=1:rc=0:aq-mode=0"},
}
# FFmpeg's own encoders: quantiser 1 (118 in its unit) for all kinds of frames.
FIXED_QUANTISER = {
    "flags": "+qscale", "global_quality": "118", "qmin": "1", "b_qfactor": "1", "b_qoffset": "0",
}  # fmt: skip
SAMPLES_AT_ONCE = 4096  # PCM's packets are as long as what is encoded at once
AUDIO_BITS_PER_S = {"aac": 128_000, "libmp3lame": 128_000, "libopus": 96_000, "ac3": 192_000}


@dataclass(frozen=True)
class Picture:
    """How the scene's picture is recorded.

    Attributes:
        width: of the coded frames, in pixels; ``height`` likewise.
        fps: of constant rate; else ``pts`` in milliseconds are the frames' times, the last its end.
        start_frames: how many frames later than second 0 of the scene frame 0 is shown.
        pixel_aspect: width of a coded pixel by its height.
        rotation: degrees counter-clockwise by which a player has to turn the coded frames.
        matrix: of ``LUMA_WEIGHTS``.
        tagged: whether the stream says ``matrix`` and ``full_range``.
    """

    codec: str = "libx264"
    width: int = 128
    height: int = 96
    seconds: float = 3.6
    fps: Fraction = Fraction(25)
    pts: tuple[int, ...] = ()
    start_frames: int = 0
    gop: int = 15
    b_frames: int = 0
    pixel_aspect: Fraction = Fraction(1)
    rotation: int = 0
    pix_fmt: str = "yuv420p"
    matrix: str = "bt601"
    full_range: bool = False
    tagged: bool = True
    options: dict[str, str] = field(default_factory=dict)

    @property
    def time_base(self) -> Fraction:
        """Unit of ``ticks``, in seconds."""
        return Fraction(1, 1000) if self.pts else 1 / self.fps

    @property
    def ticks(self) -> list[int]:
        """When the frames are shown; the last one is when the last frame ends."""
        count = round(self.seconds * self.fps) + 1
        return list(self.pts or range(self.start_frames, self.start_frames + count))

    @property
    def times_s(self) -> np.ndarray:
        """``ticks`` in seconds of the scene."""
        return np.array([float(tick * self.time_base) for tick in self.ticks])

    @property
    def upright(self) -> tuple[int, int, Fraction]:
        """Pixels across, pixels down and pixel aspect after the rotation."""
        if self.rotation % 180:
            return self.height, self.width, 1 / self.pixel_aspect
        return self.width, self.height, self.pixel_aspect

    def regions(self) -> np.ndarray:
        """Where the regions are in the coded frames: uint8 [height, width]."""
        across, down, aspect = self.upright
        u, v = (np.arange(across) + 0.5) * float(aspect), np.arange(down) + 0.5
        upright = region_map(u, v, across * float(aspect), down)
        return np.rot90(upright, -self.rotation // 90)

    def decoded_regions(self, height: int, width: int, fit: str) -> np.ndarray:
        """Where the regions are in a decoded frame: uint8 [height, width]."""
        across, down, aspect = self.upright
        shown = across * float(aspect), float(down)
        scales = width / shown[0], height / shown[1]
        scale = max(scales) if fit == "crop" else min(scales)
        u = shown[0] / 2 + (np.arange(width) + 0.5 - width / 2) / scale
        v = shown[1] / 2 + (np.arange(height) + 0.5 - height / 2) / scale
        return region_map(u, v, *shown)


@dataclass(frozen=True)
class Sound:
    """How the scene's sound is recorded: ``seconds`` of it from second ``start_s``."""

    codec: str = "aac"
    rate: int = 44100
    channels: int = 1
    seconds: float = 3.6
    start_s: float = 0.0
    options: dict[str, str] = field(default_factory=dict)

    def samples(self) -> np.ndarray:
        """float32 [channels, N]."""
        seconds = self.start_s + np.arange(round(self.seconds * self.rate)) / self.rate
        noise = np.random.default_rng(0).normal(0, NOISE_LEVEL, (self.channels, len(seconds)))
        reach = 6 * CLICK_SPREAD_S
        for place in np.flatnonzero(np.abs(CLICKS_S - seconds.mean()) < self.seconds):
            near = np.abs(seconds - CLICKS_S[place]) < reach
            wave = CLICK_LEVEL * click(seconds[near] - CLICKS_S[place])
            noise[:, near] += click_gains(self.channels)[:, place, None] * wave
        return noise.astype(np.float32)


def record(
    path: Path,
    picture: Picture | None,
    sound: Sound | None,
    options: dict[str, str] | None = None,
) -> None:
    """Write a film.

    Args:
        path: its suffix names the container.
        picture: None for none; ``sound`` likewise.
        options: of the muxer.
    """
    with _own_priority(), av.open(str(path), "w", options=options or {}) as target:
        packets = _video_packets(target, picture) if picture else []
        sounds = _audio_packets(target, sound) if sound else []
        if path.suffix == ".avi":
            _start_at_zero(sounds)
        # In the order of decoding, as muxers and readers like it.
        packets = sorted(packets + sounds, key=lambda packet: packet.dts * packet.time_base)
        for packet in packets:
            target.mux(packet)


@contextmanager
def _own_priority() -> Iterator[None]:
    """Undo what SVT-AV1 does for root: the thread that encodes, and all that it starts later, would
    run at real-time priority, before everything else on the machine.
    """
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, parameters)


def _start_at_zero(packets: list[Any]) -> None:
    """Move the encoder's priming, which is before second 0, behind it.

    AVI has no negative times: its muxer would move the picture too, by a whole frame.
    """
    early = min((packet.pts for packet in packets), default=0)
    for packet in packets:
        packet.pts, packet.dts = packet.pts - early, packet.dts - early


def _video_packets(target: Any, picture: Picture) -> list[Any]:
    options = VIDEO_OPTIONS.get(picture.codec, FIXED_QUANTISER) | {"threads": "1"} | picture.options
    stream = target.add_stream(picture.codec, rate=picture.fps, options=options)
    stream.width, stream.height, stream.pix_fmt = picture.width, picture.height, picture.pix_fmt
    context = stream.codec_context
    context.time_base, context.gop_size = picture.time_base, picture.gop
    context.max_b_frames = picture.b_frames
    if picture.pixel_aspect != 1:
        context.sample_aspect_ratio = picture.pixel_aspect
    if picture.tagged:
        tags = COLOUR_TAGS[picture.matrix]
        context.colorspace, context.color_primaries, context.color_trc = tags
        context.color_range = ColorRange.JPEG if picture.full_range else ColorRange.MPEG
    if picture.rotation:
        stream.set_display_rotation(picture.rotation)
    packets = []
    for frame in _video_frames(picture):
        packets += stream.encode(frame)
    packets += stream.encode(None)
    lengths = dict(zip(picture.ticks, np.diff(picture.ticks).tolist(), strict=False))
    for packet in packets:  # encoders take the frame rate for it
        packet.duration = lengths[packet.pts]
    return packets


def _video_frames(picture: Picture) -> Iterator[av.VideoFrame]:
    layout = av.VideoFormat(picture.pix_fmt, picture.width, picture.height)
    regions, ticks = picture.regions(), picture.ticks
    # Chroma samples lie between luma samples; the regions are wide enough to take any of them.
    masks = [
        regions[:: -(-picture.height // part.height), :: -(-picture.width // part.width)]
        for part in layout.components
    ]
    depth = layout.components[0].bits
    colours = to_yuv(true_colours(np.arange(len(ticks) - 1)), picture, depth)
    for table, tick, next_tick in zip(colours, ticks[:-1], ticks[1:], strict=True):
        frame = av.VideoFrame(picture.width, picture.height, picture.pix_fmt)
        for part, plane in enumerate(frame.planes):
            samples = np.frombuffer(memoryview(plane), dtype=colours.dtype)
            rows = samples.reshape(-1, plane.line_size // colours.itemsize)
            rows[: masks[part].shape[0], : masks[part].shape[1]] = table[masks[part], part]
        frame.pts, frame.time_base, frame.duration = tick, picture.time_base, next_tick - tick
        if picture.tagged:
            frame.colorspace = COLOUR_TAGS[picture.matrix][0]
            frame.color_range = ColorRange.JPEG if picture.full_range else ColorRange.MPEG
        yield frame


def to_yuv(rgb: np.ndarray, picture: Picture, depth: int) -> np.ndarray:
    """Y'CbCr of R'G'B' as ITU-R BT.601, BT.709 and BT.2020 define it; uint8 or uint16."""
    red_weight, blue_weight = LUMA_WEIGHTS[picture.matrix]
    red, green, blue = np.moveaxis(rgb / 255.0, -1, 0)
    luma = red_weight * red + (1 - red_weight - blue_weight) * green + blue_weight * blue
    chroma = (blue - luma) / (2 - 2 * blue_weight), (red - luma) / (2 - 2 * red_weight)
    top = 2**depth - 1
    if picture.full_range:
        planes = [luma * top, *(c * top + 2 ** (depth - 1) for c in chroma)]
    else:
        unit = 2 ** (depth - 8)
        planes = [(16 + 219 * luma) * unit, *((128 + 224 * c) * unit for c in chroma)]
    values = np.stack(planes, axis=-1).round().clip(0, top)
    return values.astype(np.uint8 if depth == 8 else np.uint16)


def _audio_packets(target: Any, sound: Sound) -> list[Any]:
    layout = LAYOUTS[sound.channels]
    options = {"strict": "experimental", **sound.options}
    stream = target.add_stream(sound.codec, rate=sound.rate, layout=layout, options=options)
    if sound.codec in AUDIO_BITS_PER_S:
        stream.bit_rate = AUDIO_BITS_PER_S[sound.codec] * max(1, sound.channels // 2)
    converter = av.AudioResampler(stream.codec_context.format, layout, sound.rate)
    samples = sound.samples()
    packets = []
    for start in range(0, samples.shape[1], SAMPLES_AT_ONCE):
        part = np.ascontiguousarray(samples[:, start : start + SAMPLES_AT_ONCE])
        frame = av.AudioFrame.from_ndarray(part, format="fltp", layout=layout)
        frame.sample_rate, frame.time_base = sound.rate, Fraction(1, sound.rate)
        frame.pts = round(sound.start_s * sound.rate) + start
        packets += [packet for one in converter.resample(frame) for packet in stream.encode(one)]
    return packets + stream.encode(None)


def cut(source: Path, target: Path, from_s: float, with_group: bool = True) -> None:
    """Copy packets from second ``from_s`` on, which becomes timestamp 0.

    Args:
        with_group: also copy what is between it and the keyframe before, with negative
            timestamps, as ``ffmpeg -ss FROM -i SOURCE -c copy`` does.
    """
    with av.open(str(source)) as film, av.open(str(target), "w") as copy:
        copies = {stream.index: copy.add_stream_from_template(stream) for stream in film.streams}
        film.seek(int(from_s * av.time_base))
        for packet in film.demux():
            if packet.dts is None:
                continue
            ticks = round(Fraction(from_s).limit_denominator(10**6) / packet.time_base)
            packet.pts, packet.dts = packet.pts - ticks, packet.dts - ticks
            if packet.dts >= 0 or with_group:
                packet.stream = copies[packet.stream.index]
                copy.mux(packet)


@dataclass(frozen=True)
class Film:
    """A rendered film and what it takes to know its truth.

    Attributes:
        suffix: names the container.
        zero_s: the scene's second that is the file's second 0; default: where frame 0 is shown.
        sound_late_s: how much later than recorded the container presents the sound, because it
            has no field that says otherwise; every use gives the reason.
    """

    suffix: str = "mp4"
    picture: Picture | None = field(default_factory=Picture)
    sound: Sound | None = field(default_factory=Sound)
    options: dict[str, str] = field(default_factory=dict)
    zero_s: float | None = None
    sound_late_s: float = 0.0

    @property
    def zero(self) -> float:
        if self.zero_s is not None:
            return self.zero_s
        return float(self.picture.times_s[0]) if self.picture else self.sound.start_s


# Kinds that the tests use

B_FRAMES = Picture(b_frames=2, matrix="bt709")
X265 = Picture("libx265", b_frames=3)  # its default: open groups of pictures
VP8, VP9, AV1 = Picture("libvpx"), Picture("libvpx-vp9"), Picture("libsvtav1")
MPEG4 = Picture("mpeg4", tagged=False)
PRORES = Picture("prores_ks", pix_fmt="yuv422p10le")
MJPEG = Picture("mjpeg", pix_fmt="yuvj420p", full_range=True)
MPEG2 = Picture("mpeg2video", b_frames=2)
MP3 = Sound("libmp3lame")
OPUS = Sound("libopus", 48000, 2)
VORBIS = Sound("vorbis", 44100, 2)
PCM = Sound("pcm_s16le")
