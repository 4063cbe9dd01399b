"""A folder of media, searched to the bottom; a caption is the .txt beside a file."""

from __future__ import annotations

from dataclasses import replace

from pipeline.media import Clip
from pipeline.settings import ConfigError
from pipeline.sources.rows import (
    MEDIA_SUFFIXES,
    UNTOLD_S,
    Source,
    folder_key,
    hashed_key,
    in_threads,
    media_files,
    reading,
    suffix_of,
)
from pipeline.storage import Folder

MAX_CAPTION_BYTES = 1 << 20


def folder_source(folder: Folder, files: list[str], num_skipped: int) -> Source:
    """Make a clip of every media file of a listing.

    Raises:
        ConfigError: no media, a caption that can't be read, a name that is not UTF-8.
    """
    media = media_files(files, folder.root)
    stems = {_stem(uri) for uri in media}
    sidecars = {uri for uri in files if suffix_of(uri) in (".txt", ".json") and _stem(uri) in stems}
    num_skipped += len(files) - len(media) - len(sidecars)
    if not media:
        raise ConfigError(
            f"--src {folder.root}: no media among {num_skipped} files; expected files ending in "
            + ", ".join(sorted(MEDIA_SUFFIXES))
            + ", or .tar (links that lead out of the folder are not followed)"
        )
    with_text = [uri for uri in media if f"{_stem(uri)}.txt" in sidecars]
    texts = in_threads(lambda uri: _caption(folder, f"{_stem(uri)}.txt"), with_text, "captions")
    captions = dict(zip(with_text, texts, strict=True))
    clips = [
        Clip(folder_key(uri), uri, 0.0, UNTOLD_S, captions.get(uri, ""), _parent_name(uri))
        for uri in media
    ]
    return Source("folder", folder.root, _unique_keys(clips), num_skipped)


def _stem(uri: str) -> str:
    return uri.rpartition(".")[0]


def _parent_name(uri: str) -> str:
    return uri.rpartition("/")[0].rpartition("/")[2]


def _caption(folder: Folder, uri: str) -> str:
    where = f"caption {folder.root}/{uri}"
    with reading(where):
        size = folder.stat(uri).size
        if size > MAX_CAPTION_BYTES:
            raise ConfigError(f"{where}: {size} bytes, expected {MAX_CAPTION_BYTES} at most")
        data = folder.read(uri, 0, size)
    return caption_text(data, where)


def caption_text(data: bytes, where: str) -> str:
    """Return a caption on one line.

    Raises:
        ConfigError: no UTF-8.
    """
    try:
        return " ".join(data.decode("utf-8-sig").split())  # Windows editors put a BOM
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}: expected UTF-8 text, {error}") from None


def _unique_keys(clips: list[Clip]) -> list[Clip]:
    """Tell files apart that differ in their suffix only (a.mp4, a.mkv)."""
    seen: set[str] = set()
    unique = []
    for clip in clips:
        key = clip.key
        while key in seen:  # again where a file is named like another one's key
            key = hashed_key(clip.key, f"{key} {clip.uri}")
        seen.add(key)
        unique.append(clip if key == clip.key else replace(clip, key=key))
    return unique
