"""VGGSound's own csv: YouTube id, start second, label, split; no header. The files are cut."""

from __future__ import annotations

import re
from dataclasses import replace

from pipeline.config import EncodeConfig
from pipeline.media import Clip
from pipeline.settings import ConfigError
from pipeline.sources.rows import Source, media_files, reading
from pipeline.sources.table import csv_rows
from pipeline.storage import Folder

CSV_NAME = "vggsound.csv"
WANTED = "expected id,start,label,split such as -26aVYRtEAc,30,female singing,train"


def vggsound_source(lists: Folder, name: str, media: Folder, config: EncodeConfig) -> Source:
    """Read the csv and find each row's file, ``<id>_<start, 6 digits>.<any>``, below ``media``.

    A row without a file is a clip all the same; decoding finds it missing.

    Raises:
        ConfigError: a row that is none, a clip that is there twice, nothing at all.
    """
    with reading(f"media folder {media.root}"):
        found, _ = media.list_files()
    found = media_files(found, media.root)
    files = {uri.rpartition("/")[2].rpartition(".")[0]: uri for uri in found}
    clips: dict[str, Clip] = {}
    for where, row in csv_rows(lists, name):
        clip = _clip(row, where, config)
        if clip.key in clips:
            raise ConfigError(f"{where}: {clip.key} is there twice; remove one")
        clips[clip.key] = replace(clip, uri=files.get(clip.key, f"{clip.key}.mp4"))
    if not clips:
        raise ConfigError(f"{lists.root}/{name} has no row; {WANTED}")
    num_skipped = len(set(files) - set(clips))
    return Source("vggsound", media.root, list(clips.values()), num_skipped)


def _clip(row: list[str], where: str, config: EncodeConfig) -> Clip:
    if len(row) != 4:
        raise ConfigError(
            f"{where}: {len(row)} fields in {','.join(row)!r}, {WANTED}; other tables have a "
            "header with the column uri"
        )
    identity, start, label, split = (cell.strip() for cell in row)
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", identity):
        raise ConfigError(f"{where}: id {identity!r} is no YouTube id, {WANTED}")
    if not re.fullmatch(r"[0-9]{1,6}", start):
        raise ConfigError(f"{where}: start {start!r} is no whole number of seconds, {WANTED}")
    if not re.fullmatch(r"[A-Za-z0-9_-]+", split):
        raise ConfigError(f"{where}: split {split!r} is no name, {WANTED}")
    caption = "" if config.caption_template else " ".join(label.split())
    # The files are cut already: the clip starts at their second 0.
    key = f"{identity}_{int(start):06d}"
    return Clip(key, "", 0.0, config.clip.seconds, caption, label, split)
