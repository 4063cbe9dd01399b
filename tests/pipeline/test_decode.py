"""Second 0 of a clip is the same instant in picture and sound, or the clip is refused."""

import dataclasses
from fractions import Fraction

import av
import decord
import numpy as np
import pytest
from PIL import Image

from pipeline.audio import resample
from pipeline.decode import decode_clip, read_sound
from pipeline.demux import media_length, probing
from pipeline.format import STATUSES
from pipeline.geometry import orientation
from pipeline.media import Clip, ClipError, DecodeSettings
from pipeline.mux import write_mp4

SIZE = 64
BLOCK = SIZE // 4
RATE = 16000
BOTH = {"video", "audio"}
SETTINGS = DecodeSettings(
    fps=8, sizes=((SIZE, SIZE),), fit="crop", decoder="decord", sample_rate=RATE, channels=1
)
CLICK_S = 1.5


def numbered(count, width=SIZE):
    """Frames that show their number: 4 x 4 blocks, 8 bits and their complement."""
    number = np.arange(count)[:, None]
    bits = (number >> np.arange(8)) & 1
    blocks = np.concatenate([bits, 1 - bits], axis=1).reshape(count, 4, 4).astype(np.uint8)
    grey = np.kron(blocks, np.full((1, BLOCK, BLOCK), 255, dtype=np.uint8))
    grey = np.pad(grey, ((0, 0), (0, 0), ((width - SIZE) // 2,) * 2), mode="edge")
    return np.repeat(grey[..., None], 3, axis=3)


def numbers(frames):
    """Read the numbers back, -1 where the picture is no number."""
    blocks = frames.reshape(-1, 4, BLOCK, 4, BLOCK, 3)[:, :, 4:-4, :, 4:-4].mean(axis=(2, 4, 5))
    bits = (blocks.reshape(-1, 16) > 128).astype(int)
    clear = (np.abs(blocks.reshape(-1, 16) - 128) > 64).all(axis=1)
    valid = clear & (bits[:, :8] + bits[:, 8:] == 1).all(axis=1)
    return np.where(valid, bits[:, :8] @ (1 << np.arange(8)), -1)


def noise_with_click(seconds, rate=RATE, click_s=CLICK_S, channels=1):
    """Faint noise (silence can be told from it) and one loud click."""
    generator = np.random.default_rng(0)
    sound = generator.normal(0, 0.01, (channels, round(seconds * rate))).astype(np.float32)
    start = round(click_s * rate)
    sound[:, start : start + rate // 400] += 0.8
    return sound


def click_second(sound, rate=RATE):
    """Second at which the loud part begins."""
    return int(np.flatnonzero(np.abs(sound[0]) > 0.3)[0]) / rate


def make(path, seconds=4.0, fps=25.0, rate=RATE, sound_s=None, channels=1, **click):
    sound = noise_with_click(sound_s or seconds, rate, channels=channels, **click)
    write_mp4(path, numbered(round(seconds * fps)), fps, sound, rate)
    return path


def clip_of(start_s=0.0, duration_s=10.0):
    return Clip("key", "a.mp4", start_s, duration_s)


def decode(path, clip=None, wanted=BOTH, **settings):
    return decode_clip(path, clip or clip_of(), dataclasses.replace(SETTINGS, **settings), wanted)


def probe(path, clip=None):
    with probing(path, clip) as probed:
        return probed


def remux(path, out, keep=("video", "audio"), delay_s=None, video_pts=None):
    """Copy the packets into another container, later or with other timestamps."""
    with av.open(str(path)) as source, av.open(str(out), "w") as target:
        streams = {}
        for kind in keep:
            for stream in getattr(source.streams, kind):
                streams[stream.index] = target.add_stream_from_template(stream)
        for packet in source.demux():
            if packet.stream.index not in streams or packet.pts is None or packet.is_discard:
                continue
            if video_pts and packet.stream.type == "video":
                packet.pts = packet.dts = video_pts(packet.pts, packet.time_base)
            shift = (delay_s or {}).get(packet.stream.type, 0)
            ticks = round(Fraction(shift) / packet.time_base)
            packet.pts, packet.dts = packet.pts + ticks, packet.dts + ticks
            packet.stream = streams[packet.stream.index]
            target.mux(packet)
    return out


def shown_at(seconds, fps):
    """Numbers that a film of constant rate may show at these seconds, 2 ms of tolerance."""
    seconds = np.asarray(seconds)
    return np.floor((seconds - 0.0021) * fps), np.floor((seconds + 0.0021) * fps)


def assert_shows(frames, seconds, fps):
    early, late = shown_at(seconds, fps)
    found = numbers(frames)
    assert len(found) == len(seconds)
    assert ((found >= early) & (found <= late)).all(), found


# -- the picture


@pytest.mark.parametrize("film_fps", [10, 24, 25, 30000 / 1001, 30, 50])
def test_frame_is_the_one_presented_at_every_instant(tmp_path, film_fps):
    path = make(tmp_path / "a.mp4", fps=film_fps)
    for fps in (1, 4, 8, 12, 16, 24, 30, 60):
        decoded = decode(path, clip_of(duration_s=3), fps=fps)
        assert decoded.problems == {} and decoded.facts["decoder"] == "decord"
        assert_shows(decoded.frames, np.arange(3 * fps) / fps, film_fps)


def test_frames_of_a_film_of_varying_rate_are_those_on_screen(tmp_path):
    """Every third frame stands four times as long as the others."""
    source = make(tmp_path / "a.mp4", seconds=2.4, sound_s=5)
    starts_s = np.cumsum([0.0] + [0.12 if i % 3 == 2 else 0.03 for i in range(59)])

    def stretched(pts, time_base):
        return round(starts_s[round(pts * time_base * 25)] / time_base)

    path = remux(source, tmp_path / "b.mp4", video_pts=stretched)
    decoded = decode(path, fps=20)
    assert decoded.problems == {}
    seconds = np.arange(len(decoded.frames)) / 20
    expected = np.searchsorted(starts_s, seconds + 0.002, side="right") - 1
    np.testing.assert_array_equal(numbers(decoded.frames), expected)


@pytest.mark.parametrize("start_s", [0.0, 0.04, 0.5, 1.3, 2.96])
def test_span_starts_at_its_second_in_both_modalities(tmp_path, start_s):
    path = make(tmp_path / "a.mp4", seconds=6, click_s=3.0)
    decoded = decode(path, clip_of(start_s, 2.0))
    assert decoded.problems == {}
    assert_shows(decoded.frames, start_s + np.arange(16) / 8, 25)
    assert decoded.sound.shape == (1, 2 * RATE)
    if start_s + 2 > 3:
        assert click_second(decoded.sound) == pytest.approx(3.0 - start_s, abs=0.002)


OPEN_GROUPS = {"g": "12", "bf": "3", "x264-params": "open-gop=1:scenecut=0"}
SHORT_GROUPS = {"g": "12", "bf": "3"}


def encode_groups(path, codec, options, muxer_options=None):
    """Six numbered seconds at 25 fps in short groups of pictures."""
    with av.open(str(path), "w", options=muxer_options or {}) as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = SIZE, SIZE, "yuv420p"
        for pixels in numbered(150):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))


@pytest.mark.parametrize(
    ("name", "codec", "options", "muxer_options"),
    [
        ("a.mp4", "libx264", SHORT_GROUPS, {}),
        ("a.mp4", "libx264", OPEN_GROUPS, {}),
        ("a.mp4", "libx264", SHORT_GROUPS, {"movflags": "frag_keyframe+empty_moov"}),
        ("a.mp4", "libx265", {"x265-params": "keyint=12:bframes=3:log-level=none"}, {}),
        ("a.mkv", "libx264", OPEN_GROUPS, {}),
        ("a.mkv", "libx264", SHORT_GROUPS, {"live": "1"}),  # without an index
        ("a.webm", "libvpx-vp9", {"g": "12"}, {}),
        ("a.ts", "libx264", SHORT_GROUPS, {}),
        ("a.ts", "mpeg2video", {"g": "12"}, {}),
        ("a.flv", "libx264", SHORT_GROUPS, {}),
        ("a.mxf", "mpeg2video", {"g": "12", "bf": "2"}, {}),
    ],
)
@pytest.mark.parametrize("decoder", ["its own", "pyav"])
def test_frames_are_right_behind_a_seek(
    tmp_path, monkeypatch, name, codec, options, muxer_options, decoder
):
    """decord counts frames after a seek: off in open groups and in files without an index."""
    if decoder == "pyav":
        monkeypatch.setattr("pipeline.picture.decord_frames", lambda *arguments: None)
    encode_groups(tmp_path / name, codec, options, muxer_options)
    for start in (0, 11, 12, 13, 35, 60, 107):
        decoded = decode(tmp_path / name, clip_of(start / 25, 1.0))
        assert set(decoded.problems) == {"audio"}
        assert_shows(decoded.frames, start / 25 + np.arange(8) / 8, 25)


def test_closed_groups_with_an_index_are_decoded_by_decord(tmp_path):
    for name, options, decoder in (
        ("a.mp4", SHORT_GROUPS, "decord"),
        ("b.mkv", SHORT_GROUPS, "decord"),
        ("c.mp4", OPEN_GROUPS, "pyav"),
    ):
        encode_groups(tmp_path / name, "libx264", options)
        assert decode(tmp_path / name).facts["decoder"] == decoder


@pytest.mark.parametrize("muxer_options", [{}, {"live": "1"}])
@pytest.mark.parametrize("with_sound", [True, False])
@pytest.mark.parametrize("container", ["mkv", "webm", "ts", "mp4", "flv"])
def test_still_second_that_was_left_out_is_no_damage(
    tmp_path, container, with_sound, muxer_options
):
    """A film of 25 fps without frames 30 to 54, as `mpdecimate -fps_mode vfr` leaves it."""
    path = tmp_path / f"a.{container}"
    webm = container == "webm"
    with av.open(str(path), "w", options=muxer_options if container == "mkv" else {}) as film:
        video = film.add_stream("libvpx" if webm else "libx264", rate=25)
        video.width, video.height, video.pix_fmt = SIZE, SIZE, "yuv420p"
        audio = film.add_stream("libopus" if webm else "aac", rate=48000, layout="mono")
        for place, pixels in enumerate(numbered(100)):
            if not 30 <= place < 55:
                picture = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                picture.pts, picture.time_base = place, Fraction(1, 25)
                film.mux(video.encode(picture))
            if with_sound:
                samples = noise_with_click(0.04, 48000, click_s=1)
                frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
                frame.sample_rate, frame.pts = 48000, place * 1920
                film.mux(audio.encode(frame))
        film.mux(video.encode(None))
        if with_sound:
            film.mux(audio.encode(None))
    decoded = decode(path, wanted={"video"}, fps=5)
    assert decoded.facts["video_decoded_share"] == 1
    found, whole = numbers(decoded.frames), np.arange(0, len(decoded.frames) * 5, 5)
    np.testing.assert_array_equal(found, np.where((whole >= 30) & (whole < 55), 29, whole))


@pytest.mark.parametrize("container", ["mkv", "ts"])
def test_hole_in_picture_and_sound_is_lost(tmp_path, container):
    """The same gap in both: a part of the file is not there."""
    source = make(tmp_path / "a.mp4", seconds=4, fps=25, rate=48000)
    path = tmp_path / f"b.{container}"
    with av.open(str(source)) as film, av.open(str(path), "w") as copy:
        copies = {stream.index: copy.add_stream_from_template(stream) for stream in film.streams}
        for packet in film.demux():
            if packet.dts is not None and not 1.2 <= packet.dts * packet.time_base < 2.2:
                packet.stream = copies[packet.stream.index]
                copy.mux(packet)
    decoded = decode(path)
    for modality in BOTH:
        assert decoded.facts[f"{modality}_decoded_share"] == pytest.approx(0.72, abs=0.05)


def test_length_tagged_for_another_container_is_not_believed(tmp_path):
    with av.open(str(tmp_path / "a.ogg"), "w") as film:
        stream = film.add_stream("libopus", rate=48000, layout="mono")
        stream.metadata["DURATION"] = "00:00:10.000000000"
        frame = av.AudioFrame.from_ndarray(noise_with_click(3, 48000), "fltp", "mono")
        frame.sample_rate = 48000
        film.mux(stream.encode(frame))
        film.mux(stream.encode(None))
    with av.open(str(tmp_path / "a.ogg")) as film:
        assert "DURATION" in film.streams.audio[0].metadata
    facts = decode(tmp_path / "a.ogg").facts
    assert facts["duration_s"] == pytest.approx(3, abs=0.03)
    assert facts["audio_decoded_share"] == pytest.approx(1, abs=0.01)


def test_title_in_another_encoding_does_not_matter(tmp_path):
    path = make(tmp_path / "a.mp4", seconds=2)
    titled = tmp_path / "b.mp4"
    with av.open(str(path)) as source, av.open(str(titled), "w") as target:
        target.metadata["title"] = "XXXX"
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.pts is not None:
                packet.stream = stream
                target.mux(packet)
    titled.write_bytes(titled.read_bytes().replace(b"XXXX", "Käß€".encode("cp1252")))
    assert set(decode(titled).problems) == {"audio"}


def test_wide_film_is_scaled_to_its_short_side_and_cropped_in_the_centre(tmp_path):
    frames = numbered(50, width=128)
    frames[:, :, :24] = frames[:, :, -24:] = 128
    write_mp4(tmp_path / "a.mp4", frames.repeat(2, axis=1).repeat(2, axis=2), 25, None, RATE)
    decoded = decode(tmp_path / "a.mp4")
    assert decoded.frames.shape == (16, SIZE, SIZE, 3) and decoded.frames.dtype == np.uint8
    assert_shows(decoded.frames, np.arange(16) / 8, 25)


def test_only_what_is_wanted_is_decoded(tmp_path):
    path = make(tmp_path / "a.mp4", seconds=2)
    for wanted in ({"video"}, {"audio"}, set()):
        decoded = decode(path, wanted=wanted)
        assert decoded.problems == {}
        assert {"video"} & wanted == ({"video"} if decoded.frames is not None else set())
        assert {"audio"} & wanted == ({"audio"} if decoded.sound is not None else set())


# -- the sound


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000])
@pytest.mark.parametrize("click_s", [0.25, 1.5, 1.9])
def test_click_is_at_its_second_at_any_rate(tmp_path, rate, click_s):
    decoded = decode(make(tmp_path / "a.mp4", seconds=2, rate=rate, click_s=click_s))
    assert decoded.sound.dtype == np.float32
    assert click_second(decoded.sound) == pytest.approx(click_s, abs=0.002)


