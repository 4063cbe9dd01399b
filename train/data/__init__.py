"""View, epoch order and loader over latent columns."""

from train.data.loader import LatentLoader
from train.data.view import DataConfig, View, open_view

__all__ = ["DataConfig", "LatentLoader", "View", "open_view"]
