"""What a source is, and the rules by which its clips are named. Opens nothing."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.addresses import UriError
from pipeline.media import Clip
from pipeline.settings import ConfigError

MEDIA_SUFFIXES = frozenset(
    (
        *(".mp4", ".mov", ".mkv", ".webm", ".avi", ".flv", ".ts", ".mpg", ".ps", ".3gp", ".ogv"),
        *(".wmv", ".mxf"),
    )
)
# A source that doesn't say how long a clip is; ``pipeline.sources.spans`` fills it in.
UNTOLD_S = 0.0
# The start in ms has 9 digits in keys.
MAX_START_S = 1e6
MAX_KEY_LENGTH = 80


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
