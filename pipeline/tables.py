"""Parquet tables of a data set that survive a crash: written whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from pipeline.files import is_local, write_atomically, writing

# Makes its functions when it is imported, unseen by type checkers.
pc: Any = pyarrow.compute


def read_parquet(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a small table, or columns of it.

    Raises:
        FileNotFoundError, OSError, pa.ArrowException: it is not there, or can't be read.
    """
    source: Any = path if is_local(path) else pa.BufferReader(path.read_bytes())
    return pq.read_table(source, columns=list(columns) if columns is not None else None)


def open_parquet(path: Path) -> pq.ParquetFile:
    """Open a table of any size, of which only what is asked for is read.

    Raises:
        FileNotFoundError, OSError, pa.ArrowException: it is not there, or is no table.
    """
    return pq.ParquetFile(path if is_local(path) else path.open("rb"))


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
    with writing(path) as file, pq.ParquetWriter(file, schema, write_statistics=False) as writer:
        yield writer
