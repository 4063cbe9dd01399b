"""Taking a commit back: durable, and safe beside another run that does the same."""

import numpy as np
import pytest

from pipeline import old_rows
from pipeline.format import ColumnSpec
from pipeline.old_rows import kept_path, take_back
from pipeline.records import record_path
from pipeline.shards import ShardWriter, create_column

SPEC = ColumnSpec("video", {"name": "mean"}, {}, ("time", "channel"), 8.0, 0.0, True)


@pytest.fixture
def column(tmp_path):
    """A column with one committed shard of one row."""
    column = create_column(tmp_path, SPEC, "plan")
    with ShardWriter(column, 0, "first") as writer:
        writer.add("clip", np.ones((2, 1), np.float16))
        assert writer.commit()
    return column


def test_what_is_taken_back_is_off_the_disk_before_its_files_change(column, monkeypatch):
    is_committed = []
    sync = old_rows.sync_folder

    def look(folder):
        is_committed.append(record_path(column, 0).exists())
        sync(folder)

    monkeypatch.setattr(old_rows, "sync_folder", look)
    take_back(column, 0)
    assert is_committed == [False]
    assert column.committed_shards() == set() and kept_path(column, 0).exists()


def test_what_another_run_took_back_stays_taken_back(column, monkeypatch):
    """Before this one looked, or between its steps."""
    write = old_rows.write_atomically

    def write_late(path, data):
        write(path, data)
        record_path(column, 0).unlink()

    record = record_path(column, 0).read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(old_rows, "write_atomically", write_late)
        take_back(column, 0)
    take_back(column, 0)
    assert kept_path(column, 0).read_bytes() == record
