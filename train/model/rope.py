"""Rotary positions: where and when a token is, in units that both modalities share.

A token has three coordinates: time in seconds, and its row and column as fractions of the
frame. Seconds make a video frame and the sound at that instant neighbours at any pair of
rates (LTX-2 does the same); fractions keep a place in the picture when the codec or the
resolution changes. Everything here is float32: 10 s at the fastest frequency is 785 rad, where
bfloat16 would be off by radians. Nothing is kept in buffers, which ``.bfloat16()`` would round.

Shapes: B batch, N tokens, H heads, R head width.
"""

from __future__ import annotations

from math import log10, tau

import torch

from train.latents import LatentSpec
from train.model.tokens import Patching

# Shortest and longest period. Time: two latents of the finest modality (audio at 25 Hz), up to
# four times a 10 s clip, so that the slowest pair turns by a quarter over a clip and orders it.
PERIODS_S = (0.08, 40.0)
# Space: two patches of a grid of 32, up to four frames, for the same reasons.
PERIODS_FRAME = (1 / 16, 4.0)
CENTRE = 0.5  # row and column of what has no place in the picture


def coordinates(
    patching: Patching, spec: LatentSpec, shape: tuple[int, ...], device: torch.device
) -> torch.Tensor:
    """Return the middle of every patch of one sample, float32 [N, 3]: seconds, row, column.

    Seconds count from the start of the crop. Audio has its frequency in the place of the row,
    and stands at the centre of the frame where it is not cut along frequency.
    """
    middles = []
    for axis, count, size in zip(
        patching.axes, patching.counts(shape), patching.sizes, strict=True
    ):
        index = torch.arange(count, dtype=torch.float32, device=device)
        if axis == "time":
            middles.append(spec.offset_s + (index * size + (size - 1) / 2) / spec.rate_hz)
        else:
            middles.append((index + 0.5) / count)
    grid = dict(zip(patching.axes, torch.meshgrid(*middles, indexing="ij"), strict=True))
    centre = torch.full_like(grid["time"], CENTRE)
    row = grid.get("height", grid.get("frequency", centre))
    return torch.stack([grid["time"], row, grid.get("width", centre)], dim=-1).reshape(-1, 3)


def frequencies(periods: tuple[float, float], num: int, device: torch.device) -> torch.Tensor:
    """Return ``num`` angular frequencies, geometric from the short period to the long one."""
    shortest, longest = (log10(period) for period in periods)
    return tau / torch.logspace(shortest, longest, num, dtype=torch.float32, device=device)


def rotary_table(positions: torch.Tensor, head_width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosines and sines, float32 [B, 1, N, R/2], for positions float32 [B, N, 3].

    Half of the pairs turn with time, a quarter each with row and column.
    """
    num_space = head_width // 8
    num_time = head_width // 2 - 2 * num_space
    laws = ((PERIODS_S, num_time), (PERIODS_FRAME, num_space), (PERIODS_FRAME, num_space))
    angles = [
        positions[..., axis, None] * frequencies(periods, num, positions.device)
        for axis, (periods, num) in enumerate(laws)
    ]
    angle = torch.cat(angles, dim=-1).unsqueeze(1)
    return angle.cos(), angle.sin()


def rotate(x: torch.Tensor, table: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Turn queries or keys [B, H, N, R] by their positions; pair i is (x[i], x[i + R/2])."""
    cos, sin = table
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)
    return turned.to(x.dtype)
