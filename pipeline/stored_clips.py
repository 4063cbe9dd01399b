"""Single clips of a data set: their rows in a video and an audio column, read by the index."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from pipeline import format as fmt
from pipeline.joint import ShardRows
from pipeline.media import Clip
from pipeline.plan_table import PlanTable

SHARDS_OPEN = 16  # indices kept in memory


@dataclass(frozen=True)
class StoredClip:
    """A clip with what is stored of it.

    Attributes:
        statuses: by modality of the chosen columns.
        latents: by modality, of what is ok.
    """

    clip: Clip
    shard: int
    row: int
    statuses: dict[str, str]
    latents: dict[str, np.ndarray]


class StoredClips:
    """The chosen columns of a data set, read row by row.

    Attributes:
        opened: by modality.
        shards: committed in all of them.

    Raises:
        FormatError: no such column, or neither picture nor sound.
    """

    def __init__(self, root: Path, plan: fmt.Plan, names: dict[str, str | None]) -> None:
        self.opened = {
            modality: fmt.find_column(root, modality, name, plan.plan_id)
            for modality, name in names.items()
            if name is not None or fmt.column_directories(root, modality)
        }
        if not self.opened:
            raise fmt.FormatError(f"{root} has neither a video nor an audio column; encode first")
        self._num_shards = len(plan.shard_rows())
        committed = (column.committed_shards() for column in self.opened.values())
        self.shards = set(range(self._num_shards)).intersection(*committed)
        self._table = PlanTable(root, plan)
        self._rows = lru_cache(SHARDS_OPEN)(
            lambda shard: {m: ShardRows(column, shard) for m, column in self.opened.items()}
        )

    def usable(self, shard: int, split: str | None) -> list[int]:
        """Return the rows of a shard that have a latent, of one split or of all."""
        is_ok = np.any([rows.index["status"] == fmt.OK for rows in self._rows(shard).values()], 0)
        usable = np.flatnonzero(is_ok).tolist()
        if split is None or not usable:
            return usable
        splits = self._table.read(shard, ["split"])["split"]
        return [row for row in usable if splits[row] == split]

    def places(self, keys: list[str]) -> list[tuple[int, int]]:
        """Return (shard, row) of clips.

        Raises:
            FormatError: one is not planned, or not committed in all chosen columns.
        """
        wanted, found = set(keys), dict[str, tuple[int, int]]()
        for shard in range(self._num_shards):
            if len(found) == len(wanted):
                break
            planned = self._table.read(shard, [])["key"]
            found |= {key: (shard, row) for row, key in enumerate(planned) if key in wanted}
        for key in keys:
            if key not in found or found[key][0] not in self.shards:
                why = "is not in the plan"
                if key in found:
                    why = f"is in shard {found[key][0]}, which is not committed in all columns"
                raise fmt.FormatError(f"clip {key!r:.100} {why}; expected one that is encoded")
        return [found[key] for key in dict.fromkeys(keys)]

    def read(self, shard: int, row: int) -> StoredClip:
        """Read what is stored of a clip.

        Raises:
            FormatError: it is damaged.
        """
        clip, rows = self._table.clips(shard)[row], self._rows(shard)
        statuses = {m: fmt.STATUSES[r.index["status"][row]] for m, r in rows.items()}
        latents = {m: r.array(row, clip.key) for m, r in rows.items() if r.is_ok(row)}
        return StoredClip(clip, shard, row, statuses, latents)
