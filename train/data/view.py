"""What a training run reads: data sets side by side, their usable clips, and the shapes of crops.

A view of any size opens at once: it holds counts per shard. What is known of every clip stays in
the census on disk, and the indices of a shard are read, and checked, when its turn comes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch

from pipeline.data_root import open_root
from pipeline.format import (
    MODALITIES,
    OK,
    Column,
    FormatError,
    find_column,
    fingerprint,
    read_plan,
)
from pipeline.settings import ConfigError
from train.data.buckets import Bucket, assign_buckets, bucket_of_kind, latent_spec
from train.data.census_cache import open_census
from train.data.classes import (
    CLIP_MODALITIES,
    Selection,
    Subset,
    has_too_few,
    reasons_in_words,
)
from train.data.config import DataConfig, PartConfig
from train.data.filters import parse_filter, shown
from train.data.part import Part, Source
from train.data.payload import read_row
from train.latents import LatentSpec

MOST_RATE_HZ = 1e6  # of latents
# What the columns of a modality have in common, in all data sets of a view.
COMMON_FIELDS = ("codec", "weights", "axes", "rate_hz", "offset_s", "dtype")


@dataclass(frozen=True)
class View:
    """The usable clips of one or several data sets.

    Attributes:
        view_id: names all that decides the stream of samples, but seed and batch size.
        plan_id: the plan's; of several parts, all joined by "+".
        config: the settings it was opened with.
        parts: the data sets.
        buckets: the shapes of steps, the one with the most clips first.
        null_text: float16 [S, D], the empty caption of the first part.
    """

    view_id: str
    plan_id: str
    config: DataConfig
    parts: tuple[Part, ...]
    buckets: tuple[Bucket, ...]
    null_text: torch.Tensor

    @property
    def num_clips(self) -> int:
        """Usable clips of all parts."""
        return sum(part.num_clips for part in self.parts)

    @property
    def video(self) -> LatentSpec:
        """What the model gets of video, in the shape that most clips have."""
        return self.buckets[0].video

    @property
    def audio(self) -> LatentSpec:
        """The same of audio."""
        return self.buckets[0].audio

    @property
    def text_width(self) -> int:
        """Width D of a text token."""
        return self.null_text.shape[1]


def open_view(
    config: DataConfig, subset: Subset = "train", time_multiple: Mapping[str, int] | None = None
) -> View:
    """Open data sets, count their clips unless this node has before, and choose the usable ones.

    Args:
        config: data sets, columns and crop.
        subset: "train" is split "train" without the held-out clips, "heldout" is the rest.
        time_multiple: what the number of latents in a crop must divide by, per modality: the
            model's patch along time. 1 where not named.

    Raises:
        FormatError: no data set, an uncommitted shard, damage, too few usable clips, or data sets
            that don't fit together.
        ConfigError: the crop is shorter than one patch, or the filter can't be read.
        OSError: a file can't be read.
    """
    sources = [open_source(config, part, subset, time_multiple or {}) for part in config.parts]
    check_agreement(sources)
    for source in sources:
        check_missing(source, config, subset)
    kinds, bucket_of = assign_buckets([s.census for s in sources], config.missing == "mask")
    specs = {name: latent_spec(sources, name) for name in CLIP_MODALITIES}
    buckets = tuple(bucket_of_kind(kind, count, specs, sources) for kind, count in kinds)
    total_weight = sum(source.config.weight for source in sources)
    # Two windows are in use while reading passes from one to the next.
    num_cached = 2 * config.window_shards + 32
    parts = tuple(
        Part(source, source.config.weight / total_weight, places, len(buckets), num_cached)
        for source, places in zip(sources, bucket_of, strict=True)
    )
    null_texts = [read_null_text(part) for part in parts]
    check_widths(parts, null_texts)
    return View(
        view_id=view_id_of(config, subset, parts, buckets),
        plan_id="+".join(part.plan.plan_id for part in parts),
        config=config,
        parts=parts,
        buckets=buckets,
        null_text=null_texts[0],
    )


def open_source(
    config: DataConfig, part: PartConfig, subset: Subset, time_multiple: Mapping[str, int]
) -> Source:
    """Open the columns of a data set and its census.

    Raises:
        FormatError, ConfigError, OSError: as ``open_view``.
    """
    root = open_root(part.root)
    plan = read_plan(root)
    opened = {
        name: find_column(root, name, getattr(part, name), plan.plan_id) for name in MODALITIES
    }
    for name, column in opened.items():
        check_spec(column, is_text=name == "text")
    lengths = {
        name: crop_length(opened[name], config.seconds, time_multiple.get(name, 1))
        for name in CLIP_MODALITIES
    }
    clip_filter = parse_filter(part.filter) if part.filter is not None else None
    selection = Selection(subset, config.heldout_share, lengths, clip_filter)
    census = open_census(config.cache_dir, root, plan, opened, selection)
    return Source(root, part, plan, opened, lengths, census)


def check_spec(column: Column, is_text: bool) -> None:
    """Check that the arrays of a column are such as batches are made of.

    Raises:
        FormatError: they are not; names the column and what is wrong.
    """
    spec = column.spec
    if spec.dtype != "float16":
        raise FormatError(f"{column.path} holds {spec.dtype}, expected float16; encode it again")
    first, num_axes = ("token", 2) if is_text else ("time", len(spec.axes))
    is_shaped = spec.axes[:1] == (first,) and "channel" in spec.axes[1:] and num_axes <= 4
    rate_hz = spec.rate_hz
    is_timed = is_text or (isinstance(rate_hz, int | float) and 0 < rate_hz <= MOST_RATE_HZ)
    if not (is_shaped and is_timed and len(spec.axes) == num_axes):
        raise FormatError(
            f"{column.path} has axes {spec.axes} at {rate_hz!r} Hz, expected {first!r} first, a "
            "channel, at most 4 in all, and latents per second; encode it again"
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


def check_agreement(sources: Sequence[Source]) -> None:
    """Check that latents of all data sets mean the same to a model.

    Raises:
        FormatError: they differ; names the field and both values.
    """
    first = sources[0]
    for source in sources[1:]:
        for modality in MODALITIES:
            one, two = first.opened[modality], source.opened[modality]
            for name in COMMON_FIELDS:
                expected, found = getattr(one.spec, name), getattr(two.spec, name)
                if found != expected:
                    raise FormatError(
                        f"{two.path}: {name} is {found}, but {expected} in {one.path}; the data "
                        f"sets of data.mix need one kind of {modality} latents: choose other "
                        "columns, or encode again"
                    )


def check_missing(source: Source, config: DataConfig, subset: Subset) -> None:
    """Check that enough of the wanted clips are usable.

    Raises:
        FormatError: none is, or more are missing than ``config.missing`` allows.
    """
    tally = source.census.head.tally
    chosen = f"clips of subset {subset!r}"
    if source.config.filter is not None:
        chosen += f" that pass data.filter {shown(source.config.filter)}"
    if not tally.wanted:
        raise FormatError(
            f"{source.root} has no {chosen}: of its {tally.planned}, {tally.outside} are outside "
            f"of the subset and {tally.filtered} don't pass; choose others (data.filter, "
            "data.heldout_share, or the splits of the plan)"
        )
    missing = tally.wanted - tally.complete
    usable = tally.complete
    if config.missing == "mask":
        usable += tally.video_only + tally.audio_only
    found = reasons_in_words(tally.reasons, config.seconds) or "none"
    message = f"{source.root}: {missing} of {tally.wanted} {chosen} can't be used ({found})"
    if not usable:
        raise FormatError(f"{message}: none is left; lower data.seconds or encode more clips")
    if config.missing == "error" and has_too_few(tally):
        raise FormatError(f"{message}; encode them again, or set data.missing=drop")


def read_null_text(part: Part) -> torch.Tensor:
    """Read the empty caption, float16 [S, D].

    Raises:
        FormatError: it was not encoded, or is damaged.
    """
    column, caption = part.opened["text"], part.caption_record(0)
    if caption.record["status"] != OK:
        raise FormatError(
            f"{column.path}: caption 0, the empty one, was not encoded; encode text again"
        )
    array = read_row(column.path, caption.tar, caption.record, "the empty caption")
    return torch.from_numpy(array)


def check_widths(parts: Sequence[Part], null_texts: Sequence[torch.Tensor]) -> None:
    """Check that text tokens are as wide in all data sets.

    Raises:
        FormatError: they differ; names both widths.
    """
    expected = null_texts[0].shape[1]
    for part, null_text in zip(parts, null_texts, strict=True):
        if null_text.shape[1] != expected:
            raise FormatError(
                f"{part.opened['text'].path}: tokens are {null_text.shape[1]} wide, but {expected} "
                f"in {parts[0].opened['text'].path}; the data sets of data.mix need one text codec"
            )


def view_id_of(
    config: DataConfig, subset: Subset, parts: Sequence[Part], buckets: Sequence[Bucket]
) -> str:
    """Return 8 hex digits that name all that decides the stream of samples, but seed and batch."""
    columns = [{name: column.path.name for name, column in part.opened.items()} for part in parts]
    identity = [
        [[part.plan.plan_id, part.census.head.content, part.weight] for part in parts],
        columns,
        [asdict(bucket) for bucket in buckets],
        [config.seconds, config.window_shards, config.tail, config.missing == "mask", subset],
    ]
    return fingerprint(identity)
