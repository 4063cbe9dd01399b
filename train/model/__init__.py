"""The diffusion transformer: tokens, rotary positions, layers."""

from train.model.dit import DiT, ModelConfig

__all__ = ["DiT", "ModelConfig"]
