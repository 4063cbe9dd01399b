"""The media cache: bounded, shared by processes, and never a part of a file."""

import contextlib
import multiprocessing
import os
import random
import signal
import stat
import time
from pathlib import Path

import pytest

from pipeline import media_cache
from pipeline.media_cache import CacheError, MediaCache
from pipeline.settings import ConfigError

SPAWN = multiprocessing.get_context("spawn")


def name_of(number):
    return f"{number:032x}.mp4"


def content_of(number, size):
    return bytes([number % 256]) * size


def use(cache, number, size=1000):
    """Hold a copy for a moment; return its content."""
    with cache.held(name_of(number), size, lambda f: f.write(content_of(number, size))) as path:
        return path.read_bytes()


def entries(cache):
    return sorted(path.name for path in cache.folder.iterdir() if path.name != ".lock")


def total(cache):
    size = 0
    for item in os.scandir(cache.folder):
        with contextlib.suppress(FileNotFoundError):  # another process evicts
            size += item.stat().st_size if item.name != ".lock" else 0
    return size


def never(file):
    raise AssertionError("was fetched again")


def test_copy_is_made_once_and_is_whole(tmp_path):
    cache = MediaCache(str(tmp_path), 10_000)
    assert use(cache, 1) == content_of(1, 1000)
    with cache.held(name_of(1), 1000, never) as path:
        assert path.read_bytes() == content_of(1, 1000)
    with MediaCache(str(tmp_path), 10_000).held(name_of(1), 1000, never):
        pass


def test_folder_is_private_and_made_with_its_parents(tmp_path):
    cache = MediaCache(str(tmp_path / "a" / "b"), 10_000)
    assert stat.S_IMODE(cache.folder.stat().st_mode) == 0o700
    use(cache, 1)
    assert {stat.S_IMODE(path.stat().st_mode) for path in cache.folder.iterdir()} == {0o600}


def test_folder_that_others_can_enter_is_refused(tmp_path):
    MediaCache(str(tmp_path), 10_000).folder.chmod(0o755)
    with pytest.raises(ConfigError, match=r"mode 0700.*drwxr-xr-x.*set cache_dir"):
        MediaCache(str(tmp_path), 10_000)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_folder_of_another_user_is_refused(tmp_path):
    os.chown(MediaCache(str(tmp_path), 10_000).folder, 12345, 12345)
    with pytest.raises(ConfigError, match="of user 12345"):
        MediaCache(str(tmp_path), 10_000)


def test_folder_that_is_a_link_is_refused(tmp_path):
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / f"av-latents-media-{os.geteuid()}").symlink_to(tmp_path / "real")
    with pytest.raises(ConfigError, match="expected a folder that is yours"):
        MediaCache(str(tmp_path), 10_000)


def test_files_of_others_in_the_folder_stay(tmp_path):
    cache = MediaCache(str(tmp_path), 2000)
    (cache.folder / "thesis.mp4").write_bytes(bytes(5000))
    for number in range(5):
        use(cache, number)
    assert (cache.folder / "thesis.mp4").stat().st_size == 5000


def test_file_bigger_than_the_cache_names_the_setting(tmp_path):
    cache = MediaCache(str(tmp_path), 10**9)
    with pytest.raises(CacheError, match=r"2 GB.*cache_gb=1\); raise cache_gb"):
        use(cache, 1, 2 * 10**9)


def test_least_recently_used_copies_go_first(tmp_path):
    cache = MediaCache(str(tmp_path), 5000)
    for number in (1, 2, 3, 4, 5):
        use(cache, number)
        time.sleep(0.002)  # the file system's clock is coarse
    use(cache, 1)
    use(cache, 6)
    assert entries(cache) == [name_of(n) for n in (1, 3, 4, 5, 6)]


def test_copies_in_use_stay_and_the_rest_makes_room(tmp_path):
    cache = MediaCache(str(tmp_path), 3000)
    with cache.held(name_of(1), 1000, lambda f: f.write(content_of(1, 1000))) as path:
        for number in range(2, 9):
            use(cache, number)
            assert total(cache) <= 3000
        assert path.read_bytes() == content_of(1, 1000)


def test_cache_full_of_copies_in_use_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(media_cache, "WAIT_FOR_ROOM_S", 0.2)
    cache = MediaCache(str(tmp_path), 1500)
    first = cache.held(name_of(1), 1000, lambda f: f.write(content_of(1, 1000)))
    with first, pytest.raises(CacheError, match="in use; raise cache_gb"):
        use(cache, 2)
    assert use(cache, 2) == content_of(2, 1000)


@pytest.mark.parametrize("written", [0, 999, 1001])
def test_copy_of_another_size_is_not_kept(tmp_path, written):
    cache = MediaCache(str(tmp_path), 10_000)
    copy = cache.held(name_of(1), 1000, lambda f: f.write(bytes(written)))
    with pytest.raises(OSError, match=f"got {written} bytes, expected 1000"), copy:
        pass
    assert entries(cache) == []


