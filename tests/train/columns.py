"""Builds small data sets of known content, as pipeline.encode would leave them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
from pipeline.tables import parquet_writer, write_parquet

VIDEO_RATE_HZ = 4.0
AUDIO_RATE_HZ = 25.0
VIDEO_AXES = ("time", "channel", "height", "width")
AUDIO_AXES = ("time", "frequency", "channel")
FACTS_NAME = "facts@probe-0a1b2c3d"


@dataclass(frozen=True)
class Dataset:
    """What a built data set holds, for tests to compare with.

    ``failed`` maps clip number to the name of its status, in video and audio alike;
    ``failed_video`` and ``failed_audio`` in one of them. The video of ``wide`` clips has twice the
    width. ``facts`` maps names to functions of the clip number. Columns in ``moments`` store means
    and log-variances. Data sets of another ``seed`` have other keys, captions and values.
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
    failed_video: dict[int, str] = field(default_factory=dict)
    failed_audio: dict[int, str] = field(default_factory=dict)
    failed_text: dict[int, str] = field(default_factory=dict)  # by row of caption
    wide: frozenset[int] = frozenset()
    labels: dict[int, str] = field(default_factory=dict)
    facts: dict[str, Callable[[int], Any]] = field(default_factory=dict)
    moments: frozenset[str] = frozenset()
    seed: int = 0
    short_s: dict[int, float] = field(default_factory=dict)
    splits: dict[int, str] = field(default_factory=dict)
    video_name: str = "test"

    def key(self, clip: int) -> str:
        return f"clip{self.seed or ''}{clip:05d}"

    def text_row(self, clip: int) -> int:
        """Caption 0 is the empty one and belongs to no clip."""
        return 1 + clip % (self.num_captions - 1)

    def caption(self, row: int) -> str:
        return f"caption {row}" + (f" of {self.seed}" if self.seed else "")

    def duration_s(self, clip: int) -> float:
        return self.short_s.get(clip, self.clip_s)

    def video(self, clip: int) -> np.ndarray:
        """float16 [T, C, H, W]; of moments 2C."""
        channels, height, width = self.video_size
        size = (channels, height, 2 * width if clip in self.wide else width)
        return self._values("video", clip, VIDEO_RATE_HZ, size)

    def audio(self, clip: int) -> np.ndarray:
        """float16 [L, F, C]; of moments 2C."""
        return self._values("audio", clip, AUDIO_RATE_HZ, self.audio_size)

    def text(self, row: int) -> np.ndarray:
        """float16 [S, D]; S differs from caption to caption."""
        generator = np.random.default_rng([3, row, *self._seeds])
        return generator.standard_normal((1 + row, self.text_width)).astype(np.float16)

    def _values(self, name: str, clip: int, rate_hz: float, size: tuple[int, ...]) -> np.ndarray:
        generator = np.random.default_rng([len(name), ord(name[0]), clip, *self._seeds])
        shape = (int(self.duration_s(clip) * rate_hz), *size)
        values = generator.standard_normal(shape)
        if name in self.moments:
            log_variance = generator.standard_normal(shape) - 2
            axis = (VIDEO_AXES if name == "video" else AUDIO_AXES).index("channel")
            values = np.concatenate([values, log_variance], axis=axis)
        return values.astype(np.float16)

    @property
    def _seeds(self) -> list[int]:
        return [self.seed] if self.seed else []

    @property
    def plan(self) -> Plan:
        captions = PlanSegment(0, self.num_captions, self.captions_per_shard)
        return Plan(
            plan_id=fingerprint([self.num_clips, self.shard_size, *self._seeds]) * 2,
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
        codec = {"name": name} | ({"store": "moments"} if modality in self.moments else {})
        return ColumnSpec(modality, codec, {}, axes, rate_hz, offset_s, croppable)

    def shard_clips(self, shard: int) -> range:
        first = shard * self.shard_size
        return range(first, min(first + self.shard_size, self.num_clips))

    def build(self) -> Dataset:
        """Write plan and the three columns."""
        self.root.mkdir(parents=True, exist_ok=True)
        self.write_plan()
        for modality in ("video", "audio", "text"):
            self.write_column(modality)
        for shard in range(len(self.plan.shard_rows()) if self.facts else 0):
            self.write_facts(shard)
        return self

    def column_path(self, modality: str) -> Path:
        """Return the folder of a column."""
        return self.root / self.spec(modality).directory

    def write_facts(self, shard: int) -> None:
        clips = self.shard_clips(shard)
        table = {"key": [self.key(clip) for clip in clips], "row": list(range(len(clips)))}
        table |= {name: [fact(clip) for clip in clips] for name, fact in self.facts.items()}
        (self.root / FACTS_NAME).mkdir(exist_ok=True)
        write_parquet(self.root / FACTS_NAME / f"{shard:06d}.parquet", pa.table(table))

    def write_plan(self) -> None:
        clips = range(self.num_clips)
        columns = {
            "shard": pa.array([clip // self.shard_size for clip in clips], pa.int32()),
            "row": pa.array([clip % self.shard_size for clip in clips], pa.int32()),
            "key": [self.key(clip) for clip in clips],
            "uri": [f"{self.key(clip)}.mp4" for clip in clips],
            "start_s": [0.0] * self.num_clips,
            "duration_s": [self.duration_s(clip) for clip in clips],
            "caption": [self.caption(self.text_row(clip)) for clip in clips],
            "label": [self.labels.get(clip, "thing") for clip in clips],
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
                "caption": ["", *(self.caption(row) for row in rows[1:])],
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
            return writer.commit({"wall_s": 0.5} | ({"facts": FACTS_NAME} if self.facts else {}))

    def rows(self, modality: str, shard: int) -> list[tuple[str, np.ndarray | None, int]]:
        """Return (key, array, status) of a shard's rows, in plan order."""
        if modality == "text":
            first = shard * self.captions_per_shard
            rows = range(first, min(first + self.captions_per_shard, self.num_captions))
            keys, values, failed = "caption{:05d}".format, self.text, self.failed_text
        else:
            rows, keys = self.shard_clips(shard), self.key
            values = self.video if modality == "video" else self.audio
            own = self.failed_video if modality == "video" else self.failed_audio
            failed = self.failed | own
        return [
            (keys(row), None, STATUS_CODE[failed[row]])
            if row in failed
            else (keys(row), values(row), OK)
            for row in rows
        ]


def flip_last_byte(path: Path, column: str) -> bytes:
    """Flip a bit of the last page of a column in a parquet file; return the whole content."""
    whole, group = path.read_bytes(), pq.ParquetFile(path).metadata.row_group(0)
    chunks = {group.column(n).path_in_schema: group.column(n) for n in range(group.num_columns)}
    chunk = chunks[column]
    end = (chunk.dictionary_page_offset or chunk.data_page_offset) + chunk.total_compressed_size - 1
    path.write_bytes(whole[:end] + bytes([whole[end] ^ 1]) + whole[end + 1 :])
    return whole
