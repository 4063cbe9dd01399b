"""Media files to frames and sound on one clock. Only this file and pipeline.demux read media.

decord decodes the picture; PyAV reads the timestamps first and decodes the sound. decord drops
start offsets, and on clips cut between keyframes it repeats the last frame under wrong
timestamps, so its table is compared with the demuxed one. After a seek it counts frames instead
of reading their times: up to 3 frames off in open groups of pictures (x265's default), a whole
group off in transport streams. Where the tables differ, where a seek may land elsewhere, where
the file carries frames that must not be shown, or where it is rotated, PyAV decodes the picture.

All times are seconds from the file's second 0, see ``pipeline.demux``, unless named ``pts_s``.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from pipeline.audio import resample  # imports torch: decord before torch can crash (sam2#465)
from pipeline.demux import AudioProbe, Probe, VideoProbe, open_media, probe
from pipeline.media import Clip, ClipError, Decoded, DecodeSettings

import decord  # isort: skip

# Share of frames or samples below which a stream counts as damaged.
COMPLETE_SHARE = 0.98
# Two clocks agree when they differ by less; the finest frame interval seen is 8 ms.
CLOCK_TOLERANCE_S = 0.002
# Encoders put up to this much in front of the sound (AAC: 2,112 samples) for decoders to drop.
MAX_PRIMING_S = 0.1
# A last frame counts when at most this share of its interval is missing: streams of "10 s" end
# some milliseconds early as often as late, and 79 frames for 80 would waste the clip.
LAST_FRAME_SLACK = 0.2

os.environ.setdefault("DECORD_LOG_LEVEL", "3")
decord.logging.set_level(decord.logging.QUIET)
log = logging.getLogger(__name__)


def decode_clip(path: Path, clip: Clip, settings: DecodeSettings, wanted: set[str]) -> Decoded:
    """Decode the wanted modalities of a clip, and say what is wrong with the others.

    Args:
        path: the media file.
        clip: which span of it; both modalities end where the first of them does.
        settings: frame rate, size, sample rate.
        wanted: of {"video", "audio"}: what to decode; both are probed in any case.

    Raises:
        ClipError: ``missing`` or ``unreadable``: nothing in the file can be used.
    """
    probed = probe(path)
    facts = _facts(probed)
    problems: dict[str, tuple[str, str]] = {}
    if probed.video is None:
        problems["video"] = ("no_video", "the file has no picture that can be decoded")
    if probed.audio is None:
        problems["audio"] = ("no_audio", "the file has no sound that can be decoded")
    duration_s, cut_short = _common_span(probed, clip)
    facts["duration_s"] = duration_s
    for modality in {"video", "audio"} - set(problems):
        if modality in cut_short:
            problems[modality] = ("truncated", cut_short[modality])
        elif duration_s < COMPLETE_SHARE * settings.min_seconds:
            problems[modality] = (
                "too_short",
                f"{duration_s:.2f} s of picture and sound from second {clip.start_s:g}, "
                f"expected at least {settings.min_seconds:g} s",
            )
    frames = sound = None
    if "video" in wanted and "video" not in problems and probed.video:
        try:
            frames, facts["decoder"] = _frames(path, probed.video, clip, duration_s, settings)
        except ClipError as error:
            problems["video"] = (error.status, error.message)
    if "audio" in wanted and "audio" not in problems and probed.audio:
        try:
            sound = _sound(path, probed.audio, probed.zero_s, clip, duration_s, settings)
        except ClipError as error:
            problems["audio"] = (error.status, error.message)
    return Decoded(frames, sound, problems, facts)


def read_sound(path: Path, sample_rate: int) -> np.ndarray:
    """Read a whole file's sound, averaged to mono, float32 [N]; second 0 is its first frame's.

    Raises:
        ClipError: the file has no sound that can be decoded.
    """
    probed = probe(path)
    if probed.audio is None:
        raise ClipError("no_audio", f"{path} has no sound that can be decoded")
    whole = Clip(key="", uri="", start_s=0.0, duration_s=probed.audio.end_s - probed.zero_s)
    settings = DecodeSettings(fps=1, size=1, sample_rate=sample_rate, channels=1, min_seconds=0)
    return _sound(path, probed.audio, probed.zero_s, whole, whole.duration_s, settings)[0]


def _common_span(probed: Probe, clip: Clip) -> tuple[float, dict[str, str]]:
    """Return the clip's real length, and modality -> message where a damaged file cut it."""
    duration_s, cut_short = clip.duration_s, dict[str, str]()
    for modality, stream in (("video", probed.video), ("audio", probed.audio)):
        if stream is None:
            continue
        start_s = float(stream.pts_s[0]) if isinstance(stream, VideoProbe) else stream.start_s
        there_s = max(stream.end_s - probed.zero_s - clip.start_s, 0.0)
        declared_s = start_s + stream.declared_s - probed.zero_s - clip.start_s
        expected_s = min(clip.duration_s, declared_s)
        if there_s < COMPLETE_SHARE * expected_s:
            cut_short[modality] = (
                f"{modality} ends after {there_s:.2f} s, its header promises "
                f"{expected_s:.2f} s: the file is cut off"
            )
        duration_s = min(duration_s, there_s)
    return duration_s, cut_short


