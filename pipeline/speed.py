"""How fast a column was encoded: what its commit records and the clock of its latents tell."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipeline import format as fmt
from pipeline.files import map_ahead
from pipeline.records import CommitRecord, read_index, read_record

# Clip lengths are taken from the indices of this many shards, spread evenly. The plan is
# shuffled, so that 64 shards of 512 clips stand for the others.
SAMPLED_SHARDS = 64


@dataclass
class Speed:
    """Sums over the shards whose writer noted its time; ``seconds`` are those of one cell."""

    seconds: float = 0.0
    encode_s: float = 0.0
    ok: int = 0
    rates: list[tuple[float, int]] = field(default_factory=list)  # (ok clips a second, shard)

    def add(self, shard: int, record: CommitRecord) -> None:
        """Take in one shard."""
        if record.seconds:
            self.seconds += record.seconds
            self.encode_s += record.encode_s or 0.0
            self.ok += record.ok
            self.rates.append((record.ok / record.seconds, shard))

    def summary(self, clip_s: float | None) -> dict[str, Any] | None:
        """Return the rates of one cell, or None where no shard was timed.

        Args:
            clip_s: mean length of an ok clip, where it is known.
        """
        if not self.rates:
            return None
        per_s = self.ok / self.seconds
        slowest, shard = min(self.rates)
        return {
            "seconds": round(self.seconds, 3),
            "encode_s": round(self.encode_s, 3),
            "clips_per_s": round(per_s, 3),
            "clips_per_s_median_shard": round(float(np.median([r for r, _ in self.rates])), 3),
            "clips_per_s_slowest_shard": round(slowest, 3),
            "slowest_shard": shard,
            "clips_per_encode_s": round(self.ok / self.encode_s, 3) if self.encode_s else None,
            "hours_per_hour": round(per_s * clip_s, 3) if clip_s else None,
        }


def mean_clip_s(column: fmt.Column, shards: list[int], problems: list[str]) -> float | None:
    """Return the mean length of the ok clips of shards, None where the column has no clock."""
    if not shards or column.spec.rate_hz <= 0:
        return None
    places = np.linspace(0, len(shards) - 1, min(len(shards), SAMPLED_SHARDS)).astype(int)

    def read(shard: int) -> np.ndarray | fmt.FormatError | None:
        try:
            record = read_record(column, shard)
            return None if record is None else read_index(column, shard, record)
        except fmt.FormatError as error:
            return error

    latents, clips = 0, 0
    for index in map_ahead(column.path, read, [shards[place] for place in places]):
        if isinstance(index, fmt.FormatError):
            problems.append(str(index))
        elif index is not None:
            lengths = index["shape"][index["status"] == fmt.OK, 0]
            latents, clips = latents + int(lengths.sum()), clips + len(lengths)
    return latents / column.spec.rate_hz / clips if clips else None
