"""Parquet tables of a data set that survive a crash: written whole or not at all.

Every page has a checksum, which is compared whenever it is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from pipeline.files import check_plain, is_local, write_atomically, writing

# Makes its functions when it is imported, unseen by type checkers.
pc: Any = pyarrow.compute


def read_parquet(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a small table, or columns of it.

    Raises:
        FileNotFoundError, OSError, pa.ArrowException: it is not there, or can't be read.
    """
    check_plain(path)
    source: Any = path if is_local(path) else pa.BufferReader(path.read_bytes())
    wanted = list(columns) if columns is not None else None
    return pq.read_table(source, columns=wanted, page_checksum_verification=True)


def open_parquet(path: Path) -> pq.ParquetFile:
    """Open a table of any size, of which only what is asked for is read.

    Raises:
        FileNotFoundError, OSError, pa.ArrowException: it is not there, or is no table.
    """
    check_plain(path)
    source = path if is_local(path) else path.open("rb")
    return pq.ParquetFile(source, page_checksum_verification=True)


def write_parquet(path: Path, table: pa.Table) -> None:
    """Write a small table atomically."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, write_page_checksum=True)
    write_atomically(path, sink.getvalue().to_pybytes())


@contextmanager
def parquet_writer(path: Path, schema: pa.Schema) -> Iterator[pq.ParquetWriter]:
    """Write a table of any size; ``path`` is replaced when the block ends without an error.

    Without statistics: nothing asks for them, and those of many row groups make a large footer.
    """
    with (
        writing(path) as file,
        pq.ParquetWriter(file, schema, write_statistics=False, write_page_checksum=True) as writer,
    ):
        yield writer
