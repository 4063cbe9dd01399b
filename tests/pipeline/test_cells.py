"""A decoder that hangs, dies or raises costs its own clip at most, and no clip is lost or doubled.

The pool is real and so are its processes; only what a decoder does with a clip is replaced, by
an actor that behaves as the clip's key says.
"""

import ctypes
import os
import re
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import ray
from ray.util.placement_group import placement_group, remove_placement_group

from pipeline import cells
from pipeline.cells import CellError, DecoderPool, local_cluster
from pipeline.config import CheckSettings, EncodeConfig, decode_settings
from pipeline.jobs import Job
from pipeline.media import Clip, Decoded
from pipeline.mux import write_mp4
from tests.pipeline.test_decoder_memory import MAX_PEAK_BYTES, write_full_hd

# By value: a worker that imported this module would import what only tests need.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

NUM_DECODERS = 2
TIMEOUT_S = 2.0
BOTH = {"video", "audio"}
SETTINGS = replace(decode_settings(EncodeConfig()), sizes=((64, 64),))


@ray.remote(num_cpus=1, max_restarts=0)
class OddDecoder:
    """Does what the clip's key says, and notes every attempt in the source's folder."""

    def __init__(self, media, settings):
        with media.local("anchor") as path:
            self.root = path.parent

    def decode(self, clip, wanted):
        behaviour, row = clip.key.split("-")
        attempts = len(list(self.root.glob(f"{row}.*")))
        (self.root / f"{row}.{attempts}").touch()
        if behaviour == "hang" or (behaviour == "hangonce" and attempts == 0):
            ctypes.PyDLL(None).sleep(1000)  # in C and holding the GIL, like decord
        if behaviour == "crash" or (behaviour == "crashonce" and attempts == 0):
            ctypes.string_at(0)  # a read through a null pointer: a true segmentation fault
        if behaviour == "raise":
            raise ZeroDivisionError("a bug")
        facts = {"attempts": attempts, "process": os.getpid()}
        return Decoded(np.full((2, 4, 4, 3), int(row), np.uint8), None, {}, facts)


@ray.remote(num_cpus=1, max_restarts=0)
class SlowToFetch:
    """Takes longer to fetch a file than a clip may take, and for one that hangs for ever."""

    def __init__(self, media, settings):
        pass

    def fetch(self, clip):
        time.sleep(1000 if clip.key.startswith("hang") else 1.5 * TIMEOUT_S)

    def decode(self, clip, wanted):
        return Decoded(None, None)


@ray.remote(num_cpus=1, max_restarts=0)
class SlowToStart:
    """Takes longer to load its libraries than a clip may take."""

    def __init__(self, media, settings):
        time.sleep(2 * TIMEOUT_S)

    def decode(self, clip, wanted):
        return Decoded(None, None)


@ray.remote(num_cpus=1, max_restarts=0)
class NeverStarts:
    """Has libraries that can't be loaded."""

    def __init__(self, media, settings):
        raise ImportError("libavcodec.so.62 is missing")

    def decode(self, clip, wanted):
        return Decoded(None, None)


@pytest.fixture(scope="module")
def group():
    with local_cluster(NUM_DECODERS + 1, object_store_bytes=100_000_000):
        placed = placement_group([{"CPU": 1}] * (NUM_DECODERS + 1), "STRICT_PACK")
        assert placed.wait(60)
        yield placed
        remove_placement_group(placed)


