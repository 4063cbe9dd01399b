"""Calibration measures clips as a cell would work on them, advises, and writes nothing."""

import os
from dataclasses import asdict, replace

import pytest

from pipeline.calibrate import (
    MIN_CLIPS,
    Calibration,
    ClipFigures,
    _conclude,
    calibrate,
    calibration_text,
)
from pipeline.config import EncodeConfig
from pipeline.settings import ConfigError, load
from pipeline.sources import open_source
from tools.bouncing import ClipSettings
from tools.make_clips import make_clips

NUM_CLIPS = 6


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    make_clips(folder, ClipSettings(seconds=1, size=32), NUM_CLIPS)
    return folder


def settings(*overrides):
    return load(EncodeConfig, None, ["video.size=64", *overrides])


def test_clips_are_measured_and_nothing_is_written(clips, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    threads = os.environ.get("OMP_NUM_THREADS")
    (clips / "broken.mp4").write_bytes(b"no film")
    before = sorted(clips.iterdir())
    try:
        config = settings("encoder_cpus=2", "window_mb=1", "video.batch=3")
        found = calibrate(open_source(str(clips), config), config)
    finally:
        (clips / "broken.mp4").unlink()
    assert found.num_clips == NUM_CLIPS and found.failed == {"unreadable": 1}
    assert found.media_s == pytest.approx(1, abs=0.1)
    assert set(found.encode_clips_per_s) == {"video", "audio", "text", "all"}
    assert min([found.decode_clips_per_s, *found.encode_clips_per_s.values()]) > 0
    rates = found.encode_clips_per_s
    assert 1 / rates["all"] == pytest.approx(1 / rates["video"] + 1 / rates["audio"])
    # 8 frames of 64², 1 s of 16 kHz float32; clips may be a frame longer or shorter.
    assert found.clip_bytes == pytest.approx(8 * 64 * 64 * 3 + 4 * 16000, rel=0.15)
    assert found.window_clips == 1_000_000 // found.clip_bytes
    assert not list(tmp_path.iterdir()) and len(before) == len(list(clips.iterdir())) + 1
    assert os.environ.get("OMP_NUM_THREADS") == threads


def test_one_column_is_measured_alone(clips):
    config = settings("columns=[audio]")
    found = calibrate(open_source(str(clips), config), config, num_clips=MIN_CLIPS)
    assert found.num_clips == MIN_CLIPS
    assert set(found.encode_clips_per_s) == {"audio", "all"}


def test_too_few_clips_are_an_error_that_says_why(tmp_path):
    for number in range(5):
        (tmp_path / f"{number}.mp4").write_bytes(b"no film")
    config = settings()
    with pytest.raises(ConfigError, match=r"0 clips of .*5 unreadable; .*\.mp4.*expected 4"):
        calibrate(open_source(str(tmp_path), config), config)


def test_captions_alone_need_no_calibration(clips):
    config = settings("columns=[text]")
    with pytest.raises(ConfigError, match="expected video or audio"):
        calibrate(open_source(str(clips), config), config)


def conclude(monkeypatch, cpus, decode_s, encode_s, **changes) -> Calibration:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cpus)))
    clips = [ClipFigures(seconds, encode_s, 10**7, 10.0) for seconds in decode_s]
    return _conclude(clips, {}, replace(EncodeConfig(columns=tuple(encode_s)), **changes))


def test_decoders_are_advised_by_the_rates_and_the_machine(monkeypatch):
    encode_s = {"video": 0.125, "audio": 0.125, "text": 99.0}  # captions have no decoders
    found = conclude(monkeypatch, 8, [0.5, 1.5], encode_s)
    assert (found.decode_clips_per_s, found.encode_clips_per_s["all"]) == (1.0, 4.0)
    assert found.decode_cv == 0.5
    assert (found.decoders_needed, found.decoders, found.bound) == (4, 4, "encoding")
    assert found.clips_per_s == 4.0
    assert "decoders=4" in calibration_text(found)

    capped = conclude(monkeypatch, 4, [0.5, 1.5], encode_s, encoder_cpus=2, window_mb=30)
    assert (capped.decoders_needed, capped.decoders, capped.bound) == (4, 2, "decoding")
    assert capped.clips_per_s == 2.0 and capped.window_clips == 3
    text = calibration_text(capped)
    assert "4 would keep an encoder busy, but this machine has 4 CPUs" in text
    assert "raise window_mb to 40" in text
    assert asdict(capped)["cpus"] == 4
