"""The model of a run: its initial weights, and whether it fits all shapes of a view."""

from __future__ import annotations

import torch

from pipeline.settings import ConfigError
from train.config import TrainConfig
from train.data.view import View
from train.model import DiT, ModelConfig, num_tokens, patchings_of
from train.objective.tasks import TASKS
from train.rng import seed_of


def new_model(config: TrainConfig, view: View) -> DiT:
    """Return the model with its initial weights, the same on all ranks.

    Raises:
        ConfigError: the latents of a bucket don't divide into the model's patches.
    """
    tokens_by_bucket(config.model, view)
    torch.manual_seed(seed_of(config.seed, "weights"))
    return DiT(config.model, view.video, view.audio, view.text_width, len(TASKS))


def tokens_by_bucket(config: ModelConfig, view: View) -> list[int]:
    """Return the tokens of a sample of each bucket.

    Raises:
        ConfigError: the latents of a bucket don't divide into patches; names both.
    """
    counts = []
    for number, bucket in enumerate(view.buckets):
        shapes = (bucket.video.shape, bucket.audio.shape)
        try:
            counts.append(num_tokens(patchings_of(config, view.video, view.audio), shapes))
        except ValueError as error:
            raise ConfigError(
                f"the model does not fit bucket {number} ({bucket.num_clips} clips of video "
                f"{shapes[0]} and audio {shapes[1]}): {error}"
            ) from None
    return counts


def describe_model(model: DiT, view: View) -> str:
    """Return the model's size in words; before ZeRO-3 partitions it."""
    counts = tokens_by_bucket(model.config, view)
    tokens = f"{max(counts)} tokens a sample"
    if len(counts) > 1:
        tokens = f"{min(counts)} to {tokens} in {len(counts)} shapes"
    return f"{model.num_parameters / 1e6:.1f} M parameters, {tokens}"
