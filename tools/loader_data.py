"""The rows that loaders are compared on, how a loader's batches are checked, and our data set.

Every row is drawn from its number, so that any process can write the rows in the format of its
loader, and tell whether a batch holds what was written. Imports no loader.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

NUM_SHARDS = 16
NUM_CAPTIONS, MIN_TOKENS, MAX_TOKENS = 256, 4, 16
BASE = 2048  # float16 holds every whole number up to this

# "video" [B, T, C, H, W], "audio" [B, L, F, C], "text" [B, S, D] float16, "mask" [B, S] bool;
# the limits have no text.
Batch = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Rows:
    """Latents and captions by their numbers.

    Attributes:
        num_rows: how many, a multiple of 16 batches: no shard ends within a batch.
        video_shape: of a row, [T, C, H, W].
        audio_shape: of a row, [L, F, C].
        text_width: values of a token; a caption has 4 to 16 tokens.
        clip_s: seconds of a clip.
    """

    num_rows: int = 1024
    video_shape: tuple[int, ...] = (21, 16, 32, 32)
    audio_shape: tuple[int, ...] = (250, 16, 8)
    text_width: int = 64
    clip_s: float = 10.0

    @property
    def shard_rows(self) -> int:
        """Rows of a shard, in the formats that let one choose."""
        return self.num_rows // NUM_SHARDS

    @property
    def row_bytes(self) -> int:
        """Bytes of a row's picture and sound."""
        return 2 * (math.prod(self.video_shape) + math.prod(self.audio_shape))

    def key(self, row: int) -> str:
        """Return the name of a row."""
        return f"row{row:06d}"

    def caption(self, row: int) -> int:
        """Return the number of a row's caption, from 1; number 0 is the empty one."""
        return 1 + row % (NUM_CAPTIONS - 1)

    def text(self, caption: int) -> np.ndarray:
        """Return a caption, float16 [S, D]."""
        length = MIN_TOKENS + caption % (MAX_TOKENS - MIN_TOKENS + 1)
        return _draw([1, caption], (length, self.text_width))

    def arrays(self, row: int) -> dict[str, np.ndarray]:
        """Return video, audio and text of a row; the sound begins with the row's number."""
        audio = _draw([2, row], self.audio_shape)
        audio.reshape(-1)[:2] = row % BASE, row // BASE
        video = _draw([3, row], self.video_shape)
        return {"video": video, "audio": audio, "text": self.text(self.caption(row))}

    def checksums(self) -> list[tuple[int, int]]:
        """Return CRC-32 of every row: of picture and sound, and of its caption."""
        return [_checksum(self.arrays(row)) for row in range(self.num_rows)]


def _draw(seed: Sequence[int], shape: tuple[int, ...]) -> np.ndarray:
    """Return random float16 of magnitude below 2: all bits but the exponent's highest."""
    data = bytearray(np.random.default_rng(seed).bytes(2 * math.prod(shape)))
    values = np.frombuffer(data, np.uint16)
    values &= 0xBFFF
    return values.view(np.float16).reshape(shape)


def _checksum(arrays: Mapping[str, np.ndarray]) -> tuple[int, int]:
    media = zlib.crc32(arrays["audio"].data, zlib.crc32(arrays["video"].data))
    return media, zlib.crc32(arrays["text"].tobytes()) if "text" in arrays else 0


