"""View, epoch order and loader over latent columns."""

from train.data.config import DataConfig, PartConfig
from train.data.loader import LatentLoader
from train.data.view import View, open_view

__all__ = ["DataConfig", "LatentLoader", "PartConfig", "View", "open_view"]
