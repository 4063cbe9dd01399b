"""One data set of a view: its columns, its census, and the rows of a shard when they are needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline.format import OK, Column, FormatError, Plan
from train.data.census import NOT_USABLE, Census
from train.data.classes import CLIP_MODALITIES
from train.data.committed import CommittedShard, read_committed
from train.data.config import PartConfig
from train.data.order import shards_of


@dataclass(frozen=True)
class ShardRows:
    """One shard of a part, checked against plan, commit records and census. R planned clips.

    Attributes:
        shard: its number.
        keys: of the R clips.
        text_rows: int64 [R], rows of their captions.
        index: "video" and "audio": ``INDEX_DTYPE`` [R].
        has: "video" and "audio": bool [R], there and not shorter than the crop.
        tars: "video" and "audio": file name of the tar, in the folder of the column.
        tar_bytes: the size of each.
        tar_crc32c: the checksum of each.
    """

    shard: int
    keys: Sequence[str]
    text_rows: np.ndarray
    index: dict[str, np.ndarray]
    has: dict[str, np.ndarray]
    tars: dict[str, str]
    tar_bytes: dict[str, int]
    tar_crc32c: dict[str, int]


class CaptionRecord(NamedTuple):
    """Where an encoded caption lies.

    Attributes:
        shard: its shard of the text column.
        row: its row there.
        record: its record of ``INDEX_DTYPE``.
        tar: file name of the tar, in the folder of the column.
        tar_bytes: its size.
        tar_crc32c: its checksum.
    """

    shard: int
    row: int
    record: np.void
    tar: str
    tar_bytes: int
    tar_crc32c: int


@dataclass(frozen=True)
class Source:
    """A data set that was opened and counted, before views give its clips their buckets.

    Attributes:
        root: its folder, or a remote one.
        config: which columns and clips of it.
        plan: its plan.
        opened: columns by modality: "video", "audio" and "text".
        lengths: latents in a crop, by modality.
        census: what each clip is good for.
    """

    root: Path
    config: PartConfig
    plan: Plan
    opened: Mapping[str, Column]
    lengths: Mapping[str, int]
    census: Census


class Part:
    """One data set of a view. Its methods may be called in any thread.

    A row of a part is the number of its clip in the whole plan: ``first_rows[shard]`` plus the row
    in the shard.

    Args:
        source: the data set.
        weight: its share of the steps, of all parts' together.
        bucket_of: bucket for each class of the census, or ``NOT_USABLE``.
        num_buckets: of the view.
        num_cached: shards whose rows are kept in memory, and as many of text.

    Attributes:
        root: the data set's folder, a ``pathlib.Path`` or a ``pipeline.data_root.RemotePath``.
        config: which columns and clips of it.
        plan: its plan.
        opened: columns by modality: "video", "audio" and "text".
        census: what each clip is good for.
        weight: its share of the steps.
        first_rows: int64 [num_shards + 1], planned clips before each shard.
        counts: int32 [num_shards, num_buckets], usable clips.
        num_clips: usable clips.
    """

    def __init__(
        self,
        source: Source,
        weight: float,
        bucket_of: Sequence[int],
        num_buckets: int,
        num_cached: int,
    ) -> None:
        self.root, self.config, self.plan = source.root, source.config, source.plan
        self.opened, self.census, self.weight = dict(source.opened), source.census, weight
        self.first_rows = self.census.first_rows
        self._lengths = source.lengths
        self._buckets = np.full(NOT_USABLE + 1, NOT_USABLE, np.uint8)
        self._buckets[: len(bucket_of)] = bucket_of
        self.counts = np.zeros((len(self.first_rows) - 1, num_buckets), np.int32)
        for number, bucket in enumerate(bucket_of):
            if bucket != NOT_USABLE:
                self.counts[:, bucket] += self.census.class_counts[:, number]
        self._rows_per_shard = self.plan.shard_rows()
        self._text_rows_per_shard = self.plan.shard_rows(text=True)
        self._text_ends = np.cumsum(self._text_rows_per_shard)
        self._ends = np.cumsum(self.counts.sum(axis=1, dtype=np.int64))
        self.num_clips = int(self._ends[-1])
        self._shard_rows = lru_cache(num_cached)(self._read_shard_rows)
        # Captions are numbered as the plan first has them: near shards, near captions.
        self._text_shard = lru_cache(num_cached)(self._read_text_shard)

    def buckets_of(self, shard: int) -> np.ndarray:
        """Return the bucket of every clip of a shard, or ``NOT_USABLE``: uint8 [R].

        Raises:
            FormatError: the census was cut short.
        """
        return self._buckets[self.census.codes(shard)]

    def shard_rows(self, shard: int) -> ShardRows:
        """Return the rows of a shard; the same object as long as it is cached.

        Raises:
            FormatError: its files are damaged, or others than when the view was opened.
            MissingFileError, OSError: a file is not there, or can't be read now.
        """
        return self._shard_rows(shard)

    def caption_record(self, text_row: int) -> CaptionRecord:
        """Return where a caption lies.

        Raises:
            FormatError, MissingFileError, OSError: as ``shard_rows``.
        """
        shard = int(np.searchsorted(self._text_ends, text_row, side="right"))
        row = text_row - int(self._text_ends[shard] - self._text_rows_per_shard[shard])
        read = self._text_shard(shard)
        tar = read.record
        return CaptionRecord(shard, row, read.index[row], tar.tar, tar.tar_bytes, tar.tar_crc32c)

    def nth(self, ordinals: np.ndarray) -> np.ndarray:
        """Return the rows of usable clips by their ordinals in plan order, both int64 [n]."""
        shards = np.searchsorted(self._ends, ordinals, side="right")
        rows = np.empty(len(ordinals), np.int64)
        for place, (ordinal, shard) in enumerate(
            zip(ordinals.tolist(), shards.tolist(), strict=True)
        ):
            usable = np.flatnonzero(self.buckets_of(shard) != NOT_USABLE)
            first = int(self._ends[shard]) - len(usable)
            rows[place] = self.first_rows[shard] + usable[ordinal - first]
        return rows

    def keys_of(self, rows: Sequence[int]) -> list[str]:
        """Return the keys of rows, by the census: no shard is read.

        Raises:
            FormatError: the census was damaged meanwhile.
        """
        shards = shards_of(self.first_rows, rows).tolist()
        return [
            self.census.keys(shard)[row - int(self.first_rows[shard])]
            for row, shard in zip(rows, shards, strict=True)
        ]

    def _read_shard_rows(self, shard: int) -> ShardRows:
        keys = self.census.keys(shard)
        read = {
            name: self._read_unchanged(name, shard, self._rows_per_shard, keys)
            for name in CLIP_MODALITIES
        }
        has = {
            name: (found.index["status"] == OK)
            & (found.index["shape"][:, 0] >= self._lengths[name])
            for name, found in read.items()
        }
        return ShardRows(
            shard=shard,
            keys=keys,
            text_rows=self.census.text_rows(shard),
            index={name: found.index for name, found in read.items()},
            has=has,
            tars={name: found.record.tar for name, found in read.items()},
            tar_bytes={name: found.record.tar_bytes for name, found in read.items()},
            tar_crc32c={name: found.record.tar_crc32c for name, found in read.items()},
        )

    def _read_text_shard(self, shard: int) -> CommittedShard:
        return self._read_unchanged("text", shard, self._text_rows_per_shard, None)

    def _read_unchanged(
        self, name: str, shard: int, rows_per_shard: np.ndarray, keys: Sequence[str] | None
    ) -> CommittedShard:
        column = self.opened[name]
        read = read_committed(column, shard, rows_per_shard, keys)
        expected = int(self.census.index_crc32c[name][shard])
        if read.record.index_crc32c != expected:
            raise FormatError(
                f"{column.path / read.record.index}: crc32c is {read.record.index_crc32c:08x}, "
                f"expected {expected:08x}: the shard was encoded again since the view was opened; "
                f"start again (where that does not help, remove {self.census.folder})"
            )
        return read
