"""Exponential moving average of the weights, sharded like the fp32 master weights.

Every rank averages the shard it owns: exact, 4 bytes per parameter over all ranks, and no
communication. Only ``checkpoint`` gathers whole parameters, one at a time.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from train.engine import Engine
from train.schedule import ema_decay


class Ema:
    """The average over ``Engine.master_shards``; starts at the current weights."""

    def __init__(self, engine: Engine, limit: float) -> None:
        """Copy the master weights; ``limit`` is the decay reached behind the warm-up."""
        self.limit = limit
        self.shards = [shard.clone() for shard in engine.master_shards()]

    def update(self, engine: Engine, step: int) -> None:
        """Take in the weights behind optimiser step ``step``."""
        weight = 1 - ema_decay(step, self.limit)
        torch._foreach_lerp_(self.shards, engine.master_shards(), weight)

    def save(self, path: Path) -> None:
        """Write this rank's shards, float32, to a safetensors file."""
        save_file({f"{i:05d}": shard.cpu() for i, shard in enumerate(self.shards)}, path)

    def load(self, path: Path) -> None:
        """Restore this rank's shards in place."""
        saved = load_file(path)
        for i, shard in enumerate(self.shards):
            shard.copy_(saved[f"{i:05d}"])
