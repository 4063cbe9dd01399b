"""Latents drawn anew from stored posteriors: mean and log-variance of a variational encoder."""

from __future__ import annotations

import torch

from pipeline.format import LOG_VARIANCE_RANGE
from train.rng import generator


def sample_posterior(
    moments: torch.Tensor, channel_axis: int, modality: str, seed: int, samples: torch.Tensor
) -> torch.Tensor:
    """Draw one latent per sample: mean + exp(log-variance / 2) · ε.

    Args:
        moments: float16 [B, ...], means and then log-variances along the channel axis, 2C.
        channel_axis: of one sample, the batch axis not counted.
        modality: names the stream of random numbers.
        seed: seed of the run.
        samples: int64 [B] on the CPU, places in the training stream: each keys its ε, so that a
            clip gets another latent whenever it comes again, and the same one after a resume.

    Returns:
        float16 [B, ...] with C channels, on the device of ``moments``.
    """
    mean, log_variance = moments.float().chunk(2, dim=channel_axis + 1)
    noise = torch.stack(
        [
            torch.randn(
                mean.shape[1:],
                generator=generator(moments.device, seed, f"posterior {modality}", sample),
                device=moments.device,
            )
            for sample in samples.tolist()
        ]
    )
    std = torch.exp(0.5 * log_variance.clamp(*LOG_VARIANCE_RANGE))
    return (mean + std * noise).half()
