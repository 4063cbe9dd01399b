"""What all sources share: the names and fields of clips, their captions and their spans."""

from __future__ import annotations

import contextlib
import hashlib
import math
import re
import string
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from pipeline.config import EncodeConfig
from pipeline.folders import UriError
from pipeline.media import Clip, ClipError
from pipeline.settings import ConfigError
from pipeline.storage import MediaStore

MEDIA_SUFFIXES = frozenset(
    (
        *(".mp4", ".mov", ".mkv", ".webm", ".avi", ".flv", ".ts", ".mpg", ".ps", ".3gp", ".ogv"),
        *(".wmv", ".mxf"),
    )
)
# A source that doesn't say how long a clip is; ``with_spans`` fills it in.
UNTOLD_S = 0.0
# The start in ms has 9 digits in keys.
MAX_START_S = 1e6
MAX_KEY_LENGTH = 80
FIELDS = ("uri", "start_s", "duration_s", "caption", "label", "split", "key")
NUM_THREADS = 8
REPORT_EVERY = 1000

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Source:
    """The clips of one source.

    Attributes:
        kind: "folder", "vggsound", "table" or "tars".
        root: folder or URL that every clip's uri is relative to.
        clips: all clips, in no order that matters.
        num_skipped: files, or members of tars, that are no part of a clip.
    """

    kind: str
    root: str
    clips: list[Clip]
    num_skipped: int = 0


def suffix_of(uri: str) -> str:
    """Return a name's suffix in lower case, with its dot; "" where there is none."""
    stem, dot, suffix = uri.rpartition("/")[2].rpartition(".")
    return f".{suffix.lower()}" if dot and stem else ""


def media_files(files: list[str], root: str) -> list[str]:
    """Return those of a listing that are media.

    Raises:
        ConfigError: a name is not UTF-8, which plans are.
    """
    media = [uri for uri in files if suffix_of(uri) in MEDIA_SUFFIXES]
    for uri in media:
        try:
            uri.encode()
        except UnicodeEncodeError:
            raise ConfigError(f"file name {uri!a} in {root} is not UTF-8; rename it") from None
    return media


def folder_key(uri: str) -> str:
    """Return the key of a relative path: its stem, and 8 hex digits where that is ambiguous.

    A plain file name in the root keeps its stem; anything else (subfolders, odd characters)
    gets a hash of the whole path, so that two files never share a key.
    """
    stem = uri.rpartition(".")[0] or uri
    plain = re.sub(r"[^A-Za-z0-9_-]+", "_", stem)
    if plain == stem and len(plain) <= 64:
        return plain
    return hashed_key(plain, uri)


def hashed_key(key: str, text: str, length: int = 64) -> str:
    """Return the end of a key and 8 hex digits of a text, ``length`` + 9 characters at most."""
    return f"{key[-length:]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def timed_key(key: str, start_s: float) -> str:
    """Return the key of a clip that starts within its file: with the start in ms."""
    start = f"_{round(start_s * 1000):09d}"
    if len(key) + len(start) > MAX_KEY_LENGTH:
        key = hashed_key(key, key, MAX_KEY_LENGTH - len(start) - 9)
    return key + start


@contextlib.contextmanager
def reading(what: str) -> Iterator[None]:
    """Turn what goes wrong while a source is read into an error that names it.

    Raises:
        ConfigError: it can't be opened, or the network fails.
    """
    try:
        yield
    except FileNotFoundError:
        raise ConfigError(f"{what}: no such file") from None
    except UriError as error:
        raise ConfigError(f"{what}: refused, {error}") from None
    except OSError as error:
        raise ConfigError(f"{what} can't be read: {error.strerror or error}") from None


def in_threads(
    function: Callable[[Item], Result], items: Sequence[Item], what: str
) -> list[Result]:
    """Return the function's results in the order of the items; progress of many on stderr."""
    results = []
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        try:
            for result in pool.map(function, items):
                results.append(result)
                if len(results) % REPORT_EVERY == 0:
                    sys.stderr.write(f"{len(results)} of {len(items)} {what} read\n")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return results


# -- the fields of a row


@dataclass(frozen=True)
class Fields:
    """A row with its types checked; None or "" where the row has nothing.

    Attributes:
        start_s: second of the file at which the clip starts.
        duration_s: its length at most.
        caption: on one line.
        label: on one line.
        split: "train" where the row has nothing.
        key: ``[A-Za-z0-9_-]+``.
    """

    uri: str
    start_s: float | None
    duration_s: float | None
    caption: str
    label: str
    split: str
    key: str


def read_fields(row: Mapping[str, Any], where: str) -> Fields:
    """Check a row.

    Raises:
        ConfigError: a field has another type or range than it should; with the row's place.
    """
    fields = Fields(
        uri=_text(row, "uri", where),
        start_s=_seconds(row, "start_s", where),
        duration_s=_seconds(row, "duration_s", where),
        caption=" ".join(_text(row, "caption", where).split()),
        label=" ".join(_text(row, "label", where).split()),
        split=_text(row, "split", where) or "train",
        key=_text(row, "key", where),
    )
    if fields.duration_s == 0:
        raise ConfigError(f"{where}: duration_s is 0, expected more")
    if not re.fullmatch(r"[A-Za-z0-9_-]+", fields.split):
        raise ConfigError(f"{where}: split {fields.split!r} is no name such as train or test")
    if not re.fullmatch(r"[A-Za-z0-9_-]*", fields.key) or len(fields.key) > MAX_KEY_LENGTH:
        raise ConfigError(
            f"{where}: key {fields.key!r}, expected letters, digits, _ and -, at most "
            f"{MAX_KEY_LENGTH} of them"
        )
    return fields


def _text(row: Mapping[str, Any], name: str, where: str) -> str:
    value = row.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ConfigError(f"{where}: {name} is {value!r:.80}, expected text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{where}: {name} {value!a:.80} is not Unicode") from None
    return value


def _seconds(row: Mapping[str, Any], name: str, where: str) -> float | None:
    value = row.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{where}: {name} is {value!r:.80}, expected a number of seconds")
    if not math.isfinite(value) or not 0 <= value < MAX_START_S:
        raise ConfigError(f"{where}: {name} is {value}, expected 0 to {MAX_START_S:g} seconds")
    return float(value)


# -- captions made of labels


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


def with_captions(source: Source, template: str) -> Source:
    """Caption the clips that have a label only."""
    if not template:
        return source
    parts = check_template(template)

    def caption(label: str) -> str:
        return " ".join("".join(text + label * follows for text, follows in parts).split())

    clips = [
        replace(clip, caption=caption(clip.label)) if clip.label and not clip.caption else clip
        for clip in source.clips
    ]
    return replace(source, clips=clips)


# -- spans


def with_spans(source: Source, config: EncodeConfig) -> Source:
    """Give every clip of unknown length one: ``clip.seconds``, or the windows of its file.

    With windows, every such file is opened (remote ones are fetched) to measure it.
    """
    untold = [clip for clip in source.clips if clip.duration_s == UNTOLD_S]
    lengths = _lengths(source.root, untold, config) if untold and config.windows.seconds else {}
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
    length_s = min(length_s, MAX_START_S)  # damaged files may claim to last for years
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
