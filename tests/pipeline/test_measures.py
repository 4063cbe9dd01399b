"""Each measure has the value that its definition gives for pictures and sounds made by hand."""

import numpy as np
import pytest

from pipeline.measures import picture_measures, sound_measures

RATE = 48000


def film(levels):
    """Grey frames of these levels, uint8 [T, 32, 48, 3]."""
    return np.tile(np.uint8(levels)[:, None, None, None], (1, 32, 48, 3))


def test_motion_is_the_mean_step_and_white_is_one():
    assert picture_measures(film([0, 255, 0, 255]), 8)["motion"] == pytest.approx(1)
    assert picture_measures(film([10, 10, 61]), 8)["motion"] == pytest.approx(51 / 255 / 2)


def test_single_frame_has_no_motion_to_measure():
    measures = picture_measures(film([10]), 8)
    assert measures["motion"] is None and measures["frozen_s"] == 0


@pytest.mark.parametrize(
    ("levels", "expected"),
    [([9] * 16, 2.0), (list(range(16)), 0.0), ([1, 2, 3, 3, 3, 3, 4, 4, 5], 0.5)],
)
def test_frozen_is_the_longest_run_of_one_picture(levels, expected):
    assert picture_measures(film(levels), 8)["frozen_s"] == expected


def test_black_counts_true_black_and_black_of_a_wrong_range_but_no_dark_picture():
    assert picture_measures(film([0, 16, 40, 200]), 8)["black_share"] == 0.5
    red = np.zeros((1, 32, 48, 3), dtype=np.uint8)
    red[..., 0] = 255
    assert picture_measures(red, 8)["black_share"] == 0


@pytest.mark.parametrize("amplitude", [1.0, 0.1, 0.001])
def test_loudness_of_a_sine_is_3_db_below_its_peak(amplitude):
    sine = amplitude * np.sin(np.arange(RATE) * 2 * np.pi * 100 / RATE).astype(np.float32)
    expected = 20 * np.log10(amplitude) - 3.01
    assert sound_measures(sine, RATE)["loudness_dbfs"] == pytest.approx(expected, abs=0.01)


def test_silence_is_at_the_floor_and_all_silent():
    measures = sound_measures(np.zeros(RATE, dtype=np.float32), RATE)
    assert measures == {"loudness_dbfs": -120, "silent_share": 1}
    assert sound_measures(np.zeros(0, dtype=np.float32), RATE)["silent_share"] == 1


def test_silent_share_counts_tenths_of_a_second():
    sound = np.zeros(RATE, dtype=np.float32)
    sound[: RATE * 3 // 10] = 0.1
    sound[RATE * 3 // 10 :] = 0.0005  # -66 dBFS
    assert sound_measures(sound, RATE)["silent_share"] == pytest.approx(0.7)
