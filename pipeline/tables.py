"""Parquet tables that survive a crash: written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from pipeline.files import sync_folder, write_atomically

# Makes its functions when it is imported, unseen by type checkers.
pc: Any = pyarrow.compute


def write_parquet(path: Path, table: pa.Table) -> None:
    """Write a small table atomically."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    write_atomically(path, sink.getvalue().to_pybytes())


@contextmanager
def parquet_writer(path: Path, schema: pa.Schema) -> Iterator[pq.ParquetWriter]:
    """Write a table of any size; ``path`` is replaced when the block ends without an error.

    Without statistics: nothing asks for them, and of 20,000 row groups they are half the footer.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with pq.ParquetWriter(temporary, schema, write_statistics=False) as writer:
            yield writer
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
