"""WebDataset tars of media, as video2dataset writes them: key.mp4, key.txt and key.json together.

The text is the caption; the JSON may have caption, label, split, start_s and duration_s, which mean
what they mean in tables. Other members and other fields are ignored, and so are hidden members.

A tar is read by its headers; only captions are read whole. What is damaged is an error: clips would
be missing from the plan without a word.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterable, Iterator
from itertools import groupby
from operator import itemgetter
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa

from pipeline import format as fmt
from pipeline.folders import UriError, check_uri, is_hidden
from pipeline.settings import ConfigError
from pipeline.sources.folder import caption_text
from pipeline.sources.rows import (
    MEDIA_SUFFIXES,
    TEXT,
    UNTOLD_S,
    Listing,
    Source,
    check_fields,
    clip_batch,
    first_repeat,
    folder_keys,
    hashed_keys,
    in_threads,
    reading,
    versions,
)
from pipeline.sources.table import json_object
from pipeline.storage import Folder
from pipeline.tables import pc

MAX_SIDECAR_BYTES = 16 << 20
# Brings a member's header, the captions before it and the header after it in one request.
REQUEST_BYTES = 1 << 16
# What tarfile raises on damage, beside its own errors.
DAMAGE = (
    *(tarfile.TarError, EOFError, ValueError, OverflowError, LookupError, MemoryError),
    RecursionError,  # of thousands of headers for one member
)
# A member, and its content if it is a text.
Member = tuple[tarfile.TarInfo, bytes | None]
JSON_FIELDS = ("start_s", "duration_s", "caption", "label", "split")


class Sample(NamedTuple):
    """A sample with media: the text's caption, and what its JSON says by field, not checked."""

    name: str
    uri: str
    caption: str
    row: dict[str, Any]


def tars_source(folder: Folder, tars: list[str], num_skipped: int) -> Source:
    """Make a clip of every sample of the tars that has media.

    Raises:
        ConfigError: a tar can't be found. On reading: a damaged tar, a refused member, a sample
            that is there twice, no media.
    """
    state = fmt.canonical_json(versions(folder, tars))
    return Source("tars", folder.root, state, lambda: _read_tars(folder, tars, num_skipped))


def _read_tars(folder: Folder, tars: list[str], num_skipped: int) -> Listing:
    """List the samples; keys that several tars use get a hash of their tar's name."""
    listed = in_threads(lambda tar: _tar_clips(folder, tar), tars, "tars")
    keys = pa.concat_tables(listing.clips for listing in listed)["key"]
    if not len(keys):
        raise ConfigError(
            f"--src {folder.root}: no media in {len(tars)} tars; expected members named key.mp4 "
            f"or another of {', '.join(sorted(MEDIA_SUFFIXES))}"
        )
    uses = pc.value_counts(keys)
    shared = uses.field("values").filter(pc.greater(uses.field("counts"), 1))

    def named_apart(clips: pa.Table, tar: str) -> pa.Table:
        keys = clips["key"].combine_chunks()
        is_shared = pc.is_in(keys, shared)
        names = pc.binary_join_element_wise(
            pa.scalar(tar, TEXT), keys.filter(is_shared), pa.scalar("/", TEXT)
        )
        told = hashed_keys(keys.filter(is_shared), names)
        return clips.set_column(0, "key", pc.replace_with_mask(keys, is_shared, told))

    clips = [listing.clips for listing in listed]
    if len(shared):
        clips = [named_apart(part, tar) for part, tar in zip(clips, tars, strict=True)]
    num_skipped += sum(listing.num_skipped for listing in listed)
    return Listing(pa.concat_tables(clips), num_skipped)


def _tar_clips(folder: Folder, tar: str) -> Listing:
    """List a tar's clips, and count its members that are no part of one."""
    where = f"{folder.root}/{tar}"
    samples: list[Sample] = []
    num_members = num_used = 0
    with reading(where), folder.open(tar, REQUEST_BYTES) as file:
        for sample, members in _samples(_members(file, where), where):
            num_members += len(members)
            media = [m for suffix, (m, _) in members if suffix in MEDIA_SUFFIXES]
            texts = {suffix: data for suffix, (_, data) in members if data is not None}
            if not sample or not media:
                continue
            if len(media) > 1:
                raise ConfigError(
                    f"{where} sample {sample!r:.80} has {len(media)} media, expected one"
                )
            suffixes = [suffix for suffix, _ in members]
            if len(set(suffixes)) < len(suffixes):
                twice = max(suffixes, key=suffixes.count)
                raise ConfigError(f"{where} sample {sample!r:.80} has two members {twice:.80}")
            uri = f"{tar}#{media[0].offset_data}+{media[0].size}/{media[0].name}"
            samples.append(_sample(sample, uri, texts, where))
            num_used += 1 + len(texts)
    return Listing(_clips(samples, where), num_members - num_used)


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
                f"{where} sample {sample!r:.80} is there twice, or other members are in the midst "
                "of it"
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


def _sample(name: str, uri: str, texts: dict[str, bytes], tar: str) -> Sample:
    where = f"{tar} member {name}"
    caption = caption_text(texts.get(".txt", b""), f"{where}.txt")
    row = json_object(texts[".json"], f"{where}.json") if ".json" in texts else {}
    return Sample(name, uri, caption, {field: row.get(field) for field in JSON_FIELDS})


def _clips(samples: list[Sample], tar: str) -> pa.Table:
    """Name the samples, and check what their JSON says."""
    keys = pa.chunked_array(
        [folder_keys(pa.array([f"{sample.name}." for sample in samples], TEXT))]
    )
    if repeat := first_repeat(keys):
        raise ConfigError(f"{tar}: two samples would have the key {keys[repeat[0]]}; rename one")
    told = {field: [sample.row[field] for sample in samples] for field in JSON_FIELDS}
    fields = check_fields(told, len(samples), lambda row: f"{tar} member {samples[row].name}.json")
    captions = zip(
        [sample.caption for sample in samples], fields["caption"].to_pylist(), strict=True
    )
    columns = {
        **fields,
        "key": keys.chunk(0),
        "uri": [sample.uri for sample in samples],
        "start_s": fields["start_s"].fill_null(0.0),
        "duration_s": fields["duration_s"].fill_null(UNTOLD_S),
        "caption": [text or other for text, other in captions],
    }
    return pa.Table.from_batches([clip_batch(columns)])


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
            f"{where} is damaged or cut off near byte {offset}: {str(error) or 'too big'}; "
            "make or fetch it anew"
        ) from None


def _check_member(member: tarfile.TarInfo, where: str) -> None:
    name = f"{where} member {member.name!a:.80}"
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
            f"{where} member {member.name!r:.80}: {member.size} bytes of text, expected "
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
