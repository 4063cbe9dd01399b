"""A data set of any number of clips without their payloads, for ``tools.bench_view``.

Real are the plan's head, column.json, the captions, the census, and in the shards that are to be
read commit records and indices. Tars of those are sparse files: all zeros, as their indices state.
Of all other shards, and of plan.parquet, nothing is there: once there is a census, nobody looks.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import google_crc32c
import numpy as np

from pipeline import format as fmt
from pipeline.shards import ShardWriter, create_column
from train.data import DataConfig
from train.data.census import NOT_USABLE, CensusWriter, ClipClass, Tally
from train.data.census_cache import census_folder
from train.data.classes import Selection

SPECS = {
    "video": ("time", "channel", "height", "width"),
    "audio": ("time", "frequency", "channel"),
    "text": ("token", "channel"),
}
RATES_HZ = {"video": 2.0, "audio": 25.0, "text": 0.0}
LENGTHS = {"video": 21, "audio": 250}  # latents of a clip
CHANNELS = {"video": 16, "audio": 8}
NUM_CAPTIONS, CAPTION_SHAPE = 1000, (16, 64)
# Sizes along all axes but time; 89 % of the clips are of the first class, 2 % are held out.
CLASSES = (ClipClass((16, 32, 32), (16, 8)), ClipClass((16, 32, 48), (16, 8)))
SHARES = (0.89, 0.09)


@dataclass(frozen=True)
class MadeUpView:
    """Which clips there are, and which of them are usable: a layout for the order.

    Attributes:
        root: the data set's folder.
        num_rows: clips.
        shard_size: clips of a shard, but of the last one.
    """

    root: Path
    num_rows: int
    shard_size: int

    @cached_property
    def plan(self) -> fmt.Plan:
        """The plan's head."""
        return fmt.Plan(
            plan_id=fmt.fingerprint([self.num_rows, self.shard_size]) * 2,
            seed=0,
            source={"name": "made up"},
            clips=(fmt.PlanSegment(0, self.num_rows, self.shard_size),),
            captions=(fmt.PlanSegment(0, NUM_CAPTIONS, self.shard_size),),
        )

    @cached_property
    def first_rows(self) -> np.ndarray:
        """Clips before each shard, int64 [num_shards + 1]."""
        return np.concatenate([[0], np.cumsum(self.plan.shard_rows())])

    @cached_property
    def counts(self) -> np.ndarray:
        """Usable clips of each shard by class, int64 [num_shards, 2]."""
        num_shards = len(self.first_rows) - 1
        counts = np.tile(np.bincount(self._pattern, minlength=256)[:2], (num_shards, 1))
        counts[-1] = np.bincount(self.buckets_of(num_shards - 1), minlength=256)[:2]
        return counts

    @cached_property
    def _pattern(self) -> np.ndarray:
        draws = np.random.default_rng(0).random(self.shard_size)
        return np.select([draws < SHARES[0], draws < sum(SHARES)], [0, 1], NOT_USABLE).astype(
            np.uint8
        )

    def buckets_of(self, shard: int) -> np.ndarray:
        """Return the class of each clip of a shard, uint8 [R]."""
        num_rows = int(self.first_rows[shard + 1] - self.first_rows[shard])
        return np.roll(self._pattern, shard)[:num_rows]

    def keys(self, shard: int) -> list[str]:
        """Return the keys of a shard's clips."""
        return [key_of(row) for row in range(*self.first_rows[shard : shard + 2].tolist())]


def key_of(row: int) -> str:
    """Return the key of a clip, as long as one of VGGSound with its start."""
    return f"clip{row:014d}"


def write_view(view: MadeUpView, config: DataConfig, read: Collection[int]) -> None:
    """Write a data set and its census.

    Args:
        view: its clips.
        config: the settings with which it is going to be opened.
        read: the shards that are going to be read.
    """
    view.root.mkdir(parents=True)
    (view.root / "plan.parquet").touch()  # its time is a part of the census's name
    fmt.write_plan(view.root, view.plan)
    columns = {}
    for modality, axes in SPECS.items():
        rate_hz = RATES_HZ[modality]
        offset_s = 0.5 / rate_hz if rate_hz else 0.0
        spec = fmt.ColumnSpec(modality, {"name": "made-up"}, {}, axes, rate_hz, offset_s, True)
        columns[modality] = create_column(view.root, spec, view.plan.plan_id)
    text_crcs = write_captions(columns["text"], view.plan)
    crcs: dict[str, dict[int, int]] = {}
    for name in LENGTHS:
        crcs[name] = {shard: write_shard(view, columns[name], shard) for shard in read}
    lengths = {name: int(config.seconds * RATES_HZ[name]) for name in LENGTHS}
    selection = Selection("train", config.heldout_share, lengths, None)
    folder = census_folder(config.cache_dir, view.root, view.plan, columns, selection)
    folder.mkdir(mode=0o700)
    write_census(view, folder, crcs, text_crcs)


