"""The built-in codecs: transforms without weights, so that everything runs on a fresh machine.

They stand where autoencoders stand: same axes, similar rates and channel counts, and they decode
well enough to see and hear what a model generates.

Shapes: T frames, H and W pixels, N samples, L latents, P coefficients kept.
"""

from __future__ import annotations

import functools
import hashlib
import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.format import FormatError

if TYPE_CHECKING:  # torch takes seconds to load: a run that finds all committed needs no codec
    import torch

# BT.601 full range, rows Y, Cb, Cr over RGB in [0, 1].
RGB_TO_YCBCR = np.array(
    [[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]],
    dtype=np.float32,
)
# Energy of a chroma plane relative to luma; any value in 0.01 .. 0.11 keeps the same 16 of 192.
CHROMA_ENERGY = 0.05
TIME_SCALE = 0.5
# The transform goes over a clip in pieces of about so many values, which stay in the cache.
PIECE_VALUES = 2**19
# A BLAS multiplies tiles of rows, and adds up those left over in another order. Pieces of a
# multiple of this many rows have none left over: they give the bits of one product of all.
TILE_ROWS = 48
# A latent counts when at most this share of its samples is missing from the clip's end.
LAST_LATENT_SLACK = 0.2


def dct_matrix(size: int) -> np.ndarray:
    """Return the orthonormal DCT-II matrix, float32 [frequency, position]."""
    position, frequency = np.arange(size), np.arange(size)[:, None]
    matrix = np.sqrt(2 / size) * np.cos(np.pi * (2 * position + 1) * frequency / (2 * size))
    matrix[0] /= np.sqrt(2)
    return matrix.astype(np.float32)


@functools.lru_cache(maxsize=8)
def strongest_coefficients(frames: int, block: int, count: int) -> np.ndarray:
    """Return the ``count`` coefficients (of 3 * frames * block²) with most expected energy.

    The power spectrum of natural scenes falls with the square of the frequency (Field 1987), in
    space and, for moving scenes, in time.
    """
    planes = np.array([1.0, CHROMA_ENERGY, CHROMA_ENERGY])[:, None, None, None]
    time, rows, columns = np.ogrid[:frames, :block, :block]
    # Frequencies in cycles per block side; a step in time moves about as far as TIME_SCALE pixels.
    squared = (time * TIME_SCALE * block / frames) ** 2 + rows**2 + columns**2
    energy = planes / (0.1 + squared)
    return np.argsort(-energy.ravel(), kind="stable")[:count]


