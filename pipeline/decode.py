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
from pipeline.streams import AudioProbe, VideoProbe

# A last frame counts when at most this share of its interval is missing: streams of "10 s" end
# some milliseconds early as often as late, and 79 frames for 80 would waste the clip.
LAST_FRAME_SLACK = 0.2
# Lengths that differ by less are the same: Matroska rounds to 1 ms.
SAME_LENGTH_S = 0.005
NAMES = {"video": "a picture", "audio": "sound"}


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
        native = decode_sound(probed, audio, probed.zero_s, duration_s, channels=1)
    return _resampled(native.samples, audio.sample_rate, sample_rate, duration_s)[0]


def _decode(probed: Probe, clip: Clip, settings: DecodeSettings, wanted: set[str]) -> Decoded:
    first_s = probed.zero_s + clip.start_s
    duration_s = _common_s(probed, first_s, clip.duration_s)
    facts = _facts(probed, first_s, duration_s)
    problems: dict[str, tuple[str, str]] = {}
    media: dict[str, np.ndarray] = {}
    for modality, stream in (("video", probed.video), ("audio", probed.audio)):
        try:
            if stream is None:
                message = f"found {probed.streams}, expected {NAMES[modality]} to decode"
                raise ClipError(f"no_{modality}", message)
            _expect_a_frame(duration_s, clip, settings)
            if modality in wanted:
                media[modality], found = (
                    _decode_video(probed, stream, first_s, duration_s, settings)
                    if isinstance(stream, VideoProbe)
                    else _decode_audio(probed, stream, first_s, duration_s, settings)
                )
                facts |= found
        except ClipError as error:
            problems[modality] = (error.status, error.message)
    return Decoded(media.get("video"), media.get("audio"), problems, facts)


def _decode_video(
    probed: Probe, video: VideoProbe, first_s: float, duration_s: float, settings: DecodeSettings
) -> tuple[np.ndarray, dict[str, Any]]:
    """Return the frames, uint8 [T, height, width, 3], and what was found."""
    there_share = _there_share(video, first_s, duration_s)
    if there_share == 0:
        message = f"found no frame of it, expected {duration_s:.2f} s: the file is cut off"
        raise ClipError("truncated", message)
    picture = decode_picture(probed, video, first_s, _num_frames(duration_s, settings), settings)
    microseconds = np.round((picture.pts_s - probed.zero_s) * 1e6).astype("<i8")
    return picture.frames, picture_measures(picture.frames, settings.fps) | {
        "video_decoded_share": there_share * picture.decoded_share,
        "pts_hash": hashlib.blake2b(microseconds.tobytes(), digest_size=8).hexdigest(),
        "decoder": picture.decoder,
        "num_frames": len(picture.frames),
    }


def _decode_audio(
    probed: Probe, audio: AudioProbe, first_s: float, duration_s: float, settings: DecodeSettings
) -> tuple[np.ndarray, dict[str, Any]]:
    """Return the sound, float32 [channels, N], and what was found."""
    native = decode_sound(probed, audio, first_s, duration_s, settings.channels)
    sound = _resampled(native.samples, audio.sample_rate, settings.sample_rate, duration_s)
    found = sound_measures(native.mono, audio.sample_rate)
    return sound, found | {"audio_decoded_share": native.decoded_share}


def _resampled(native: np.ndarray, from_hz: int, to_hz: int, duration_s: float) -> np.ndarray:
    """Resample to exactly ``round(duration_s * to_hz)`` samples."""
    count = round(duration_s * to_hz)
    sound = resample(native, from_hz, to_hz)[:, :count]
    return np.pad(sound, ((0, 0), (0, count - sound.shape[1])))


def _num_frames(duration_s: float, settings: DecodeSettings) -> int:
    return int(duration_s * settings.fps + LAST_FRAME_SLACK)


def _expect_a_frame(duration_s: float, clip: Clip, settings: DecodeSettings) -> None:
    if _num_frames(duration_s, settings) == 0:
        raise ClipError(
            "too_short",
            f"found {duration_s:.3f} s of picture and sound from second {clip.start_s:g}, "
            f"expected {1 / settings.fps:g} s at least: one frame at {settings.fps:g} fps",
        )


def _common_s(probed: Probe, first_s: float, duration_s: float) -> float:
    """Return the clip's real length; what is cut off one stream does not shorten the other."""
    for stream in (probed.video, probed.audio):
        if stream:
            there_s = max(stream.end_s - first_s, 0.0)
            declared_s = stream.declared_end_s - first_s
            cut_off = there_s < min(duration_s, declared_s) - SAME_LENGTH_S
            duration_s = min(duration_s, declared_s if cut_off else there_s)
    return duration_s


def _there_share(stream: VideoProbe | AudioProbe, first_s: float, duration_s: float) -> float:
    """Return the share of a span that a stream lasts, of the part behind its start."""
    begins_s, ends_s = max(stream.start_s, first_s), first_s + duration_s
    if begins_s >= ends_s:
        return 1.0
    return min(max(stream.end_s - begins_s, 0.0) / (ends_s - begins_s), 1.0)


def _facts(probed: Probe, first_s: float, duration_s: float) -> dict[str, Any]:
    """Return what is known without decoding."""
    facts: dict[str, Any] = {"content_hash": probed.content_hash, "duration_s": duration_s}
    for modality, stream in (("video", probed.video), ("audio", probed.audio)):
        if stream:
            facts[f"{modality}_decoded_share"] = _there_share(stream, first_s, duration_s)
    if probed.video:
        facts |= _video_facts(probed.video)
    if probed.audio:
        facts |= _audio_facts(probed.audio, probed.zero_s)
    return facts


def _video_facts(video: VideoProbe) -> dict[str, Any]:
    read_s = video.end_s - video.start_s
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
