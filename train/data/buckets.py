"""The shapes of steps: which clips can share a batch, over all data sets of a view."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pipeline.format import FormatError
from train.data.census import NOT_USABLE, Census, ClipClass
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
