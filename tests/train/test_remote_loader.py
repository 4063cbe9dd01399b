"""Shards on an object store: the batches of a local data set, through a bounded shared cache.

The server is a real S3 server (SeaweedFS) on loopback.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.data_root import open_root
from pipeline.format import Column, FormatError
from pipeline.media_cache import _unlinked_unless_held
from pipeline.settings import ConfigError
from tests.pipeline.servers import s3_bucket
from tests.train.batches import global_batches, loader_of, rows_of, view_of
from tests.train.columns import Dataset
from train.data import background, shard_files
from train.data.config import PartConfig
from train.data.retry import LoaderClosed
from train.data.view import View

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with s3_bucket(tmp_path_factory.mktemp("s3"), "data") as files:
        yield files


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Ten shards of four clips; a window is two of them."""
    root = tmp_path_factory.mktemp("local") / "shards"
    return Dataset(root, shard_size=4, failed={3: "silent"}).build()


@pytest.fixture(scope="module")
def remote(bucket: Any, local: Dataset) -> Dataset:
    """The same data set in the bucket, which no test changes."""
    bucket.put(str(local.root), "data/whole", recursive=True)
    return replace(local, root=open_root("s3://data/whole"))


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def remote_view(dataset: Dataset, cache: Path, **config: Any) -> View:
    return view_of(dataset, cache_dir=str(cache), **config)


def column_of(dataset: Dataset, modality: str) -> Column:
    return Column(dataset.column_path(modality), dataset.spec(modality), dataset.plan.plan_id)


def tar_bytes(dataset: Dataset, modality: str) -> list[int]:
    """Return the bytes of each tar of a column."""
    column = column_of(dataset, modality)
    shards = range(len(dataset.plan.shard_rows(text=modality == "text")))
    return [column.committed(shard)["tar_bytes"] for shard in shards]


def all_bytes(dataset: Dataset) -> int:
    return sum(sum(tar_bytes(dataset, name)) for name in ("video", "audio", "text"))


def bytes_of_shards(dataset: Dataset, num: float) -> int:
    """Return the bytes of so many shards with all captions."""
    pairs = zip(tar_bytes(dataset, "video"), tar_bytes(dataset, "audio"), strict=True)
    return int(num * max(map(sum, pairs))) + sum(tar_bytes(dataset, "text"))


def copies(cache: Path) -> list[Path]:
    return list(cache.glob("av-latents-media-*/*.tar")) + list(cache.glob("*/.*.tmp"))


def total_bytes(cache: Path) -> int:
    total = 0
    for path in copies(cache):
        with contextlib.suppress(FileNotFoundError):  # evicted meanwhile
            total += path.stat().st_size
    return total


def changed(bucket: Any, local: Dataset, name: str, modality: str, data: bytes) -> Dataset:
    """Return a copy of the data set in the bucket with another tar of shard 1."""
    bucket.put(str(local.root), f"data/{name}", recursive=True)
    dataset = replace(local, root=open_root(f"s3://data/{name}"))
    path = column_of(dataset, modality).tar_path(1)
    path.write_bytes(data)
    return dataset


# -- the same stream


@pytest.mark.parametrize(("num_ranks", "micro_batch"), [(1, 8), (2, 2)])
def test_batches_are_those_of_the_local_data_set(
    local: Dataset, remote: Dataset, cache: Path, num_ranks: int, micro_batch: int
) -> None:
    here, there = view_of(local), remote_view(remote, cache)
    assert there.view_id == here.view_id
    expected = global_batches(here, 9)  # over two epochs of 4
    assert global_batches(there, 9, num_ranks, micro_batch) == expected


def test_local_state_goes_on_remotely(local: Dataset, remote: Dataset, cache: Path) -> None:
    here, there = view_of(local), remote_view(remote, cache)
    with loader_of(here) as loader:
        for _ in range(5):
            next(loader)
        state = loader.state_dict()
    assert global_batches(there, 4, 4, 1, state=state) == global_batches(here, 9)[5:]


