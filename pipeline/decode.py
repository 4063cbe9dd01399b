"""One clip to frames and sound on one clock, and what was found on the way. Applies no policy.

All times are seconds from the file's second 0, see ``pipeline.demux``, unless named ``pts_s``.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.audio import resample
from pipeline.demux import Probe, probing
from pipeline.measures import picture_measures, sound_measures
from pipeline.media import Clip, ClipError, Decoded, DecodeSettings
from pipeline.picture import decode_picture
from pipeline.sound import decode_sound
from pipeline.tracks import AudioProbe, VideoProbe

# A last frame counts when at most this share of its interval is missing: streams of "10 s" end
# some milliseconds early as often as late, and 79 frames for 80 would waste the clip.
LAST_FRAME_SLACK = 0.2
# Lengths that differ by less are the same: Matroska rounds to 1 ms.
SAME_LENGTH_S = 0.005


def decode_clip(path: Path, clip: Clip, settings: DecodeSettings, wanted: set[str]) -> Decoded:
    """Decode what can be decoded of the wanted modalities, and measure it.

    Both modalities end where the first of them does, but for what is cut off a damaged one: there
    the last frame stays, or silence. ``problems`` holds only what makes latents
    impossible: ``no_video``, ``no_audio``, ``too_short`` (not one frame) and ``truncated``
    (nothing of it can be decoded); how much is damaged is in the facts.

    Args:
        path: the media file.
        clip: which span of it.
        settings: frame rate, sizes, sample rate.
        wanted: of {"video", "audio"}: what to decode; both are probed in any case.

    Raises:
        ClipError: ``missing`` or ``unreadable``: nothing in the file can be used.
    """
    with probing(path, clip) as probed:
        return _decode(probed, clip, settings, wanted)


def read_sound(path: Path, sample_rate: int) -> np.ndarray:
    """Read a whole file's sound, averaged to mono, float32 [N]; second 0 is its first frame's.

    Raises:
        ClipError: the file has no sound that can be decoded.
    """
    with probing(path) as probed:
        audio = probed.audio
        if audio is None:
            message = f"{path} has {probed.streams}, expected sound that can be decoded"
            raise ClipError("no_audio", message)
        duration_s = audio.end_s - probed.zero_s
        native, _ = decode_sound(probed, audio, probed.zero_s, duration_s, channels=1)
    return _resampled(native, audio.sample_rate, sample_rate, duration_s)[0]


def _decode(probed: Probe, clip: Clip, settings: DecodeSettings, wanted: set[str]) -> Decoded:
    duration_s, shares = _common_span(probed, clip)
    facts = _facts(probed) | {"duration_s": duration_s}
    problems: dict[str, tuple[str, str]] = {}
    frames = sound = None
    try:
        frames = _decode_video(probed, clip, settings, facts, shares["video"], wanted)
    except ClipError as error:
        problems["video"] = (error.status, error.message)
    try:
        sound = _decode_audio(probed, clip, settings, facts, shares["audio"], wanted)
    except ClipError as error:
        problems["audio"] = (error.status, error.message)
    return Decoded(frames, sound, problems, facts)


def _decode_video(
    probed: Probe,
    clip: Clip,
    settings: DecodeSettings,
    facts: dict[str, Any],
    there_share: float,
    wanted: set[str],
) -> np.ndarray | None:
    """Return the frames, uint8 [T, height, width, 3], and add what was found to ``facts``."""
    if probed.video is None:
        raise ClipError(
            "no_video", f"found {probed.streams}, expected a picture that can be decoded"
        )
    facts["video_decoded_share"] = there_share
    count = int(facts["duration_s"] * settings.fps + LAST_FRAME_SLACK)
    if count == 0:
        raise _no_frame(facts["duration_s"], there_share, clip, settings)
    if "video" not in wanted:
        return None
    picture = decode_picture(probed, probed.video, probed.zero_s + clip.start_s, count, settings)
    microseconds = np.round((picture.pts_s - probed.zero_s) * 1e6).astype("<i8")
    facts |= picture_measures(picture.frames, settings.fps)
    facts["video_decoded_share"] = there_share * picture.decoded_share
    facts["pts_hash"] = hashlib.blake2b(microseconds.tobytes(), digest_size=8).hexdigest()
    facts["decoder"] = picture.decoder
    facts["num_frames"] = count
    return picture.frames


def _decode_audio(
    probed: Probe,
    clip: Clip,
    settings: DecodeSettings,
    facts: dict[str, Any],
    there_share: float,
    wanted: set[str],
) -> np.ndarray | None:
    """Return the sound, float32 [channels, N], and add what was found to ``facts``."""
    audio, duration_s = probed.audio, facts["duration_s"]
    if audio is None:
        raise ClipError("no_audio", f"found {probed.streams}, expected sound that can be decoded")
    facts["audio_decoded_share"] = there_share
    if int(duration_s * settings.fps + LAST_FRAME_SLACK) == 0:
        raise _no_frame(duration_s, there_share, clip, settings)
    if "audio" not in wanted:
        return None
    first_s = probed.zero_s + clip.start_s
    native, decoded_share = decode_sound(probed, audio, first_s, duration_s, settings.channels)
    facts |= sound_measures(native, audio.sample_rate)
    facts["audio_decoded_share"] = there_share * decoded_share
    return _resampled(native, audio.sample_rate, settings.sample_rate, duration_s)


def _resampled(native: np.ndarray, from_hz: int, to_hz: int, duration_s: float) -> np.ndarray:
    """Resample to exactly ``round(duration_s * to_hz)`` samples."""
    count = round(duration_s * to_hz)
    sound = resample(native, from_hz, to_hz)[:, :count]
    return np.pad(sound, ((0, 0), (0, count - sound.shape[1])))


def _no_frame(
    duration_s: float, there_share: float, clip: Clip, settings: DecodeSettings
) -> ClipError:
    status = "too_short" if there_share == 1.0 else "truncated"
    return ClipError(
        status,
        f"found {duration_s:.3f} s of picture and sound from second {clip.start_s:g}, "
        f"expected {1 / settings.fps:g} s at least: one frame at {settings.fps:g} fps",
    )


def _common_span(probed: Probe, clip: Clip) -> tuple[float, dict[str, float]]:
    """Return the clip's real length, and modality -> share there of what the index promises."""
    duration_s, shares = clip.duration_s, {"video": 0.0, "audio": 0.0}
    start_s = probed.zero_s + clip.start_s
    for modality, stream in (("video", probed.video), ("audio", probed.audio)):
        if stream is None:
            continue
        there_s = max(stream.end_s - start_s, 0.0)
        expected_s = min(clip.duration_s, stream.declared_end_s - start_s)
        if there_s >= expected_s - SAME_LENGTH_S:
            shares[modality] = 1.0
        else:
            shares[modality] = there_s / expected_s
            # What was cut off one of them does not shorten the other, but if nothing is left.
            there_s = expected_s if there_s else 0.0
        duration_s = min(duration_s, there_s)
    return duration_s, shares


def _facts(probed: Probe) -> dict[str, Any]:
    return (
        {"content_hash": probed.content_hash}
        | (_video_facts(probed.video) if probed.video else {})
        | (_audio_facts(probed.audio, probed.zero_s) if probed.audio else {})
    )


def _video_facts(video: VideoProbe) -> dict[str, Any]:
    read_s = video.end_s - float(video.pts_s[0])
    return {
        "video_codec": video.codec,
        "width": video.width,
        "height": video.height,
        "pixel_aspect": video.pixel_aspect,
        "rotation": video.rotation,
        "fps": len(video.pts_s) / read_s if read_s > 0 else 0.0,
        "video_s": video.length_s,
    }


def _audio_facts(audio: AudioProbe, zero_s: float) -> dict[str, Any]:
    return {
        "audio_codec": audio.codec,
        "sample_rate": audio.sample_rate,
        "channels": audio.channels,
        "audio_s": audio.length_s,
        "audio_offset_s": audio.start_s - zero_s,
    }
