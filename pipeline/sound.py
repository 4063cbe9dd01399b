"""PCM of a clip's span on the common clock, decoded by PyAV at the file's own rate."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import av
import numpy as np

from pipeline.audio import resample
from pipeline.demux import Probe
from pipeline.media import ClipError
from pipeline.streams import AudioProbe

# Encoders put up to this much in front of the sound (AAC: 2,112 samples) for decoders to drop.
MAX_PRIMING_S = 0.1
# Timestamps that differ by less from the count of samples say the same: Matroska and FLV round
# to 1 ms, so the first one and a later one are up to 1 ms apart. Beyond it, there is a gap.
ROUNDING_S = 0.0012
SIDES = ("left", "right")
INTEGER_SCALE = {"u1": 2.0**7, "i2": 2.0**15, "i4": 2.0**31, "i8": 2.0**63}


class NativeSound(NamedTuple):
    """Decoded sound of a span at the file's rate.

    Attributes:
        samples: float32 [channels, N].
        mono: float32 [N], the average of all channels of the file.
        decoded_share: share of the samples that should be there that could be decoded.
    """

    samples: np.ndarray
    mono: np.ndarray
    decoded_share: float


class _Piece(NamedTuple):
    """Samples that follow each other without a gap, float32 [channels, n]."""

    pts_s: float
    rate_hz: int
    layout: av.AudioLayout
    samples: np.ndarray


def decode_sound(
    probed: Probe, audio: AudioProbe, first_s: float, duration_s: float, channels: int
) -> NativeSound:
    """Decode PCM of a span at the rate of ``audio``.

    Late sound is preceded by silence, early sound is cut; gaps in the timestamps stay gaps.

    Args:
        probed: the media file, still open (``pipeline.demux.probing``).
        audio: its sound.
        first_s: presentation time at which the span starts.
        duration_s: its length; the sound should be there until its end.
        channels: 1 averages all; 2 keeps stereo, doubles mono, and averages those of more
            channels on each side, with the centre.

    Raises:
        ClipError: ``unreadable``: it is encrypted. ``truncated``: not one sample can be decoded.
    """
    if audio.track.encrypted:
        raise ClipError("unreadable", "the sound is encrypted (DRM), expected an unprotected file")
    rate_hz, num_rows = audio.sample_rate, 1 if channels == 1 else channels + 1  # and mono
    native = np.zeros((num_rows, round(duration_s * rate_hz)), dtype=np.float32)
    covered, begins_s = np.zeros(native.shape[1], dtype=bool), audio.start_s + MAX_PRIMING_S
    for piece in _pieces(_decoded(probed, audio, first_s, first_s + duration_s), channels):
        begins_s = min(begins_s, max(piece.pts_s, audio.start_s))
        samples = resample(piece.samples, piece.rate_hz, rate_hz)
        start = round((piece.pts_s - first_s) * rate_hz)
        low, high = max(start, 0), min(start + samples.shape[1], native.shape[1])
        if high > low:
            native[:, low:high] = samples[:, low - start : high - start]
            covered[low:high] = True
    filled = int(covered.sum())  # pieces overlap where timestamps are damaged
    expected = native.shape[1] - max(0, round((begins_s - first_s) * rate_hz))
    if expected > 0 and filled == 0:
        raise ClipError("truncated", f"found no sample that can be decoded, expected {expected}")
    share = min(filled / expected, 1.0) if expected > 0 else 1.0
    return NativeSound(native[:channels], native[-1], share)


def _pieces(decoded: Iterator[_Piece], channels: int) -> Iterator[_Piece]:
    """Join what follows each other: frame by frame, rounded timestamps would tear the sound."""
    joined: list[_Piece] = []
    ends_s = 0.0
    for piece in decoded:
        if joined and (not _alike(piece, joined[0]) or abs(piece.pts_s - ends_s) > ROUNDING_S):
            yield _join(joined, channels)
            joined = []
        if not joined:
            ends_s = piece.pts_s
        joined.append(piece)
        ends_s += piece.samples.shape[1] / piece.rate_hz
    if joined:
        yield _join(joined, channels)


def _alike(one: _Piece, other: _Piece) -> bool:
    return one.rate_hz == other.rate_hz and one.layout.name == other.layout.name


def _join(pieces: list[_Piece], channels: int) -> _Piece:
    """Join pieces at the median of where their timestamps put the first sample: 0.5 ms at most."""
    rate_hz, layout = pieces[0].rate_hz, pieces[0].layout
    samples = np.concatenate([piece.samples for piece in pieces], axis=1)
    ends = np.cumsum([piece.samples.shape[1] for piece in pieces])
    starts_s = np.concatenate([[0], ends[:-1]]) / rate_hz
    pts_s = np.median([piece.pts_s for piece in pieces] - starts_s)
    mono = samples.mean(axis=0, keepdims=True, dtype=np.float32)
    rows = mono if channels == 1 else np.concatenate([stereo(samples, layout), mono])
    return _Piece(float(pts_s), rate_hz, layout, rows)


def _decoded(probed: Probe, audio: AudioProbe, from_s: float, to_s: float) -> Iterator[_Piece]:
    """Yield every frame around the span, each at its own rate and with its own channels."""
    track = audio.track
    for context, packet in probed.packets(track, track.place_before(from_s)):
        try:
            frames = context.decode(packet)
        except av.FFmpegError:
            continue  # the samples that are not there are counted above
        for frame in frames:
            if frame.pts is None or not frame.sample_rate:
                continue
            pts_s = frame.pts * track.tick_s
            if pts_s >= to_s:
                return
            yield _Piece(pts_s, frame.sample_rate, frame.layout, _samples(frame))


def _samples(frame: av.AudioFrame) -> np.ndarray:
    """Return a frame's samples, float32 [channels, n] in about [-1, 1]."""
    samples = frame.to_ndarray()
    if not frame.format.is_planar:
        samples = samples.reshape(-1, frame.layout.nb_channels).T
    scale = INTEGER_SCALE.get(samples.dtype.str[1:])
    if scale is None:
        return samples.astype(np.float32, copy=False)
    middle = 128 if samples.dtype == np.uint8 else 0
    return (samples.astype(np.float32) - middle) / np.float32(scale)


def stereo(samples: np.ndarray, layout: av.AudioLayout) -> np.ndarray:
    """Average what is on the left and what is on the right, never louder than before.

    A side is its channels and those in the middle; the bass effects (LFE) belong to neither, as
    in ITU-R BS.775. FFmpeg's own downmix would add up to 3 dB.

    Args:
        samples: float32 [channels, N].
        layout: names the channels.

    Returns:
        float32 [2, N].
    """
    if len(samples) == 2:
        return samples
    if layout.name == f"{len(samples)} channels":  # unnamed, as PCM's in Matroska
        layout = av.AudioLayout(f"{len(samples)}c")
    sides = [_side(channel.name) for channel in layout.channels]
    heard = [[place for place, side in enumerate(sides) if side in ("both", one)] for one in SIDES]
    means = [samples[places].sum(axis=0) / np.float32(max(len(places), 1)) for places in heard]
    return np.stack(means)


def _side(name: str) -> str:
    """Return the side of a channel by FFmpeg's name of it, such as FL, FRC, TBR, BC, LFE."""
    if name.startswith("LFE"):
        return "neither"
    return {"L": "left", "R": "right"}.get(name.removesuffix("C")[-1:], "both")
