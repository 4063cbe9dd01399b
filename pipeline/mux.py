"""Write frames and sound to an mp4 that every player shows as meant: the one media writer.

H.264 in yuv420p and AAC, index in front. Second 0 is the first frame's start and the first
sample: AAC's priming samples are signalled as an edit list, so that readers which honour
timestamps see sound and picture in line. One thread and no dates: the same input gives the
same bytes on the same FFmpeg build. Media is read by `pipeline.demux` and `pipeline.decode`.
"""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.container import OutputContainer
from av.video.reformatter import (
    ColorPrimaries,
    ColorRange,
    Colorspace,
    ColorTrc,
    VideoReformatter,
)

# What MPEG-4 AAC can name in its header.
SAMPLE_RATES_HZ = (
    96000, 88200, 64000, 48000, 44100, 32000, 24000, 22050, 16000, 12000, 11025, 8000, 7350,
)  # fmt: skip
LAYOUTS = {1: "mono", 2: "stereo"}
AAC_BITS_PER_S = 96_000  # per channel; FFmpeg's encoder lowers it where the rate allows less

# NTSC rates (30000/1001) stay exact below this denominator.
MAX_FPS_DENOMINATOR = 1001
CRF = "18"  # x264's quality, from 0 (lossless) to 51: what a codec lost shows, not what x264 does


def write_mp4(
    path: Path,
    frames: np.ndarray,
    fps: float,
    sound: np.ndarray | None,
    sample_rate: int,
) -> None:
    """Write one clip; ``path`` appears complete or not at all.

    Args:
        path: the file to write or replace; its folder must exist.
        frames: uint8 [T, H, W, 3], RGB; an odd height or width gains a copy of its last row or
            column, because 4:2:0 has no odd sizes.
        fps: frames per second, may be fractional.
        sound: float [N] or [channels, N] with one or two channels in [-1, 1] (values beyond are
            clipped), or None for a silent film without an audio stream.
        sample_rate: of ``sound`` in Hz, one of ``SAMPLE_RATES_HZ``.

    Raises:
        ValueError: an array or a rate that can't be written; the message says what fits.
        OSError: the file can't be written.
    """
    frames = even_frames(frames)
    if not fps > 0:
        raise ValueError(f"fps is {fps}, expected a positive number")
    planes = None if sound is None else sound_planes(sound, sample_rate)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    options = {"movflags": "+faststart", "fflags": "+bitexact"}
    try:
        with av.open(str(temporary), "w", format="mp4", options=options) as container:
            packets = video_packets(container, frames, fps)
            if planes is not None:
                packets += audio_packets(container, planes, sample_rate)
            # In the order of decoding, so that a player needs no seeking.
            packets.sort(key=lambda packet: (packet.dts or 0) * (packet.time_base or 0))
            container.mux(packets)
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def even_frames(frames: np.ndarray) -> np.ndarray:
    """Return uint8 [T, H, W, 3] with H and W even, edges repeated.

    Raises:
        ValueError: another shape or dtype, or no frame.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or not frames.size:
        raise ValueError(f"frames are {frames.dtype} {frames.shape}, expected uint8 [T, H, W, 3]")
    _, height, width, _ = frames.shape
    if height % 2 or width % 2:
        frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    return np.ascontiguousarray(frames)


def sound_planes(sound: np.ndarray, sample_rate: int) -> np.ndarray:
    """Return float32 [channels, N] in [-1, 1].

    Raises:
        ValueError: another shape, no samples, values that are not finite, or a sample rate that
            AAC has no name for.
    """
    planes = np.atleast_2d(np.asarray(sound, dtype=np.float32))
    if planes.ndim != 2 or len(planes) not in LAYOUTS or not planes.size:
        raise ValueError(f"sound is {sound.shape}, expected [N], [1, N] or [2, N] with N > 0")
    if not np.isfinite(planes).all():
        raise ValueError("sound holds NaN or infinity; replace them before writing")
    if sample_rate not in SAMPLE_RATES_HZ:
        raise ValueError(f"sample rate {sample_rate} Hz is none of AAC's: {SAMPLE_RATES_HZ}")
    return np.ascontiguousarray(planes.clip(-1, 1))


def video_packets(container: OutputContainer, frames: np.ndarray, fps: float) -> list[av.Packet]:
    """Add an H.264 stream to ``container`` and return the encoded frames, uint8 [T, H, W, 3]."""
    rate = Fraction(fps).limit_denominator(MAX_FPS_DENOMINATOR)
    # No B-frames: decoding order is showing order, and the first timestamp is 0 in every reader.
    options = {"crf": CRF, "preset": "medium", "bf": "0", "threads": "1"}
    stream = container.add_stream("libx264", rate=rate, options=options)
    stream.height, stream.width = frames.shape[1:3]
    stream.pix_fmt = "yuv420p"
    # BT.601's matrix, because readers that ignore the tag assume it for small pictures;
    # sRGB's primaries, so that a colour-managed browser leaves the colours alone.
    context = stream.codec_context
    context.colorspace = Colorspace.ITU601
    context.color_range = ColorRange.MPEG
    context.color_primaries = ColorPrimaries.BT709
    context.color_trc = ColorTrc.BT709
    reformatter = VideoReformatter()  # one for all: to set one up takes longer than to encode
    packets = []
    for number, pixels in enumerate(frames):
        frame = reformatter.reformat(
            av.VideoFrame.from_ndarray(pixels, format="rgb24"),
            format="yuv420p",
            dst_colorspace=Colorspace.ITU601,
            src_color_range=ColorRange.JPEG,
            dst_color_range=ColorRange.MPEG,
            threads=1,
        )
        frame.pts, frame.time_base = number, 1 / rate
        packets += stream.encode(frame)
    return packets + stream.encode(None)


def audio_packets(
    container: OutputContainer, planes: np.ndarray, sample_rate: int
) -> list[av.Packet]:
    """Add an AAC stream to ``container`` and return the encoded sound, float32 [channels, N]."""
    stream = container.add_stream("aac", rate=sample_rate, layout=LAYOUTS[len(planes)])
    stream.codec_context.bit_rate = AAC_BITS_PER_S * len(planes)
    frame = av.AudioFrame.from_ndarray(planes, format="fltp", layout=LAYOUTS[len(planes)])
    frame.sample_rate, frame.pts, frame.time_base = sample_rate, 0, Fraction(1, sample_rate)
    return stream.encode(frame) + stream.encode(None)