def write_captions(column: fmt.Column, plan: fmt.Plan) -> list[int]:
    """Write the text column; return the crc32c of its indices."""
    first, crcs = 0, []
    for shard, num_rows in enumerate(plan.shard_rows(text=True).tolist()):
        with ShardWriter(column, shard, "made-up") as writer:
            for row in range(first, first + num_rows):
                writer.add(f"caption{row}", np.full(CAPTION_SHAPE, row % 7, np.float16))
            writer.commit()
        first += num_rows
        crcs.append(column.committed(shard)["index_crc32c"])
    return crcs


def write_shard(view: MadeUpView, column: fmt.Column, shard: int) -> int:
    """Write tar, index and commit record of a shard; return the crc32c of its index."""
    name = column.spec.modality
    sizes = [getattr(CLASSES[code], name) for code in (0, 1)]
    codes = np.where(view.buckets_of(shard) == 1, 1, 0)  # those held out are there too
    index = np.zeros(len(codes), fmt.INDEX_DTYPE)
    index["shape"][:, 0] = LENGTHS[name]
    index["shape"][:, 1 : len(SPECS[name])] = np.array(sizes)[codes]
    nbytes = np.array([LENGTHS[name] * np.prod(size) * 2 for size in sizes])
    index["nbytes"] = nbytes[codes]
    index["crc32c"] = np.array([google_crc32c.value(bytes(size)) for size in nbytes])[codes]
    members = 1024 + (index["nbytes"] + 511) // 512 * 512  # tar header, .npy header, padding
    index["offset"] = np.cumsum(members) - members + 640
    stem, num_rows = fmt.shard_name(shard), len(codes)
    np.save(column.path / f"{stem}.idx.npy", index)
    crc = google_crc32c.value((column.path / f"{stem}.idx.npy").read_bytes())
    with (column.path / f"{stem}.tar").open("wb") as tar:
        tar.truncate(int(members.sum()))
    record = {
        "plan_id": view.plan.plan_id,
        "column": column.path.name,
        "shard": shard,
        "tar": f"{stem}.tar",
        "index": f"{stem}.idx.npy",
        "rows": num_rows,
        "ok": num_rows,
        "status_counts": {"ok": num_rows},
        "keys_hash": fmt.keys_hash(view.keys(shard)),
        "tar_bytes": int(members.sum()),
        "tar_crc32c": 0,  # compared where a tar is copied
        "index_crc32c": crc,
        "channels": unit_sums(name, num_rows),
    }
    (column.path / f"{stem}.json").write_text(json.dumps(record))
    return crc


def unit_sums(name: str, count: int) -> dict:
    """Return channel sums of mean 0 and standard deviation 1."""
    channels = CHANNELS[name]
    return {"count": count, "sum": [0.0] * channels, "sum_of_squares": [float(count)] * channels}


def write_census(
    view: MadeUpView, folder: Path, crcs: dict[str, dict[int, int]], text_crcs: list[int]
) -> None:
    """Write the census of all clips."""
    with CensusWriter(folder) as writer:
        for shard in range(len(view.counts)):
            keys, codes = view.keys(shard), view.buckets_of(shard)
            text_rows = 1 + (view.first_rows[shard] + np.arange(len(keys))) % (NUM_CAPTIONS - 1)
            writer.add(codes, text_rows, keys, {n: crcs[n].get(shard, 0) for n in crcs})
        usable = int(view.counts.sum())
        left_out = view.num_rows - usable
        tally = Tally(
            planned=view.num_rows,
            heldout=left_out,
            outside=left_out,
            wanted=usable,
            complete=usable,
        )
        sums = {name: unit_sums(name, usable) for name in LENGTHS}
        writer.finish(CLASSES, sums, tally, text_crcs)
