"""WebDataset tars of media, as video2dataset writes them: key.mp4, key.txt and key.json together.

The text is the caption; the JSON may have caption, label, split, start_s and duration_s, which mean
what they mean in tables. Other members and other fields are ignored, and so are hidden members.

A tar is read by its headers; only captions are read whole. What is damaged is an error: clips would
be missing from the plan without a word.
"""

from __future__ import annotations

import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import groupby
from operator import itemgetter
from typing import BinaryIO

from pipeline.folders import UriError, check_uri, is_hidden
from pipeline.media import Clip
from pipeline.settings import ConfigError
from pipeline.sources.folder import caption_text
from pipeline.sources.rows import (
    MEDIA_SUFFIXES,
    UNTOLD_S,
    Source,
    folder_key,
    hashed_key,
    in_threads,
    read_fields,
    reading,
)
from pipeline.sources.table import json_object
from pipeline.storage import Folder

MAX_SIDECAR_BYTES = 16 << 20
# Brings a member's header, the captions before it and the header after it in one request.
REQUEST_BYTES = 1 << 16
# What tarfile raises on damage, beside its own errors.
DAMAGE = (tarfile.TarError, EOFError, ValueError, OverflowError, LookupError, MemoryError)
# A member, and its content if it is a text.
Member = tuple[tarfile.TarInfo, bytes | None]


def tars_source(folder: Folder, tars: list[str], num_skipped: int) -> Source:
    """Make a clip of every sample of the tars that has media.

    Keys of samples that several tars use get a hash of their tar's name.

    Raises:
        ConfigError: a damaged tar, a refused member, a sample that is there twice, no media.
    """
    listed = in_threads(lambda tar: _tar_clips(folder, tar), tars, "tars")
    pairs = [(clip, tar) for tar, (clips, _) in zip(tars, listed, strict=True) for clip in clips]
    if not pairs:
        raise ConfigError(
            f"--src {folder.root}: no media in {len(tars)} tars; expected members named key.mp4 "
            f"or another of {', '.join(sorted(MEDIA_SUFFIXES))}"
        )
    uses = Counter(clip.key for clip, _ in pairs)
    clips = [
        replace(clip, key=hashed_key(clip.key, f"{tar}/{clip.key}")) if uses[clip.key] > 1 else clip
        for clip, tar in pairs
    ]
    return Source("tars", folder.root, clips, num_skipped + sum(other for _, other in listed))


def _tar_clips(folder: Folder, tar: str) -> tuple[list[Clip], int]:
    """Return a tar's clips, and how many members are no part of one."""
    where = f"{folder.root}/{tar}"
    clips: dict[str, Clip] = {}
    num_members = num_used = 0
    with reading(where), folder.open(tar, REQUEST_BYTES) as file:
        for sample, members in _samples(_members(file, where), where):
            num_members += len(members)
            media = [m for suffix, (m, _) in members if suffix in MEDIA_SUFFIXES]
            texts = {suffix: data for suffix, (_, data) in members if data is not None}
            if not sample or not media:
                continue
            if len(media) > 1:
                raise ConfigError(f"{where} sample {sample!r} has {len(media)} media, expected one")
            uri = f"{tar}#{media[0].offset_data}+{media[0].size}/{media[0].name}"
            clip = _clip(sample, uri, texts, where)
            if clip.key in clips:
                raise ConfigError(f"{where}: two samples would have the key {clip.key}; rename one")
            clips[clip.key] = clip
            num_used += 1 + len(texts)
    return list(clips.values()), num_members - num_used


def _samples(
    members: Iterable[Member], where: str
) -> Iterator[tuple[str, list[tuple[str, Member]]]]:
    """Yield (key, [(suffix, member)]) of members that follow each other; key "" has no sample.

    Raises:
        ConfigError: a key comes again.
    """
    named = ((*_sample_and_suffix(member[0].name), member) for member in members)
    seen: set[str] = set()
    for sample, group in groupby(named, itemgetter(0)):
        if sample and sample in seen:
            raise ConfigError(
                f"{where} sample {sample!r} is there twice, or other members are in the midst of it"
            )
        seen.add(sample)
        yield sample, [(suffix, member) for _, suffix, member in group]


def _sample_and_suffix(name: str) -> tuple[str, str]:
    """Split a member's name at the first dot of its last part, as WebDataset does."""
    last = name.rpartition("/")[2]
    stem, dot, suffix = last.partition(".")
    if not stem or not dot:
        return "", ""
    return name[: len(name) - len(suffix) - 1], f".{suffix.lower()}"


def _clip(sample: str, uri: str, texts: dict[str, bytes], tar: str) -> Clip:
    where = f"{tar} member {sample}"
    row = json_object(texts[".json"], f"{where}.json") if ".json" in texts else {}
    told = {name: row.get(name) for name in ("start_s", "duration_s", "caption", "label", "split")}
    fields = read_fields(told, f"{where}.json")
    return Clip(
        key=folder_key(f"{sample}."),
        uri=uri,
        start_s=fields.start_s or 0.0,
        duration_s=fields.duration_s or UNTOLD_S,
        caption=caption_text(texts.get(".txt", b""), f"{where}.txt") or fields.caption,
        label=fields.label,
        split=fields.split,
    )


def _members(file: BinaryIO, where: str) -> Iterator[Member]:
    """Yield the plain files of a tar, with the content of captions.

    Raises:
        ConfigError: damage, with its offset; a link, or a name that leads out.
    """
    offset = 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # pyright: ignore[reportAttributeAccessIssue] (it keeps them all)
                if member.size < 0 or member.offset_data < offset + tarfile.BLOCKSIZE:
                    raise tarfile.ReadError("a header points backwards")
                offset = tar.offset
                member.name = member.name.removeprefix("./")  # as `tar cf x.tar .` writes them
                if member.isdir() or is_hidden(member.name):
                    continue
                _check_member(member, where)
                yield member, _sidecar(tar, member, where)
            offset = tar.offset
            _check_end(file, offset)
    except DAMAGE as error:
        raise ConfigError(
            f"{where} is damaged or cut off near byte {offset}: {error}; make or fetch it anew"
        ) from None


def _check_member(member: tarfile.TarInfo, where: str) -> None:
    name = f"{where} member {member.name!a}"
    if not member.isreg() or member.issparse():
        raise ConfigError(f"{name}: refused, it is no plain file but a link, a device or sparse")
    try:
        check_uri(member.name).encode()
    except UriError as error:
        raise ConfigError(f"{name}: refused, {error}") from None
    except UnicodeEncodeError:
        raise ConfigError(f"{name}: the name is not UTF-8") from None


def _sidecar(tar: tarfile.TarFile, member: tarfile.TarInfo, where: str) -> bytes | None:
    if _sample_and_suffix(member.name)[1] not in (".txt", ".json"):
        return None
    if member.size > MAX_SIDECAR_BYTES:
        raise ConfigError(
            f"{where} member {member.name!r}: {member.size} bytes of text, expected "
            f"{MAX_SIDECAR_BYTES} at most"
        )
    opened = tar.extractfile(member)
    assert opened is not None
    return opened.read()


def _check_end(file: BinaryIO, offset: int) -> None:
    """Python's tarfile takes any damaged header for the end; a real end is zeros to the last byte.

    Raises:
        ReadError: this is none.
    """
    file.seek(offset)
    block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError("the mark of the end is missing")
    while block:
        if block.strip(b"\0"):
            raise tarfile.ReadError("expected a header or zeros to the end")
        block = file.read(REQUEST_BYTES)
