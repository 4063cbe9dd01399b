"""What can be measured of decoded frames and sound: motion, freezes, darkness, loudness.

Numpy only. Frames are uint8 [T, H, W, 3] RGB; sound is float32 [N] at the rate of the file, the
average of its channels, so that the figures do not depend on the settings of the sound's column.
"""

from __future__ import annotations

import numpy as np

# Every 4th pixel of both axes is enough: 2 ms for 80 frames of 256 x 256, 30 ms for all pixels.
PIXEL_STEP = 4
# Frames that differ by less (of 1.0) show the same picture: an eighth of one grey level.
SAME_PICTURE = 0.0005
# Mean luma of a black frame: limited-range black shown as if full range is 16 / 255 = 0.063.
BLACK_LUMA = 0.07
LUMA_WEIGHTS = np.array([0.2126, 0.7152, 0.0722])  # BT.709
SILENCE_DBFS = -60.0
FLOOR_DBFS = -120.0
PIECE_S = 0.1


def picture_measures(frames: np.ndarray, fps: float) -> dict[str, float | None]:
    """Return ``motion`` (None of a single frame), ``frozen_s`` and ``black_share``."""
    pixels = frames[:, ::PIXEL_STEP, ::PIXEL_STEP].reshape(len(frames), -1)
    steps = frame_steps(pixels)
    return {
        "motion": float(steps.mean()) if len(steps) else None,
        "frozen_s": frozen_s(steps, fps),
        "black_share": black_share(pixels),
    }


def sound_measures(mono: np.ndarray, rate_hz: int) -> dict[str, float]:
    """Return ``loudness_dbfs`` and ``silent_share`` of mono sound [N]."""
    return {"loudness_dbfs": loudness_dbfs(mono), "silent_share": silent_share(mono, rate_hz)}


def frame_steps(pixels: np.ndarray) -> np.ndarray:
    """Return the mean absolute difference of successive frames, float64 [T - 1] in [0, 1].

    Args:
        pixels: uint8 [T, n]. All in uint8 but the sums: 0.4 ms, 5 ms by way of int16.
    """
    steps = np.maximum(pixels[1:], pixels[:-1])
    steps -= np.minimum(pixels[1:], pixels[:-1])
    return steps.sum(axis=1, dtype=np.uint32) / (255 * pixels.shape[1])


def frozen_s(steps: np.ndarray, fps: float) -> float:
    """Return for how long the same picture is shown at most, in seconds; 0 if it never stays.

    Args:
        steps: see ``frame_steps``.
        fps: output frames a second.
    """
    changes = np.flatnonzero(np.concatenate([[True], steps >= SAME_PICTURE, [True]]))
    longest = int(np.diff(changes).max())
    return longest / fps if longest > 1 else 0.0


def black_share(pixels: np.ndarray) -> float:
    """Return the share of frames, uint8 [T, 3 n] RGB, whose mean luma is that of black."""
    count = pixels.shape[1] // 3
    weights = np.tile(LUMA_WEIGHTS / (255 * count), count)
    luma = pixels.astype(np.float32) @ weights.astype(np.float32)
    return float((luma < BLACK_LUMA).mean())


def loudness_dbfs(mono: np.ndarray) -> float:
    """Return the RMS of mono sound [N] in dB of full scale, at least -120."""
    return float(_dbfs(mono[None])[0])


def silent_share(mono: np.ndarray, rate_hz: int) -> float:
    """Return the share of pieces of 100 ms whose RMS is below -60 dBFS."""
    length = min(max(round(PIECE_S * rate_hz), 1), max(len(mono), 1))
    pieces = mono[: len(mono) // length * length].reshape(-1, length)
    return float((_dbfs(pieces) < SILENCE_DBFS).mean()) if len(pieces) else 1.0


def _dbfs(pieces: np.ndarray) -> np.ndarray:
    """Return the RMS of every row of [pieces, n] in dB of full scale."""
    if pieces.size == 0:
        return np.full(len(pieces), FLOOR_DBFS)
    power = np.einsum("ij,ij->i", pieces, pieces, dtype=np.float64) / pieces.shape[1]
    return 10 * np.log10(np.maximum(power, 10 ** (FLOOR_DBFS / 10)))
