"""The one place that imports torchaudio: resampling, mel spectrogram, Griffin-Lim.

The torchaudio wheel carries a compiled part linked against CUDA, which fails to load beside a
CPU-only torch. Everything used here is plain Python in torchaudio, so in that case a stand-in
says "no compiled part" and the rest works.
"""

from __future__ import annotations

import functools
import math
import sys
import types
from fractions import Fraction
from typing import Any

import numpy as np
import torch


def _import_torchaudio() -> Any:
    try:
        import torchaudio
    except OSError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchaudio"]:
            del sys.modules[name]
        stand_in: Any = types.ModuleType("torchaudio._extension")
        stand_in._IS_TORCHAUDIO_EXT_AVAILABLE = False
        stand_in._IS_ALIGN_AVAILABLE = False
        stand_in.fail_if_no_align = lambda function: function
        sys.modules["torchaudio._extension"] = stand_in
        import torchaudio
    return torchaudio


torchaudio = _import_torchaudio()

# 16 MB of kernel, some 100 MB while it is made.
MAX_PHASES = 2000


def resample(sound: np.ndarray, from_hz: int, to_hz: int) -> np.ndarray:
    """Band-limited resampling (windowed sinc, torchaudio's Kaiser "best" setting).

    Args:
        sound: float32 [channels, N].
        from_hz: rate of ``sound``.
        to_hz: wanted rate.

    Returns:
        float32 [channels, ceil(N * to_hz / from_hz)].

    The filter holds a kernel for each phase of the ratio: 44,101 -> 16,000 Hz would take over
    1 GB. A ratio of more than ``MAX_PHASES`` phases is replaced by the nearest one of fewer, at
    most 2.5e-4 away (2.5 ms in 10 s), and what is left is mended by leaving out or repeating a
    sample now and then, so that no sample is off by more than half its length.
    """
    if from_hz == to_hz or sound.shape[1] == 0:
        return sound
    exact = Fraction(to_hz, from_hz)
    ratio = exact.limit_denominator(MAX_PHASES)
    resampler = _resampler(ratio.denominator, ratio.numerator)
    resampled = resampler(torch.from_numpy(sound)).numpy() if ratio != 1 else sound
    if ratio == exact:
        return resampled
    places = np.rint(np.arange(math.ceil(sound.shape[1] * exact)) * float(ratio / exact))
    return resampled[:, np.minimum(places.astype(np.int64), resampled.shape[1] - 1)]


@functools.lru_cache(maxsize=4)
def _resampler(from_hz: int, to_hz: int) -> Any:
    return torchaudio.transforms.Resample(
        from_hz,
        to_hz,
        lowpass_filter_width=64,
        rolloff=0.9475937167399596,
        resampling_method="sinc_interp_kaiser",
        beta=14.769656459379492,
    )


@functools.lru_cache(maxsize=8)
def mel_spectrogram(
    sample_rate: int, n_fft: int, hop: int, num_mels: int, fmin_hz: float, fmax_hz: float
) -> Any:
    """Return a module: float32 [N] -> magnitude mel [num_mels, 1 + N // hop] (Slaney filters)."""
    return torchaudio.transforms.MelSpectrogram(
        sample_rate=sample_rate,
        n_fft=n_fft,
        hop_length=hop,
        f_min=fmin_hz,
        f_max=fmax_hz,
        n_mels=num_mels,
        power=1.0,
        norm="slaney",
        mel_scale="slaney",
    )


def griffin_lim(magnitude: torch.Tensor, n_fft: int, hop: int, num_samples: int) -> torch.Tensor:
    """Estimate a waveform from a magnitude spectrogram (Griffin & Lim 1984, 32 fast iterations).

    Args:
        magnitude: float32 [n_fft // 2 + 1, frames].
        n_fft: transform size, with a Hann window of that length.
        hop: samples between frames.
        num_samples: length of the result.

    Returns:
        float32 [num_samples]; the same input gives the same output.
    """
    window = torch.hann_window(n_fft)
    return torchaudio.functional.griffinlim(
        magnitude,
        window,
        n_fft,
        hop,
        n_fft,
        power=1.0,
        n_iter=32,
        momentum=0.99,
        length=num_samples,
        rand_init=False,
    )