class DctVideo:
    """YCbCr blocks of ``frames`` x ``block`` x ``block``, orthonormal DCT, strongest P kept.

    Latent: [T // frames, P, H // block, W // block].
    """

    axes = ("time", "channel", "height", "width")
    croppable = True

    def __init__(
        self, preprocessing: dict[str, Any], *, frames: int = 1, block: int = 8, channels: int = 16
    ) -> None:
        if channels > 3 * frames * block**2:
            raise FormatError(
                f"dct with channels={channels}: blocks of frames={frames}, block={block} have "
                f"{3 * frames * block**2} coefficients"
            )
        self.frames, self.block = frames, block
        fps = float(preprocessing["fps"])
        self.rate_hz = fps / frames
        self.offset_s = (frames - 1) / 2 / fps
        kept = strongest_coefficients(frames, block, channels)
        space, time = dct_matrix(block), dct_matrix(frames)
        # One matrix does the whole transform: colour, time, rows and columns.
        basis = np.einsum("cr,kt,vy,ux->ckvutyxr", RGB_TO_YCBCR, time, space, space)
        self.forward = np.ascontiguousarray(
            basis.reshape(3 * frames * block * block, -1)[kept], dtype=np.float32
        )
        inverse = np.einsum(
            "rc,kt,vy,ux->tyxrckvu", np.linalg.inv(RGB_TO_YCBCR), time, space, space
        )
        self.inverse = np.ascontiguousarray(
            inverse.reshape(frames * block * block * 3, -1)[:, kept], dtype=np.float32
        )

    def encode(self, batch: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Encode frames uint8 [T, H, W, 3]; a last block that frames do not fill is cut."""
        return [self._encode(frames) for frames in batch]

    def _encode(self, frames: np.ndarray) -> np.ndarray:
        t, b = self.frames, self.block
        count, rows, columns = frames.shape[0] // t, frames.shape[1] // b, frames.shape[2] // b
        blocks = frames[: count * t, : rows * b, : columns * b]
        blocks = blocks.reshape(count, t, rows, b, columns, b, 3).transpose(0, 2, 4, 1, 3, 5, 6)
        kept, values = self.forward.shape
        latent = np.empty((count, kept, rows, columns), dtype=np.float32)
        whole = TILE_ROWS // math.gcd(TILE_ROWS, rows * columns)
        step = max(PIECE_VALUES // (whole * rows * columns * values), 1) * whole
        held = np.empty((min(step, count) * rows * columns, values), dtype=np.float32)
        for first in range(0, count, step):
            piece = blocks[first : first + step]
            flat = held[: len(piece) * rows * columns]
            flat[:] = piece.reshape(flat.shape)
            flat /= 255
            flat -= 0.5
            product = (flat @ self.forward.T).reshape(len(piece), rows, columns, kept)
            latent[first : first + step] = product.transpose(0, 3, 1, 2)
        return latent

    def decode(self, latents: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Decode latents [L, P, rows, columns] into frames uint8 [L * frames, H, W, 3]."""
        return [self._decode(np.asarray(latent, dtype=np.float32)) for latent in latents]

    def _decode(self, latent: np.ndarray) -> np.ndarray:
        count, _, rows, columns = latent.shape
        flat = latent.transpose(0, 2, 3, 1).reshape(count * rows * columns, -1) @ self.inverse.T
        blocks = flat.reshape(count, rows, columns, self.frames, self.block, self.block, 3)
        frames = blocks.transpose(0, 3, 1, 4, 2, 5, 6)
        shape = (count * self.frames, rows * self.block, columns * self.block, 3)
        return np.clip((frames.reshape(shape) + 0.5) * 255 + 0.5, 0, 255).astype(np.uint8)

    def fingerprint(self) -> dict[str, Any]:
        """No weights: the settings say everything."""
        return {}


class LogmelAudio:
    """Log mel spectrogram in ``patch`` x ``patch`` DCT blocks; Griffin-Lim on the way back.

    With the default settings the latent has the shape of AudioLDM2's autoencoder: [T / 4, 16, 8]
    for T spectrogram frames of 10 ms.
    """

    axes = ("time", "frequency", "channel")
    croppable = True

    def __init__(
        self,
        preprocessing: dict[str, Any],
        *,
        num_mels: int = 64,
        n_fft: int = 1024,
        hop: int = 160,
        fmin_hz: float = 0.0,
        fmax_hz: float = 8000.0,
        patch: int = 4,
        channels: int = 8,
    ) -> None:
        if num_mels % patch or channels > patch**2:
            raise FormatError(
                f"logmel with num_mels={num_mels}, channels={channels}: expected a multiple of "
                f"patch={patch} and at most {patch**2} channels"
            )
        self.patch, self.hop, self.n_fft = patch, hop, n_fft
        sample_rate = int(preprocessing["sample_rate"])
        self.rate_hz = sample_rate / (hop * patch)
        self.offset_s = (patch - 1) / 2 * hop / sample_rate
        fmax_hz = min(fmax_hz, sample_rate / 2)
        if fmin_hz >= fmax_hz:
            raise FormatError(
                f"logmel with fmin_hz={fmin_hz:g}: nothing is left below {fmax_hz:g} Hz (fmax_hz, "
                "at most half the sample rate)"
            )
        self._mel_settings = (sample_rate, n_fft, hop, num_mels, fmin_hz, fmax_hz)
        frequency = np.arange(patch)
        distance = frequency[:, None] ** 2 + frequency**2
        kept = np.argsort(distance.ravel(), kind="stable")[:channels]  # the lowest, both ways
        matrix = dct_matrix(patch)
        self.basis = np.kron(matrix, matrix)[kept]  # [channels, patch * patch]

    @functools.cached_property
    def mel(self) -> Any:
        """The transform to mel spectrograms, built when first used."""
        from pipeline.audio import mel_spectrogram

        return mel_spectrogram(*self._mel_settings)

    def encode(self, batch: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Encode sound float32 [channels, N] (averaged to mono) into float32 latents."""
        return [self._encode(sound) for sound in batch]

    def _encode(self, sound: np.ndarray) -> np.ndarray:
        import torch

        patch, samples = self.patch, self.patch * self.hop
        count = int(sound.shape[1] / samples + LAST_LATENT_SLACK)
        mono = torch.from_numpy(sound.mean(axis=0))
        # The transform mirrors half a window at both ends.
        needed = max(count * samples, self.n_fft // 2 + 1)
        mono = torch.nn.functional.pad(mono, (0, max(0, needed - len(mono))))
        spectrogram = self.mel(mono).clamp_min(1e-5).log().numpy()[:, : count * patch]
        bands = spectrogram.shape[0] // patch
        blocks = spectrogram.T.reshape(count, patch, bands, patch).transpose(0, 2, 1, 3)
        return blocks.reshape(count, bands, patch * patch) @ self.basis.T

    def decode(self, latents: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Decode latents [L, bands, channels] into mono sound float32 [1, L * patch * hop]."""
        return [self._decode(np.asarray(latent, dtype=np.float32)) for latent in latents]

    def spectrogram(self, latent: np.ndarray) -> np.ndarray:
        """Return the log mel spectrogram of a latent, float32 [L * patch, num_mels]."""
        count, bands, _ = latent.shape
        blocks = np.asarray(latent, dtype=np.float32) @ self.basis
        blocks = blocks.reshape(count, bands, self.patch, self.patch).transpose(0, 2, 1, 3)
        return blocks.reshape(count * self.patch, bands * self.patch)

    def _decode(self, latent: np.ndarray) -> np.ndarray:
        import torch

        from pipeline.audio import griffin_lim

        mel = torch.from_numpy(self.spectrogram(latent)).clamp(-12, 6).exp().T
        magnitude = (self._mel_inverse() @ mel).clamp_min(0)
        magnitude = torch.cat([magnitude, magnitude[:, -1:]], dim=1)  # centred frames: one more
        num_samples = latent.shape[0] * self.patch * self.hop
        sound = griffin_lim(magnitude, self.n_fft, self.hop, num_samples)
        return sound.numpy()[None]

    def _mel_inverse(self) -> torch.Tensor:
        import torch

        return torch.linalg.pinv(self.mel.mel_scale.fb.T)

    def fingerprint(self) -> dict[str, Any]:
        """No weights: the settings say everything."""
        return {}


class HashText:
    """Every word becomes a fixed random vector, seeded by its hash; a last token ends the text.

    Latent: [words + 1, width]. The empty caption is the end token alone: the unconditional text.
    """

    axes = ("token", "channel")
    rate_hz = 0.0
    offset_s = 0.0
    croppable = False

    def __init__(self, preprocessing: dict[str, Any], *, width: int = 64) -> None:
        self.width = width
        self.max_words = int(preprocessing["max_words"])

    def encode(self, batch: Sequence[str]) -> list[np.ndarray]:
        """Encode captions into float32 [words + 1, width], unit variance."""
        return [self._encode(caption) for caption in batch]

    def _encode(self, caption: str) -> np.ndarray:
        words = re.findall(r"\w+", caption.lower())[: self.max_words]
        return np.stack([self._vector(word) for word in (*words, "</s>")])

    def _vector(self, word: str) -> np.ndarray:
        seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "little")
        return np.random.default_rng(seed).standard_normal(self.width, dtype=np.float32)

    def decode(self, latents: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Hashes can't be read back."""
        raise NotImplementedError("the hash text codec has no decoder")

    def fingerprint(self) -> dict[str, Any]:
        """No weights: the settings say everything."""
        return {}
