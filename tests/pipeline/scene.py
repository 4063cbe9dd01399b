"""The made-up scene that all rendered films show: numbers, colours and clicks, all known.

Its picture shows the number of the frame as a bar code above patches whose colours follow from
the number; in its sound there is a click at each second of `CLICKS_S`. `region_colours`,
`numbers_shown` and `find_clicks` read them from decoded arrays. Drawn by formula, numpy only.
"""

from __future__ import annotations

import numpy as np

# ---------------------------------------------------------------------------------------------
# The scene's picture: regions of one colour each

NUMBER_BITS = 12
CELL_ROWS, CELL_COLUMNS, NUM_PATCHES = 3, 8, 3
BACKGROUND, FIRST_CELL = 0, 1
FIRST_PATCH = FIRST_CELL + 2 * NUMBER_BITS
FIRST_CORNER = FIRST_PATCH + NUM_PATCHES
BARS = FIRST_CORNER + 4  # what is outside the picture when it is padded
NUM_REGIONS = BARS + 1
PATCH_COLOURS = np.array(
    [(255, 0, 0), (0, 160, 60), (20, 40, 220), (224, 172, 140), (10, 120, 130), (128, 128, 128)]
)
# Top left, top right, bottom left, bottom right.
CORNER_COLOURS = ((230, 200, 40), (60, 200, 220), (190, 60, 200), (240, 130, 30))


def region_map(u: np.ndarray, v: np.ndarray, width: float, height: float) -> np.ndarray:
    """Which region is at the columns ``u`` and rows ``v`` of an upright width x height picture.

    The middle 3/4 of the central square hold the bar code above the patches; the corners of the
    whole picture are marked.

    Returns:
        uint8 [len(v), len(u)].
    """
    side = min(width, height)
    x = (u - width / 2) / (0.75 * side) + 0.5
    y = ((v - height / 2) / (0.75 * side) + 0.5)[:, None]
    cell = FIRST_CELL + np.floor(2 * CELL_ROWS * y) * CELL_COLUMNS + np.floor(CELL_COLUMNS * x)
    found = np.where(y < 0.5, cell, FIRST_PATCH + np.floor(NUM_PATCHES * x))
    inside = (x >= 0) & (x < 1) & (y >= 0) & (y < 1)
    found = np.where(inside, found, BACKGROUND)
    left, right = u < side / 8, u >= width - side / 8
    top, bottom = (v < side / 8)[:, None], (v >= height - side / 8)[:, None]
    for place, corner in enumerate((top & left, top & right, bottom & left, bottom & right)):
        found = np.where(corner, FIRST_CORNER + place, found)
    outside = (u < 0) | (u >= width) | ((v < 0) | (v >= height))[:, None]
    return np.where(outside, BARS, found).astype(np.uint8)


def true_colours(numbers: np.ndarray) -> np.ndarray:
    """Colour of every region in the frames of these numbers: uint8 [T, NUM_REGIONS, 3]."""
    numbers = np.asarray(numbers)
    colours = np.zeros((len(numbers), NUM_REGIONS, 3), dtype=np.uint8)
    colours[:, BACKGROUND] = 128
    bits = (numbers[:, None] >> np.arange(NUMBER_BITS)) & 1
    colours[:, FIRST_CELL:FIRST_PATCH] = 255 * np.concatenate([bits, 1 - bits], axis=1)[..., None]
    places = (numbers[:, None] + np.arange(NUM_PATCHES)) % len(PATCH_COLOURS)
    colours[:, FIRST_PATCH:FIRST_CORNER] = PATCH_COLOURS[places]
    colours[:, FIRST_CORNER:BARS] = CORNER_COLOURS
    return colours


