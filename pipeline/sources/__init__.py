"""Where clips come from: folders of media, tables, VGGSound's csv, tars; local or by URL.

Lists clips; media are opened only to measure them for windows.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, replace
from pathlib import Path

from pipeline import format as fmt
from pipeline.config import EncodeConfig
from pipeline.folders import URL, normal_root, parent_and_name
from pipeline.media_cache import MediaCache
from pipeline.settings import ConfigError
from pipeline.sources.folder import folder_source
from pipeline.sources.rows import (
    CLIP_SCHEMA,
    MEDIA_SUFFIXES,
    Listing,
    Source,
    check_names,
    clip_table,
    clips_of,
    media_files,
    reading,
    suffix_of,
)
from pipeline.sources.spans import check_template, with_captions, with_spans
from pipeline.sources.table import TABLE_SUFFIXES, has_header, table_source
from pipeline.sources.tars import tars_source
from pipeline.sources.vggsound import CSV_NAME, vggsound_source
from pipeline.storage import Folder, LocalFolder, open_folder

__all__ = [
    "CLIP_SCHEMA",
    "MEDIA_SUFFIXES",
    "Listing",
    "Source",
    "clip_table",
    "clips_of",
    "open_source",
]


def open_source(src: str, config: EncodeConfig) -> Source:
    """Find a source; its ``read`` lists the clips.

    Args:
        src: a folder with media, tars or ``vggsound.csv`` in it, a table, or a tar; path or URL.
        config: ``media``, ``caption_template``, ``clip``, ``windows`` and the cache count here.

    Raises:
        ConfigError: nothing there, no media, or the cache that its media need can't be made. On
            reading: something in it that is refused, with its place.
    """
    if config.caption_template:
        check_template(config.caption_template)
    folder, name = _locate(src)
    source = _list_file(folder, name, config) if name else _list_folder(folder, config)
    if URL.match(source.root) or source.kind == "tars":
        MediaCache(config.cache_dir, int(config.cache_gb * 1e9))  # better fails now than per clip
    settings = [config.caption_template, config.clip.seconds, asdict(config.windows)]
    settings += [config.checks.min_seconds] if config.windows.seconds else []
    parts = [source.kind, source.root, source.state, settings]
    state = hashlib.sha256(fmt.canonical_json(parts).encode()).hexdigest()
    return replace(source, state=state, read=lambda: _read(source, config))


def _read(source: Source, config: EncodeConfig) -> Listing:
    listing = source.read()
    clips = with_spans(listing.clips, source.root, config)
    clips = with_captions(clips, config.caption_template) if config.caption_template else clips
    return replace(listing, clips=clips)


def _locate(src: str) -> tuple[str, str]:
    """Return the folder of a source, and the name of the file in it; "" where it is a folder."""
    root = normal_root(src)
    if URL.match(root):
        is_file = suffix_of(root) in TABLE_SUFFIXES | {".tar"}
    else:
        path = Path(root)
        if not path.exists():
            raise ConfigError(f"--src {src}: no such file or folder")
        is_file = path.is_file()
    return parent_and_name(root) if is_file else (root, "")


def _list_file(root: str, name: str, config: EncodeConfig) -> Source:
    folder = open_folder(root)
    if isinstance(folder, LocalFolder):  # a link that the user names may lead anywhere
        real = Path(normal_root(str(Path(root, name).resolve())))
        folder, name = LocalFolder(str(real.parent)), real.name
    if suffix_of(name) not in TABLE_SUFFIXES | {".tar"}:
        raise ConfigError(
            f"--src {folder.root}/{name}: expected a folder, a .tar, or a table: "
            + ", ".join(sorted(TABLE_SUFFIXES))
        )
    if suffix_of(name) == ".tar":
        _refuse_media_setting(config)
        return tars_source(folder, [name], 0)
    media = _media_folder(config.media or root)
    if suffix_of(name) == ".csv" and not has_header(folder, name):
        return vggsound_source(folder, name, media, config)
    return table_source(folder, name, media)


def _media_folder(address: str) -> Folder:
    folder = open_folder(address)
    if isinstance(folder, LocalFolder) and not Path(folder.root).is_dir():
        raise ConfigError(f"media folder {address}: no such folder")
    return folder


def _list_folder(root: str, config: EncodeConfig) -> Source:
    folder = open_folder(root)
    with reading(f"--src {root}"):
        if _has_file(folder, CSV_NAME):
            return _list_file(root, CSV_NAME, config)
        _refuse_media_setting(config)
        files, num_skipped = folder.list_files()
    tars = [uri for uri in files if suffix_of(uri) == ".tar"]
    check_names(tars, root)
    media = media_files(files, root)
    if tars and media:
        raise ConfigError(
            f"--src {root} holds both media (such as {media[0]}) and tars (such as {tars[0]}); "
            "put them in two folders, and name one"
        )
    if tars:
        return tars_source(folder, tars, num_skipped + len(files) - len(tars))
    return folder_source(folder, files, num_skipped, config)


def _has_file(folder: Folder, name: str) -> bool:
    try:
        folder.stat(name)
    except FileNotFoundError:
        return False
    return True


def _refuse_media_setting(config: EncodeConfig) -> None:
    if config.media:
        raise ConfigError(
            f"media={config.media}: only tables and VGGSound's csv have media elsewhere; a folder "
            "or a tar is named by --src alone"
        )
