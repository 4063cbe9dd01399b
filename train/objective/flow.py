"""Rectified flow over two modalities: what is drawn, what is predicted, what it costs.

Time t is 0 at the data and 1 at the noise:

    x_t = (1 - t)·x + t·ε        v = dx_t/dt = ε - x        x = x_t - t·v

All draws are keyed by (seed, stream, sample), so a sample meets the same noise on any rank and
in any batch. Shapes: B batch, S text tokens, D text width; latents are [B, *axes of the spec].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import exp
from statistics import NormalDist
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat, PositiveFloat
from pydantic import dataclasses as pydantic_dataclasses

from pipeline.settings import STRICT
from train.latents import LatentBatch, LatentSpec
from train.objective.tasks import Role, Task
from train.rng import generator, uniform

Share = Annotated[float, Field(ge=0, le=1)]
Velocity = Callable[..., tuple[torch.Tensor, torch.Tensor]]


@pydantic_dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class FlowConfig:
    """The law of times, the weights of the loss, and what is dropped for guidance.

    Attributes:
        logit_mean: mean of the logit-normal law of t (Stable Diffusion 3, arXiv 2403.03206).
        logit_std: its standard deviation.
        uniform_share: share of the samples whose t is uniform instead, so that both ends of
            [0, 1], where sampling starts and stops, are trained too.
        video_shift: above 1 moves the times of video towards noise, as its many redundant
            values need: neighbours average the noise away.
        audio_shift: the same for audio.
        video_weight: factor of the video loss.
        audio_weight: factor of the audio loss.
        drop_text: share of the samples that see the empty caption.
        drop_given: share of the samples whose given modality is replaced by noise.
    """

    logit_mean: float = 0.0
    logit_std: PositiveFloat = 1.0
    uniform_share: Share = 0.1
    video_shift: PositiveFloat = 3.0
    audio_shift: PositiveFloat = 1.0
    video_weight: NonNegativeFloat = 1.0
    audio_weight: NonNegativeFloat = 1.0
    drop_text: Share = 0.1
    drop_given: Share = 0.1


@dataclass(frozen=True)
class FlowLoss:
    """The loss of a micro-batch.

    Attributes:
        total: scalar float32, to be differentiated.
        sums: float32 [2], losses of video and audio summed over the samples where they count;
            detached. Add over ranks, then divide by ``counts``.
        counts: float32 [2], those samples.
        num_unserved: scalar float32, the samples that had no part in the loss, as they lack what
            the task is given or all that it generates.
    """

    total: torch.Tensor
    sums: torch.Tensor
    counts: torch.Tensor
    num_unserved: torch.Tensor


# ---------------------------------------------------------------------------------------------
# Channel statistics


def standardise(latents: torch.Tensor, spec: LatentSpec) -> torch.Tensor:
    """Return latents [B, *axes] of any dtype with mean 0 and deviation 1 per channel, float32."""
    mean, scale = channel_statistics(spec, latents)
    return (latents.float() - mean) / scale


def unstandardise(latents: torch.Tensor, spec: LatentSpec) -> torch.Tensor:
    """Undo ``standardise``: latents [B, *axes] as the codec gave them, float32."""
    mean, scale = channel_statistics(spec, latents)
    return latents.float() * scale + mean


def channel_statistics(
    spec: LatentSpec, latents: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and scale, float32, shaped to meet ``latents`` at the channel axis.

    A constant channel has scale 1. Its deviation comes out of sums of squares as rounding
    noise of about 1e-8 of the mean, which must not be divided by.
    """
    shape = [1] * len(spec.axes)
    shape[spec.channel_axis] = -1
    mean = torch.tensor(spec.mean, dtype=torch.float32, device=latents.device).view(shape)
    std = torch.tensor(spec.std, dtype=torch.float32, device=latents.device).view(shape)
    return mean, torch.where(std > 1e-6 * mean.abs(), std, 1.0)


# ---------------------------------------------------------------------------------------------
# The path from data to noise