def pad(captions: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return captions [S, D] side by side, [B, S, D], and which tokens are real, [B, S]."""
    length = max(len(caption) for caption in captions)
    text = torch.zeros(len(captions), length, captions[0].shape[1], dtype=torch.float16)
    mask = torch.zeros(len(captions), length, dtype=torch.bool)
    for place, caption in enumerate(captions):
        text[place, : len(caption)] = caption
        mask[place, : len(caption)] = True
    return text, mask


def numbers(batch: Batch) -> torch.Tensor:
    """Return the first two values of each row's sound, which are its number; a copy [B, 2]."""
    return batch["audio"].flatten(1)[:, :2].clone()


def check_numbers(found: Sequence[torch.Tensor], rows: Rows) -> None:
    """Raise ValueError unless the batches held every row once.

    Args:
        found: what `numbers` returned for each batch.
        rows: the rows.
    """
    low, high = torch.cat(list(found)).double().cpu().T
    counts = np.bincount((low + BASE * high).long().numpy(), minlength=rows.num_rows)
    if len(counts) != rows.num_rows or (counts != 1).any():
        raise ValueError(
            f"{counts.sum()} rows came, {(counts > 0).sum()} different ones, "
            f"expected each of {rows.num_rows} once"
        )


def check_batch(batch: Batch, rows: Rows, checksums: np.ndarray) -> None:
    """Raise ValueError unless a batch is of the promised shapes and holds what was written.

    Args:
        batch: the batch.
        rows: the rows.
        checksums: of `Rows.checksums`, [num_rows, 2].
    """
    for name, shape in (("video", rows.video_shape), ("audio", rows.audio_shape)):
        tensor = batch[name]
        if tensor.dtype != torch.float16 or tuple(tensor.shape[1:]) != shape:
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, expected {shape}")
    low, high = numbers(batch).double().cpu().T
    host = {name: tensor.cpu() for name, tensor in batch.items()}
    for place, row in enumerate((low + BASE * high).long().tolist()):
        arrays = {name: host[name][place].contiguous().numpy() for name in ("video", "audio")}
        expected = checksums[row].tolist() if row < rows.num_rows else None
        if "text" in host:
            arrays["text"] = host["text"][place][host["mask"][place]].numpy()
        elif expected:
            expected[1] = 0
        if expected is None or list(_checksum(arrays)) != expected:
            raise ValueError(f"row {row} is not what was written")


def write_columns(rows: Rows, root: Path) -> None:
    """Write the rows as our data set: a plan and three columns."""
    # Here, not above: the peers' processes have no use for them.
    import pyarrow as pa

    from pipeline.format import Plan, PlanSegment, fingerprint, write_plan
    from pipeline.tables import parquet_writer

    root.mkdir(parents=True)
    numbers_ = range(rows.num_rows)
    clips = {
        "shard": pa.array([row // rows.shard_rows for row in numbers_], pa.int32()),
        "row": pa.array([row % rows.shard_rows for row in numbers_], pa.int32()),
        "key": [rows.key(row) for row in numbers_],
        "uri": [f"{rows.key(row)}.mp4" for row in numbers_],
        "start_s": [0.0] * rows.num_rows,
        "duration_s": [rows.clip_s] * rows.num_rows,
        "caption": [f"caption {rows.caption(row)}" for row in numbers_],
        "label": ["noise"] * rows.num_rows,
        "split": ["train"] * rows.num_rows,
        "text_row": pa.array([rows.caption(row) for row in numbers_], pa.int64()),
    }
    captions = {
        "row": pa.array(range(NUM_CAPTIONS), pa.int64()),
        "key": [f"caption{row:06d}" for row in range(NUM_CAPTIONS)],
        "caption": ["", *(f"caption {row}" for row in range(1, NUM_CAPTIONS))],
    }
    for name, columns, size in (
        ("plan", clips, rows.shard_rows),
        ("captions", captions, NUM_CAPTIONS),
    ):
        table = pa.table(columns)
        with parquet_writer(root / f"{name}.parquet", table.schema) as writer:
            writer.write_table(table, row_group_size=size)
    plan = Plan(
        plan_id=fingerprint([rows.num_rows, rows.shard_rows]) * 2,
        seed=0,
        source={"name": "noise"},
        clips=(PlanSegment(0, rows.num_rows, rows.shard_rows),),
        captions=(PlanSegment(0, NUM_CAPTIONS, NUM_CAPTIONS),),
    )
    write_plan(root, plan)
    _write_shards(rows, root, plan.plan_id)


def _write_shards(rows: Rows, root: Path, plan_id: str) -> None:
    from pipeline.format import ColumnSpec
    from pipeline.shards import ShardWriter, create_column

    axes = {
        "video": ("time", "channel", "height", "width"),
        "audio": ("time", "frequency", "channel"),
        "text": ("token", "channel"),
    }
    lengths = {"video": rows.video_shape[0], "audio": rows.audio_shape[0], "text": 0}
    for modality, length in lengths.items():
        rate_hz = length / rows.clip_s
        offset_s = 0.5 / rate_hz if length else 0.0
        codec = {"name": "noise"}
        spec = ColumnSpec(modality, codec, {}, axes[modality], rate_hz, offset_s, length > 0)
        column = create_column(root, spec, plan_id)
        for shard in range(NUM_SHARDS if length else 1):
            with ShardWriter(column, shard, "first") as writer:
                for key, array in _members(rows, modality, shard):
                    writer.add(key, array)
                writer.commit()


def _members(rows: Rows, modality: str, shard: int) -> Iterator[tuple[str, np.ndarray]]:
    if modality == "text":
        yield from ((f"caption{row:06d}", rows.text(row)) for row in range(NUM_CAPTIONS))
        return
    for row in range(shard * rows.shard_rows, (shard + 1) * rows.shard_rows):
        yield rows.key(row), rows.arrays(row)[modality]
