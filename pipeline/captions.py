"""captions.parquet of a text column: which caption each of its rows is, and under which key."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import format as fmt


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
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=4096, columns=columns):
            yield from zip(*(batch[name].to_pylist() for name in columns), strict=True)
