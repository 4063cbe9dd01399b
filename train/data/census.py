"""The census of a data set: what each planned clip is good for in a view, in a folder of tables.

It is made once (``train.data.survey``) and kept in the node's cache. Whatever has a value per clip
stays in its file and is read by ranges, so that opening a census of any size costs the same.

    head.json           classes, counts, sums and hashes; written last
    codes.bin           uint8 [N], class of every planned clip, or NOT_USABLE
    text_rows.bin       int64 [N], row of its caption
    keys.bin            keys of the clips, each shard's joined by newlines
    range_crc32c.bin    uint32 [num_shards, 3], of each shard's range in these three files
    key_ends.bin        int64 [num_shards], where each shard's keys end
    class_counts.bin    int32 [num_shards, num_classes]
    MODALITY.bin        uint32 [shards of that column], crc32c of their indices

The head's hash covers the tables from range_crc32c on, and is checked when a census is opened; a
shard's ranges are checked whenever they are read.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import field, replace
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import google_crc32c
import numpy as np
from pydantic import TypeAdapter
from pydantic.dataclasses import dataclass

from pipeline.files import write_durably
from pipeline.format import MODALITIES, FormatError

NOT_USABLE = 255  # code of a clip, and bucket of a row, that is left out
CENSUS_VERSION = 2
HEAD_NAME = "head.json"
RANGES = ("codes", "text_rows", "keys")  # what there is of every clip

Size = tuple[int, ...]


@dataclass(frozen=True)
class ClipClass:
    """What clips of one kind have to offer: sizes along all axes but time, None where nothing."""

    video: Size | None
    audio: Size | None

    @property
    def is_complete(self) -> bool:
        """Whether there are both picture and sound."""
        return None not in (self.video, self.audio)


@dataclass(frozen=True)
class Tally:
    """Clips counted.

    Attributes:
        planned: of the plan.
        heldout: of split "train" that are held out by their key, whatever the subset.
        outside: not of the subset: held out or not, or of another split.
        filtered: of the subset, but not what the filter asks for.
        wanted: the rest; all below are of these.
        complete: usable in both modalities.
        video_only: usable as video alone.
        audio_only: usable as sound alone.
        statuses: by modality, how many clips have which status; "short" is shorter than the crop.
        reasons: why clips are not complete, by the first status that is not ok.
    """

    planned: int = 0
    heldout: int = 0
    outside: int = 0
    filtered: int = 0
    wanted: int = 0
    complete: int = 0
    video_only: int = 0
    audio_only: int = 0
    statuses: dict[str, dict[str, int]] = field(default_factory=dict)
    reasons: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class CensusHead:
    """What a census says of the data set as a whole.

    Attributes:
        version: of its files.
        content: 64 hex digits that name all it says, equal wherever it was made.
        clips: 64 hex digits over what it says of every clip.
        classes: what the codes of clips stand for.
        sums: by modality, "channels" of all commit records added up; None without a payload.
        tally: clips counted.
    """

    version: int
    content: str
    clips: str
    classes: tuple[ClipClass, ...]
    sums: dict[str, dict[str, Any]]
    tally: Tally


HEAD_TYPE = TypeAdapter(CensusHead)


def content_of(head: CensusHead, tables: Mapping[str, np.ndarray]) -> str:
    """Return the hash of a head, but for its own ``content``, and of the tables per shard."""
    digest = hashlib.sha256(HEAD_TYPE.dump_json(replace(head, content="")))
    for name in sorted(tables):
        digest.update(tables[name].tobytes())
    return digest.hexdigest()


class CensusWriter:
    """Writes a census shard by shard; a context manager.

    Args:
        folder: an empty folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._hash = hashlib.sha256()
        self._files: dict[str, BinaryIO] = {}
        self._range_crcs: list[list[int]] = []
        self._key_ends: list[int] = []
        self._counts: list[np.ndarray] = []
        self._crcs: dict[str, list[int]] = {"video": [], "audio": []}

    def __enter__(self) -> CensusWriter:
        for name in RANGES:
            self._files[name] = (self._folder / f"{name}.bin").open("wb")
        return self

    def __exit__(self, *exception: object) -> None:
        for file in self._files.values():
            file.close()

    def add(
        self, codes: np.ndarray, text_rows: np.ndarray, keys: Sequence[str], crcs: dict[str, int]
    ) -> None:
        """Append a shard.

        Args:
            codes: uint8 [R], place of each clip's class in the head, or ``NOT_USABLE``.
            text_rows: int64 [R].
            keys: R keys.
            crcs: crc32c of the shard's index by modality: "video" and "audio".
        """
        joined = "\n".join(keys).encode()
        ranges = (codes.astype(np.uint8).tobytes(), text_rows.astype("<i8").tobytes(), joined)
        for file, data in zip(self._files.values(), ranges, strict=True):
            file.write(data)
            self._hash.update(data)
        self._range_crcs.append([google_crc32c.value(data) for data in ranges])
        self._key_ends.append((self._key_ends[-1] if self._key_ends else 0) + len(joined))
        counts = np.bincount(codes[codes != NOT_USABLE])
        self._counts.append(counts.astype(np.int32))
        for name, values in self._crcs.items():
            values.append(crcs[name])

    def finish(
        self,
        classes: Sequence[ClipClass],
        sums: dict[str, dict[str, Any]],
        tally: Tally,
        text_crcs: Sequence[int],
    ) -> None:
        """Write what is known at the end, and wait until all is on the disk."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        counts = np.zeros((len(self._counts), len(classes)), "<i4")
        for row, found in zip(counts, self._counts, strict=True):
            row[: len(found)] = found
        tables = {name: np.array(crcs, "<u4") for name, crcs in self._crcs.items()}
        tables |= {"text": np.array(text_crcs, "<u4"), "class_counts": counts}
        tables |= {"key_ends": np.array(self._key_ends, "<i8")}
        tables |= {"range_crc32c": np.array(self._range_crcs, "<u4")}
        for name, table in tables.items():
            write_durably(self._folder / f"{name}.bin", table.tobytes())
        head = CensusHead(CENSUS_VERSION, "", self._hash.hexdigest(), tuple(classes), sums, tally)
        head = replace(head, content=content_of(head, tables))
        write_durably(self._folder / HEAD_NAME, HEAD_TYPE.dump_json(head))


class Census:
    """A census on disk, opened for reading; its methods may be called in any thread.

    Args:
        folder: its folder.
        rows_per_shard: int64 [num_shards], from the plan.
        num_text_shards: from the plan.

    Attributes:
        head: what it says of the data set as a whole.
        first_rows: int64 [num_shards + 1], planned clips before each shard.
        class_counts: int32 [num_shards, num_classes].
        index_crc32c: uint32 [shards of the column], by modality.

    Raises:
        FormatError: it is not whole, or not of this plan.
    """

    def __init__(self, folder: Path, rows_per_shard: np.ndarray, num_text_shards: int) -> None:
        self.folder = folder
        self.head = self._read_head()
        num_shards, num_rows = len(rows_per_shard), int(rows_per_shard.sum())
        shards_of = {"text": num_text_shards}
        tables = {
            "range_crc32c": self._table("range_crc32c", "<u4", num_shards, len(RANGES)),
            "key_ends": self._table("key_ends", "<i8", num_shards),
            "class_counts": self._table("class_counts", "<i4", num_shards, len(self.head.classes)),
        }
        tables |= {n: self._table(n, "<u4", shards_of.get(n, num_shards)) for n in MODALITIES}
        if self.head.content != content_of(self.head, tables):
            raise self._damaged(f"{HEAD_NAME} and tables are not what was written")
        self.first_rows = np.concatenate([[0], np.cumsum(rows_per_shard)]).astype(np.int64)
        self.class_counts = tables["class_counts"]
        self.index_crc32c = {name: tables[name] for name in MODALITIES}
        self._range_crc32c = tables["range_crc32c"]
        self._key_ends = np.concatenate([[0], tables["key_ends"]])
        nbytes = {"codes": num_rows, "text_rows": 8 * num_rows, "keys": int(self._key_ends[-1])}
        self._files = {name: self._open(f"{name}.bin", nbytes[name]) for name in RANGES}

    def __reduce__(self) -> NoReturn:
        raise TypeError("a view has open files: open it in the process that uses it (open_view)")

    def codes(self, shard: int) -> np.ndarray:
        """Return the codes of a shard's clips, uint8 [R]."""
        first, end = self.first_rows[shard : shard + 2].tolist()
        return np.frombuffer(self._read("codes", shard, first, end), np.uint8)

    def text_rows(self, shard: int) -> np.ndarray:
        """Return the rows of the captions of a shard's clips, int64 [R]."""
        first, end = (8 * self.first_rows[shard : shard + 2]).tolist()
        return np.frombuffer(self._read("text_rows", shard, first, end), "<i8")

    def keys(self, shard: int) -> list[str]:
        """Return the keys of a shard's clips."""
        first, end = self._key_ends[shard : shard + 2].tolist()
        return self._read("keys", shard, first, end).decode().split("\n")

    def _read_head(self) -> CensusHead:
        with self._open(HEAD_NAME) as file:
            data = file.read()
        try:
            version = json.loads(data)["version"]
            if version == CENSUS_VERSION:
                return HEAD_TYPE.validate_json(data)
        except (KeyError, TypeError, ValueError) as error:
            raise self._damaged(f"{HEAD_NAME}: {str(error).splitlines()[0]}") from None
        raise self._damaged(f"version {version}, expected {CENSUS_VERSION}")

    def _table(self, name: str, dtype: str, *shape: int) -> np.ndarray:
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        with self._open(f"{name}.bin", nbytes) as file:
            return np.frombuffer(file.read(), dtype).reshape(shape)

    def _open(self, name: str, nbytes: int | None = None) -> BinaryIO:
        try:
            file = (self.folder / name).open("rb", buffering=0)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise self._damaged(f"{name}: {error.strerror}") from None
        found = os.fstat(file.fileno()).st_size
        if nbytes not in (None, found):
            file.close()
            raise self._damaged(f"{name}: {found} bytes, expected {nbytes}")
        return file

    def _read(self, name: str, shard: int, first: int, end: int) -> bytes:
        """Read a range; not by mapping, for a file cut short would then kill the process."""
        data = os.pread(self._files[name].fileno(), end - first, first)
        if len(data) != end - first:
            raise self._damaged(f"{name}.bin was cut short, expected at least {end} bytes")
        if google_crc32c.value(data) != self._range_crc32c[shard, RANGES.index(name)]:
            raise self._damaged(f"{name}.bin: other bytes of shard {shard} than were written")
        return data

    def _damaged(self, reason: str) -> FormatError:
        return FormatError(f"{self.folder} is not whole ({reason}); remove it, it is made anew")
