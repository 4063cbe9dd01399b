"""Parquet tables that survive a crash: written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.files import write_atomically


def write_parquet(path: Path, table: pa.Table, rows_per_group: int | None = None) -> None:
    """Write a table atomically, in row groups of ``rows_per_group`` rows."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=rows_per_group)
    write_atomically(path, sink.getvalue().to_pybytes())