def test_local_and_remote_data_sets_mix(
    local: Dataset, remote: Dataset, cache: Path, tmp_path: Path
) -> None:
    other = Dataset(tmp_path / "other", seed=1).build()
    views = [
        view_of(
            local,
            mix=(PartConfig(root=str(root)), PartConfig(root=str(other.root))),
            cache_dir=str(cache),
        )
        for root in (local.root, remote.root)
    ]
    found = [global_batches(view, 8) for view in views]
    assert found[0] == found[1]


# -- the cache


def test_every_shard_is_fetched_once_where_there_is_room(
    local: Dataset, remote: Dataset, cache: Path
) -> None:
    with loader_of(remote_view(remote, cache)) as loader:
        for _ in range(3 * 4):
            next(loader)
        assert loader.num_fetched_bytes == all_bytes(local)
    assert total_bytes(cache) == all_bytes(local)


def test_cache_keeps_its_bound_and_drops_what_is_behind(
    local: Dataset, remote: Dataset, cache: Path
) -> None:
    capacity = bytes_of_shards(local, 4.5)  # two windows of two shards, and a half
    view = remote_view(remote, cache, cache_gb=capacity / 1e9)
    expected = global_batches(view_of(local), 30, micro_batch=4, global_batch=4)
    seen, is_done = [], threading.Event()

    def watch() -> None:
        while not is_done.is_set():
            seen.append(total_bytes(cache))
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with loader_of(view, global_batch=4) as loader:
            found = [rows_of(next(loader)) for _ in range(30)]  # over three epochs of 9
            assert loader.num_fetched_bytes > all_bytes(local)  # what was dropped came again
    finally:
        is_done.set()
        watcher.join()
    assert found == expected
    assert 0 < max(seen) <= capacity


def test_cache_below_two_windows_says_what_it_needs(
    local: Dataset, remote: Dataset, cache: Path
) -> None:
    needed = bytes_of_shards(local, 4)
    view = remote_view(remote, cache, cache_gb=0.9 * needed / 1e9)
    with loader_of(view, global_batch=4) as loader:
        for _ in range(2):
            with pytest.raises(ConfigError, match="can't hold the remote shards") as error:
                loader.wait_step()
    assert f"set data.cache_gb to {1.1 * needed / 1e9:.3g} or more" in str(error.value)


def test_copies_are_held_while_they_are_needed(
    local: Dataset, remote: Dataset, cache: Path
) -> None:
    """Other users of the cache can't evict what this loader reads from."""
    capacity = bytes_of_shards(local, 4.5)
    view = remote_view(remote, cache, cache_gb=capacity / 1e9)
    with loader_of(view, global_batch=4) as loader:
        found = [rows_of(next(loader))]
        for path in copies(cache):
            assert not _unlinked_unless_held(path)  # as an eviction would
        found += [rows_of(next(loader)) for _ in range(3)]
    assert found == global_batches(view_of(local), 4, micro_batch=4, global_batch=4)


# -- other processes

CHILD = """
import sys
from pathlib import Path
from pipeline.data_root import open_root
from tests.train.batches import loader_of, view_of
from tests.train.columns import Dataset
from train.data import shard_files

dataset = Dataset(open_root(sys.argv[1]), shard_size=4, failed={3: "silent"})
view = view_of(dataset, cache_dir=sys.argv[2])
read = shard_files.read_range
if sys.argv[3] == "hang":
    shard_files.REQUEST_BYTES = 1000

def hang(path, start, nbytes):
    if sys.argv[3] == "hang" and start:
        print("hanging", flush=True)
        import time; time.sleep(600)
    return read(path, start, nbytes)

shard_files.read_range = hang
with loader_of(view) as loader:
    print("ready", flush=True)
    sys.stdin.readline()
    for _ in range(12):
        next(loader)
    print(loader.num_fetched_bytes, flush=True)
"""


