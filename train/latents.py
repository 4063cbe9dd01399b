"""The value types that cross from the loader to the model. No logic, no I/O.

Shapes: B batch, T video latent frames, L audio latent frames, S text tokens, D text width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LatentSpec:
    """One modality's latents as the model sees them: the shape of a crop and its clock.

    Attributes:
        modality: "video" or "audio".
        axes: axis names of one sample, time first, e.g. ("time", "channel", "height", "width")
            for video, ("time", "frequency", "channel") or ("time", "channel") for audio.
        shape: sizes along ``axes`` of one crop.
        rate_hz: latents per second.
        offset_s: seconds from the start of the crop to the middle of its first latent.
        mean: one value per channel, of the whole column.
        std: one value per channel, of the whole column.
    """

    modality: str
    axes: tuple[str, ...]
    shape: tuple[int, ...]
    rate_hz: float
    offset_s: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def channel_axis(self) -> int:
        """Position of the channel axis within one sample (batch axis not counted)."""
        return self.axes.index("channel")


@dataclass(frozen=True)
class LatentBatch:
    """A micro-batch: unscaled float16 latents, on the device that trains.

    Attributes:
        samples: int64 [B], place of every sample in the training stream, counted over all ranks
            and epochs; keys all random draws. Always on the CPU.
        keys: clip keys.
        bucket: number of the shapes that all samples of the step share, see ``View.buckets``.
        video: float16 [B, T, C, H, W] (axes of its LatentSpec behind B); zeros where there is none.
        audio: float16 [B, L, F, C] or [B, L, C]; zeros where there is none.
        has_video: bool [B], False where a clip without video is kept (``data.missing=mask``).
        has_audio: bool [B], the same for audio.
        video_start_s: float32 [B], time of the first video latent cut, less the crop's start.
        audio_start_s: float32 [B], the same for audio: up to half a latent from zero.
        text: float16 [B, S, D], zero-padded.
        text_mask: bool [B, S], True on real tokens.
    """

    samples: torch.Tensor
    keys: tuple[str, ...]
    bucket: int
    video: torch.Tensor
    audio: torch.Tensor
    has_video: torch.Tensor
    has_audio: torch.Tensor
    video_start_s: torch.Tensor
    audio_start_s: torch.Tensor
    text: torch.Tensor
    text_mask: torch.Tensor