def region_colours(frames: np.ndarray, regions: np.ndarray, border: int = 2) -> np.ndarray:
    """Median colour of every region without its border, where scaling blends colours.

    Args:
        frames: uint8 [T, H, W, 3].
        regions: uint8 [H, W].
        border: pixels to leave out around the cells of the bar code; twice as many around the
            others, because colour is stored at half of the resolution.

    Returns:
        float [T, NUM_REGIONS, 3], NaN for regions that aren't in the frame.
    """
    is_cell = (regions >= FIRST_CELL) & (regions < FIRST_PATCH)
    flat = np.where(is_cell, _flat(regions, border), _flat(regions, 2 * border))
    colours = np.full((len(frames), NUM_REGIONS, 3), np.nan)
    for region in np.unique(regions[flat]):
        colours[:, region] = np.median(frames[:, flat & (regions == region)], axis=1)
    return colours


def _flat(regions: np.ndarray, border: int) -> np.ndarray:
    """Whether all pixels within ``border`` are of the same region, bool [H, W]."""
    padded = np.pad(regions, border, mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (2 * border + 1,) * 2)
    return (windows == regions[..., None, None]).all(axis=(2, 3))


def numbers_shown(colours: np.ndarray) -> np.ndarray:
    """Read the frames' numbers from ``region_colours``; -1 where the bar code makes no sense."""
    grey = colours[:, FIRST_CELL:FIRST_PATCH].mean(axis=2)
    bits = (grey > 128).astype(int)
    clear = (np.abs(grey - 128) > 64).all(axis=1)
    valid = clear & (bits[:, :NUMBER_BITS] != bits[:, NUMBER_BITS:]).all(axis=1)
    return np.where(valid, bits[:, :NUMBER_BITS] @ (1 << np.arange(NUMBER_BITS)), -1)


# ---------------------------------------------------------------------------------------------
# The scene's sound: clicks in faint noise

# Uneven, so that sound that is off by one click isn't taken for right.
CLICKS_S = np.array([0.31 + 0.6 * i + 0.05 * (i * i % 7) for i in range(200)])
CLICK_LEVEL, NOISE_LEVEL = 0.7, 0.004
CLICK_SPREAD_S = 0.003  # standard deviation of its envelope
LOW_FREQUENCY_CHANNEL = 3  # of 5.1: codecs keep nothing of a click there


def click(seconds: np.ndarray) -> np.ndarray:
    """One click around second 0: a sweep from about 0.5 to 3 kHz, which has one sharp correlation
    peak (0.2 ms wide), survives every codec and is below half of the lowest sample rate."""
    phase = 2 * np.pi * (1600 * seconds + 90_000 * seconds**2)
    return np.exp(-0.5 * (seconds / CLICK_SPREAD_S) ** 2) * np.cos(phase)


def click_gains(channels: int) -> np.ndarray:
    """Level of every click in every channel, [channels, len(CLICKS_S)], 0 or 1.

    Stereo: every third click is in both channels, the others left and right in turn.
    5.1: every click is in one channel.
    """
    place = np.arange(len(CLICKS_S))
    if channels == 1:
        return np.ones((1, len(place)))
    if channels == 2:
        return np.stack([place % 3 != 2, place % 3 != 1]).astype(float)
    audible = [c for c in range(channels) if c != LOW_FREQUENCY_CHANNEL]
    owner = np.array(audible)[place % len(audible)]
    return (owner == np.arange(channels)[:, None]).astype(float)


def find_clicks(
    sound: np.ndarray, rate: int, expected_s: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Find the clicks expected at these seconds, at most 0.25 s away from there.

    Args:
        sound: float32 [N].
        rate: in Hz.
        expected_s: seconds of ``sound``.

    Returns:
        the seconds at which they are, and their levels (1: as recorded), like ``expected_s``.
    """
    reach = round(4 * CLICK_SPREAD_S * rate)
    pattern = click(np.arange(-reach, reach + 1) / rate)
    match = np.convolve(np.pad(sound.astype(np.float64), reach), pattern[::-1], mode="valid")
    found_s, levels = [], []
    for second in expected_s:
        low = max(round((second - 0.25) * rate), 0)
        place = low + int(np.argmax(match[low : round((second + 0.25) * rate)]))
        found_s.append(place / rate)
        levels.append(match[place] / (CLICK_LEVEL * (pattern**2).sum()))
    return np.array(found_s), np.array(levels)