@pytest.fixture
def make_pool(group, tmp_path, monkeypatch):
    pools = []

    def make(
        decoder=OddDecoder,
        window=8,
        timeout_s=TIMEOUT_S,
        fetch_timeout_s=60.0,
        clips_per_decoder=1000,
        cache_dir=None,
    ):
        if decoder is not None:
            monkeypatch.setattr(cells, "DecoderActor", decoder)
        (tmp_path / "anchor").touch()
        job = Job(
            root="",
            facts="",
            plan_id="plan",
            run_id="run",
            columns={},
            media_root=str(tmp_path),
            cache_dir=cache_dir,
            cache_bytes=1_000_000,
            decode=SETTINGS,
            checks=CheckSettings(),
            decode_timeout_s=timeout_s,
            fetch_timeout_s=fetch_timeout_s,
            clips_per_decoder=clips_per_decoder,
            window_clips=window,
        )
        pools.append(DecoderPool(job, group, NUM_DECODERS))
        return pools[-1]

    yield make
    for pool in pools:
        for lane in pool._lanes:
            ray.kill(lane.actor)


def clips_of(*behaviours):
    return [Clip(f"{name}-{row}", f"{row}.mp4", 0, 10) for row, name in enumerate(behaviours)]


def collect(pool, clips, rows=None):
    """Run the pool dry: row -> decoded, each row once, and its own frames."""
    rows = list(range(len(clips))) if rows is None else rows
    found = [news for news in pool.decode(clips, rows, {"video"}) if news is not None]
    assert Counter(row for row, _ in found) == Counter(rows)
    decoded = dict(found)
    for row, result in decoded.items():
        if not result.problems:
            assert (result.frames == row).all()
    return decoded


def statuses(decoded):
    return {row: result.problems["video"][0] for row, result in decoded.items() if result.problems}


def test_every_row_comes_once_with_its_own_frames(make_pool):
    pool = make_pool()
    assert statuses(collect(pool, clips_of(*["fine"] * 30))) == {}
    # The same decoders go on with another shard, of which some rows have no file.
    assert statuses(collect(pool, clips_of(*["fine"] * 12), rows=[0, 3, 4, 11])) == {}
    assert collect(pool, clips_of("fine"), rows=[]) == {}


def test_clip_that_hangs_in_native_code_costs_itself_only(make_pool, tmp_path):
    pool = make_pool()
    clips = clips_of("fine", "hang", *["fine"] * 10)
    decoded = collect(pool, clips)
    assert statuses(decoded) == {1: "decode_timeout"}
    message = decoded[1].problems["audio"][1]
    assert "2 s" in message and "2 times" in message and "decode_timeout_s" in message
    assert len(list(tmp_path.glob("1.*"))) == 2
    assert statuses(collect(pool, clips_of("fine", "fine"))) == {}


def test_clip_that_kills_its_decoder_costs_itself_only(make_pool, tmp_path):
    decoded = collect(make_pool(), clips_of("crash", *["fine"] * 6, "crash", "fine"))
    assert statuses(decoded) == {0: "decode_crash", 7: "decode_crash"}
    assert "decoder died" in decoded[0].problems["video"][1]
    # Three attempts where the first death was blamed on the clip before.
    assert all(2 <= len(list(tmp_path.glob(f"{row}.*"))) <= 3 for row in (0, 7))


def test_clip_before_a_killer_is_not_quarantined(make_pool):
    """A death right behind a finished clip can swallow that clip's answer."""
    decoded = collect(make_pool(), clips_of(*["fine", "fine", "crash"] * 4))
    assert statuses(decoded) == dict.fromkeys((2, 5, 8, 11), "decode_crash")


def test_clip_that_fails_once_is_decoded_the_second_time(make_pool):
    decoded = collect(make_pool(), clips_of("crashonce", "fine", "hangonce", "fine", "fine"))
    assert statuses(decoded) == {}
    assert decoded[0].facts["attempts"] == decoded[2].facts["attempts"] == 1


