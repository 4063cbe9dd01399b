"""A source that was read to the end, as objects that compare."""

from __future__ import annotations

from typing import NamedTuple

from pipeline.media import Clip
from pipeline.sources import Source, clips_of


class Listed(NamedTuple):
    kind: str
    root: str
    clips: list[Clip]
    num_skipped: int


def read(source: Source) -> Listed:
    listing = source.read()
    return Listed(source.kind, source.root, list(clips_of(listing.clips)), listing.num_skipped)
