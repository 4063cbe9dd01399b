"""Properties of tars as local files: themselves or copies that are whole, checked and bounded."""

from __future__ import annotations

import gc
import resource
import threading
from pathlib import Path
from typing import Any

import fsspec
import google_crc32c
import numpy as np
import pytest

from pipeline import media_cache
from pipeline.data_root import open_root
from pipeline.format import FormatError
from pipeline.settings import ConfigError
from train.data import shard_files
from train.data.retry import LoaderClosed
from train.data.shard_files import SPARE_FILES, TarStore, allow_open_files, copy_name
from train.data.tar_bytes import LocalTar, TarFacts

CONTENT = bytes(range(256)) * 40


@pytest.fixture
def remote() -> Any:
    """A folder that is no local one; fsspec keeps its files in memory."""
    memory = fsspec.filesystem("memory")
    yield open_root("memory://column")
    memory.rm("/", recursive=True)


@pytest.fixture
def files(tmp_path: Path) -> TarStore:
    return TarStore(str(tmp_path / "cache"), 3 * len(CONTENT), threading.Event())


def put(remote: Any, number: int = 0, content: bytes = CONTENT, **facts: Any) -> TarFacts:
    path = remote / f"{number:06d}.tar"
    path.write_bytes(content)
    known = {"nbytes": len(CONTENT), "crc32c": google_crc32c.value(CONTENT), "repair": "mend"}
    return TarFacts(path, **{**known, **facts})


def content_of(tar: LocalTar) -> bytes:
    out = np.empty(tar.facts.nbytes, np.uint8)
    tar.read_into(out, 0)
    return out.tobytes()


def copies(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "cache").rglob("*.tar*"))


def test_local_tar_is_the_file_itself(files: TarStore, tmp_path: Path) -> None:
    path = tmp_path / "000000.tar"
    path.write_bytes(CONTENT)
    tar = files.open(TarFacts(path, len(CONTENT), 0, "mend"))
    assert content_of(tar) == CONTENT
    assert not (tmp_path / "cache").exists()
    assert files.num_fetched_bytes == 0


def test_remote_tar_is_copied_once(
    files: TarStore, remote: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_files, "REQUEST_BYTES", 1000)
    facts = put(remote)
    assert content_of(files.open(facts)) == CONTENT
    assert files.num_fetched_bytes == len(CONTENT)
    facts.path.unlink()
    assert content_of(files.open(facts)) == CONTENT
    assert files.num_fetched_bytes == len(CONTENT)
    assert copies(tmp_path) == [copy_name(facts)]


def test_copies_in_use_stay_and_others_make_room(
    files: TarStore, remote: Any, tmp_path: Path
) -> None:
    held = files.open(put(remote, 0))
    for number in range(1, 8):
        files.open(put(remote, number))
        total = sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*.tar*"))
        assert total <= files.cache_bytes
    assert copy_name(held.facts) in copies(tmp_path)
    name = copy_name(held.facts)
    del held
    gc.collect()
    for number in range(8, 12):
        files.open(put(remote, number))
    assert name not in copies(tmp_path)


def test_wrong_bytes_are_named_and_not_kept(files: TarStore, remote: Any, tmp_path: Path) -> None:
    wrong = CONTENT[:-1] + b"?"
    facts = put(remote, content=wrong)
    found, expected = google_crc32c.value(wrong), facts.crc32c
    with pytest.raises(
        FormatError,
        match=f"{facts.path}: crc32c of what came is {found:08x} and {found:08x}, fetched twice; "
        f"its commit record says {expected:08x}; mend",
    ):
        files.open(facts)
    assert copies(tmp_path) == []
    assert files.num_fetched_bytes == 2 * len(CONTENT)


def test_bytes_that_are_wrong_once_on_their_way_are_fetched_again(
    files: TarStore, remote: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts, read, calls = put(remote), shard_files.read_range, []

    def garble_first(path: Path, start: int, nbytes: int) -> bytes:
        calls.append(start)
        data = read(path, start, nbytes)
        return data if len(calls) > 1 else bytes(len(data))

    monkeypatch.setattr(shard_files, "read_range", garble_first)
    assert content_of(files.open(facts)) == CONTENT
    assert calls == [0, 0]


def test_remote_tar_that_ends_early_is_named(files: TarStore, remote: Any, tmp_path: Path) -> None:
    facts = put(remote, content=CONTENT[:-100])
    with pytest.raises(FormatError, match=rf"{facts.path} ends at byte {len(CONTENT) - 100}"):
        files.open(facts)
    assert copies(tmp_path) == []


def test_missing_remote_tar_is_an_error_that_may_pass(
    files: TarStore, remote: Any, tmp_path: Path
) -> None:
    facts = put(remote)
    facts.path.unlink()
    with pytest.raises(OSError, match=r"there is no 000000\.tar"):
        files.open(facts)
    assert copies(tmp_path) == []
    assert content_of(files.open(put(remote))) == CONTENT


def test_tar_bigger_than_the_cache_names_the_setting(files: TarStore, remote: Any) -> None:
    facts = put(remote, nbytes=10**6)
    with pytest.raises(ConfigError, match=rf"{facts.path} has 0\.001 GB.*raise data\.cache_gb"):
        files.open(facts)


def test_copy_waits_until_another_process_lets_go(
    files: TarStore,
    remote: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(media_cache, "WAIT_FOR_ROOM_S", 0.05)
    other = TarStore(str(tmp_path / "cache"), files.cache_bytes, threading.Event())
    held = [other.open(put(remote, number)) for number in range(3)]
    timer = threading.Timer(0.3, held.clear)
    timer.start()
    assert content_of(files.open(put(remote, 3))) == CONTENT
    timer.join()
    assert "waiting for room for a copy of memory://column/000003.tar" in caplog.text


def test_copy_that_never_finds_room_says_what_to_do(
    files: TarStore, remote: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(media_cache, "WAIT_FOR_ROOM_S", 0.05)
    monkeypatch.setattr(shard_files, "WAIT_FOR_ROOM_S", 0.2)
    held = [files.open(put(remote, number)) for number in range(3)]
    with pytest.raises(ConfigError, match=r"000003\.tar: .* in use; raise cache_gb"):
        files.open(put(remote, 3))
    assert len(held) == 3


def test_closing_ends_a_download_that_leaves_nothing(
    files: TarStore, remote: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_files, "REQUEST_BYTES", 1000)
    read = shard_files.read_range

    def close_after_first(path: Path, start: int, nbytes: int) -> bytes:
        files._closing.set()
        return read(path, start, nbytes)

    monkeypatch.setattr(shard_files, "read_range", close_after_first)
    with pytest.raises(LoaderClosed):
        files.open(put(remote))
    assert files.num_fetched_bytes == 1000
    assert copies(tmp_path) == []


def test_copy_is_another_where_the_tar_is_another(remote: Any) -> None:
    facts = put(remote)
    others = [facts._replace(crc32c=1), facts._replace(nbytes=1), put(remote, 1)]
    assert len({copy_name(one) for one in (facts, *others)}) == 4
    assert copy_name(facts._replace(repair="other")) == copy_name(facts)


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ((4096, 4096), []),
        ((1024, 524288), [(1000 + SPARE_FILES, 524288)]),
        ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), []),
    ],
)
def test_limit_of_open_files_is_raised_where_needed(
    monkeypatch: pytest.MonkeyPatch, limits: tuple[int, int], expected: list[tuple[int, int]]
) -> None:
    found: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda _, value: found.append(value))
    allow_open_files(1000)
    assert found == expected