def test_decoder_is_replaced_after_its_share_of_clips(make_pool, tmp_path):
    """No clip is lost, blamed or decoded twice for it, in one shard or over several."""
    share, num_clips = 4, 12
    pool = make_pool(clips_per_decoder=share)
    processes = Counter()
    for _ in range(2):
        decoded = collect(pool, clips_of(*["fine"] * num_clips))
        assert statuses(decoded) == {}
        assert [decoded[row].facts["attempts"] for row in range(num_clips)] == [0] * num_clips
        processes.update(result.facts["process"] for result in decoded.values())
        for note in tmp_path.glob("[0-9]*"):
            note.unlink()
    assert max(processes.values()) <= share
    # Which process gets how many is a matter of timing, when the second shard starts above all.
    assert 2 * num_clips / share <= len(processes) <= 2 * num_clips / share + NUM_DECODERS
    assert not any(psutil.pid_exists(pid) for pid in list(processes)[:-NUM_DECODERS])


def test_decoder_is_replaced_while_others_hang_and_die(make_pool):
    """The hanging clip's decoder is waited for; the other one works on and is recycled."""
    clips = clips_of("hang", *["fine", "fine", "crash"] * 2, "fine")
    decoded = collect(make_pool(clips_per_decoder=2, window=20), clips)
    expected = dict.fromkeys((3, 6), "decode_crash") | {0: "decode_timeout"}
    assert statuses(decoded) == expected
    processes = {result.facts["process"] for result in decoded.values() if result.facts}
    assert len(processes) >= 2


def test_bug_in_the_decoder_is_a_status_and_kills_no_process(make_pool, tmp_path):
    decoded = collect(make_pool(), clips_of("fine", "raise", "fine"))
    assert statuses(decoded) == {1: "decode_crash"}
    assert "ZeroDivisionError('a bug')" in decoded[1].problems["video"][1]
    assert len(list(tmp_path.glob("1.*"))) == 1


def test_shard_of_nothing_but_killers_ends(make_pool):
    decoded = collect(make_pool(), clips_of(*["crash"] * 4))
    assert statuses(decoded) == dict.fromkeys(range(4), "decode_crash")


def test_nothing_is_decoded_further_ahead_than_the_window(make_pool, tmp_path):
    """While row 0 hangs, the other decoder stops at the window's end."""
    window = 5
    clips = clips_of("hang", *["fine"] * 20)
    silent = 0
    for news in make_pool(window=window).decode(clips, list(range(21)), {"video"}):
        if news is None:
            silent += 1
            continue
        if news[0] == 0:
            break
        assert news[0] < window
    started = {int(path.stem) for path in tmp_path.glob("[0-9]*")}
    assert max(started) < window
    assert silent > 0, "the caller must hear that the pool is alive"


def test_caller_that_is_slow_costs_no_clip(make_pool):
    """Results that wait for the caller are not late: the clock is the decoder's, not ours."""
    pool = make_pool(timeout_s=1.0)
    found = []
    for news in pool.decode(clips_of(*["fine"] * 5), list(range(5)), {"video"}):
        if news is not None:
            found.append(news)
            time.sleep(1.3)
    assert sorted(row for row, _ in found) == list(range(5))
    assert statuses(dict(found)) == {}
    assert [decoded.facts["attempts"] for _, decoded in found] == [0] * 5


def test_time_to_fetch_a_file_is_not_the_decoder_s(make_pool):
    """Members of tars and remote files are copied first, and that has a deadline of its own."""
    clips = [replace(clip, uri=f"a.tar#0+4/{clip.uri}") for clip in clips_of("fine", "fine")]
    decoded = dict(filter(None, make_pool(SlowToFetch).decode(clips, [0, 1], set())))
    assert decoded.keys() == {0, 1} and statuses(decoded) == {}


def test_file_that_never_comes_costs_its_clip_only_and_says_so(make_pool):
    clips = [replace(clip, uri=f"a.tar#0+4/{clip.uri}") for clip in clips_of("hang", "hang")]
    clips.append(Clip("fine-2", "2.mp4", 0, 10))  # a local file is not fetched
    pool = make_pool(SlowToFetch, fetch_timeout_s=1.0)
    decoded = dict(filter(None, pool.decode(clips, [0, 1, 2], set())))
    assert statuses(decoded) == dict.fromkeys((0, 1), "unreadable")
    assert "not fetched in 1 s" in decoded[0].problems["video"][1]
    assert "fetch_timeout_s" in decoded[0].problems["video"][1]


