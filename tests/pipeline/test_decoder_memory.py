"""A decoder decodes a day's clips in bounded memory, and one of 1080p in 400 MB."""

import multiprocessing
import re
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import psutil
import pytest

from pipeline.mux import write_mp4

# What a Python process may gain from allocator noise; a leak of one frame a clip would be 12 MB.
MAX_GROWTH_BYTES = 20e6
MAX_PEAK_BYTES = 400e6
NUM_CLIPS = 500


def in_child(function, *arguments):
    """Call a function in a fresh process, whose memory no other test has used."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply_async(function, arguments).get(timeout=280)


def decode(path, decoder, **video):
    from pipeline.config import EncodeConfig, VideoSettings, decode_settings
    from pipeline.decode import decode_clip
    from pipeline.media import Clip

    settings = decode_settings(EncodeConfig(video=VideoSettings(decoder=decoder, **video)))
    clip = Clip(key="a", uri=path.name, start_s=0.0, duration_s=10.0)
    return decode_clip(path, clip, settings, {"video", "audio"})


def footprints(path):
    """Decode with both decoders in turn; return (RSS bytes, open files) after 50 and after all."""
    process, found = psutil.Process(), []
    for number in range(1, NUM_CLIPS + 1):
        decoder = ("decord", "pyav")[number % 2]
        decoded = decode(path, decoder, size=128)
        assert not decoded.problems and decoded.facts["decoder"] == decoder
        if number in (50, NUM_CLIPS):
            found.append((process.memory_info().rss, process.num_fds()))
    return found


def test_memory_and_open_files_stay_bounded_over_many_clips(tmp_path):
    frames = np.random.default_rng(0).integers(0, 255, size=(30, 8, 8, 3), dtype=np.uint8)
    frames = frames.repeat(16, axis=1).repeat(16, axis=2)
    sound = np.random.default_rng(0).uniform(-0.5, 0.5, size=round(1.2 * 44100))
    write_mp4(tmp_path / "a.mp4", frames, 25, sound, 44100)
    (early_bytes, early_files), (late_bytes, late_files) = in_child(footprints, tmp_path / "a.mp4")
    print(f"RSS {early_bytes / 1e6:.0f} MB after 50 clips, {late_bytes / 1e6:.0f} MB after all")
    assert late_bytes - early_bytes < MAX_GROWTH_BYTES
    assert late_files <= early_files


def write_full_hd(path, seconds=10):
    """A 1080p film with a moving edge and quick encoding, sound like any clip's."""
    rate = Fraction(30)
    with av.open(str(path), "w") as film:
        picture = film.add_stream("libx264", rate=rate, options={"preset": "ultrafast"})
        picture.width, picture.height, picture.pix_fmt = 1920, 1080, "yuv420p"
        sound = film.add_stream("aac", rate=44100, layout="stereo")
        noise = np.random.default_rng(0).uniform(-0.5, 0.5, size=(2, seconds * 44100))
        samples = av.AudioFrame.from_ndarray(noise.astype(np.float32), "fltp", layout="stereo")
        samples.sample_rate, samples.pts = 44100, 0
        film.mux(sound.encode(samples))
        frame = av.VideoFrame(1920, 1080, "yuv420p")
        for number in range(round(seconds * rate)):
            frame.make_writable()
            for plane in frame.planes:
                rows = np.frombuffer(plane, dtype=np.uint8).reshape(plane.height, plane.line_size)
                rows[:] = 100
                rows[:, : number * plane.width // 300] = 180
            frame.pts = number
            film.mux(picture.encode(frame))
        film.mux(picture.encode(None))
        film.mux(sound.encode(None))


def peak_bytes(path, decoder):
    decoded = decode(path, decoder)
    assert not decoded.problems and len(decoded.frames) == 80
    # Not getrusage's: a new process takes over the peak of the one that started it.
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])


@pytest.mark.parametrize("decoder", ["pyav", "decord"])
def test_clip_of_1080p_fits_a_small_decoder(tmp_path_factory, decoder):
    path = tmp_path_factory.getbasetemp() / "1080p.mp4"
    if not path.exists():
        write_full_hd(path)
    peak = in_child(peak_bytes, path, decoder)
    print(f"peak RSS with {decoder}: {peak / 1e6:.0f} MB")
    assert peak < MAX_PEAK_BYTES
