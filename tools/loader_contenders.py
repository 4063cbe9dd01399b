"""All that the loader benchmark lets run: ours, the peers, and what no loader can beat."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from tools.loader_data import NUM_SHARDS, Batch, write_columns
from tools.loader_peers import FILES, SHARD_PEERS, Epochs, Job, Loader, importing

OURS, FIRST, ALWAYS = "ours", "ours, first epoch", "ours, verify_crc=always"
FOLDER, PREADV, MEMCPY = "torch.save folder", "preadv", "memcpy"
MODALITIES = ("video", "audio")


def _open_view(job: Job, verify_crc: Literal["first", "always"]) -> Any:
    """Open our data set as a trainer would; its census is made anew by every process."""
    from train.data import DataConfig, open_view

    config = DataConfig(
        root=str(job.folder),
        seconds=job.rows.clip_s,
        heldout_share=0.0,
        verify_crc=verify_crc,
        read_threads=job.num_workers,
        cache_dir=tempfile.mkdtemp(),
    )
    return open_view(config)


def _loader(view: Any, job: Job) -> Any:
    from train.data import LatentLoader

    return LatentLoader(view, seed=0, global_batch=job.batch, device=job.device)


def _epoch(loader: Any, job: Job) -> Iterator[Batch]:
    for _ in range(job.rows.num_rows // job.batch):
        yield _tensors(next(loader))


def _tensors(batch: Any) -> Batch:
    return {
        "video": batch.video,
        "audio": batch.audio,
        "text": batch.text,
        "mask": batch.text_mask,
    }


def open_ours(job: Job) -> Epochs:
    """One loader for all epochs: checksums are checked in the first."""
    loader = _loader(_open_view(job, "first"), job)
    return lambda: _epoch(loader, job)


def open_always(job: Job) -> Epochs:
    """One loader for all epochs, checking every checksum every time."""
    loader = _loader(_open_view(job, "always"), job)
    return lambda: _epoch(loader, job)


def open_first(job: Job) -> Epochs:
    """A new loader for every epoch, so that every epoch is its first."""
    view = _open_view(job, "first")

    def epoch() -> Iterator[Batch]:
        with _loader(view, job) as loader:
            yield from _epoch(loader, job)

    return epoch


def _reused_batch(job: Job) -> dict[str, torch.Tensor]:
    shapes = {"video": job.rows.video_shape, "audio": job.rows.audio_shape}
    return {
        name: torch.zeros(job.batch, *shape, dtype=torch.float16, pin_memory=job.device != "cpu")
        for name, shape in shapes.items()
    }


def _bytes(tensor: torch.Tensor) -> list[memoryview]:
    """Return the memory of each row of a batch."""
    return [row.reshape(-1).view(np.uint8).data for row in tensor.numpy()]


def open_preadv(job: Job) -> Epochs:
    """Read the payloads that ours reads, shuffled, with one call each into one reused batch."""
    from pipeline.format import open_column, read_plan

    plan_id = read_plan(job.folder).plan_id
    names = {name: next(job.folder.glob(f"{name}@*")).name for name in MODALITIES}
    columns = {name: open_column(job.folder, names[name], plan_id) for name in MODALITIES}
    places: dict[str, list[tuple[int, int]]] = {name: [] for name in MODALITIES}
    for name, column in columns.items():
        for shard in range(NUM_SHARDS):
            descriptor = os.open(column.tar_path(shard), os.O_RDONLY)
            index = column.index(shard, job.rows.shard_rows)
            places[name] += [(descriptor, offset) for offset in index["offset"].tolist()]
    batch = _reused_batch(job)
    memory = {name: _bytes(tensor) for name, tensor in batch.items()}
    generator = np.random.default_rng(0)

    def epoch() -> Iterator[Batch]:
        order = generator.permutation(job.rows.num_rows).tolist()
        for first in range(0, len(order), job.batch):
            for place, row in enumerate(order[first : first + job.batch]):
                for name in MODALITIES:
                    descriptor, offset = places[name][row]
                    os.preadv(descriptor, [memory[name][place]], offset)
            yield batch

    return epoch


def open_memcpy(job: Job) -> Epochs:
    """Copy the same bytes from arrays in memory, shuffled, into one reused batch."""
    batch = _reused_batch(job)
    rows = [job.rows.arrays(row) for row in range(job.rows.num_rows)]
    generator = np.random.default_rng(0)

    def epoch() -> Iterator[Batch]:
        arrays = {name: batch[name].numpy() for name in MODALITIES}
        order = generator.permutation(job.rows.num_rows).tolist()
        for first in range(0, len(order), job.batch):
            for place, row in enumerate(order[first : first + job.batch]):
                for name in MODALITIES:
                    arrays[name][place] = rows[row][name]
            yield batch

    return epoch


def _columns(open_: Callable[[Job], Epochs], *num_workers: int) -> Loader:
    return Loader("torch", importing("train.data"), write_columns, open_, "columns", num_workers)


CONTENDERS = {
    OURS: _columns(open_ours, 1, 2),
    FIRST: _columns(open_first, 1),
    ALWAYS: _columns(open_always, 1),
    **SHARD_PEERS,
    FOLDER: FILES,
    PREADV: _columns(open_preadv, 0),
    MEMCPY: _columns(open_memcpy, 0),
}


def folder_of(bench_folder: Path, contender: str) -> Path:
    """Return where a contender's format of the rows lies."""
    return bench_folder / CONTENDERS[contender].data
