"""Which spans of its file a clip takes where the source doesn't say: one, or windows over all."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from pipeline.config import EncodeConfig
from pipeline.media import Clip, ClipError
from pipeline.sources.listing import UNTOLD_S, Source, timed_key
from pipeline.sources.threads import in_threads
from pipeline.storage import MediaStore


def with_spans(source: Source, config: EncodeConfig) -> Source:
    """Give every clip of unknown length one: ``clip.seconds``, or the windows of its file.

    With windows, every such file is opened (remote ones are fetched) to measure it.
    """
    untold = [clip for clip in source.clips if clip.duration_s == UNTOLD_S]
    lengths = _lengths(source.root, untold, config) if config.windows.seconds else {}
    clips = [
        spanned
        for clip in source.clips
        for spanned in _spans(clip, config, lengths.get(clip.uri, 0.0))
    ]
    return replace(source, clips=clips)


def _spans(clip: Clip, config: EncodeConfig, length_s: float) -> Iterator[Clip]:
    if clip.duration_s != UNTOLD_S:
        yield clip
        return
    windows = config.windows
    if not windows.seconds:
        yield replace(clip, duration_s=config.clip.seconds)
        return
    for k in range(num_windows(length_s - clip.start_s, config)):
        start_s = round(clip.start_s + k * windows.stride_seconds, 6)
        key = timed_key(clip.key, start_s)
        yield replace(clip, key=key, start_s=start_s, duration_s=windows.seconds)


def num_windows(length_s: float, config: EncodeConfig) -> int:
    """Return how many windows of so much media hold ``checks.min_seconds``; 1 at least.

    Windows start at k * stride; the last ones may be shorter than ``windows.seconds``.
    """
    wanted_s = min(max(config.checks.min_seconds, 1e-3), config.windows.seconds)
    last = (length_s - wanted_s + 1e-6) / config.windows.stride_seconds
    return max(1, math.floor(last) + 1)


def _lengths(root: str, clips: list[Clip], config: EncodeConfig) -> dict[str, float]:
    """Measure the media of each uri, in seconds; 0 where that fails: decoding will say why."""
    from pipeline.demux import media_length  # libav, which plans without windows don't need

    store = MediaStore(root, config.cache_dir, int(config.cache_gb * 1e9))

    def length_s(uri: str) -> float:
        try:
            with store.local(uri) as path:
                return media_length(path)
        except ClipError:
            return 0.0

    uris = list(dict.fromkeys(clip.uri for clip in clips))
    return dict(zip(uris, in_threads(length_s, uris, "lengths"), strict=True))
