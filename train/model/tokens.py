"""Latents to tokens and back: a pure reshape in any order of axes.

The channel axis counts as one patch of its whole size, so that every axis is treated alike.
Shapes: B batch, N tokens, P values per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch

from train.latents import LatentSpec

# What the numbers of a patch size in the settings stand for.
PATCH_AXES = {"video": ("time", "height", "width"), "audio": ("time", "frequency")}


@dataclass(frozen=True)
class Patching:
    """How one modality is cut into tokens.

    Attributes:
        modality: "video" or "audio".
        axes: axis names of one sample.
        sizes: latents per patch along each of ``axes``.
    """

    modality: str
    axes: tuple[str, ...]
    sizes: tuple[int, ...]

    @property
    def num_values(self) -> int:
        """Values per token."""
        return prod(self.sizes)

    def counts(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the number of patches along each axis of one sample.

        Raises:
            ValueError: another number of axes, or a size that the patch does not divide.
        """
        if len(shape) != len(self.axes):
            raise ValueError(f"{self.modality} of shape {shape} does not have axes {self.axes}")
        for axis, size, patch in zip(self.axes, shape, self.sizes, strict=True):
            if size == 0 or size % patch:
                raise ValueError(
                    f"{self.modality} {axis} of {size} latents does not divide into patches of "
                    f"{patch}; crop it, or change model.{self.modality}_patch"
                )
        return tuple(size // patch for size, patch in zip(shape, self.sizes, strict=True))

    def num_tokens(self, shape: tuple[int, ...]) -> int:
        """Tokens of one sample of this shape; raises as ``counts``."""
        return prod(self.counts(shape))


def patching_of(spec: LatentSpec, patch: tuple[int, ...]) -> Patching:
    """Return how ``spec`` is cut by a patch size from the settings.

    Args:
        spec: the latents.
        patch: sizes in the order of ``PATCH_AXES``; 0 takes the whole axis.

    Raises:
        ValueError: an axis that has no patch size, or a patch size that has no axis.
    """
    names = PATCH_AXES[spec.modality]
    wanted = dict(zip(names, patch, strict=True))
    strangers = sorted(set(spec.axes) - {*names, "channel"})
    if strangers:
        raise ValueError(f"{spec.modality} has unknown axes {strangers}; known: {names}")
    for axis, size in wanted.items():
        if axis not in spec.axes and size > 1:
            raise ValueError(
                f"model.{spec.modality}_patch takes {size} latents of {axis}, but the column has "
                f"only {spec.axes}; set it to 0"
            )
    sizes = (wanted.get(axis) or size for axis, size in zip(spec.axes, spec.shape, strict=True))
    return Patching(spec.modality, spec.axes, tuple(sizes))


def patchify(latents: torch.Tensor, patching: Patching) -> torch.Tensor:
    """Cut latents [B, *axes] into tokens [B, N, P]; tokens run over the axes in their order."""
    counts = patching.counts(tuple(latents.shape[1:]))
    pairs = [size for pair in zip(counts, patching.sizes, strict=True) for size in pair]
    x = latents.reshape(-1, *pairs)  # [B, count, patch, count, patch, …]
    outer, inner = range(1, x.ndim, 2), range(2, x.ndim, 2)
    return x.permute(0, *outer, *inner).reshape(len(latents), prod(counts), patching.num_values)


def unpatchify(tokens: torch.Tensor, patching: Patching, shape: tuple[int, ...]) -> torch.Tensor:
    """Put tokens [B, N, P] together to latents [B, *shape]; the inverse of ``patchify``."""
    counts = patching.counts(shape)
    x = tokens.reshape(-1, *counts, *patching.sizes)
    axes = len(counts)
    order = [axis for i in range(axes) for axis in (1 + i, 1 + axes + i)]
    return x.permute(0, *order).reshape(len(tokens), *shape)
