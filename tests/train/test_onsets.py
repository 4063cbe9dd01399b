"""The onset detector finds known impacts, also behind a spectrogram and Griffin-Lim."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.codecs.builtin import LogmelAudio
from pipeline.decode import read_sound
from pipeline.mux import write_mp4
from tools.bouncing import ClipSettings, draw_sound, draw_world
from train.metrics.onsets import OnsetScore, onset_f1, onset_times, pool

SETTINGS = ClipSettings()
NUM_CLIPS = 24


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Return (impact seconds, sound behind AAC) of some clips."""
    path = tmp_path_factory.mktemp("onsets") / "clip.mp4"
    made = []
    for index in range(NUM_CLIPS):
        bodies = draw_world(np.random.default_rng([7, index]), SETTINGS)
        picture = np.zeros((32, 16, 16, 3), dtype=np.uint8)
        write_mp4(path, picture, SETTINGS.fps, draw_sound(bodies, SETTINGS), SETTINGS.sample_rate)
        times = [time_s for body in bodies for time_s, _ in body.impacts]
        made.append((np.sort(times), read_sound(path, SETTINGS.sample_rate)))
    return made


def pooled_f1(clips, sounds):
    found = [onset_times(sound, SETTINGS.sample_rate) for sound in sounds]
    return pool(onset_f1(times, true) for times, (true, _) in zip(found, clips, strict=True)).f1


def test_onsets_of_the_clips_own_sound_are_the_impacts(clips):
    assert pooled_f1(clips, [sound for _, sound in clips]) > 0.95


def test_onsets_survive_mel_and_griffin_lim(clips):
    codec = LogmelAudio({"sample_rate": SETTINGS.sample_rate})
    latents = [codec.encode([sound[None]])[0].astype(np.float16) for _, sound in clips]
    assert pooled_f1(clips, [codec.decode([latent])[0][0] for latent in latents]) > 0.93


def test_onsets_survive_noisy_latents(clips):
    codec = LogmelAudio({"sample_rate": SETTINGS.sample_rate})
    latents = [codec.encode([sound[None]])[0] for _, sound in clips]
    spread = np.concatenate(latents).std(axis=(0, 1))
    rng = np.random.default_rng(0)
    noisy = [latent + 0.3 * spread * rng.standard_normal(latent.shape) for latent in latents]
    assert pooled_f1(clips, [codec.decode([latent])[0][0] for latent in noisy]) > 0.9


def test_sound_of_other_clips_scores_low(clips):
    sounds = [sound for _, sound in clips]
    assert pooled_f1(clips, [*sounds[1:], sounds[0]]) < 0.4


@pytest.mark.parametrize("sample_rate", [8000, 16000, 22050, 44100, 48000])
@pytest.mark.parametrize("level", [0.01, 0.9])
def test_tones_are_found_at_their_second_at_any_rate_and_level(sample_rate, level):
    starts = np.array([0.31, 0.9, 1.25, 1.6])
    seconds = np.arange(2 * sample_rate) / sample_rate
    since_s = np.maximum(seconds[:, None] - starts, 0)
    sound = level * (np.exp(-since_s / 0.07) * np.sin(2 * np.pi * 500 * since_s)).sum(axis=1)
    found = onset_times(sound.astype(np.float32), sample_rate)
    np.testing.assert_allclose(found, starts, atol=0.015)


def test_silence_hum_and_nothing_have_no_onset():
    hum = 0.3 * np.sin(2 * np.pi * 200 * np.arange(16000) / 16000)
    for sound in (np.zeros(16000), hum, 1e-5 * hum, np.zeros(0), np.zeros(1)):
        assert len(onset_times(sound.astype(np.float32), 16000)) == 0


@pytest.mark.parametrize("sound", [np.zeros((2, 100)), np.full(100, np.nan)])
def test_stereo_and_nan_are_refused(sound):
    with pytest.raises(ValueError, match="finite values"):
        onset_times(sound.astype(np.float32), 16000)


short_lists = st.lists(st.integers(0, 60), max_size=5).map(lambda units: np.array(units) / 50)


@given(short_lists, short_lists)
def test_no_other_matching_has_more_pairs(predicted, true):
    tolerance_s = 0.0601

    def most(pairs):
        few, many = sorted(pairs, key=len)
        return max(
            sum(abs(a - b) <= tolerance_s for a, b in zip(few, chosen, strict=True))
            for chosen in itertools.permutations(many, len(few))
        )

    score = onset_f1(predicted, true, tolerance_s)
    assert score == OnsetScore(most([predicted, true]), len(predicted), len(true))


def test_scores_are_pooled_by_counts():
    score = pool([OnsetScore(1, 1, 3), OnsetScore(2, 5, 3), OnsetScore(0, 0, 0)])
    assert score == OnsetScore(3, 6, 6)
    assert (score.precision, score.recall, score.f1) == (0.5, 0.5, 0.5)
    assert OnsetScore(0, 0, 0).f1 == 0


def test_detector_needs_numpy_only():
    program = (
        "import sys, train.metrics.onsets; "
        "print([name for name in ('torch', 'torchaudio', 'scipy', 'av') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert done.stdout.strip() == b"[]"
