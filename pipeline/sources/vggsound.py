"""VGGSound's own csv: YouTube id, start second, label, split; no header. The files are cut."""

from __future__ import annotations

import re
from collections.abc import Iterator

from pipeline import format as fmt
from pipeline.config import EncodeConfig
from pipeline.media import Clip
from pipeline.settings import ConfigError
from pipeline.sources.rows import Listing, Source, clip_table, media_files, reading
from pipeline.sources.table import content_hash, csv_rows
from pipeline.storage import Folder

CSV_NAME = "vggsound.csv"
WANTED = "expected id,start,label,split such as -26aVYRtEAc,30,female singing,train"


def vggsound_source(lists: Folder, name: str, media: Folder, config: EncodeConfig) -> Source:
    """List the media; find each row's file, ``<id>_<start, 6 digits>.<any>``, below ``media``.

    A row without a file is a clip all the same; decoding finds it missing.

    Raises:
        ConfigError: the media can't be listed. On reading: a row that is none, a clip that is there
            twice or has two files, nothing at all.
    """
    with reading(f"media folder {media.root}"):
        found, _ = media.list_files()
    found = media_files(found, media.root)
    files: dict[str, str] = {}
    twins: dict[str, str] = {}
    for uri in found:
        stem = uri.rpartition("/")[2].rpartition(".")[0]
        (twins if stem in files else files)[stem] = uri

    def read() -> Listing:
        clips = clip_table(_clips(lists, name, files, config))
        if not len(clips):
            raise ConfigError(f"{lists.root}/{name} has no row; {WANTED}")
        for key in clips["key"].to_pylist() if twins else ():
            if key in twins:
                raise ConfigError(
                    f"media folder {media.root}: {files[key]} and {twins[key]} are both named like "
                    f"the clip {key} of {name}; remove or rename one"
                )
        num_found = len(files.keys() & set(clips["key"].to_pylist()))
        return Listing(clips, len(found) - num_found)

    state = fmt.canonical_json([content_hash(lists, name), found])
    return Source("vggsound", media.root, state, read)


def _clips(lists: Folder, name: str, files: dict[str, str], config: EncodeConfig) -> Iterator[Clip]:
    seen: set[str] = set()
    for where, row in csv_rows(lists, name):
        clip = _clip(row, where, files, config)
        if clip.key in seen:
            raise ConfigError(f"{where}: {clip.key} is there twice; remove one")
        seen.add(clip.key)
        yield clip


def _clip(row: list[str], where: str, files: dict[str, str], config: EncodeConfig) -> Clip:
    if len(row) != 4:
        raise ConfigError(
            f"{where}: {len(row)} fields in {','.join(row)!r:.80}, {WANTED}; other tables have a "
            "header with the column uri"
        )
    identity, start, label, split = (cell.strip() for cell in row)
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", identity):
        raise ConfigError(f"{where}: id {identity!r:.80} is no YouTube id, {WANTED}")
    if not re.fullmatch(r"[0-9]{1,6}", start):
        raise ConfigError(f"{where}: start {start!r:.80} is no whole number of seconds, {WANTED}")
    if not re.fullmatch(r"[A-Za-z0-9_-]+", split):
        raise ConfigError(f"{where}: split {split!r:.80} is no name, {WANTED}")
    caption = "" if config.caption_template else " ".join(label.split())
    # The files are cut already: the clip starts at their second 0.
    key = f"{identity}_{int(start):06d}"
    uri = files.get(key, f"{key}.mp4")
    return Clip(key, uri, 0.0, config.clip.seconds, caption, label, split)
