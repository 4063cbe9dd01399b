"""The diffusion transformer: tokens, rotary positions, layers."""

from train.model.dit import DiT, ModelConfig, num_tokens, patchings_of

__all__ = ["DiT", "ModelConfig", "num_tokens", "patchings_of"]
