"""The census of a data set: what each planned clip is good for in a view, in a folder of tables.

It is made once (``train.data.survey``) and kept in the node's cache. Whatever has a value per clip
stays in its file and is read by ranges, so that opening a census of any size costs the same.

    head.json           classes, counts and sums; written last
    codes.bin           uint8 [N], class of every planned clip, or NOT_USABLE
    text_rows.bin       int64 [N], row of its caption
    keys.bin            keys of the clips, each shard's joined by newlines
    key_ends.npy        int64 [num_shards], where each shard's keys end
    class_counts.npy    int32 [num_shards, num_classes]
    MODALITY.npy        uint32 [shards of that column], crc32c of their indices
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Sequence
from dataclasses import field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from pipeline.files import write_durably
from pipeline.format import MODALITIES, FormatError

NOT_USABLE = 255  # code of a clip, and bucket of a row, that is left out
CENSUS_VERSION = 1
HEAD_NAME = "head.json"

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
        classes: what the codes of clips stand for.
        sums: by modality, "channels" of all commit records added up; None without a payload.
        tally: clips counted.
    """

    version: int
    content: str
    classes: tuple[ClipClass, ...]
    sums: dict[str, dict[str, Any]]
    tally: Tally


HEAD_TYPE = TypeAdapter(CensusHead)


class CensusWriter:
    """Writes a census shard by shard; a context manager.

    Args:
        folder: an empty folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._hash = hashlib.sha256()
        self._files: dict[str, BinaryIO] = {}
        self._key_ends: list[int] = []
        self._counts: list[np.ndarray] = []
        self._crcs: dict[str, list[int]] = {"video": [], "audio": []}

    def __enter__(self) -> CensusWriter:
        for name in ("codes", "text_rows", "keys"):
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
        parts = (codes.astype(np.uint8), text_rows.astype("<i8"), np.frombuffer(joined, np.uint8))
        for file, array in zip(self._files.values(), parts, strict=True):
            data: Any = np.ascontiguousarray(array)
            file.write(data)
            self._hash.update(data)
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
        counts = np.zeros((len(self._counts), len(classes)), np.int32)
        for row, found in zip(counts, self._counts, strict=True):
            row[: len(found)] = found
        tables = {name: np.array(crcs, "<u4") for name, crcs in self._crcs.items()}
        tables["text"] = np.array(text_crcs, "<u4")
        for name in MODALITIES:
            self._hash.update(tables[name].tobytes())
        tables |= {"key_ends": np.array(self._key_ends, "<i8"), "class_counts": counts}
        for name, table in tables.items():
            data = io.BytesIO()
            np.save(data, table)
            write_durably(self._folder / f"{name}.npy", data.getvalue())
        head = CensusHead(CENSUS_VERSION, "", tuple(classes), sums, tally)
        self._hash.update(HEAD_TYPE.dump_json(head))
        head = CensusHead(CENSUS_VERSION, self._hash.hexdigest(), tuple(classes), sums, tally)
        write_durably(self._folder / HEAD_NAME, HEAD_TYPE.dump_json(head))


class Census:
    """A census on disk, opened for reading; its methods may be called in any thread.

    Args:
        folder: its folder.
        rows_per_shard: int64 [num_shards], from the plan.
        captions_per_shard: int64 [number of text shards], from the plan.

    Attributes:
        head: what it says of the data set as a whole.
        first_rows: int64 [num_shards + 1], planned clips before each shard.
        class_counts: int32 [num_shards, num_classes].
        index_crc32c: uint32 [shards of the column], by modality.

    Raises:
        FormatError: it is not whole, or not of this plan.
    """

    def __init__(
        self, folder: Path, rows_per_shard: np.ndarray, captions_per_shard: np.ndarray
    ) -> None:
        self.folder = folder
        self._num_captions = int(captions_per_shard.sum())
        try:
            self.head = HEAD_TYPE.validate_json((folder / HEAD_NAME).read_bytes())
        except (OSError, ValidationError) as error:
            raise self._damaged(f"{HEAD_NAME}: {error}") from None
        if self.head.version != CENSUS_VERSION:
            raise self._damaged(f"version {self.head.version}, expected {CENSUS_VERSION}")
        num_shards, num_rows = len(rows_per_shard), int(rows_per_shard.sum())
        self.first_rows = np.concatenate([[0], np.cumsum(rows_per_shard)]).astype(np.int64)
        shape = (num_shards, len(self.head.classes))
        self.class_counts = self._table("class_counts", "<i4", shape)
        num_shards_of = {"text": len(captions_per_shard)}
        self.index_crc32c = {
            name: self._table(name, "<u4", (num_shards_of.get(name, num_shards),))
            for name in MODALITIES
        }
        self._key_ends = self._table("key_ends", "<i8", (num_shards,))
        self._codes = self._open("codes", num_rows)
        self._text_rows = self._open("text_rows", 8 * num_rows)
        self._keys = self._open("keys", int(self._key_ends[-1]) if num_shards else 0)

    def codes(self, shard: int) -> np.ndarray:
        """Return the codes of a shard's clips, uint8 [R]."""
        first, end = self.first_rows[shard : shard + 2].tolist()
        return np.frombuffer(self._read(self._codes, first, end), np.uint8)

    def text_rows(self, shard: int) -> np.ndarray:
        """Return the rows of the captions of a shard's clips, int64 [R]."""
        first, end = (8 * self.first_rows[shard : shard + 2]).tolist()
        rows = np.frombuffer(self._read(self._text_rows, first, end), "<i8")
        if rows.min() < 0 or rows.max() >= self._num_captions:
            raise self._damaged(f"shard {shard}: a caption outside the {self._num_captions}")
        return rows

    def keys(self, shard: int) -> list[str]:
        """Return the keys of a shard's clips."""
        first = int(self._key_ends[shard - 1]) if shard else 0
        data = self._read(self._keys, first, int(self._key_ends[shard]))
        keys = data.decode(errors="replace").split("\n")
        expected = int(self.first_rows[shard + 1] - self.first_rows[shard])
        if len(keys) != expected:
            raise self._damaged(f"{len(keys)} keys of shard {shard}, expected {expected}")
        return keys

    def _table(self, name: str, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
        try:
            table = np.load(self.folder / f"{name}.npy", allow_pickle=False)
        except (OSError, EOFError, ValueError) as error:
            raise self._damaged(f"{name}.npy: {error}") from None
        if table.dtype != dtype or table.shape != shape:
            raise self._damaged(f"{name}.npy: {table.dtype} {table.shape}, expected {shape}")
        return table

    def _open(self, name: str, nbytes: int) -> BinaryIO:
        try:
            file = (self.folder / f"{name}.bin").open("rb", buffering=0)
        except OSError as error:
            raise self._damaged(f"{name}.bin: {error.strerror}") from None
        found = os.fstat(file.fileno()).st_size
        if found != nbytes:
            raise self._damaged(f"{name}.bin: {found} bytes, expected {nbytes}")
        return file

    def _read(self, file: BinaryIO, first: int, end: int) -> bytes:
        """Read a range; not by mapping, for a file cut short would then kill the process."""
        data = os.pread(file.fileno(), end - first, first)
        if len(data) != end - first:
            raise self._damaged(f"{file.name} was cut short, expected at least {end} bytes")
        return data

    def _damaged(self, reason: str) -> FormatError:
        reason = " ".join(reason.split())[:300]
        return FormatError(f"{self.folder} is not whole ({reason}); remove it, it is made anew")
