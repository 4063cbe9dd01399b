"""A folder of media, searched to the bottom; a caption is the .txt beside a file."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa

from pipeline import format as fmt
from pipeline.config import EncodeConfig
from pipeline.media import Clip
from pipeline.settings import ConfigError
from pipeline.sources.rows import (
    MEDIA_SUFFIXES,
    TEXT,
    UNTOLD_S,
    Listing,
    Source,
    clip_table,
    folder_keys,
    hashed_keys,
    in_threads,
    media_files,
    reading,
    suffix_of,
    versions,
)
from pipeline.storage import Folder

MAX_CAPTION_BYTES = 1 << 20


def folder_source(
    folder: Folder, files: list[str], num_skipped: int, config: EncodeConfig
) -> Source:
    """Make a clip of every media file of a listing.

    Raises:
        ConfigError: no media, a name that is not UTF-8. On reading: a caption that can't be read.
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

    def read() -> Listing:
        texts = in_threads(lambda uri: _caption(folder, f"{_stem(uri)}.txt"), with_text, "captions")
        captions = dict(zip(with_text, texts, strict=True))
        clips = (
            Clip(key, uri, 0.0, UNTOLD_S, captions.get(uri, ""), _parent_name(uri))
            for key, uri in _keyed(media)
        )
        return Listing(clip_table(clips), num_skipped)

    told = [f"{_stem(uri)}.txt" for uri in with_text]
    told += media if config.windows.seconds else []  # which are cut by their length
    state = fmt.canonical_json([media, versions(folder, told)])
    return Source("folder", folder.root, state, read)


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


def _keyed(uris: list[str]) -> Iterator[tuple[str, str]]:
    """Yield (key, uri); tell files apart that differ in their suffix only (a.mp4, a.mkv)."""
    seen: set[str] = set()
    for uri, plain in zip(uris, folder_keys(pa.array(uris, TEXT)).to_pylist(), strict=True):
        key = plain
        while key in seen:  # again where a file is named like another one's key
            (key,) = hashed_keys(
                pa.array([plain], TEXT), pa.array([f"{key} {uri}"], TEXT)
            ).to_pylist()
        seen.add(key)
        yield key, uri
