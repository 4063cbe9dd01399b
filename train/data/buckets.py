"""The shapes of steps: which clips can share a batch, and what the model is told of each shape."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from pipeline.format import FormatError
from pipeline.records import statistics_of
from train.data.census import NOT_USABLE, Census, ClipClass
from train.data.part import Source
from train.latents import LatentSpec


@dataclass(frozen=True)
class Bucket:
    """One shape of a step.

    Attributes:
        video: the shape of a crop, its clock, statistics; those are the same in all buckets.
        audio: the same for audio.
        num_clips: usable clips, over all parts.
    """

    video: LatentSpec
    audio: LatentSpec
    num_clips: int


def assign_buckets(
    censuses: Sequence[Census], is_masking: bool
) -> tuple[list[tuple[ClipClass, int]], list[list[int]]]:
    """Give every class of clips its bucket.

    Clips with picture and sound make the buckets. With ``is_masking``, a clip with one of the two
    goes into the largest bucket of its size, and where there is none makes one with the commonest
    size of the other.

    Returns:
        The buckets, the largest first, with their numbers of clips; and for every census the
        bucket of each of its classes, or ``NOT_USABLE``.

    Raises:
        FormatError: there are too many.
    """
    clips: Counter[ClipClass] = Counter()
    for census in censuses:
        for clip_class, count in zip(census.head.classes, class_totals(census), strict=True):
            clips[clip_class] += count
    complete = ordered({kind: count for kind, count in clips.items() if kind.is_complete})
    home = {kind: kind for kind in complete}
    if is_masking:
        for kind in ordered({kind: count for kind, count in clips.items() if kind not in home}):
            home[kind] = home_of(kind, complete, clips)
    totals: Counter[ClipClass] = Counter()
    for kind, bucket in home.items():
        totals[bucket] += clips[kind]
    buckets = ordered(totals)
    if len(buckets) > NOT_USABLE:
        raise FormatError(
            f"the clips come in {len(buckets)} shapes, at most {NOT_USABLE} fit; encode with fewer "
            "sizes (video.sizes), or leave a data set out of data.mix"
        )
    number = {kind: place for place, kind in enumerate(buckets)}
    places = [
        [number[home[kind]] if kind in home else NOT_USABLE for kind in census.head.classes]
        for census in censuses
    ]
    return [(kind, totals[kind]) for kind in buckets], places


def class_totals(census: Census) -> list[int]:
    """Return the clips of each class over all shards."""
    return census.class_counts.sum(axis=0, dtype="int64").tolist()


def ordered(clips: dict[ClipClass, int]) -> list[ClipClass]:
    """Return classes by their numbers of clips, the largest first; none without any clip."""
    there = [kind for kind, count in clips.items() if count]
    return sorted(there, key=lambda kind: (-clips[kind], kind.video or (), kind.audio or ()))


def home_of(
    kind: ClipClass, complete: Sequence[ClipClass], clips: dict[ClipClass, int]
) -> ClipClass:
    """Return the bucket of a class that lacks one modality."""
    name, other = ("video", "audio") if kind.audio is None else ("audio", "video")
    size = getattr(kind, name)
    for bucket in complete:
        if getattr(bucket, name) == size:
            return bucket
    sizes: Counter[tuple[int, ...]] = Counter()
    for each, count in clips.items():
        if getattr(each, other) is not None:
            sizes[getattr(each, other)] += count
    if not sizes:
        raise FormatError(
            f"no clip has {other}, so that its size is not known; encode {other}, or set "
            "data.missing=drop"
        )
    # The commonest; of two as common the smaller.
    commonest = min(sizes, key=lambda each: (-sizes[each], each))
    return replace(kind, **{other: commonest})


def latent_spec(sources: Sequence[Source], modality: str) -> LatentSpec:
    """Describe a modality's latents, with the statistics of all data sets; the shape is empty.

    Raises:
        FormatError: no shard holds a payload, or the numbers of channels differ.
    """
    spec = sources[0].opened[modality].spec
    sums = [source.census.head.sums[modality] for source in sources]
    for source, one in zip(sources, sums, strict=True):
        if one["count"] and len(one["sum"]) != len(sums[0]["sum"]):
            raise FormatError(
                f"{source.opened[modality].path}: statistics of {len(one['sum'])} channels, "
                f"but {len(sums[0]['sum'])} in {sources[0].opened[modality].path}"
            )
    statistics = statistics_of(sums)
    if statistics is None:
        raise FormatError(f"{sources[0].opened[modality].path} holds no encoded clip")
    return LatentSpec(
        modality=modality,
        axes=spec.axes,
        shape=(),
        rate_hz=spec.rate_hz,
        offset_s=spec.offset_s,
        mean=tuple(statistics["mean"]),
        std=tuple(statistics["std"]),
    )


def bucket_of_kind(
    kind: ClipClass, num_clips: int, specs: Mapping[str, LatentSpec], sources: Sequence[Source]
) -> Bucket:
    """Return the bucket of a class of clips.

    Raises:
        FormatError: its clips have not the channels that the statistics have.
    """
    shaped = {}
    for name, spec in specs.items():
        stored = list(getattr(kind, name))
        axis = spec.channel_axis - 1  # behind time
        per_channel = 2 if sources[0].opened[name].spec.stores_moments else 1
        expected = per_channel * len(spec.mean)
        if stored[axis] != expected:
            raise FormatError(
                f"{sources[0].opened[name].path}: {name} of sizes {stored} has {stored[axis]} "
                f"channels, but statistics are of {expected}; encode the column again"
            )
        stored[axis] = len(spec.mean)
        shaped[name] = replace(spec, shape=(sources[0].lengths[name], *stored))
    return Bucket(shaped["video"], shaped["audio"], num_clips)
