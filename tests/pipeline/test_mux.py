"""What is written is what a player shows and sounds, at the same instant."""

import subprocess
import sys

import av
import numpy as np
import pytest

from pipeline.mux import write_mp4

SAMPLE_RATE = 16000


def red_square(num_frames=32, height=64, width=64):
    frames = np.full((num_frames, height, width, 3), (30, 200, 90), dtype=np.uint8)
    frames[:, 16:48, 16:48] = (255, 0, 0)
    return frames


def clicks(at, channels=1, num_samples=32200, sample_rate=SAMPLE_RATE):
    sound = np.zeros((channels, num_samples), dtype=np.float32)
    for sample in at:
        sound[:, sample : sample + 40] = 0.8 * np.sin(np.arange(40) * 0.9)
    return sound


def decoded_sound(path):
    """Return (samples, second of the first one), by timestamps."""
    with av.open(str(path)) as container:
        frames = list(container.decode(audio=0))
    sound = np.concatenate([frame.to_ndarray() for frame in frames], axis=1)
    return sound, frames[0].time


def test_red_square_in_is_red_square_out(tmp_path):
    write_mp4(tmp_path / "a.mp4", red_square(), 16, None, SAMPLE_RATE)
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert not container.streams.audio
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == 32
    for frame in (frames[0], frames[-1]):
        np.testing.assert_allclose(frame[32, 32], (255, 0, 0), atol=4)
        np.testing.assert_allclose(frame[4, 4], (30, 200, 90), atol=4)


@pytest.mark.parametrize("sample_rate", [8000, 16000, 44100, 48000])
def test_click_is_decoded_at_its_second(tmp_path, sample_rate):
    at = [sample_rate // 4, sample_rate, sample_rate * 15 // 8]
    sound = clicks(at, num_samples=2 * sample_rate + 200, sample_rate=sample_rate)
    write_mp4(tmp_path / "a.mp4", red_square(), 16, sound[0], sample_rate)
    decoded, start_s = decoded_sound(tmp_path / "a.mp4")
    assert start_s == 0
    for sample in at:
        reach = sample_rate // 20
        window = slice(sample - reach, sample + reach)
        delay = np.abs(decoded[0, window]).argmax() - np.abs(sound[0, window]).argmax()
        assert abs(delay) <= 0.002 * sample_rate


def test_stereo_keeps_its_sides_and_mono_forms_agree(tmp_path):
    sound = clicks([8000], channels=2)
    sound[1] = 0
    write_mp4(tmp_path / "stereo.mp4", red_square(), 16, sound, SAMPLE_RATE)
    decoded, _ = decoded_sound(tmp_path / "stereo.mp4")
    assert np.abs(decoded[0]).max() > 0.5 > 20 * np.abs(decoded[1]).max()
    write_mp4(tmp_path / "one.mp4", red_square(), 16, sound[0], SAMPLE_RATE)
    write_mp4(tmp_path / "two.mp4", red_square(), 16, sound[:1], SAMPLE_RATE)
    assert (tmp_path / "one.mp4").read_bytes() == (tmp_path / "two.mp4").read_bytes()


@pytest.mark.parametrize("fps", [16, 23.976, 30000 / 1001, 12.5])
def test_frames_are_shown_at_their_instants(tmp_path, fps):
    write_mp4(tmp_path / "a.mp4", red_square(), fps, None, SAMPLE_RATE)
    with av.open(str(tmp_path / "a.mp4")) as container:
        times = [frame.time for frame in container.decode(video=0)]
        video = container.streams.video[0]
        length_s = float(video.duration * video.time_base)
    np.testing.assert_allclose(times, np.arange(32) / fps, atol=1e-4)
    assert length_s == pytest.approx(32 / fps, abs=1e-3)


def test_same_input_gives_same_bytes_without_a_date(tmp_path):
    for name in ("a.mp4", "b.mp4"):
        write_mp4(tmp_path / name, red_square(), 16, clicks([8000]), SAMPLE_RATE)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert "creation_time" not in container.metadata


def test_index_comes_before_the_media(tmp_path):
    write_mp4(tmp_path / "a.mp4", red_square(), 16, clicks([8000]), SAMPLE_RATE)
    data = (tmp_path / "a.mp4").read_bytes()
    assert 0 < data.find(b"moov") < data.find(b"mdat")


def test_odd_size_gains_a_copy_of_its_edge(tmp_path):
    write_mp4(tmp_path / "a.mp4", red_square(3, 63, 61), 16, None, SAMPLE_RATE)
    with av.open(str(tmp_path / "a.mp4")) as container:
        frame = next(container.decode(video=0)).to_ndarray(format="rgb24")
    assert frame.shape == (64, 62, 3)
    np.testing.assert_allclose(frame[-1, -1], (30, 200, 90), atol=4)


def test_sound_shorter_than_one_aac_frame_is_written(tmp_path):
    write_mp4(tmp_path / "a.mp4", red_square(1), 16, clicks([0], num_samples=100), SAMPLE_RATE)
    decoded, start_s = decoded_sound(tmp_path / "a.mp4")
    assert start_s == 0
    assert np.abs(decoded[0, :100]).max() > 0.3


@pytest.mark.parametrize(
    ("frames", "sound", "sample_rate", "message"),
    [
        (red_square().astype(np.float32), None, SAMPLE_RATE, "expected uint8"),
        (red_square()[0], None, SAMPLE_RATE, "expected uint8"),
        (red_square(0), None, SAMPLE_RATE, "expected uint8"),
        (red_square(), np.full(100, np.nan, dtype=np.float32), SAMPLE_RATE, "NaN"),
        (red_square(), clicks([0], channels=3), SAMPLE_RATE, "expected \\[N\\]"),
        (red_square(), clicks([], num_samples=0), SAMPLE_RATE, "expected \\[N\\]"),
        (red_square(), clicks([0]), 17000, "17000 Hz"),
    ],
)
def test_what_can_not_be_written_is_said_and_leaves_no_file(
    tmp_path, frames, sound, sample_rate, message
):
    with pytest.raises(ValueError, match=message):
        write_mp4(tmp_path / "a.mp4", frames, 16, sound, sample_rate)
    assert not list(tmp_path.iterdir())


def test_full_disk_is_an_oserror_and_keeps_the_old_file(tmp_path):
    """A limit on the size of files stands for the full disk."""
    program = """
import resource, signal, sys
import numpy as np
from pathlib import Path
from pipeline.mux import write_mp4
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
noise = np.random.default_rng(0).integers(0, 255, (30, 64, 64, 3), dtype=np.uint8)
try:
    write_mp4(Path(sys.argv[1]), noise, 16, np.zeros(16000, np.float32), 16000)
except OSError:
    sys.exit(7)
"""
    (tmp_path / "a.mp4").write_bytes(b"old")
    command = [sys.executable, "-c", program, str(tmp_path / "a.mp4")]
    assert subprocess.run(command, check=False).returncode == 7
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]
    assert (tmp_path / "a.mp4").read_bytes() == b"old"
