"""Clips drawn from a view for sampling: their stored latents from second 0, and their origin.

Reads the shards that the drawn clips lie in, and no other.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from pipeline.format import ColumnSpec
from pipeline.plan_table import PlanTable
from train.data.order import shards_of
from train.data.part import Part
from train.data.payload import read_row
from train.data.view import View
from train.rng import seed_of


@dataclass(frozen=True)
class Drawn:
    """One clip drawn for sampling.

    Attributes:
        key: its key.
        uri: its source file.
        start_s: where in it the clip starts.
        caption: its caption.
        bucket: number of its shapes in ``View.buckets``.
        video: float16 [T, C, H, W], the crop from second 0.
        audio: float16 [L, F, C] or [L, C], the same.
        text: float16 [S, D], the caption's tokens.
    """

    key: str
    uri: str
    start_s: float
    caption: str
    bucket: int
    video: torch.Tensor
    audio: torch.Tensor
    text: torch.Tensor


def draw(view: View, num: int, seed: int) -> list[Drawn]:
    """Choose ``num`` clips of a view's only data set by the seed, or all if there are fewer.

    Raises:
        FormatError: a shard or a payload is damaged.
    """
    (part,) = view.parts
    random = np.random.default_rng(seed_of(seed, "draw"))
    ordinals = random.choice(part.num_clips, size=min(num, part.num_clips), replace=False)
    plan = PlanTable(part.root, part.plan)
    return [read_clip(view, part, plan, row) for row in part.nth(ordinals).tolist()]


def read_clip(view: View, part: Part, plan: PlanTable, clip: int) -> Drawn:
    """Read the clip of a row of the plan."""
    (shard,) = shards_of(part.first_rows, [clip]).tolist()
    row = clip - int(part.first_rows[shard])
    rows, bucket = part.shard_rows(shard), int(part.buckets_of(shard)[row])
    planned = plan.read(shard, ["uri", "start_s", "caption"])
    latents = {}
    for spec in (view.buckets[bucket].video, view.buckets[bucket].audio):
        column = part.opened[spec.modality]
        record = rows.index[spec.modality][row]
        whole = read_row(column.path, rows.tars[spec.modality], record, rows.keys[row])
        latents[spec.modality] = without_variance(whole, column.spec)[: spec.shape[0]]
    caption = part.caption_record(int(rows.text_rows[row]))
    text = read_row(part.opened["text"].path, caption.tar, caption.record, planned["caption"][row])
    return Drawn(
        key=rows.keys[row],
        uri=planned["uri"][row],
        start_s=planned["start_s"][row],
        caption=planned["caption"][row],
        bucket=bucket,
        video=torch.tensor(latents["video"]),
        audio=torch.tensor(latents["audio"]),
        text=torch.tensor(text),
    )


def without_variance(latent: np.ndarray, spec: ColumnSpec) -> np.ndarray:
    """Return the latent itself: of one stored as moments its mean, the likeliest value."""
    if not spec.stores_moments:
        return latent
    return np.split(latent, 2, axis=spec.channel_axis)[0]
