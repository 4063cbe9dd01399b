"""Where clips come from: a folder of media, or VGGSound's csv. Lists clips, opens no media."""

from __future__ import annotations

import csv
import hashlib
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.config import EncodeConfig
from pipeline.media import Clip
from pipeline.settings import ConfigError

MEDIA_SUFFIXES = frozenset(
    (
        ".mp4",
        ".mov",
        ".mkv",
        ".webm",
        ".avi",
        ".flv",
        ".ts",
        ".mpg",
        ".ps",
        ".3gp",
        ".ogv",
        ".wmv",
        ".mxf",
    )
)
CSV_NAME = "vggsound.csv"


@dataclass(frozen=True)
class Source:
    """The clips of one source.

    Attributes:
        kind: "folder" or "vggsound".
        root: folder that every clip's uri is relative to.
        clips: all clips, in no order that matters.
        num_skipped: files that are no media.
    """

    kind: str
    root: Path
    clips: list[Clip]
    num_skipped: int = 0


def open_source(src: Path, config: EncodeConfig) -> Source:
    """List a source: a csv, a folder with ``vggsound.csv`` in it, or any folder of media.

    Raises:
        ConfigError: nothing there, no media, or a csv row that can't be read.
    """
    if not src.exists():
        raise ConfigError(f"--src {src}: no such file or folder")
    if src.is_file():
        if src.suffix != ".csv":
            raise ConfigError(f"--src {src}: expected a folder, or a VGGSound csv")
        return _vggsound(src, Path(config.media) if config.media else src.parent, config)
    if (src / CSV_NAME).is_file():
        return _vggsound(src / CSV_NAME, Path(config.media) if config.media else src, config)
    return _folder(src, config)


def _folder(root: Path, config: EncodeConfig) -> Source:
    media, num_skipped = [], 0
    for path in _files(root):
        if path.suffix.lower() in MEDIA_SUFFIXES:
            media.append(path)
        elif path.suffix not in (".txt", ".json") or not _has_media(path):
            num_skipped += 1
    if not media:
        raise ConfigError(
            f"--src {root}: no media among {num_skipped} files; expected files ending in "
            + ", ".join(sorted(MEDIA_SUFFIXES))
            + " (links that lead out of the folder are not followed)"
        )
    clips = [_folder_clip(root, path, config) for path in media]
    return Source("folder", root, _unique_keys(clips), num_skipped)


def _files(root: Path) -> list[Path]:
    """All files below ``root``, sorted; without hidden ones, dead links and links out of it."""
    found: list[Path] = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(folder, name) for name in sorted(names) if not name.startswith(".")]
    inside = root.resolve()

    def leads_inside(link: Path) -> bool:
        return link.is_file() and inside in link.resolve().parents

    return [path for path in found if not path.is_symlink() or leads_inside(path)]


def _uri(root: Path, path: Path) -> str:
    """Return the path below ``root`` as the plan stores it, which is UTF-8."""
    uri = path.relative_to(root).as_posix()
    try:
        uri.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"file name {uri!a} in {root} is not UTF-8; rename it") from None
    return uri


def _has_media(sidecar: Path) -> bool:
    return any(sidecar.with_suffix(suffix).exists() for suffix in MEDIA_SUFFIXES)


def _folder_clip(root: Path, path: Path, config: EncodeConfig) -> Clip:
    uri = _uri(root, path)
    sidecar = path.with_suffix(".txt")
    caption = ""
    if sidecar.is_file():
        try:
            caption = sidecar.read_text(encoding="utf-8-sig")  # Windows editors put a BOM
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"caption {sidecar}: expected UTF-8 text, {error}") from None
    return Clip(
        key=folder_key(uri),
        uri=uri,
        start_s=0.0,
        duration_s=config.clip.seconds,
        caption=" ".join(caption.split()),
        label=path.parent.name if path.parent != root else "",
    )


def folder_key(uri: str) -> str:
    """Return the key of a relative path: its stem, and 8 hex digits where that is ambiguous.

    A plain file name in the root keeps its stem; anything else (subfolders, odd characters)
    gets a hash of the whole path, so that two files never share a key.
    """
    stem = uri.rpartition(".")[0]
    plain = re.sub(r"[^A-Za-z0-9_-]+", "_", stem)
    if plain == stem and len(plain) <= 64:
        return plain
    return f"{plain[-64:]}-{hashlib.sha256(uri.encode()).hexdigest()[:8]}"


def _unique_keys(clips: list[Clip]) -> list[Clip]:
    """Tell files apart that differ in their suffix only (a.mp4, a.mkv)."""
    seen: dict[str, str] = {}
    unique = []
    for clip in clips:
        key = clip.key
        while key in seen:  # again where a file is named like another one's key
            name = f"{key} {clip.uri}".encode()
            key = f"{clip.key[:64]}-{hashlib.sha256(name).hexdigest()[:8]}"
        seen[key] = clip.uri
        unique.append(clip if key == clip.key else replace(clip, key=key))
    return unique


def _vggsound(path: Path, media: Path, config: EncodeConfig) -> Source:
    """Read VGGSound's own four columns: YouTube id, start second, label, split; no header."""
    if not media.is_dir():
        raise ConfigError(f"media folder {media}: no such folder")
    files = {file.stem: file for file in _files(media) if file.suffix.lower() in MEDIA_SUFFIXES}
    clips: dict[str, Clip] = {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            for line, row in enumerate(csv.reader(file, strict=True), start=1):
                clip = _vggsound_clip(row, f"{path} line {line}", config)
                if clip.key in clips:
                    raise ConfigError(f"{path} line {line}: {clip.key} is there twice; remove one")
                found = files.get(clip.key)
                uri = _uri(media, found) if found else f"{clip.key}.mp4"
                clips[clip.key] = replace(clip, uri=uri)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path} can't be read as csv: {error}") from None
    if not clips:
        raise ConfigError(f"{path} has no row; expected lines like -26aVYRtEAc,30,label,train")
    num_skipped = len(set(files) - set(clips))
    return Source("vggsound", media, list(clips.values()), num_skipped)


def _vggsound_clip(row: list[str], where: str, config: EncodeConfig) -> Clip:
    wanted = "expected id,start,label,split such as -26aVYRtEAc,30,female singing,train"
    if len(row) != 4:
        raise ConfigError(f"{where}: {len(row)} fields in {','.join(row)!r}, {wanted}")
    identity, start, label, split = (cell.strip() for cell in row)
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", identity):
        raise ConfigError(f"{where}: id {identity!r} is no YouTube id, {wanted}")
    if not re.fullmatch(r"\d{1,6}", start):
        raise ConfigError(f"{where}: start {start!r} is no whole number of seconds, {wanted}")
    if not re.fullmatch(r"[A-Za-z0-9_-]+", split):
        raise ConfigError(f"{where}: split {split!r} is no name, {wanted}")
    key = f"{identity}_{int(start):06d}"
    # The files are cut already: the clip starts at their second 0.
    return Clip(key, "", 0.0, config.clip.seconds, " ".join(label.split()), label, split)