def _facts(probed: Probe) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    if video := probed.video:
        length_s = video.end_s - float(video.pts_s[0])
        facts |= {
            "video_codec": video.codec,
            "width": video.width,
            "height": video.height,
            "fps": len(video.pts_s) / length_s if length_s > 0 else 0.0,
            "video_s": length_s,
        }
    if audio := probed.audio:
        facts |= {
            "audio_codec": audio.codec,
            "sample_rate": audio.sample_rate,
            "channels": audio.channels,
            "audio_s": audio.end_s - audio.start_s,
            "audio_offset_s": audio.start_s - probed.zero_s,
        }
    return facts


# ---------------------------------------------------------------------------------------------
# Picture


def _frames(
    path: Path, video: VideoProbe, clip: Clip, duration_s: float, settings: DecodeSettings
) -> tuple[np.ndarray, str]:
    """Decode the frame presented at every k / fps: uint8 [T, size, size, 3], decoder's name."""
    count = int(duration_s * settings.fps + LAST_FRAME_SLACK)
    if count == 0:
        raise ClipError("too_short", f"{duration_s:.3f} s holds no frame at {settings.fps:g} fps")
    instants = video.pts_s[0] + clip.start_s + np.arange(count) / settings.fps
    chosen = np.searchsorted(video.pts_s, instants + CLOCK_TOLERANCE_S, side="right") - 1
    chosen = np.maximum(chosen, 0)
    width, height = _scaled_size(video, settings.size)
    if video.exact_seek and video.hidden_frames == 0 and video.rotation == 0:
        frames = _decord_frames(path, video, chosen, width, height)
        if frames is not None:
            return _centre_crop(frames, settings.size), "decord"
    return _pyav_frames(path, video, chosen, width, height, settings.size), "pyav"


def _scaled_size(video: VideoProbe, size: int) -> tuple[int, int]:
    """Return (width, height) with square pixels whose short side is ``size``."""
    shown_width = video.width * video.pixel_aspect
    short = min(shown_width, video.height)
    return (
        max(size, round(shown_width * size / short)),
        max(size, round(video.height * size / short)),
    )


def _centre_crop(frames: np.ndarray, size: int) -> np.ndarray:
    top, left = (frames.shape[-3] - size) // 2, (frames.shape[-2] - size) // 2
    return np.ascontiguousarray(frames[..., top : top + size, left : left + size, :])


def _decord_frames(
    path: Path, video: VideoProbe, chosen: np.ndarray, width: int, height: int
) -> np.ndarray | None:
    """Decode by index; None where decord fails or its clock differs from the demuxed one."""
    try:
        reader = decord.VideoReader(str(path), width=width, height=height, num_threads=1)
        if len(reader) != len(video.pts_s):
            return None
        shown_s = reader.get_frame_timestamp(range(len(reader)))[:, 0]
        difference = (shown_s - shown_s[0]) - (video.pts_s - video.pts_s[0])
        if np.abs(difference).max() > CLOCK_TOLERANCE_S:
            return None
        unique, places = np.unique(chosen, return_inverse=True)
        return reader.get_batch(unique.tolist()).asnumpy()[places]
    except (decord.DECORDError, RuntimeError, IndexError) as error:
        log.debug("decord fails on %s, PyAV decodes it: %s", path, error)
        return None


