"""captions.parquet: which caption each row of the text column is, and under which key.

It is written with the plan, a row group for every shard; every text column has a copy of its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import format as fmt
from pipeline.tables import open_parquet, parquet_writer

CAPTIONS_NAME = "captions.parquet"
CAPTIONS_SCHEMA = pa.schema([("row", pa.int64()), ("key", pa.string()), ("caption", pa.string())])


def caption_key(caption: str) -> str:
    """Return the key of a caption's member in the text column: 16 hex digits of its hash."""
    return hashlib.sha256(caption.encode()).hexdigest()[:16]


def write_captions(
    writer: pq.ParquetWriter, captions: pa.Array, first_row: int, shard_size: int
) -> None:
    """Append captions, whole shards of them but for the last."""
    for start in range(0, len(captions), shard_size):
        part = captions.slice(start, shard_size)
        keys = [caption_key(caption) for caption in part.to_pylist()]
        rows = np.arange(len(part)) + first_row + start
        columns = [pa.array(rows), pa.array(keys), part.cast(pa.string())]
        writer.write_table(pa.Table.from_arrays(columns, schema=CAPTIONS_SCHEMA))


def copy_captions(root: Path, plan: fmt.Plan, folder: Path) -> None:
    """Give a text column its captions.parquet, anew where the plan was extended."""
    shards = plan.shard_rows(text=True)
    try:
        with open_parquet(folder / CAPTIONS_NAME) as there:
            if there.metadata.num_rows == shards.sum():
                return
    except (OSError, pa.ArrowException):
        pass  # none there, or none that can be read
    with (
        open_parquet(root / CAPTIONS_NAME) as planned,
        parquet_writer(folder / CAPTIONS_NAME, CAPTIONS_SCHEMA) as writer,
    ):
        for shard in range(len(shards)):
            writer.write_table(planned.read_row_group(shard))


def caption_hashes(path: Path, num_captions: int) -> np.ndarray:
    """Return a hash of every caption, int64 [num_captions], good for this process only.

    Raises:
        FormatError: captions.parquet is not the planned number of captions with their keys.
    """
    hashes = np.zeros(num_captions, np.int64)
    num_rows = 0
    try:
        for row, key, caption in read_rows(path, ["row", "key", "caption"]):
            if row != num_rows or row >= num_captions or (row == 0) != (caption == ""):
                raise fmt.FormatError(f"row {num_rows} of {num_captions} is {row}: {caption!r:.40}")
            fmt.check_key(key)
            hashes[row] = hash(caption)
            num_rows += 1
        if num_rows < num_captions:
            raise fmt.FormatError(f"it ends after {num_rows} of {num_captions} captions")
    except (OSError, TypeError, KeyError, pa.ArrowException, fmt.FormatError) as error:
        reason = " ".join(str(error).split())[:200]
        raise fmt.FormatError(
            f"{path} is not what was planned ({reason}); remove it and run pipeline.encode again"
        ) from None
    return hashes


def read_rows(path: Path, columns: list[str]) -> Iterator[tuple[Any, ...]]:
    """Yield the rows of a parquet file, a batch of them in memory at a time."""
    with open_parquet(path) as file:
        for batch in file.iter_batches(batch_size=4096, columns=columns):
            yield from zip(*(batch[name].to_pylist() for name in columns), strict=True)
