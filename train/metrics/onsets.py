"""When does something sound, and do two lists of such instants agree? Needs numpy only.

The detector follows the sum of what rises over frequency bands (spectral flux; Bello et al.
2005, "A Tutorial on Onset Detection in Music Signals"). Energies are compressed by a fourth
root: a square root misses a third of the onsets when a sound comes from noisy latents, and
decibels hear every rustle in the silence.

Shapes: F frames of the spectrum, K bands.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

# Chosen on 160 clips of tools.make_clips (±60 ms): F1 0.998 on their own sound, 0.997 behind a
# 64-band mel and Griffin-Lim, 0.97 with noise of 0.3 standard deviations on the log-mel latents.
WINDOW_S = 0.064
HOP_S = 0.005
RISE_S = 0.030  # what rises is measured over this time
NUM_BANDS = 24
LOWEST_HZ, HIGHEST_HZ = 100.0, 8000.0
COMPRESSION = 0.25  # power of the band energies
MIN_GAP_S = 0.050  # the highest rise within this distance counts
MIN_SHARE = 0.27  # of the clip's highest rise
MIN_FLUX = 0.1  # about the start of a tone at -55 dB of full scale; silence has no onset


@dataclass(frozen=True)
class OnsetScore:
    """How many onsets agree; scores of several clips are pooled by ``pool``."""

    num_matched: int
    num_predicted: int
    num_true: int

    @property
    def precision(self) -> float:
        """Share of predicted onsets that are true, 0 where none was predicted."""
        return self.num_matched / max(self.num_predicted, 1)

    @property
    def recall(self) -> float:
        """Share of true onsets that were predicted, 0 where there is none."""
        return self.num_matched / max(self.num_true, 1)

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall, 0 where both lists are empty."""
        return 2 * self.num_matched / max(self.num_predicted + self.num_true, 1)


def onset_times(sound: np.ndarray, sample_rate: int) -> np.ndarray:
    """Find the instants at which something begins to sound.

    Args:
        sound: float [N], full scale is 1.
        sample_rate: in Hz.

    Returns:
        float64 [onsets], seconds from the first sample, ascending, ``MIN_GAP_S`` apart or more.
        None lies in the first or last half window (32 ms).

    Raises:
        ValueError: the sound is not one-dimensional or not finite.
    """
    if sound.ndim != 1 or not np.isfinite(sound).all():
        raise ValueError(f"sound is {sound.shape}, expected finite values [N]; mix it to mono")
    if len(sound) <= round(WINDOW_S * sample_rate):
        return np.zeros(0)
    flux = spectral_flux(band_energies(sound, sample_rate))
    reach = round(MIN_GAP_S / HOP_S)
    around = np.lib.stride_tricks.sliding_window_view(np.pad(flux, reach), 2 * reach + 1)
    heard = flux > max(MIN_SHARE * flux.max(), MIN_FLUX)
    peaks = np.flatnonzero(heard & (flux == around.max(axis=1)))
    # Equal neighbours are one plateau: keep its first frame.
    first = np.diff(peaks, prepend=-reach - 1) > reach
    return peaks[first] * HOP_S + WINDOW_S / 2


def band_energies(sound: np.ndarray, sample_rate: int) -> np.ndarray:
    """Return the energy in bands of equal musical width, float32 [F, K].

    Frame k is centred at k hops plus half a window. No frame reaches beyond the sound, whose
    first and last sample would be clicks, and so onsets.
    """
    size = round(WINDOW_S * sample_rate)
    window = np.hanning(size).astype(np.float32)
    starts_s = np.arange(0, (len(sound) - size) / sample_rate, HOP_S)
    starts = np.round(starts_s * sample_rate).astype(int)
    frames = np.lib.stride_tricks.sliding_window_view(sound.astype(np.float32), size)[starts]
    frames = frames * window
    # Divided such that a sine of amplitude 1 has about energy 1, whatever the window's length.
    energy = np.abs(np.fft.rfft(frames)) ** 2 / np.float32(window.sum() / 2) ** 2
    frequency_hz = np.fft.rfftfreq(size, 1 / sample_rate)
    edges_hz = np.geomspace(LOWEST_HZ, min(HIGHEST_HZ, sample_rate / 2), NUM_BANDS + 1)[1:-1]
    band = np.searchsorted(edges_hz, frequency_hz, side="right")
    member = band[:, None] == np.arange(NUM_BANDS)
    return energy @ (member & (frequency_hz <= HIGHEST_HZ)[:, None]).astype(np.float32)


def spectral_flux(energy: np.ndarray) -> np.ndarray:
    """Return how much compressed energy [F, K] rose within ``RISE_S``, summed over bands, [F].

    The rise that ends at frame k is kept at k: its peak lies 1 ms before an onset (median over
    the clips above), because a window hears an onset half its length ahead.
    """
    lag = round(RISE_S / HOP_S)
    # What sounds in the first frame already, such as a noise floor, did not begin there.
    level = np.pad(energy**COMPRESSION, ((lag, 0), (0, 0)), mode="edge")
    return np.maximum(level[lag:] - level[:-lag], 0).sum(axis=1)


def onset_f1(predicted_s: np.ndarray, true_s: np.ndarray, tolerance_s: float = 0.06) -> OnsetScore:
    """Match two lists of onsets one to one, as many as lie within the tolerance.

    Args:
        predicted_s: float [P], seconds in any order.
        true_s: float [Q], seconds in any order.
        tolerance_s: largest distance of a matched pair.
    """
    predicted, true = np.sort(predicted_s).tolist(), np.sort(true_s).tolist()
    matched = i = j = 0
    # The earlier of two onsets that are too far apart can match no later one, so that taking
    # the first pair that fits never costs a match.
    while i < len(predicted) and j < len(true):
        if abs(predicted[i] - true[j]) <= tolerance_s:
            matched, i, j = matched + 1, i + 1, j + 1
        elif predicted[i] < true[j]:
            i += 1
        else:
            j += 1
    return OnsetScore(matched, len(predicted), len(true))


def pool(scores: Iterable[OnsetScore]) -> OnsetScore:
    """Add up the counts of many clips, so that every onset weighs the same (micro average)."""
    listed = list(scores)
    return OnsetScore(
        sum(score.num_matched for score in listed),
        sum(score.num_predicted for score in listed),
        sum(score.num_true for score in listed),
    )
