"""A disk or a store that is full is named, whatever was written to it."""

import errno
import os
import tempfile
from functools import partial
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline import format as fmt
from pipeline.data_root import RemotePath, open_root
from pipeline.files import NoRoomError, write_atomically, write_durably, write_json, writing
from pipeline.tables import parquet_writer, write_parquet

TABLE = pa.table({"row": [1]})


def write_table(path):
    with parquet_writer(path, TABLE.schema) as writer:
        writer.write_table(TABLE)


def write_large(path):
    with writing(path) as file:
        file.write(b"x")


WRITERS = [
    lambda path: write_atomically(path, b"x"),
    lambda path: write_json(path, {}),
    lambda path: write_parquet(path, TABLE),
    write_table,
    write_large,
]


def refuse(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("write", [*WRITERS, lambda path: write_durably(path, b"x")])
def test_full_disk_is_named_and_no_file_is_touched(tmp_path, monkeypatch, write):
    path = tmp_path / "plan.parquet"
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(NoRoomError, match=rf"write {path} \(No space left.* bytes free\); make"):
        write(path)
    assert {one.name for one in tmp_path.iterdir()} <= {path.name}


@pytest.mark.parametrize("write", WRITERS)
def test_full_store_is_named(tmp_path, monkeypatch, write):
    path = open_root(f"memory://{tmp_path.name}") / "plan.parquet"
    for name in ("upload", "write_bytes"):
        monkeypatch.setattr(RemotePath, name, refuse)
    with pytest.raises(NoRoomError, match=rf"write {path} \(No space left"):
        write(path)


def test_full_local_disk_on_the_way_to_a_store_is_named(tmp_path, monkeypatch):
    path = open_root(f"memory://{tmp_path.name}") / "plan.parquet"
    monkeypatch.setattr(tempfile, "TemporaryFile", partial(Path("/dev/full").open, "w+b"))
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    with pytest.raises(NoRoomError, match=rf"write into {tmp_path} \(No space left"):
        write_large(path)


def test_format_error_in_the_block_passes_unchanged(tmp_path):
    with pytest.raises(fmt.FormatError), writing(tmp_path / "a"):
        raise fmt.FormatError("damaged")
    assert not list(tmp_path.iterdir())
