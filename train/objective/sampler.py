"""From noise to latents: Euler steps along the learned flow, with classifier-free guidance.

Pure functions. As in training a task is data: a given modality has time 0 at every step, so
that the same update leaves it as it is. Shapes: B batch, S text tokens, D text width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch

from train.latents import LatentSpec
from train.objective.flow import FlowConfig, Velocity, draw_noise, drop_text, modality_time
from train.objective.tasks import Role, Task

Pair = tuple[torch.Tensor, torch.Tensor]


def time_grid(task: Task, config: FlowConfig, steps: int) -> torch.Tensor:
    """Return the times of video and audio, float32 [steps + 1, 2], from 1 down to 0.

    The shifts are those of training. A modality that isn't generated stays at its own time.
    """
    t = torch.linspace(1, 0, steps + 1)
    video = modality_time(task.video, t, config.video_shift)
    audio = modality_time(task.audio, t, config.audio_shift)
    return torch.stack([video, audio], dim=1)


def euler(velocity_of: Callable[[Pair, torch.Tensor], Pair], x: Pair, times: torch.Tensor) -> Pair:
    """Follow a velocity field along straight steps.

    Args:
        velocity_of: (video and audio, their times float32 [2]) → velocities of both.
        x: video and audio at ``times[0]``.
        times: float32 [steps + 1, 2], one column per modality.

    Returns:
        Video and audio at ``times[-1]``.
    """
    video, audio = x
    for now, then in pairwise(times):
        v_video, v_audio = velocity_of((video, audio), now)
        step_video, step_audio = then - now
        video, audio = video + step_video * v_video, audio + step_audio * v_audio
    return video, audio


@torch.no_grad()
def sample(
    model: Velocity,
    task: Task,
    given: tuple[torch.Tensor | None, torch.Tensor | None],
    text: torch.Tensor,
    text_mask: torch.Tensor,
    null_text: torch.Tensor,
    specs: tuple[LatentSpec, LatentSpec],
    config: FlowConfig,
    steps: int,
    guidance: float,
    seed: int,
    keys: Sequence[int | str],
) -> Pair:
    """Generate what the task generates.

    Args:
        model: called as ``DiT.forward`` is.
        task: what is given and what is generated.
        given: standardised video and audio [B, *axes] of crops that start at their first
            latent; None, or ignored, where the task does not give it.
        text: [B, S, D].
        text_mask: bool [B, S].
        null_text: [S0, D], the empty caption.
        specs: of video and audio; their shapes are what is generated.
        config: the shifts of training.
        steps: Euler steps, one forward each.
        guidance: 1 follows the text as learned, at no extra cost; above 1 leads away from the
            empty caption, in a forward of twice the batch.
        seed: of the noise.
        keys: one per sample, keys its noise in any batch.

    Returns:
        Standardised video and audio, float32 [B, *axes]; the given one as it came. A modality
        that the task neither gives nor generates is left as noise.

    Raises:
        ValueError: a modality that the task needs is not there.
    """
    device = text.device
    x = (
        start(task.video, given[0], specs[0], device, seed, keys),
        start(task.audio, given[1], specs[1], device, seed, keys),
    )
    guided = guidance != 1
    copies = 2 if guided else 1
    no_text = torch.arange(copies * len(keys), device=device) >= len(keys)
    texts = drop_text(text.repeat(copies, 1, 1), text_mask.repeat(copies, 1), null_text, no_text)
    task_number = torch.full_like(no_text, task.number, dtype=torch.int64)
    start_s = torch.zeros(len(no_text), device=device)

    def velocity_of(x: Pair, times: torch.Tensor) -> Pair:
        video, audio = (y.repeat(copies, *[1] * (y.ndim - 1)) for y in x)
        t_video, t_audio = times[:, None].expand(2, len(no_text))
        answers = model(video, audio, t_video, t_audio, task_number, *texts, start_s, start_s)
        return (guide(answers[0], guidance), guide(answers[1], guidance)) if guided else answers

    return euler(velocity_of, x, time_grid(task, config, steps).to(device))


def guide(answers: torch.Tensor, guidance: float) -> torch.Tensor:
    """Join velocities [2·B, ...], with the text and then without it, to [B, ...]."""
    with_text, without = answers.chunk(2)
    return without + guidance * (with_text - without)


def start(
    role: Role,
    given: torch.Tensor | None,
    spec: LatentSpec,
    device: torch.device,
    seed: int,
    keys: Sequence[int | str],
) -> torch.Tensor:
    """Return where one modality starts, float32 [B, *axes]: the given latents, or noise."""
    if not role.given:
        return draw_noise(spec.shape, device, f"sample {spec.modality}", seed, keys)
    if given is None:
        raise ValueError(f"the task is given {spec.modality}, but there is none; pass its latents")
    return given.to(device, torch.float32)
