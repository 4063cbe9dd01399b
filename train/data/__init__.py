"""View, epoch order and loader over latent columns."""

from train.data.config import DataConfig, PartConfig
from train.data.view import View, open_view

__all__ = ["DataConfig", "PartConfig", "View", "open_view"]