@contextlib.contextmanager
def child(remote: Dataset, cache: Path, mode: str) -> Iterator[subprocess.Popen]:
    command = [sys.executable, "-c", CHILD, str(remote.root), str(cache), mode]
    process = subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def line_of(process: subprocess.Popen) -> str:
    assert process.stdout
    return process.stdout.readline().strip()


def test_processes_of_a_node_share_the_cache(local: Dataset, remote: Dataset, cache: Path) -> None:
    with contextlib.ExitStack() as stack:
        children = [stack.enter_context(child(remote, cache, "read")) for _ in range(2)]
        assert [line_of(process) for process in children] == ["ready"] * 2
        for process in children:
            assert process.stdin
            process.stdin.write("\n")
            process.stdin.flush()
        fetched = [int(line_of(process)) for process in children]
    assert sum(fetched) == all_bytes(local)


def test_killed_download_leaves_nothing_and_is_taken_over(
    local: Dataset, remote: Dataset, cache: Path
) -> None:
    with child(remote, cache, "hang") as process:
        assert line_of(process) == "ready"
        assert process.stdin
        process.stdin.write("\n")
        process.stdin.flush()
        assert "hanging" in line_of(process)
        assert any(path.name.endswith(".tmp") for path in copies(cache))
        assert not any(path.suffix == ".tar" for path in copies(cache))
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    view = remote_view(remote, cache)
    assert global_batches(view, 12) == global_batches(view_of(local), 12)
    assert total_bytes(cache) == all_bytes(local)
    assert not any(path.name.endswith(".tmp") for path in copies(cache))


# -- failures


@pytest.mark.parametrize("modality", ["video", "audio"])
def test_wrong_bytes_on_the_server_are_found_and_named(
    bucket: Any, local: Dataset, cache: Path, modality: str
) -> None:
    data = bytearray(column_of(local, modality).tar_path(1).read_bytes())
    data[-1] = 7  # in the padding, where no payload's checksum looks
    dataset = changed(bucket, local, f"wrong-{modality}", modality, bytes(data))
    path = column_of(dataset, modality).tar_path(1)
    with loader_of(remote_view(dataset, cache)) as loader:
        for _ in range(2):
            with pytest.raises(FormatError, match=rf"{path}: crc32c of what came is"):
                list(itertools.islice(loader, 9))
    assert not any(path.name.endswith(".tmp") for path in copies(cache))


def test_tar_that_is_gone_from_the_server_is_named(
    bucket: Any, local: Dataset, cache: Path
) -> None:
    data = column_of(local, "audio").tar_path(1).read_bytes()
    dataset = changed(bucket, local, "gone", "audio", data)
    view, path = remote_view(dataset, cache), column_of(dataset, "audio").tar_path(1)
    path.unlink()
    with loader_of(view) as loader, pytest.raises(FormatError, match=rf"{path}.* is missing"):
        list(itertools.islice(loader, 9))


def test_close_does_not_wait_for_a_download_that_hangs(
    remote: Dataset, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_hanging, released = threading.Event(), threading.Event()

    def hang(*_: Any) -> bytes:
        is_hanging.set()
        released.wait()
        raise OSError("released")

    monkeypatch.setattr(shard_files, "read_range", hang)
    monkeypatch.setattr(background, "END_S", 0.1)
    loader = loader_of(remote_view(remote, cache))
    failures: list[BaseException] = []

    def wait() -> None:
        try:
            next(loader)
        except LoaderClosed as error:
            failures.append(error)

    waiter = threading.Thread(target=wait)
    waiter.start()
    assert is_hanging.wait(60)
    loader.close()
    waiter.join()
    assert len(failures) == 1
    hanging = [thread for thread in threading.enumerate() if thread.name == "lookahead"]
    assert hanging and all(thread.daemon for thread in hanging)
    released.set()
    for thread in hanging:
        thread.join()
    assert copies(cache) == []
