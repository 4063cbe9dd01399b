"""A view: the columns that a run joins, the clips usable in all of them, and their crop.

Opening a view trusts nothing: every shard must be committed, belong to the plan, and have the
index and the size that its commit record states. Payloads are checked by the loader.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from pydantic.dataclasses import dataclass as settings_dataclass

from pipeline.format import (
    MODALITIES,
    OK,
    Column,
    FormatError,
    find_column,
    fingerprint,
    read_plan,
    status_counts,
)
from pipeline.settings import STRICT, ConfigError
from train.data.committed import PlanRows, read_index, read_plan_rows
from train.data.payload import PayloadReader
from train.latents import LatentSpec

Subset = Literal["train", "heldout", "all"]

MOST_MISSING = 0.01  # share of a subset's clips that may be unusable without being asked for


@settings_dataclass(frozen=True, kw_only=True, config=STRICT)
class DataConfig:
    """Which columns are read and how clips are cut.

    Attributes:
        root: the data set's folder.
        video: video column by codec, fingerprint or directory name; None is the only one there.
        audio: the same for audio.
        text: the same for text.
        seconds: length of a crop.
        heldout_share: share of the clips of split "train" that are held out, chosen by key.
        window_shards: shards whose clips are mixed with one another.
        missing: whether more than 1 % of unusable clips is an error, or they are dropped.
        verify_crc: check every payload the first time a process reads it.
        read_threads: threads that read.
        prefetch_steps: micro-batches read ahead.
    """

    root: str = "shards"
    video: str | None = None
    audio: str | None = None
    text: str | None = None
    seconds: float = Field(default=8.0, gt=0)
    heldout_share: float = Field(default=0.02, ge=0, lt=1)
    window_shards: int = Field(default=16, ge=1)
    missing: Literal["error", "drop"] = "error"
    verify_crc: bool = True
    read_threads: int = Field(default=2, ge=1)
    prefetch_steps: int = Field(default=3, ge=1)

    def __post_init__(self) -> None:
        if "://" in self.root:
            raise ConfigError(
                f"data.root is {self.root.partition('://')[0]}://…, expected a local folder: "
                "training reads columns from local disks only; copy the data set to one"
            )


@dataclass(frozen=True)
class View:
    """Usable clips in plan order, and where their latents lie. N clips.

    Attributes:
        view_id: names all that decides the stream of samples, but seed and batch size.
        plan_id: the plan's.
        config: the settings it was opened with.
        opened: the columns by modality.
        video: what the model gets of video: the shape of a crop, its clock, statistics.
        audio: the same of audio.
        null_text: float16 [S, D], the empty caption.
        rows_per_shard: int64 [num_shards], usable clips of each shard.
        clips: the N usable clips.
        index: ``INDEX_DTYPE`` [N] for "video" and "audio"; for "text" [number of captions].
        text_rows_per_shard: int64 [number of text shards].
    """

    view_id: str
    plan_id: str
    config: DataConfig
    opened: dict[str, Column]
    video: LatentSpec
    audio: LatentSpec
    null_text: torch.Tensor
    rows_per_shard: np.ndarray
    clips: PlanRows
    index: dict[str, np.ndarray]
    text_rows_per_shard: np.ndarray

    @property
    def num_clips(self) -> int:
        """Usable clips."""
        return len(self.clips.keys)

    @property
    def columns(self) -> dict[str, str]:
        """Directory names of the columns by modality."""
        return {modality: column.path.name for modality, column in self.opened.items()}

    @property
    def text_width(self) -> int:
        """Width D of a text token."""
        return self.null_text.shape[1]

    def text_place(self, text_row: int) -> tuple[int, int]:
        """Return the text shard of a caption and its row there."""
        ends = np.cumsum(self.text_rows_per_shard)
        shard = int(np.searchsorted(ends, text_row, side="right"))
        return shard, text_row - int(ends[shard] - self.text_rows_per_shard[shard])


def open_view(
    root: Path,
    config: DataConfig,
    subset: Subset = "train",
    time_multiple: Mapping[str, int] | None = None,
) -> View:
    """Open the columns of a data set and choose the usable clips.

    Args:
        root: the data set's folder.
        config: columns and crop.
        subset: "train" is split "train" without the held-out clips, "heldout" is the rest.
        time_multiple: what the number of latents in a crop must divide by, per modality: the
            model's patch along time. 1 where not named.

    Raises:
        FormatError: no data set, an uncommitted shard, damage, too few usable clips.
        ConfigError: the crop is shorter than one patch.
    """
    plan = read_plan(root)
    opened = {
        name: find_column(root, name, getattr(config, name), plan.plan_id) for name in MODALITIES
    }
    clips = read_plan_rows(root, plan)
    index = {
        name: read_index(
            column, plan.shard_rows(name == "text"), None if name == "text" else clips.keys
        )
        for name, column in opened.items()
    }
    lengths = {
        name: crop_length(opened[name], config.seconds, (time_multiple or {}).get(name, 1))
        for name in ("video", "audio")
    }
    usable = usable_rows(clips, index, lengths, config, subset)
    for name in lengths:
        index[name] = index[name][usable]
    clips = PlanRows(
        shards=clips.shards[usable],
        rows=clips.rows[usable],
        keys=tuple(clips.keys[row] for row in usable),
        splits=clips.splits[usable],
        text_rows=clips.text_rows[usable],
    )
    specs = {name: latent_spec(opened[name], index[name], lengths[name]) for name in lengths}
    identity = [
        plan.plan_id,
        {name: column.path.name for name, column in opened.items()},
        [asdict(spec) for spec in specs.values()],
        [config.seconds, config.heldout_share, config.window_shards, subset],
        hashlib.sha256(usable.astype("<i8").tobytes()).hexdigest(),
    ]
    return View(
        view_id=fingerprint(identity),
        plan_id=plan.plan_id,
        config=config,
        opened=opened,
        video=specs["video"],
        audio=specs["audio"],
        null_text=read_null_text(opened["text"], index["text"]),
        rows_per_shard=np.bincount(clips.shards, minlength=len(plan.shard_rows())),
        clips=clips,
        index=index,
        text_rows_per_shard=plan.shard_rows(text=True),
    )


def crop_length(column: Column, seconds: float, multiple: int) -> int:
    """Return the latents in a crop: whole ones that fit, rounded down to a multiple.

    Raises:
        ConfigError: not even one multiple fits.
    """
    rate_hz = column.spec.rate_hz
    latents = int(seconds * rate_hz + 1e-6)  # 0.3 s · 10 Hz is 2.9999…
    if latents < multiple:
        raise ConfigError(
            f"data.seconds={seconds} holds {latents} latents of {column.path.name} ({rate_hz} Hz), "
            f"the patch needs {multiple}; set at least {multiple / rate_hz:g} seconds"
        )
    return latents - latents % multiple


def subset_mask(clips: PlanRows, subset: Subset, heldout_share: float) -> np.ndarray:
    """Return which clips belong to a subset, bool [N].

    A clip is held out by its key alone, so that every view and every seed hold out the same.
    """
    digests = (hashlib.sha256(key.encode()).digest() for key in clips.keys)
    places = np.array([int.from_bytes(digest[:8], "big") / 2**64 for digest in digests])
    is_train = (clips.splits == "train") & (places >= heldout_share)
    return {"train": is_train, "heldout": ~is_train, "all": np.ones_like(is_train)}[subset]


def usable_rows(
    clips: PlanRows,
    index: dict[str, np.ndarray],
    lengths: dict[str, int],
    config: DataConfig,
    subset: Subset,
) -> np.ndarray:
    """Return the places of the clips of a subset that are there in all columns and long enough.

    Raises:
        FormatError: there is none, or more are unusable than ``config.missing`` allows.
    """
    statuses = [index["video"]["status"], index["audio"]["status"]]
    statuses.append(index["text"]["status"][clips.text_rows])
    # A clip counts under its first status that is not ok.
    status = np.select([codes != OK for codes in statuses], statuses, OK)
    is_long = np.all([index[name]["shape"][:, 0] >= lengths[name] for name in lengths], axis=0)
    wanted = subset_mask(clips, subset, config.heldout_share)
    usable = np.flatnonzero(wanted & (status == OK) & is_long)
    num_wanted, num_missing = int(wanted.sum()), int(wanted.sum()) - len(usable)
    counts = status_counts(status[wanted & (status != OK)])
    counts[f"shorter than {config.seconds:g} s"] = int((wanted & (status == OK) & ~is_long).sum())
    found = ", ".join(f"{name} {count}" for name, count in counts.items() if count) or "none"
    message = f"{num_missing} of {num_wanted} clips of subset {subset!r} can't be used ({found})"
    if not len(usable):
        raise FormatError(f"{message}: none is left; lower data.seconds or encode more clips")
    if config.missing == "error" and num_missing > MOST_MISSING * num_wanted:
        raise FormatError(f"{message}; encode them again, or set data.missing=drop")
    return usable


def latent_spec(column: Column, index: np.ndarray, length: int) -> LatentSpec:
    """Describe the crops of a column.

    Raises:
        FormatError: its clips differ in size, its dtype or its channels are not as expected.
    """
    spec = column.spec
    sizes = np.unique(index["shape"][:, 1 : len(spec.axes)], axis=0)
    if len(sizes) > 1:
        raise FormatError(
            f"{column.path}: clips differ along {spec.axes[1:]}: {sizes[0].tolist()} and "
            f"{sizes[1].tolist()}; encode all at one size"
        )
    if spec.dtype != "float16":
        raise FormatError(f"{column.path} holds {spec.dtype}, expected float16; encode it again")
    statistics = column.statistics()
    shape = (length, *sizes[0].tolist())
    if len(statistics["mean"]) != shape[spec.channel_axis]:
        raise FormatError(
            f"{column.path}: statistics of {len(statistics['mean'])} channels, but clips have "
            f"{shape[spec.channel_axis]}; encode the column again"
        )
    return LatentSpec(
        modality=spec.modality,
        axes=spec.axes,
        shape=shape,
        rate_hz=spec.rate_hz,
        offset_s=spec.offset_s,
        mean=tuple(statistics["mean"]),
        std=tuple(statistics["std"]),
    )


def read_null_text(column: Column, index: np.ndarray) -> torch.Tensor:
    """Read the empty caption, float16 [S, D].

    Raises:
        FormatError: it was not encoded, or not as float16.
    """
    if not len(index) or index["status"][0] != OK or column.spec.dtype != "float16":
        raise FormatError(
            f"{column.path}: caption 0, the empty one, is not there as float16; encode text again"
        )
    reader = PayloadReader(column, max_open=1, verify_crc=True)
    return torch.from_numpy(reader.read_row(0, 0, "the empty caption", index[0]))
