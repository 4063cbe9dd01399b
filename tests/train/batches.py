"""What tests of the loader share: views of small data sets, and batches as values to compare."""

from __future__ import annotations

import itertools
from typing import Any

from tests.train.columns import Dataset
from train.data.config import DataConfig
from train.data.loader import LatentLoader
from train.data.view import View, open_view
from train.latents import LatentBatch

GLOBAL_BATCH = 8


def view_of(dataset: Dataset, **config: Any) -> View:
    """Open a view of all clips, with its cache beside the data set unless that is remote."""
    chosen = {"seconds": 6.0, "window_shards": 2, "missing": "drop", "retry_s": 0.1, **config}
    if "cache_dir" not in chosen:
        chosen["cache_dir"] = str(dataset.root.with_name("cache"))
    if "mix" not in chosen:
        chosen["root"] = str(dataset.root)
    return open_view(DataConfig(**chosen), "all")


def loader_of(view: View, **changes: Any) -> LatentLoader:
    return LatentLoader(view, **{"seed": 5, "global_batch": GLOBAL_BATCH, **changes})


def rows_of(batch: LatentBatch) -> list[tuple]:
    """Return a batch as (sample, key, bytes of all tensors) for each sample."""
    return [
        (
            int(batch.samples[place]),
            batch.keys[place],
            batch.bucket,
            batch.video[place].numpy().tobytes(),
            batch.audio[place].numpy().tobytes(),
            bool(batch.has_video[place]),
            bool(batch.has_audio[place]),
            float(batch.audio_start_s[place]),
            batch.text[place][batch.text_mask[place]].numpy().tobytes(),
        )
        for place in range(len(batch.keys))
    ]


def global_batches(
    view: View,
    steps: int,
    num_ranks: int = 1,
    micro_batch: int = GLOBAL_BATCH,
    state: dict | None = None,
    **changes: Any,
) -> list[list[tuple]]:
    """Return each global batch, from all ranks, as sorted rows of ``rows_of``."""
    found: list[list[tuple]] = [[] for _ in range(steps)]
    for rank in range(num_ranks):
        layout = {"micro_batch": micro_batch, "rank": rank, "num_ranks": num_ranks}
        with loader_of(view, **layout, **changes) as loader:
            if state:
                loader.load_state_dict(state)
            size = changes.get("global_batch", GLOBAL_BATCH)
            for step, _ in itertools.product(
                range(steps), range(size // (num_ranks * micro_batch))
            ):
                found[step] += rows_of(next(loader))
    return [sorted(rows) for rows in found]


def keys_of(batches: list[list[tuple]]) -> list[str]:
    return [row[1] for rows in batches for row in rows]


def clip_of(key: str) -> int:
    return int(key.removeprefix("clip"))