def _pyav_frames(
    path: Path, video: VideoProbe, chosen: np.ndarray, width: int, height: int, size: int
) -> np.ndarray:
    """Decode up to the last chosen frame, keeping the chosen ones.

    Raises:
        ClipError: ``truncated``: over 2 % of the chosen frames can't be decoded.
    """
    wanted = np.unique(chosen)
    kept: dict[int, np.ndarray] = {}
    for index, frame in _decoded_frames(path, video, wanted):
        picture = frame.reformat(width=width, height=height, format="rgb24").to_ndarray()
        picture = np.rot90(picture, k=video.rotation // 90)
        kept[index] = _centre_crop(picture, size)
    if len(kept) < COMPLETE_SHARE * len(wanted):
        raise ClipError(
            "truncated",
            f"{len(kept)} of {len(wanted)} frames can be decoded, "
            f"expected at least {COMPLETE_SHARE:.0%}: the picture is damaged",
        )
    there = np.array(sorted(kept))
    places = np.maximum(np.searchsorted(there, chosen, side="right") - 1, 0)
    return np.stack([kept[int(there[place])] for place in places])


def _decoded_frames(
    path: Path, video: VideoProbe, wanted: np.ndarray
) -> Iterator[tuple[int, av.VideoFrame]]:
    """Yield (index, frame) for the wanted indices, seeking past what comes before them.

    The seek goes a second further back: some demuxers compare decoding times, which are earlier.
    """
    with open_media(path) as container:
        stream: Any = container.streams.best("video")
        stream.thread_count = 1
        if video.exact_seek and wanted[0] > 0:
            target = Fraction(float(video.pts_s[wanted[0]]) - 1.0) / stream.time_base
            container.seek(int(target), stream=stream)
        for packet in container.demux(stream):
            try:
                frames = packet.decode()
            except av.FFmpegError:
                continue  # a damaged packet: the frames it should have given are counted above
            for frame in frames:
                if frame.pts is None:
                    continue
                pts_s = float(frame.pts * stream.time_base)
                index = int(np.searchsorted(video.pts_s, pts_s - CLOCK_TOLERANCE_S))
                if index > wanted[-1]:
                    return
                if index in wanted:
                    yield index, frame


# ---------------------------------------------------------------------------------------------
# Sound


def _sound(
    path: Path,
    audio: AudioProbe,
    zero_s: float,
    clip: Clip,
    duration_s: float,
    settings: DecodeSettings,
) -> np.ndarray:
    """Decode PCM of the clip's span: float32 [channels, round(duration * rate)].

    Late sound is preceded by silence, early sound is cut; gaps in the timestamps stay gaps.

    Raises:
        ClipError: ``truncated``: over 2 % of the samples that should be there are not.
    """
    rate = audio.sample_rate
    first_s = zero_s + clip.start_s
    native = np.zeros((settings.channels, round(duration_s * rate)), dtype=np.float32)
    filled, begins_s = 0, audio.start_s + MAX_PRIMING_S
    for pts_s, samples in _decoded_sound(path, audio, first_s, first_s + duration_s):
        samples = _mix(samples, settings.channels)
        begins_s = min(begins_s, max(pts_s, audio.start_s))
        start = round((pts_s - first_s) * rate)
        low, high = max(start, 0), min(start + samples.shape[1], native.shape[1])
        if high > low:
            native[:, low:high] = samples[:, low - start : high - start]
            filled += high - low
    expected = native.shape[1] - max(0, round((begins_s - first_s) * rate))
    if filled < COMPLETE_SHARE * expected:
        raise ClipError(
            "truncated",
            f"{filled} of {expected} samples can be decoded, expected at least "
            f"{COMPLETE_SHARE:.0%}: the sound is damaged",
        )
    count = round(duration_s * settings.sample_rate)
    sound = resample(native, rate, settings.sample_rate)[:, :count]
    return np.pad(sound, ((0, 0), (0, count - sound.shape[1])))


def _mix(samples: np.ndarray, channels: int) -> np.ndarray:
    """Average to mono, or keep two; FFmpeg's own downmix would add 3 dB."""
    if channels == 1:
        return samples.mean(axis=0, keepdims=True, dtype=np.float32)
    if samples.shape[0] == 2:
        return samples
    return np.repeat(samples.mean(axis=0, keepdims=True, dtype=np.float32), channels, axis=0)


def _decoded_sound(
    path: Path, audio: AudioProbe, from_s: float, to_s: float
) -> Iterator[tuple[float, np.ndarray]]:
    """Yield (pts_s, float32 [channels, n]) at the native rate around the wanted span."""
    with open_media(path) as container:
        stream: Any = container.streams.best("audio")
        stream.thread_count = 1
        if from_s > audio.start_s + 1.0:  # start a second early: codecs need a run-up
            container.seek(int(Fraction(from_s - 1.0) / stream.time_base), stream=stream)
        planar: av.AudioResampler | None = None
        for packet in container.demux(stream):
            try:
                frames = packet.decode()
            except av.FFmpegError:
                continue  # counted by the caller as samples that are not there
            for frame in frames:
                if frame.pts is None:
                    continue
                pts_s = float(frame.pts * frame.time_base)
                if pts_s >= to_s:
                    return
                if planar is None:
                    planar = av.AudioResampler("fltp", frame.layout, audio.sample_rate)
                for converted in planar.resample(frame):
                    yield pts_s, converted.to_ndarray()
