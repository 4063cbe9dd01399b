"""Builds small data sets of known content, as pipeline.encode would leave them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.format import (
    OK,
    STATUS_CODE,
    Column,
    ColumnSpec,
    Plan,
    PlanSegment,
    fingerprint,
    write_plan,
)
from pipeline.shards import ShardWriter, create_column
from pipeline.tables import parquet_writer

VIDEO_RATE_HZ = 4.0
AUDIO_RATE_HZ = 25.0
VIDEO_AXES = ("time", "channel", "height", "width")
AUDIO_AXES = ("time", "frequency", "channel")


@dataclass(frozen=True)
class Dataset:
    """What a built data set holds, for tests to compare with.

    ``failed`` maps clip number to the name of its status, in video and audio alike.
    """

    root: Path
    num_clips: int = 40
    shard_size: int = 8
    clip_s: float = 10.0
    num_captions: int = 7
    captions_per_shard: int = 3
    video_size: tuple[int, ...] = (2, 3, 3)  # channel, height, width
    audio_size: tuple[int, ...] = (4, 2)  # frequency, channel
    text_width: int = 6
    video_croppable: bool = True
    failed: dict[int, str] = field(default_factory=dict)
    short_s: dict[int, float] = field(default_factory=dict)
    splits: dict[int, str] = field(default_factory=dict)
    video_name: str = "test"

    def key(self, clip: int) -> str:
        return f"clip{clip:05d}"

    def text_row(self, clip: int) -> int:
        """Caption 0 is the empty one and belongs to no clip."""
        return 1 + clip % (self.num_captions - 1)

    def duration_s(self, clip: int) -> float:
        return self.short_s.get(clip, self.clip_s)

    def video(self, clip: int) -> np.ndarray:
        """float16 [T, C, H, W]."""
        return self._values("video", clip, VIDEO_RATE_HZ, self.video_size)

    def audio(self, clip: int) -> np.ndarray:
        """float16 [L, F, C]."""
        return self._values("audio", clip, AUDIO_RATE_HZ, self.audio_size)

    def text(self, row: int) -> np.ndarray:
        """float16 [S, D]; S differs from caption to caption."""
        generator = np.random.default_rng([3, row])
        return generator.standard_normal((1 + row, self.text_width)).astype(np.float16)

    def _values(self, name: str, clip: int, rate_hz: float, size: tuple[int, ...]) -> np.ndarray:
        generator = np.random.default_rng([len(name), ord(name[0]), clip])
        shape = (int(self.duration_s(clip) * rate_hz), *size)
        return generator.standard_normal(shape).astype(np.float16)

    @property
    def plan(self) -> Plan:
        captions = PlanSegment(0, self.num_captions, self.captions_per_shard)
        return Plan(
            plan_id=fingerprint([self.num_clips, self.shard_size]) * 2,
            seed=0,
            source={"name": "synthetic"},
            clips=(PlanSegment(0, self.num_clips, self.shard_size),),
            captions=(captions,),
        )

    def spec(self, modality: str) -> ColumnSpec:
        axes = {"video": VIDEO_AXES, "audio": AUDIO_AXES, "text": ("token", "channel")}[modality]
        rate_hz = {"video": VIDEO_RATE_HZ, "audio": AUDIO_RATE_HZ, "text": 0.0}[modality]
        name = self.video_name if modality == "video" else "test"
        offset_s = 0.5 / rate_hz if rate_hz else 0.0
        croppable = modality == "audio" or (modality == "video" and self.video_croppable)
        return ColumnSpec(modality, {"name": name}, {}, axes, rate_hz, offset_s, croppable)

    def shard_clips(self, shard: int) -> range:
        first = shard * self.shard_size
        return range(first, min(first + self.shard_size, self.num_clips))

    def build(self) -> Dataset:
        """Write plan and the three columns."""
        self.root.mkdir(parents=True, exist_ok=True)
        self.write_plan()
        for modality in ("video", "audio", "text"):
            self.write_column(modality)
        return self

    def write_plan(self) -> None:
        clips = range(self.num_clips)
        columns = {
            "shard": pa.array([clip // self.shard_size for clip in clips], pa.int32()),
            "row": pa.array([clip % self.shard_size for clip in clips], pa.int32()),
            "key": [self.key(clip) for clip in clips],
            "uri": [f"{self.key(clip)}.mp4" for clip in clips],
            "start_s": [0.0] * self.num_clips,
            "duration_s": [self.duration_s(clip) for clip in clips],
            "caption": [f"caption {self.text_row(clip)}" for clip in clips],
            "label": ["thing"] * self.num_clips,
            "split": [self.splits.get(clip, "train") for clip in clips],
            "text_row": pa.array([self.text_row(clip) for clip in clips], pa.int64()),
        }
        table = pa.table(columns)
        with parquet_writer(self.root / "plan.parquet", table.schema) as writer:
            writer.write_table(table, row_group_size=self.shard_size)
        rows = range(self.num_captions)
        captions = pa.table(
            {
                "row": pa.array(rows, pa.int64()),
                "key": [f"caption{row:05d}" for row in rows],
                "caption": ["", *(f"caption {row}" for row in rows[1:])],
            }
        )
        with parquet_writer(self.root / "captions.parquet", captions.schema) as writer:
            writer.write_table(captions, row_group_size=self.captions_per_shard)
        write_plan(self.root, self.plan)

    def write_column(self, modality: str) -> Column:
        column = create_column(self.root, self.spec(modality), self.plan.plan_id)
        for shard in range(len(self.plan.shard_rows(text=modality == "text"))):
            self.write_shard(column, shard)
        return column

    def write_shard(self, column: Column, shard: int, attempt: str = "first") -> bool:
        """Write and commit one shard; False where it was committed before."""
        with ShardWriter(column, shard, attempt) as writer:
            for key, array, status in self.rows(column.spec.modality, shard):
                writer.add(key, array, status)
            return writer.commit({"wall_s": 0.5})

    def rows(self, modality: str, shard: int) -> list[tuple[str, np.ndarray | None, int]]:
        """Return (key, array, status) of a shard's rows, in plan order."""
        if modality == "text":
            first = shard * self.captions_per_shard
            captions = range(first, min(first + self.captions_per_shard, self.num_captions))
            return [(f"caption{row:05d}", self.text(row), OK) for row in captions]
        values = self.video if modality == "video" else self.audio
        return [
            (self.key(clip), None, STATUS_CODE[self.failed[clip]])
            if clip in self.failed
            else (self.key(clip), values(clip), OK)
            for clip in self.shard_clips(shard)
        ]


def flip_last_byte(path: Path, column: str) -> bytes:
    """Flip a bit of the last page of a column in a parquet file; return the whole content."""
    whole, group = path.read_bytes(), pq.ParquetFile(path).metadata.row_group(0)
    chunks = {group.column(n).path_in_schema: group.column(n) for n in range(group.num_columns)}
    chunk = chunks[column]
    end = (chunk.dictionary_page_offset or chunk.data_page_offset) + chunk.total_compressed_size - 1
    path.write_bytes(whole[:end] + bytes([whole[end] ^ 1]) + whole[end + 1 :])
    return whole