def test_stereo_is_averaged_or_kept_and_mono_doubled(tmp_path):
    tone = 0.5 * np.sin(np.arange(2 * RATE) * 2 * np.pi * 440 / RATE)
    write_mp4(tmp_path / "a.mp4", numbered(50), 25, np.stack([tone, 0 * tone]), RATE)
    mono = decode(tmp_path / "a.mp4").sound
    left, right = decode(tmp_path / "a.mp4", channels=2).sound
    middle = slice(RATE // 2, RATE)
    assert np.abs(mono[0, middle]).max() == pytest.approx(0.25, abs=0.02)
    assert np.abs(left[middle]).max() == pytest.approx(0.5, abs=0.04)
    assert np.abs(right[middle]).max() < 0.04
    doubled = decode(make(tmp_path / "b.mp4", seconds=2), channels=2).sound
    np.testing.assert_array_equal(doubled[0], doubled[1])


@pytest.mark.parametrize("codec", ["pcm_s16le", "flac"])
def test_side_of_more_channels_is_the_mean_of_its_own_and_the_centre(tmp_path, codec):
    """5.1, one channel after the other: FL, FR, FC, LFE, BL, BR, a second of 440 Hz each."""
    tone = 0.8 * np.sin(np.arange(48000) * 2 * np.pi * 440 / 48000)
    sound = np.kron(np.eye(6), tone).astype(np.float32)
    with av.open(str(tmp_path / "a.mkv"), "w") as film:
        stream = film.add_stream(codec, rate=48000, layout="5.1")
        converter = av.AudioResampler(stream.codec_context.format or "s16", "5.1", 48000, 4096)
        frame = av.AudioFrame.from_ndarray(sound, format="fltp", layout="5.1")
        frame.sample_rate, frame.pts = 48000, 0
        for part in (*converter.resample(frame), *converter.resample(None), None):
            film.mux(stream.encode(part))
    decoded = decode(tmp_path / "a.mkv", channels=2)
    middles = np.arange(6)[:, None] * RATE + np.arange(RATE // 8, RATE * 7 // 8)
    seconds = decoded.sound[:, middles]
    expected = np.array([[1, 0, 1, 0, 1, 0], [0, 1, 1, 0, 0, 1]]) * 0.8 / 3
    np.testing.assert_allclose(np.abs(seconds).max(axis=2), expected, atol=0.01)
    mono = decode(tmp_path / "a.mkv")
    assert np.abs(mono.sound).max() == pytest.approx(0.8 / 6, abs=0.01)
    assert mono.facts["loudness_dbfs"] == decoded.facts["loudness_dbfs"]


@pytest.mark.parametrize("container", ["mp4", "mkv", "ts", "mov"])
@pytest.mark.parametrize("delay_s", [{}, {"audio": 0.5}, {"video": 0.4}, {"audio": 3, "video": 3}])
def test_sound_and_picture_stay_together_in_every_container(tmp_path, container, delay_s):
    source = make(tmp_path / "a.mp4", seconds=4)
    path = remux(source, tmp_path / f"b.{container}", delay_s=delay_s)
    decoded = decode(path, clip_of(duration_s=3))
    assert decoded.problems == {}
    assert_shows(decoded.frames, np.arange(24) / 8, 25)
    behind_s = delay_s.get("audio", 0) - delay_s.get("video", 0)
    assert click_second(decoded.sound) == pytest.approx(CLICK_S + behind_s, abs=0.003)
    if behind_s > 0:
        assert not decoded.sound[0, : round((behind_s - 0.1) * RATE)].any()


def test_read_sound_starts_with_the_picture_and_is_whole(tmp_path):
    path = make(tmp_path / "a.mp4", seconds=2, rate=44100, sound_s=3, channels=2)
    sound = read_sound(path, RATE)
    assert sound.dtype == np.float32 and abs(len(sound) - 3 * RATE) <= 0.07 * RATE
    assert click_second(sound[None]) == pytest.approx(CLICK_S, abs=0.002)
    early = remux(path, tmp_path / "b.mkv", delay_s={"video": 0.4})
    assert click_second(read_sound(early, RATE)[None]) == pytest.approx(CLICK_S - 0.4, abs=0.003)
    only = remux(path, tmp_path / "c.mkv", keep=["audio"])
    assert click_second(read_sound(only, RATE)[None]) == pytest.approx(CLICK_S, abs=0.003)


def test_read_sound_of_a_silent_film_is_refused(tmp_path):
    write_mp4(tmp_path / "a.mp4", numbered(10), 25, None, RATE)
    with pytest.raises(ClipError) as error:
        read_sound(tmp_path / "a.mp4", RATE)
    assert error.value.status == "no_audio"


# -- lengths


@pytest.mark.parametrize("duration_s", [1.0, 1.5, 2.4, 3.99])
@pytest.mark.parametrize("fps", [5, 8, 12.5])
def test_both_modalities_have_the_length_of_the_span(tmp_path, duration_s, fps):
    decoded = decode(make(tmp_path / "a.mp4"), clip_of(duration_s=duration_s), fps=fps)
    assert len(decoded.frames) == int(duration_s * fps + 0.2)
    assert decoded.sound.shape == (1, round(duration_s * RATE))
    assert decoded.facts["duration_s"] == duration_s


@pytest.mark.parametrize(("seconds", "sound_s"), [(3.0, 2.0), (2.0, 3.0)])
def test_both_modalities_end_where_the_first_does(tmp_path, seconds, sound_s):
    decoded = decode(make(tmp_path / "a.mp4", seconds=seconds, sound_s=sound_s))
    assert decoded.problems == {}
    assert len(decoded.frames) == 16
    assert 2 * RATE <= decoded.sound.shape[1] <= 2.07 * RATE  # AAC fills its last frame


@pytest.mark.parametrize(("start_s", "expected"), [(0.0, set()), (3.8, set()), (9.0, BOTH)])
def test_span_without_a_frame_is_too_short(tmp_path, start_s, expected):
    decoded = decode(make(tmp_path / "a.mp4"), clip_of(start_s))
    assert set(decoded.problems) == expected
    assert decoded.facts["duration_s"] == pytest.approx(max(4 - start_s, 0))
    for modality, (status, message) in decoded.problems.items():
        assert status == "too_short" and "one frame at 8 fps" in message
        assert (decoded.frames if modality == "video" else decoded.sound) is None


def test_file_of_one_frame_is_too_short(tmp_path):
    write_mp4(tmp_path / "a.mp4", numbered(1), 25, noise_with_click(4), RATE)
    decoded = decode(tmp_path / "a.mp4")
    assert decoded.problems["video"][0] == "too_short"


# -- what is missing or damaged


def test_silent_film_lacks_sound_only(tmp_path):
    write_mp4(tmp_path / "a.mp4", numbered(75), 25, None, RATE)
    decoded = decode(tmp_path / "a.mp4")
    assert {m: status for m, (status, _) in decoded.problems.items()} == {"audio": "no_audio"}
    assert_shows(decoded.frames, np.arange(24) / 8, 25)


def test_sound_alone_lacks_picture_only(tmp_path):
    path = remux(make(tmp_path / "a.mp4"), tmp_path / "b.mp4", keep=["audio"])
    decoded = decode(path)
    assert {m: status for m, (status, _) in decoded.problems.items()} == {"video": "no_video"}
    assert click_second(decoded.sound) == pytest.approx(CLICK_S, abs=0.002)


def test_missing_file_is_missing(tmp_path):
    with pytest.raises(ClipError) as error:
        decode(tmp_path / "a.mp4")
    assert error.value.status == "missing" and "a.mp4" in error.value.message


@pytest.mark.parametrize("content", [b"", b"\0" * 5000, b"garbage" * 999, b"\0\0\0\x18ftypisom"])
def test_garbage_is_unreadable(tmp_path, content):
    (tmp_path / "a.mp4").write_bytes(content)
    with pytest.raises(ClipError) as error:
        decode(tmp_path / "a.mp4")
    assert error.value.status == "unreadable"


def test_folder_in_place_of_a_file_is_unreadable(tmp_path):
    (tmp_path / "a.mp4").mkdir()
    with pytest.raises(ClipError) as error:
        decode(tmp_path / "a.mp4")
    assert error.value.status == "unreadable"


def share_of_right_frames(frames, fps=25):
    early, late = shown_at(np.arange(32) / 8, fps)
    found = numbers(frames)
    right = (found >= early[: len(found)]) & (found <= late[: len(found)])
    return right.sum() / 32


def share_of_sound(sound):
    blocks = sound[0, : len(sound[0]) // 160 * 160].reshape(-1, 160)
    return (np.abs(blocks).max(axis=1) > 1e-3).sum() / 400


def assert_ok_means_whole(path, loss=0.02):
    """What is said to be decoded holds all that a whole file holds, but for the allowed share."""
    try:
        decoded = decode(path, clip_of(duration_s=4))
    except ClipError as error:
        assert error.status == "unreadable"
        return set()
    assert all(status in STATUSES for status, _ in decoded.problems.values())
    whole = {
        modality
        for modality in BOTH - set(decoded.problems)
        if decoded.facts[f"{modality}_decoded_share"] >= 1 - loss
    }
    if whole == BOTH:
        assert share_of_right_frames(decoded.frames) >= 1 - loss - 1 / 32
        assert share_of_sound(decoded.sound) >= 1 - loss - 0.01
    return whole


def test_whole_file_is_ok(tmp_path):
    assert assert_ok_means_whole(make(tmp_path / "a.mp4")) == BOTH


@pytest.mark.parametrize("index_in_front", [True, False])
def test_cut_off_file_is_never_ok(tmp_path, index_in_front):
    path = make(tmp_path / "a.mp4")
    if not index_in_front:
        path = remux(path, tmp_path / "end.mp4")
    content = path.read_bytes()
    for percent in (1, 20, 40, 60, 80, 90, 95, 97):
        cut = tmp_path / f"cut{percent}.mp4"
        cut.write_bytes(content[: len(content) * percent // 100])
        assert assert_ok_means_whole(cut) != BOTH


@pytest.mark.parametrize("percent", [10, 30, 50, 70, 90])
def test_file_whose_end_was_never_written_is_never_ok(tmp_path, percent):
    """A download that was stopped, into a file of full length: zeros after the part that came."""
    path = make(tmp_path / "a.mp4")
    content = bytearray(path.read_bytes())
    start = len(content) * percent // 100
    content[start:] = bytes(len(content) - start)
    path.write_bytes(content)
    assert assert_ok_means_whole(path) != BOTH


@pytest.mark.parametrize("seed", range(6))
def test_hole_in_the_middle_is_never_taken_for_content(tmp_path, seed):
    path = make(tmp_path / "a.mp4")
    content = bytearray(path.read_bytes())
    data = content.index(b"mdat")
    length = (len(content) - data) // 5
    start = int(np.random.default_rng(seed).integers(data + 8, len(content) - length))
    content[start : start + length] = bytes(length)
    path.write_bytes(content)
    assert_ok_means_whole(path)


def make_cut_off(path, lost, kept_s):
    """A Matroska film whose header says that both streams have 4 s; one of them ends before."""
    make(path.with_suffix(".mp4"), seconds=4, rate=48000)
    with av.open(str(path.with_suffix(".mp4"))) as film, av.open(str(path), "w") as copy:
        copies = {stream.index: copy.add_stream_from_template(stream) for stream in film.streams}
        for packet in film.demux():
            if packet.dts is None:
                continue
            if packet.stream.type != lost or packet.dts * packet.time_base < kept_s:
                packet.stream = copies[packet.stream.index]
                copy.mux(packet)
    with av.open(str(path)) as film:
        said = film.streams.get({lost: 0})[0].metadata["DURATION"].encode()
    path.write_bytes(path.read_bytes().replace(said, b"00:00:04.000000000"))
    return path


@pytest.mark.parametrize("clip_s", [4.0, 3.0, 10.0])
@pytest.mark.parametrize("lost", ["video", "audio"])
def test_share_of_what_is_cut_off_is_that_of_the_span(tmp_path, lost, clip_s):
    path = make_cut_off(tmp_path / "b.mkv", lost, 2.5)
    length_s, kept = min(clip_s, 4.0), {"video": "audio", "audio": "video"}[lost]
    for wanted in (BOTH, set()):
        facts = decode(path, clip_of(duration_s=clip_s), wanted).facts
        assert facts["duration_s"] == pytest.approx(length_s, abs=0.03)  # the priming
        assert facts[f"{lost}_decoded_share"] == pytest.approx(2.5 / length_s, abs=0.01)
        assert facts[f"{kept}_decoded_share"] == pytest.approx(1, abs=0.001)
    assert decode(path, clip_of(duration_s=2)).facts[f"{lost}_decoded_share"] == 1


@pytest.mark.parametrize("lost", ["video", "audio"])
def test_other_modality_stays_where_all_of_one_is_cut_off(tmp_path, lost):
    decoded = decode(make_cut_off(tmp_path / "b.mkv", lost, 1.0), clip_of(2, 1.5))
    assert {m: status for m, (status, _) in decoded.problems.items()} == {lost: "truncated"}
    assert decoded.facts[f"{lost}_decoded_share"] == 0
    assert len(decoded.frames if lost == "audio" else decoded.sound[0, :: RATE // 8]) == 12


def test_damaged_sound_leaves_the_whole_picture(tmp_path):
    """A header that promises more sound than there is costs the sound only."""
    path = make(tmp_path / "a.mp4", seconds=4, sound_s=4)
    probed = probe(path)
    assert probed.audio and probed.video
    content = path.read_bytes()
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(audio=0) if packet.size]
        positions = [(packet.pos, packet.size) for packet in packets[len(packets) // 4 :]]
    damaged = bytearray(content)
    for position, size in positions:
        damaged[position : position + size] = bytes(size)
    path.write_bytes(damaged)
    decoded = decode(path)
    assert decoded.facts["audio_decoded_share"] < 0.5
    assert decoded.facts["video_decoded_share"] == 1
    assert "video" not in decoded.problems and len(decoded.frames) == 32
    assert_shows(decoded.frames, np.arange(32) / 8, 25)


# -- long files


def make_long(path, seconds=150):
    """Numbered frames (modulo 256) at 5 fps with a click in each minute's 13th second."""
    frames = numbered(seconds * 5)
    sound = noise_with_click(seconds, click_s=13)
    for minute_s in range(73, seconds, 60):
        sound[:, minute_s * RATE : minute_s * RATE + RATE // 400] += 0.8
    write_mp4(path, frames, 5, sound, RATE)
    return path


def whole_of(path):
    """Decode a long file from its beginning."""
    return decode(path, clip_of(0, 200), fps=5)


@pytest.mark.parametrize("container", ["mp4", "mkv", "ts", "flv"])
@pytest.mark.parametrize("delay_s", [0.0, 0.4])
def test_sound_begins_when_the_file_does_wherever_the_clip_is(tmp_path, container, delay_s):
    path = make_long(tmp_path / "a.mp4", 120)
    path = remux(path, tmp_path / f"b.{container}", delay_s={"audio": delay_s})
    offsets = [decode(path, clip_of(s, 2.0), set()).facts["audio_offset_s"] for s in (0, 70, 80)]
    assert offsets[0] == offsets[1] == offsets[2]
    assert offsets[0] == pytest.approx(delay_s, abs=0.08)


@pytest.mark.parametrize("container", ["mp4", "mkv", "ts"])
def test_window_late_in_a_long_file_is_that_part_of_the_whole(tmp_path, container):
    path = make_long(tmp_path / "a.mp4")
    if container != "mp4":
        path = remux(path, tmp_path / f"a.{container}")
    whole = whole_of(path)
    for start_s in (0.0, 20.2, 71.0, 110.6):
        window = clip_of(start_s, 4.0)
        probed = probe(path, window)
        assert probed.video and probed.audio
        decoded = decode(path, window, fps=5)
        assert decoded.problems == {} and decoded.facts["video_decoded_share"] == 1
        assert decoded.facts["audio_decoded_share"] == 1
        first = round(start_s * 5)
        np.testing.assert_array_equal(decoded.frames, whole.frames[first : first + 20])
        place = round(start_s * RATE)
        ours = decoded.sound[0, 200:-200]
        theirs = whole.sound[0, place + 200 : place + 4 * RATE - 200]
        assert np.abs(ours - theirs).max() < 0.05 and np.corrcoef(ours, theirs)[0, 1] > 0.98
    assert not probed.video.track.whole and len(probed.video.pts_s) < 200
    assert decoded.facts["video_s"] == pytest.approx(150, abs=0.5)


@pytest.mark.parametrize("container", ["mp4", "mkv", "ts"])
def test_length_is_where_the_first_stream_ends_whatever_the_header_says(tmp_path, container):
    for seconds, sound_s in ((60, 55.0), (4, 3.0)):
        path = make(tmp_path / "a.mp4", seconds=seconds, fps=4, sound_s=sound_s)
        if container != "mp4":
            path = remux(path, tmp_path / f"a.{container}")
        assert media_length(path) == pytest.approx(sound_s, abs=0.2)


def test_file_without_picture_and_sound_has_no_length(tmp_path):
    times = [f"00:0{minute}:00,000 --> 00:0{minute}:01,000" for minute in range(3)]
    lines = [f"{place}\n{time}\na line\n" for place, time in enumerate(times, start=1)]
    (tmp_path / "a.srt").write_text("\n".join(lines))
    with pytest.raises(ClipError) as error:
        media_length(tmp_path / "a.srt")
    assert error.value.status == "unreadable" and "found subtitle" in error.value.message


def test_window_of_packets_too_large_to_keep_is_read_again(tmp_path, monkeypatch):
    path = make_long(tmp_path / "a.mp4")
    kept = decode(path, clip_of(110.6, 4.0), fps=5)
    monkeypatch.setattr("pipeline.tracks.KEPT_BYTES", 0)
    again = decode(path, clip_of(110.6, 4.0), fps=5)
    np.testing.assert_array_equal(kept.frames, again.frames)
    np.testing.assert_array_equal(kept.sound, again.sound)


def test_playlist_that_poses_as_a_clip_opens_no_other_file(tmp_path):
    make(tmp_path / "a.mp4", seconds=1)
    for content in ("#EXTM3U\n#EXTINF:1,\na.mp4\n", "ffconcat version 1.0\nfile a.mp4\n"):
        (tmp_path / "b.mp4").write_text(content)
        with pytest.raises(ClipError) as error:
            decode(tmp_path / "b.mp4")
        assert error.value.status == "unreadable"


def test_skipping_unwanted_frames_changes_none(tmp_path):
    """Every frame is wanted at 25 fps, a third at 8: those are the same."""
    encode_groups(tmp_path / "a.mp4", "libx264", {"g": "50", "bf": "3"})
    every = decode(tmp_path / "a.mp4", decoder="pyav", fps=25)
    some = decode(tmp_path / "a.mp4", decoder="pyav", fps=5)
    np.testing.assert_array_equal(some.frames, every.frames[::5])


def test_avi_with_reordered_frames_is_whole(tmp_path):
    encode_groups(tmp_path / "a.avi", "libx264", SHORT_GROUPS)
    decoded = decode(tmp_path / "a.avi")
    assert set(decoded.problems) == {"audio"} and decoded.facts["video_decoded_share"] == 1
    assert_shows(decoded.frames, np.arange(len(decoded.frames)) / 8, 25)


def test_copied_and_retitled_file_has_the_same_hash_and_another_span_has_not(tmp_path):
    path = make(tmp_path / "a.mp4", seconds=4)
    titled = remux(path, tmp_path / "b.mp4")
    hashes = [decode(p, clip_of(0, 2), set()).facts["content_hash"] for p in (path, titled)]
    assert hashes[0] == hashes[1] and len(hashes[0]) == 32
    assert decode(path, clip_of(1, 2), set()).facts["content_hash"] != hashes[0]


# -- geometry


def quarters(height, width):
    """Ten frames: red, green over blue, white."""
    frame = np.zeros((height, width, 3), dtype=np.uint8)
    frame[: height // 2, : width // 2, 0] = frame[: height // 2, width // 2 :, 1] = 255
    frame[height // 2 :, : width // 2, 2] = 255
    frame[height // 2 :, width // 2 :] = 255
    return np.repeat(frame[None], 10, axis=0)


@pytest.mark.parametrize("decoder", ["pyav", "decord"])
def test_size_of_nearest_aspect_is_taken_and_filled_or_padded(tmp_path, decoder):
    sizes = ((64, 64), (48, 96), (96, 48))
    for (height, width), expected in {(128, 256): (48, 96), (256, 144): (96, 48)}.items():
        write_mp4(tmp_path / "a.mp4", quarters(height, width), 10, None, RATE)
        for fit in ("crop", "pad"):
            decoded = decode(tmp_path / "a.mp4", sizes=sizes, fit=fit, decoder=decoder)
            assert decoded.frames.shape[1:3] == expected
            middle = decoded.frames[0, expected[0] // 4, expected[1] // 4]
            assert np.abs(middle - np.array([255, 0, 0])).max() < 30
    write_mp4(tmp_path / "b.mp4", quarters(128, 256), 10, None, RATE)
    padded = decode(tmp_path / "b.mp4", fit="pad", decoder=decoder).frames[0]
    assert (padded[:16] == 0).all() and (padded[-16:] == 0).all() and padded[24, 8, 0] > 200


# -- rates


@pytest.mark.parametrize(("from_hz", "to_hz"), [(44101, 16000), (16002, 16000), (47999, 44100)])
def test_coprime_rates_neither_drift_nor_need_a_giant_kernel(from_hz, to_hz):
    sound = noise_with_click(10, from_hz, click_s=9.9)
    resampled = resample(sound, from_hz, to_hz)
    assert resampled.shape[1] == -(-sound.shape[1] * to_hz // from_hz)
    assert click_second(resampled, to_hz) == pytest.approx(9.9, abs=0.001)


# -- real files


@pytest.mark.parametrize("name", ["0DCit2EBtjs_000030", "0nib7bMm8BA_000015", "54bz5yqN2IA_000004"])
def test_real_clips_are_ok(shared_clips, name):
    decoded = decode(shared_clips / "vggsound" / "video" / f"{name}.mp4")
    assert decoded.problems == {} and decoded.facts["decoder"] == "decord"
    duration_s = decoded.facts["duration_s"]
    assert 8 < duration_s <= 10
    assert len(decoded.frames) == int(duration_s * 8 + 0.2)
    assert decoded.sound.shape == (1, round(duration_s * RATE))
    assert decoded.frames.std() > 10 and 0.001 < decoded.sound.std() < 1


def test_frames_hidden_by_an_edit_list_are_not_shown(shared_clips):
    """Cut between keyframes: decord repeats a frame here, so PyAV decodes it."""
    path = shared_clips / "vggsound" / "video" / "NMQiKrTkl10_000039.mp4"
    probed = probe(path)
    assert probed.video and any(timing.hidden for timing in probed.video.track.timings)
    decoded = decode(path)
    assert decoded.problems == {} and decoded.facts["decoder"] == "pyav"
    with av.open(str(path)) as container:
        shown = [
            (float(frame.pts * frame.time_base), frame.to_ndarray(format="rgb24"))
            for frame in container.decode(video=0)
        ]
    times_s = np.array([pts_s for pts_s, _ in shown])
    for place in (0, 5, 40):
        instant = probed.zero_s + place / 8
        picture = shown[int(np.searchsorted(times_s, instant + 0.002, side="right")) - 1][1]
        side = min(picture.shape[:2])
        top, left = (picture.shape[0] - side) // 2, (picture.shape[1] - side) // 2
        square = picture[top : top + side, left : left + side].mean(axis=2)
        assert correlation(square, decoded.frames[place].mean(axis=2)) > 0.97


def correlation(picture, small):
    """Correlation of two grey pictures at 16 x 16."""
    parts = [
        np.asarray(Image.fromarray(image.astype(np.uint8)).resize((16, 16), Image.Resampling.BOX))
        for image in (picture, small)
    ]
    return np.corrcoef(parts[0].ravel(), parts[1].ravel())[0, 1]


@pytest.mark.parametrize("folder", ["vggsound/video", "folders/unlabelled"])
def test_both_decoders_show_the_same_pictures(shared_clips, monkeypatch, folder):
    paths = [path for path in sorted((shared_clips / folder).iterdir()) if path.is_file()][:4]
    for path in paths:
        decoded = decode(path, clip_of(2.3, 1.0), wanted={"video"})
        with monkeypatch.context() as patch:
            patch.setattr("pipeline.picture.decord_frames", lambda *arguments: None)
            other = decode(path, clip_of(2.3, 1.0), wanted={"video"})
        for ours, theirs in zip(decoded.frames, other.frames, strict=True):
            assert np.abs(ours.astype(float) - theirs).mean() < 6


def test_rotated_film_is_upright(shared_clips):
    path = shared_clips / "hard" / "mediabunny_rotate-buck-bunny.mp4"
    probed = probe(path)
    assert probed.video and probed.video.rotation % 180 == 90
    decoded = decode(path)
    assert "video" not in decoded.problems
    reader = decord.VideoReader(str(path))
    shown_s = reader.get_frame_timestamp(range(len(reader)))[:, 0]
    place = len(decoded.frames) - 1  # it starts black
    index = int(np.searchsorted(shown_s - shown_s[0], place / 8 + 0.002, side="right")) - 1
    upright = reader[index].asnumpy()
    assert upright.shape[0] > upright.shape[1]
    side = upright.shape[1]
    top = (upright.shape[0] - side) // 2
    square = upright[top : top + side].mean(axis=2)
    grey = decoded.frames[place].mean(axis=2)
    assert correlation(square, grey) > 0.95
    assert max(correlation(square, np.rot90(grey, k)) for k in (1, 2, 3)) < 0.9


def test_no_odd_file_ends_in_another_error(shared_clips):
    """Whatever is in the files, a clip has arrays that fit or a status."""
    for path in sorted((shared_clips / "hard").iterdir()):
        try:
            decoded = decode(path, clip_of(duration_s=1))
        except ClipError as error:
            assert error.status == "unreadable"
            continue
        assert all(status in STATUSES for status, _ in decoded.problems.values())
        if "video" not in decoded.problems:
            assert decoded.frames.shape[1:] == (SIZE, SIZE, 3) and len(decoded.frames)
            assert 0 < decoded.facts["video_decoded_share"] <= 1
        if "audio" not in decoded.problems:
            assert np.isfinite(decoded.sound).all()
            assert 0 <= decoded.facts["audio_decoded_share"] <= 1


@pytest.mark.parametrize(
    "matrix",
    [
        *((1, 0, 0, 1), (0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0)),
        *((-1, 0, 0, 1), (1, 0, 0, -1), (0, 1, 1, 0), (0, -1, -1, 0)),
    ],
)
def test_display_matrix_puts_every_pixel_where_it_says(matrix):
    a, b, c, d = matrix
    picture = np.arange(6).reshape(3, 2)
    shown = np.zeros((2, 3) if a == 0 else (3, 2), dtype=int)
    height, width = shown.shape
    for y, x in np.ndindex(picture.shape):
        column, row = a * x + c * y, b * x + d * y  # from the other side where negative
        column += (width - 1) * (a + c < 0)
        row += (height - 1) * (b + d < 0)
        shown[row, column] = picture[y, x]
    data = np.array([a, b, 0, c, d, 0, 0, 0, 1], dtype="<i4") * 65536
    rotation, mirrored = orientation(data.tobytes())
    ours = picture[:, ::-1] if mirrored else picture
    np.testing.assert_array_equal(np.rot90(ours, rotation // 90), shown)


def test_sound_whose_rate_changes_goes_on_at_its_speed(tmp_path):
    """Two mp3 recordings of a second of 440 Hz, at 44.1 and at 22.05 kHz, one behind the other."""
    content = b""
    for rate in (44100, 22050):
        with av.open(str(tmp_path / "part.mp3"), "w") as container:
            stream = container.add_stream("libmp3lame", rate=rate, layout="mono")
            tone = 0.5 * np.sin(np.arange(2 * rate) * 2 * np.pi * 440 / rate)[None]
            frame = av.AudioFrame.from_ndarray(tone.astype(np.float32), "fltp", "mono")
            frame.sample_rate = rate
            container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        content += (tmp_path / "part.mp3").read_bytes()
    (tmp_path / "a.mp3").write_bytes(content)
    sound = decode(tmp_path / "a.mp3", clip_of(0, 3.5)).sound[0]
    for start_s in (0.5, 2.6):
        piece = sound[round(start_s * RATE) :][: RATE // 2]
        pitch_hz = np.argmax(np.abs(np.fft.rfft(piece))) * 2
        assert pitch_hz == pytest.approx(440, abs=4)
