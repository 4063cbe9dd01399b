"""Captions of a local or remote column: those that were written, fetched in few requests."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from pipeline.data_root import open_root
from tests.train.batches import view_of
from tests.train.columns import Dataset
from train.data import captions as captions_module
from train.data import shard_files, tar_bytes
from train.data.captions import CaptionCache, Captions
from train.data.payload import DamagedPayload
from train.data.retry import Patience
from train.data.shard_files import TarStore


@pytest.fixture
def local(tmp_path: Path) -> Dataset:
    """Captions of up to 40 tokens in ten shards."""
    return Dataset(tmp_path / "local", num_captions=40, captions_per_shard=4).build()


@pytest.fixture
def remote(local: Dataset) -> Iterator[Dataset]:
    """The same data set where it is no local one; fsspec keeps its files in memory."""
    memory = fsspec.filesystem("memory")
    memory.put(str(local.root), "/data", recursive=True)
    yield replace(local, root=open_root("memory://data"))
    memory.rm("/", recursive=True)


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tars that ranges of bytes are asked of, one by one."""
    asked: list[str] = []
    for module in (shard_files, tar_bytes):
        read = module.read_range

        def counting(path: Path, *span: int, read: Any = read) -> bytes:
            asked.append(path.name)
            return read(path, *span)

        monkeypatch.setattr(module, "read_range", counting)
    return asked


def captions_of(dataset: Dataset, tmp_path: Path, capacity_bytes: int = 1 << 20) -> Captions:
    view = view_of(dataset, cache_dir=str(tmp_path / "cache"))
    closing = threading.Event()
    tars = TarStore(str(tmp_path / "cache"), 10**9, closing)
    cache, patience = CaptionCache(capacity_bytes), Patience(0, closing)
    return Captions(view.parts[0], 0, cache, tars, patience)


@pytest.mark.parametrize("kind", ["local", "remote"])
def test_captions_are_those_that_were_written(
    local: Dataset, remote: Dataset, tmp_path: Path, kind: str
) -> None:
    captions = captions_of({"local": local, "remote": remote}[kind], tmp_path)
    for row in (7, 3, 39, 7, 0):
        np.testing.assert_array_equal(captions.read(row), local.text(row))


def test_small_tars_and_those_mostly_needed_are_copied_and_read_without_requests(
    remote: Dataset, tmp_path: Path, requests: list[str]
) -> None:
    captions = captions_of(remote, tmp_path, capacity_bytes=1)
    tars, singles = captions.needed(np.array([4, 5, 6, 7, 7, 4, 12]))
    assert sorted(tar.path.name for tar in tars) == ["000001.tar", "000003.tar"]
    assert singles == []
    held = [captions.copy(tar) for tar in tars]
    assert [captions.copy(tar) for tar in tars] == held
    assert sorted(requests) == ["000001.tar", "000003.tar"]
    for row in (4, 5, 6, 7, 12):
        np.testing.assert_array_equal(captions.read(row), remote.text(row))
    assert len(requests) == 2


def test_single_captions_of_large_tars_are_read_one_by_one(
    remote: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, requests: list[str]
) -> None:
    monkeypatch.setattr(captions_module, "SMALL_TAR_BYTES", 0)
    captions = captions_of(remote, tmp_path)
    rows = np.array([36, 37, 38, 39, 1, 12])  # of ten shards three; of the first a small part
    tars, singles = captions.needed(rows)
    assert "000009.tar" in [tar.path.name for tar in tars]
    assert 1 in singles
    for row in singles:
        np.testing.assert_array_equal(captions.read(row), remote.text(row))
    num_requests = len(requests)
    for row in singles:
        captions.read(row)
    assert len(requests) == num_requests == len(singles)


def test_no_more_tars_are_copied_than_may_be_open(
    remote: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(captions_module, "MOST_COPIES", 2)
    captions = captions_of(remote, tmp_path)
    tars, singles = captions.needed(np.arange(8, 24))
    assert len(tars) == 2
    assert len(singles) == 8


@pytest.mark.parametrize("kind", ["local", "remote"])
def test_damaged_caption_is_named_at_every_read(
    local: Dataset, remote: Dataset, tmp_path: Path, kind: str
) -> None:
    dataset = {"local": local, "remote": remote}[kind]
    path = dataset.column_path("text") / "000001.tar"
    data = bytearray(path.read_bytes())
    data[512 + 128 + 20] ^= 1  # behind the headers of the first caption, number 4
    path.write_bytes(bytes(data))
    captions = captions_of(dataset, tmp_path)
    for _ in range(2):
        with pytest.raises(DamagedPayload, match=rf"{path} row 0 \(caption 4\): crc32c is"):
            captions.read(4)
    np.testing.assert_array_equal(captions.read(5), dataset.text(5))