def test_time_to_start_a_decoder_is_not_the_clip_s(make_pool):
    pool = make_pool(decoder=SlowToStart)
    found = [
        news for news in pool.decode(clips_of("fine", "fine", "fine"), [0, 1, 2], set()) if news
    ]
    assert {row for row, _ in found} == {0, 1, 2}
    assert statuses(dict(found)) == {}


def test_decoder_that_can_not_start_is_blamed_on_no_clip(make_pool):
    pool = make_pool(decoder=NeverStarts)
    with pytest.raises(CellError, match=r"can't start: .*libavcodec.so.62 is missing"):
        list(pool.decode(clips_of("fine", "fine"), [0, 1], set()))


def test_real_decoder_decodes_and_gives_statuses(make_pool, tmp_path):
    frames = np.random.default_rng(0).integers(0, 255, (50, 64, 64, 3), dtype=np.uint8)
    write_mp4(tmp_path / "0.mp4", frames, 25, np.zeros(32000) + 0.1, 16000)
    (tmp_path / "1.mp4").write_bytes(b"garbage")
    pool = make_pool(decoder=None, timeout_s=60)
    news = pool.decode(clips_of("fine", "fine", "fine"), [0, 1, 2], BOTH)
    decoded = dict(found for found in news if found is not None)
    assert statuses(decoded) == {1: "unreadable", 2: "missing"}
    assert decoded[0].frames.shape == (16, 64, 64, 3)
    assert decoded[0].sound.shape == (1, 32000)


def test_real_decoder_decodes_members_of_a_tar(make_pool, tmp_path):
    frames = np.random.default_rng(0).integers(0, 255, (50, 64, 64, 3), dtype=np.uint8)
    write_mp4(tmp_path / "0.mp4", frames, 25, np.zeros(32000) + 0.1, 16000)
    size = (tmp_path / "0.mp4").stat().st_size
    (tmp_path / "0.mp4").rename(tmp_path / "a.tar")  # where members are is the plan's to know
    names = (f"a.tar#0+{size}/0.mp4", f"a.tar#0+{2 * size}/1.mp4", f"b.tar#0+{size}/2.mp4")
    clips = [Clip(f"fine-{row}", uri, 0, 10) for row, uri in enumerate(names)]
    pool = make_pool(decoder=None, timeout_s=60, cache_dir=str(tmp_path / "cache"))
    decoded = dict(filter(None, pool.decode(clips, [0, 1, 2], BOTH)))
    assert statuses(decoded) == {1: "unreadable", 2: "missing"}
    assert decoded[0].frames.shape == (16, 64, 64, 3)


@pytest.mark.slow
def test_decoder_of_1080p_stays_small(make_pool, tmp_path, tmp_path_factory):
    film = tmp_path_factory.getbasetemp() / "1080p.mp4"
    if not film.exists():
        write_full_hd(film)
    os.link(film, tmp_path / "0.mp4")
    pool = make_pool(decoder=None, timeout_s=60)
    found = pool.decode([Clip(f"a-{row}", "0.mp4", 0, 10) for row in range(4)], [*range(4)], BOTH)
    assert statuses(dict(filter(None, found))) == {}
    peaks = []
    for process in psutil.Process().children(recursive=True):
        if "ray::DecoderActor" in process.cmdline()[0]:
            status = Path(f"/proc/{process.pid}/status").read_text()
            peak, shared = (
                1024 * int(re.search(rf"{name}:\s+(\d+) kB", status)[1])
                for name in ("VmHWM", "RssShmem")
            )
            peaks.append(peak - shared)
    print(f"peak RSS without shared memory: {[round(peak / 1e6) for peak in peaks]} MB")
    assert len(peaks) == NUM_DECODERS and max(peaks) < MAX_PEAK_BYTES
