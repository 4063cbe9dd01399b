"""The model of a run: its initial weights, and whether it fits all shapes of a view."""

from __future__ import annotations

import torch

from pipeline.settings import ConfigError
from train.config import TrainConfig
from train.data.buckets import Bucket
from train.data.view import View
from train.model import DiT
from train.objective.tasks import TASKS
from train.rng import seed_of


def new_model(config: TrainConfig, view: View) -> DiT:
    """Return the model with its initial weights, the same on all ranks.

    Raises:
        ConfigError: the latents of a bucket don't divide into the model's patches.
    """
    torch.manual_seed(seed_of(config.seed, "weights"))
    try:
        model = DiT(config.model, view.video, view.audio, view.text_width, len(TASKS))
    except ValueError as error:
        raise ConfigError(f"the model does not fit the data: {error}") from None
    for bucket in view.buckets:
        num_tokens(model, bucket)
    return model


def num_tokens(model: DiT, bucket: Bucket) -> int:
    """Return the tokens of a sample of a bucket.

    Raises:
        ConfigError: its latents don't divide into patches.
    """
    video, audio = bucket.video.shape, bucket.audio.shape
    try:
        return sum(model.num_tokens(video, audio))
    except ValueError as error:
        raise ConfigError(
            f"the model does not fit the {bucket.num_clips} clips of video {video} and audio "
            f"{audio}: {error}; or leave them out with data.filter"
        ) from None


def describe_model(model: DiT, view: View) -> str:
    """Return the model's size in words; before ZeRO-3 partitions it."""
    counts = [num_tokens(model, bucket) for bucket in view.buckets]
    tokens = f"{max(counts)} tokens a sample"
    if len(counts) > 1:
        tokens = f"{min(counts)} to {tokens} in {len(counts)} shapes"
    return f"{model.num_parameters / 1e6:.1f} M parameters, {tokens}"