def interpolate(x: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Return x_t for t [B]: exactly ``x`` at 0 and exactly ``noise`` at 1."""
    t = expand_as_batch(t, x)
    return (1 - t) * x + t * noise


def velocity(x: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Return the velocity of the straight path, the target of the model."""
    return noise - x


def shift_time(t: torch.Tensor, shift: float) -> torch.Tensor:
    """Move times towards noise (shift > 1) or data (< 1); 0 and 1 stay (arXiv 2403.03206, §5.3)."""
    return shift * t / (1 + (shift - 1) * t)


def modality_time(
    role: Role,
    t: torch.Tensor,
    shift: float,
    dropped: torch.Tensor | float = 0.0,
    has: torch.Tensor | float = 1.0,
) -> torch.Tensor:
    """Return one modality's times.

    Args:
        role: what the task does with it.
        t: the times that the modalities share, before the shift.
        shift: the modality's shift.
        dropped: 1 where a given modality is replaced by noise, else 0; shaped as ``t``.
        has: 0 where the sample lacks the modality, which is pure noise then, else 1; as ``t``.
    """
    rest = role.rest_time + role.given * dropped
    time = role.generated * shift_time(t, shift) + (1 - role.generated) * rest
    return has * time + (1 - has)


def served(task: Task, has_video: torch.Tensor, has_audio: torch.Tensor) -> torch.Tensor:
    """Return which samples the task can train on, float32 [B]: 1 or 0.

    A sample must have what the task is given, and some of what it generates.

    Args:
        task: the task.
        has_video: float32 [B], 1 where the sample has video, else 0.
        has_audio: the same for audio.
    """
    has_given = (1 - task.video.given * (1 - has_video)) * (1 - task.audio.given * (1 - has_audio))
    has_target = torch.maximum(task.video.generated * has_video, task.audio.generated * has_audio)
    return has_given * has_target


def expand_as_batch(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """View values [B] so that they broadcast over ``like`` [B, ...]."""
    return values.view(-1, *[1] * (like.ndim - 1))


# ---------------------------------------------------------------------------------------------
# Draws, one sample at a time


def draw_time(config: FlowConfig, seed: int, sample: int) -> float:
    """Draw the time that both modalities of a sample share, before the shift, in (0, 1)."""
    draw = uniform(seed, "time", sample)
    if uniform(seed, "time law", sample) < config.uniform_share:
        return draw
    return 1 / (1 + exp(-NormalDist(config.logit_mean, config.logit_std).inv_cdf(draw)))


def draw_dropped(share: float, stream: str, seed: int, samples: Sequence[int]) -> torch.Tensor:
    """Return float32 [B] on the CPU: 1 where the sample is dropped, else 0."""
    return torch.tensor([float(uniform(seed, stream, sample) < share) for sample in samples])


def draw_noise(
    shape: Sequence[int], device: torch.device, stream: str, seed: int, keys: Sequence[int | str]
) -> torch.Tensor:
    """Return standard normal noise, float32 [B, *shape], a stream of its own per key."""
    noise = [
        torch.randn(*shape, generator=generator(device, seed, stream, key), device=device)
        for key in keys
    ]
    return torch.stack(noise)


# ---------------------------------------------------------------------------------------------
# Text


def pad_text(text: torch.Tensor, length: int) -> torch.Tensor:
    """Fill text [B, S, D], or a mask [B, S, 1], with zeros up to ``length`` tokens."""
    return F.pad(text, (0, 0, 0, length - text.shape[1]))


def drop_text(
    text: torch.Tensor, mask: torch.Tensor, null_text: torch.Tensor, dropped: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Put the empty caption in place of the text of some samples.

    Args:
        text: [B, S, D].
        mask: bool [B, S], True on real tokens.
        null_text: [S0, D], the empty caption, all of it real.
        dropped: bool [B].

    Returns:
        Text and mask of max(S, S0) tokens.
    """
    length = max(text.shape[1], len(null_text))
    null = pad_text(null_text[None].to(text.dtype), length)
    null_mask = torch.arange(length, device=mask.device)[None] < len(null_text)
    mask = F.pad(mask, (0, length - mask.shape[1]))
    return (
        torch.where(dropped[:, None, None], null, pad_text(text, length)),
        torch.where(dropped[:, None], null_mask, mask),
    )


# ---------------------------------------------------------------------------------------------
# The loss


def flow_loss(
    model: Velocity,
    batch: LatentBatch,
    null_text: torch.Tensor,
    task: Task,
    specs: tuple[LatentSpec, LatentSpec],
    config: FlowConfig,
    seed: int,
    time: float | None = None,
) -> FlowLoss:
    """Noise a micro-batch, ask the model for its velocity, and compare.

    Args:
        model: called as ``DiT.forward`` is.
        batch: latents as stored. Its ``samples`` are read on the host: keep them on the CPU,
            where that costs no wait for the device.
        null_text: [S0, D], the empty caption.
        task: one task for the whole micro-batch, the same on all ranks.
        specs: of video and audio.
        config: settings.
        seed: of all draws.
        time: takes the place of the drawn time of every sample; for validation.

    Returns:
        The mean over samples of ``video_weight``·(mean over video) + ``audio_weight``·(mean over
        audio), each a mean squared error in float32, each only where the task generates it and
        the sample has it. Samples that the task can't serve count as zero in this mean: to leave
        them out of it, the ranks would have to agree on their number.
    """
    device, samples = batch.video.device, batch.samples.tolist()
    video, audio = standardise(batch.video, specs[0]), standardise(batch.audio, specs[1])
    noise_video = draw_noise(video.shape[1:], device, "video noise", seed, samples)
    noise_audio = draw_noise(audio.shape[1:], device, "audio noise", seed, samples)
    has_video, has_audio = batch.has_video.float(), batch.has_audio.float()

    times = [draw_time(config, seed, sample) if time is None else time for sample in samples]
    t = torch.tensor(times, dtype=torch.float32, device=device)
    dropped = draw_dropped(config.drop_given, "drop given", seed, samples).to(device)
    t_video = modality_time(task.video, t, config.video_shift, dropped, has_video)
    t_audio = modality_time(task.audio, t, config.audio_shift, dropped, has_audio)
    no_text = draw_dropped(config.drop_text, "drop text", seed, samples).to(device)
    text, text_mask = drop_text(batch.text, batch.text_mask, null_text, no_text > 0)

    answer_video, answer_audio = model(
        interpolate(video, noise_video, t_video),
        interpolate(audio, noise_audio, t_audio),
        t_video,
        t_audio,
        torch.full_like(batch.samples, task.number, device=device),
        text,
        text_mask,
        batch.video_start_s,
        batch.audio_start_s,
    )
    is_served = served(task, has_video, has_audio)
    counted_video = task.video.generated * has_video * is_served
    counted_audio = task.audio.generated * has_audio * is_served
    loss_video = squared_error(answer_video, velocity(video, noise_video)) * counted_video
    loss_audio = squared_error(answer_audio, velocity(audio, noise_audio)) * counted_audio
    return FlowLoss(
        total=(config.video_weight * loss_video + config.audio_weight * loss_audio).mean(),
        sums=torch.stack([loss_video.sum(), loss_audio.sum()]).detach(),
        counts=torch.stack([counted_video.sum(), counted_audio.sum()]),
        num_unserved=(1 - is_served).sum(),
    )


def squared_error(answer: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the mean squared error of every sample, float32 [B]."""
    return (answer.float() - target).square().flatten(1).mean(1)