def test_fetch_that_fails_leaves_nothing_and_no_reservation(tmp_path):
    cache = MediaCache(str(tmp_path), 1500)

    def fail(file):
        file.write(bytes(500))
        raise OSError("gone")

    for _ in range(3):
        with pytest.raises(OSError, match="gone"), cache.held(name_of(1), 1000, fail):
            pass
    assert entries(cache) == []
    assert use(cache, 1) == content_of(1, 1000)


def test_error_of_the_user_of_a_copy_passes_and_lets_it_go(tmp_path):
    cache = MediaCache(str(tmp_path), 1500)
    copy = cache.held(name_of(1), 1000, lambda f: f.write(bytes(1000)))
    with pytest.raises(FileNotFoundError, match="mine"), copy:
        raise FileNotFoundError("mine")
    use(cache, 2)
    assert entries(cache) == [name_of(2)]


# -- several processes


def stall(folder, capacity, number, started, at_byte):
    """Download up to a byte and stay there; with at_byte None, hold the whole copy."""

    def fetch(file):
        file.write(content_of(number, 1000)[:at_byte])
        file.flush()
        if at_byte is not None:
            started.set()
            time.sleep(600)

    with MediaCache(folder, capacity).held(name_of(number), 1000, fetch):
        started.set()
        time.sleep(600)


@contextlib.contextmanager
def stalled(folder, capacity, number, at_byte):
    started = SPAWN.Event()
    process = SPAWN.Process(target=stall, args=(str(folder), capacity, number, started, at_byte))
    process.start()
    try:
        assert started.wait(60)
        yield process
    finally:
        process.kill()
        process.join()


@pytest.mark.parametrize("at_byte", [0, 500, 1000])
def test_killed_download_leaves_nothing_that_is_ever_served(tmp_path, at_byte):
    cache = MediaCache(str(tmp_path), 1500)
    with stalled(tmp_path, 1500, 1, at_byte) as process:
        assert entries(cache) == [f".{name_of(1)}.tmp"]
        assert total(cache) == 1000  # reserved in full
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    assert use(cache, 2) == content_of(2, 1000)  # finds the room that the dead one had reserved
    assert entries(cache) == [name_of(2)]
    assert use(cache, 1) == content_of(1, 1000)


def test_same_download_goes_on_after_the_first_is_killed(tmp_path):
    cache = MediaCache(str(tmp_path), 1500)
    with stalled(tmp_path, 1500, 1, 500) as process:
        os.kill(process.pid, signal.SIGKILL)
        assert use(cache, 1) == content_of(1, 1000)


def test_copy_held_by_a_killed_process_may_go(tmp_path, monkeypatch):
    monkeypatch.setattr(media_cache, "WAIT_FOR_ROOM_S", 0.2)
    cache = MediaCache(str(tmp_path), 1500)
    with stalled(tmp_path, 1500, 1, None) as process:
        with pytest.raises(CacheError):
            use(cache, 2)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    assert use(cache, 2) == content_of(2, 1000)


def work(folder, capacity, seed, counts):
    """Use random copies; count the downloads of each."""
    cache, rng = MediaCache(folder, capacity), random.Random(seed)
    for _ in range(150):
        number = rng.randrange(12)
        size = 500 + 100 * number

        def fetch(file, number=number, size=size):
            with Path(counts, str(number)).open("ab") as count:
                count.write(b".")
            for _ in range(10):
                file.write(content_of(number, size // 10))
                time.sleep(0.0002)

        with cache.held(name_of(number), size, fetch) as path:
            time.sleep(0.0005)
            assert path.read_bytes() == content_of(number, size)


def run_workers(folder, capacity, counts, num_processes, watch=lambda: None):
    workers = [
        SPAWN.Process(target=work, args=(str(folder), capacity, seed, str(counts)))
        for seed in range(num_processes)
    ]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        watch()
    assert [worker.exitcode for worker in workers] == [0] * num_processes


def test_processes_share_a_cache_that_keeps_its_bound(tmp_path):
    cache, seen = MediaCache(str(tmp_path / "cache"), 5000), []
    (tmp_path / "counts").mkdir()
    run_workers(tmp_path / "cache", 5000, tmp_path / "counts", 3, lambda: seen.append(total(cache)))
    assert 2000 < max(seen) <= 5000
    assert not [name for name in entries(cache) if name.endswith(".tmp")]


def test_processes_that_want_the_same_fetch_it_once(tmp_path):
    (tmp_path / "counts").mkdir()
    run_workers(tmp_path / "cache", 10**6, tmp_path / "counts", 3)
    assert {path.stat().st_size for path in (tmp_path / "counts").iterdir()} == {1}
