"""What a source leaves open: captions made of labels, and the spans of files that tell none."""

from __future__ import annotations

import contextlib
import math
import queue
import string
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import pyarrow as pa

from pipeline.child import ChildProcess
from pipeline.config import EncodeConfig
from pipeline.media import Clip, ClipError
from pipeline.settings import ConfigError
from pipeline.sources.rows import (
    CLIP_SCHEMA,
    MAX_START_S,
    REPEATED_TEXT,
    TEXT,
    UNTOLD_S,
    clip_table,
    clips_of,
    first_repeat,
    in_threads,
    mapped,
    timed_keys,
)
from pipeline.storage import MediaStore
from pipeline.tables import pc

# Processes that measure media, one file each at a time; 100 MB each.
NUM_CHILDREN = 4


def check_template(template: str) -> list[tuple[str, bool]]:
    """Split a template into texts, each with whether a label follows.

    Raises:
        ConfigError: a field other than {label}, or none, or a brace alone.
    """
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(f"caption_template {template!r}: {error}") from None
    fields = [(name, spec, how) for _, name, spec, how in parsed if name is not None]
    if set(fields) != {("label", "", None)}:
        raise ConfigError(
            f"caption_template {template!r}: expected the field {{label}} and no other, such as "
            '"the sound of {label}"'
        )
    return [(text, name is not None) for text, name, _, _ in parsed]


def with_captions(clips: pa.Table, template: str) -> pa.Table:
    """Caption the clips that have a label only."""
    parts = check_template(template)

    def caption(label: str) -> str:
        return " ".join("".join(text + label * follows for text, follows in parts).split())

    def captioned(batch: pa.RecordBatch) -> pa.Array:
        captions, labels = batch["caption"].cast(TEXT), batch["label"].cast(TEXT)
        wanted = pc.and_(pc.not_equal(labels, ""), pc.equal(captions, ""))
        return pc.if_else(wanted, mapped(labels, caption), captions).dictionary_encode()

    captions = pa.chunked_array(map(captioned, clips.to_batches()), REPEATED_TEXT)
    return clips.set_column(CLIP_SCHEMA.get_field_index("caption"), "caption", captions)


def with_spans(clips: pa.Table, root: str, config: EncodeConfig) -> pa.Table:
    """Give every clip of unknown length one: ``clip.seconds``, or the windows of its file.

    With windows, every such file is opened (remote ones are fetched) to measure it.

    Raises:
        ConfigError: a window would have the key of another clip.
    """
    untold = pc.equal(clips["duration_s"], UNTOLD_S)
    if not config.windows.seconds:
        durations = pc.if_else(untold, config.clip.seconds, clips["duration_s"])
        return clips.set_column(CLIP_SCHEMA.get_field_index("duration_s"), "duration_s", durations)
    uris = pc.unique(clips["uri"].filter(untold)).to_pylist()
    lengths = _lengths(root, uris, config) if uris else {}
    spans = clip_table(
        span for clip in clips_of(clips) for span in _windows(clip, config, lengths.get(clip.uri))
    )
    if repeat := first_repeat(spans["key"]):
        first, second = (spans["uri"][place].as_py() for place in repeat)
        raise ConfigError(
            f"two clips of {root} have the key {spans['key'][repeat[0]]}: of {first} and of "
            f"{second}; rename one"
        )
    return spans


def _windows(clip: Clip, config: EncodeConfig, length_s: float | None) -> Iterator[Clip]:
    if length_s is None or clip.duration_s != UNTOLD_S:
        yield clip
        return
    windows = config.windows
    num = num_windows(length_s - clip.start_s, config)
    starts_s = [round(clip.start_s + k * windows.stride_seconds, 6) for k in range(num)]
    keys = timed_keys(pa.array([clip.key] * num, TEXT), pa.array(starts_s))
    for key, start_s in zip(keys.to_pylist(), starts_s, strict=True):
        yield replace(clip, key=key, start_s=start_s, duration_s=windows.seconds)


def num_windows(length_s: float, config: EncodeConfig) -> int:
    """Return how many windows of so much media hold ``checks.min_seconds``; 1 at least.

    Windows start at k * stride; the last ones may be shorter than ``windows.seconds``.
    """
    length_s = min(length_s, MAX_START_S)  # damaged files may claim to last for years
    wanted_s = min(max(config.checks.min_seconds, 1e-3), config.windows.seconds)
    last = (length_s - wanted_s + 1e-6) / config.windows.stride_seconds
    return max(1, math.floor(last) + 1)


def _lengths(root: str, uris: list[str], config: EncodeConfig) -> dict[str, float]:
    """Measure the media of each uri, in seconds; 0 where that fails: decoding will say why."""
    store = MediaStore(root, config.cache_dir, int(config.cache_gb * 1e9))
    timeout_s = config.decode_timeout_s
    timeout_s += config.fetch_timeout_s if any(map(store.is_copied, uris)) else 0.0
    free = queue.SimpleQueue[ChildProcess]()

    def length_s(uri: str) -> float:
        child = free.get()
        try:
            return child.call(uri)
        except ClipError:
            return 0.0
        finally:
            free.put(child)

    with contextlib.ExitStack() as children:
        for _ in range(NUM_CHILDREN):
            child = ChildProcess(partial(_load_measure, store), timeout_s)
            free.put(children.enter_context(child))
        lengths = in_threads(length_s, uris, "lengths", NUM_CHILDREN)
    return dict(zip(uris, lengths, strict=True))


def _load_measure(store: MediaStore) -> Callable[[str], float]:
    """Return the function from a uri to seconds of media; runs in a child, which may hang."""
    from pipeline.demux import media_length  # libav, which the parent doesn't need

    def length_s(uri: str) -> float:
        with store.local(uri) as path:
            return media_length(path)

    return length_s
