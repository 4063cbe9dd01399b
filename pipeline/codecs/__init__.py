"""Frozen encoder/decoder pairs behind one protocol.

A codec is built from its settings alone, so that a column's ``column.json`` is enough to decode
it. The built-in ones need no weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from pipeline.codecs.builtin import DctVideo, HashText, LogmelAudio
from pipeline.format import ColumnSpec, FormatError


class Codec(Protocol):
    """One modality's encoder and decoder.

    Attributes:
        axes: names of a latent's axes, time first, with "channel" among them.
        rate_hz: latents per second (0 for text).
        offset_s: second of the clip at the middle of the first latent.
        croppable: whether decoding may start at any latent.
    """

    axes: tuple[str, ...]
    rate_hz: float
    offset_s: float
    croppable: bool

    def encode(self, batch: Sequence[Any]) -> list[np.ndarray]:
        """Encode frames uint8 [T, H, W, 3], sound float32 [channels, N] or captions.

        Returns:
            One float32 latent per item, time first.
        """
        ...

    def decode(self, latents: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Turn latents back into frames or sound (text codecs can't: NotImplementedError)."""
        ...

    def fingerprint(self) -> dict[str, Any]:
        """Return what decides the bytes beyond the settings: hashes of weight files."""
        ...


CODECS = {"dct": DctVideo, "logmel": LogmelAudio, "hash": HashText}


def build_codec(codec: dict[str, Any], preprocessing: dict[str, Any]) -> Codec:
    """Build a codec from the settings that a column records.

    Args:
        codec: ``{"name": …, **settings}``.
        preprocessing: what its input went through (fps, size, sample_rate, …).

    Raises:
        FormatError: no codec of that name, or it has no such settings.
    """
    settings = dict(codec)
    name = settings.pop("name", None)
    if name not in CODECS:
        known = ", ".join(sorted(CODECS))
        raise FormatError(f"codec {name!r} is unknown to this version; known: {known}")
    try:
        return CODECS[name](preprocessing, **settings)
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(
            f"codec {codec} after {preprocessing} can't be built ({error}); "
            "change these settings, or use the version that wrote them"
        ) from None


def column_spec(modality: str, codec: dict[str, Any], preprocessing: dict[str, Any]) -> ColumnSpec:
    """Describe the column that a codec with these settings writes."""
    built = build_codec(codec, preprocessing)
    return ColumnSpec(
        modality=modality,
        codec=codec,
        preprocessing=preprocessing,
        axes=built.axes,
        rate_hz=built.rate_hz,
        offset_s=built.offset_s,
        croppable=built.croppable,
        weights=built.fingerprint(),
    )


def stored(latent: np.ndarray, dtype: str) -> np.ndarray:
    """Return a latent as columns keep it, C-contiguous; inf where the type can't hold a value.

    Torch rounds to float16 as numpy does, bit for bit, but numpy takes a trap of the processor for
    every value below 6e-5: three times the time of a whole block DCT.
    """
    latent = np.ascontiguousarray(latent)
    if (latent.dtype, dtype) == (np.float32, "float16"):
        import torch

        return torch.from_numpy(latent).half().numpy()
    with np.errstate(over="ignore"):
        return latent.astype(dtype)


def all_finite(array: np.ndarray) -> bool:
    """Return whether no value is infinite or not a number; float16 in a tenth of numpy's time."""
    if array.dtype == np.float16:
        return bool(((array.view(np.uint16) & 0x7C00) != 0x7C00).all())
    return bool(np.isfinite(array).all())
