"""A decoder that hangs, dies or raises costs its own clip at most, and clips come in their order.

The pool is real and so are its processes; only what a decoder does with a clip is replaced, by
an actor that behaves as the clip's key says.
"""

import contextlib
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
from ray.exceptions import ObjectLostError, ObjectStoreFullError, OutOfMemoryError
from ray.util.placement_group import placement_group, remove_placement_group

from pipeline import decoders
from pipeline.cluster import local_cluster
from pipeline.config import EncodeConfig, decode_settings
from pipeline.decoders import DecoderPool
from pipeline.media import Clip, Decoded
from pipeline.mux import write_mp4
from pipeline.pool import CellError, CellLostError, Item
from tests.pipeline.pools import make_job
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
        if behaviour == "full" or (behaviour == "fullonce" and attempts == 0):
            raise ObjectStoreFullError
        if behaviour == "lost":
            raise ObjectLostError("0" * 56, "", "")
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

    def make(decoder=OddDecoder, **given):
        if decoder is not None:
            monkeypatch.setattr(decoders, "DecoderActor", decoder)
        (tmp_path / "anchor").touch()
        settings = {"decode_timeout_s": TIMEOUT_S, "decode": SETTINGS, "media_root": str(tmp_path)}
        job = make_job(**(settings | given))
        pools.append(DecoderPool(job, group, NUM_DECODERS))
        return pools[-1]

    yield make
    for lane in (lane for pool in pools for lane in pool._lanes):
        ray.kill(lane.actor)


def clips_of(*behaviours):
    return [Clip(f"{name}-{row}", f"{row}.mp4", 0, 10) for row, name in enumerate(behaviours)]


def items_of(clips, rows=None, wanted=BOTH, num_bytes=1000, first=0):
    """Return items whose tickets are ``first`` + row."""
    rows = range(len(clips)) if rows is None else rows
    return [Item(first + row, clips[row], frozenset(wanted), num_bytes) for row in rows]


def drain(pool, count):
    """Poll until so many came; return them, each released."""
    found = []
    while len(found) < count:
        if came := pool.poll(0.5):
            pool.release(came[0])
            found.append(came)
    return found


def collect(pool, items):
    """Run the pool dry: ticket -> decoded, in order, each with its own frames."""
    pool.submit(items)
    found = drain(pool, len(items))
    assert [item.ticket for item, _ in found] == [item.ticket for item in items]
    for item, result in found:
        if result.frames is not None and result.facts.get("process"):
            assert (result.frames == int(item.clip.key.split("-")[1])).all()
    assert pool.bytes_in_flight == 0 and pool.poll(60) is None
    return {item.ticket: result for item, result in found}


def statuses(decoded):
    return {row: result.problems["video"][0] for row, result in decoded.items() if result.problems}


def test_every_row_comes_once_with_its_own_frames(make_pool):
    pool = make_pool()
    assert statuses(collect(pool, items_of(clips_of(*["fine"] * 30)))) == {}
    # The same decoders go on with another shard, of which some rows have no file.
    assert (
        statuses(collect(pool, items_of(clips_of(*["fine"] * 12), [0, 3, 4, 11], first=30))) == {}
    )
    assert pool.poll(60) is None, "nothing is in line: there is nothing to wait for"


def test_clip_that_hangs_in_native_code_costs_itself_only(make_pool, tmp_path):
    pool = make_pool()
    clips = clips_of("fine", "hang", *["fine"] * 10)
    decoded = collect(pool, items_of(clips))
    assert statuses(decoded) == {1: "decode_timeout"}
    message = decoded[1].problems["audio"][1]
    assert "2 s" in message and "2 times" in message and "decode_timeout_s" in message
    assert len(list(tmp_path.glob("1.*"))) == 2
    assert statuses(collect(pool, items_of(clips_of("fine", "fine"), first=12))) == {}


def test_clip_that_kills_its_decoder_costs_itself_only(make_pool, tmp_path):
    decoded = collect(make_pool(), items_of(clips_of("crash", *["fine"] * 6, "crash", "fine")))
    assert statuses(decoded) == {0: "decode_crash", 7: "decode_crash"}
    assert "decoder died" in decoded[0].problems["video"][1]
    # Three attempts where the first death was blamed on the clip before.
    assert all(2 <= len(list(tmp_path.glob(f"{row}.*"))) <= 3 for row in (0, 7))


def test_clip_before_a_killer_is_not_quarantined(make_pool):
    """A death right behind a finished clip can swallow that clip's answer."""
    decoded = collect(make_pool(), items_of(clips_of(*["fine", "fine", "crash"] * 4)))
    assert statuses(decoded) == dict.fromkeys((2, 5, 8, 11), "decode_crash")


def test_clip_that_fails_once_is_decoded_the_second_time(make_pool):
    decoded = collect(
        make_pool(), items_of(clips_of("crashonce", "fine", "hangonce", "fine", "fine"))
    )
    assert statuses(decoded) == {}
    assert decoded[0].facts["attempts"] == decoded[2].facts["attempts"] == 1


def test_decoder_is_replaced_after_its_share_of_clips(make_pool, tmp_path):
    """No clip is lost, blamed or decoded twice for it, in one shard or over several."""
    share, num_clips = 4, 12
    pool = make_pool(clips_per_decoder=share)
    processes = Counter()
    for shard in range(2):
        items = items_of(clips_of(*["fine"] * num_clips), first=shard * num_clips)
        decoded = collect(pool, items)
        assert statuses(decoded) == {}
        assert {result.facts["attempts"] for result in decoded.values()} == {0}
        processes.update(result.facts["process"] for result in decoded.values())
        for note in tmp_path.glob("[0-9]*"):
            note.unlink()
    assert max(processes.values()) <= share
    # Which process gets how many is a matter of timing, when the second shard starts above all.
    assert 2 * num_clips / share <= len(processes) <= 2 * num_clips / share + NUM_DECODERS
    for pid in (pid for pid, count in processes.items() if count == share):
        with contextlib.suppress(psutil.NoSuchProcess):
            psutil.Process(pid).wait(timeout=60)


@pytest.mark.slow
def test_decoder_is_replaced_while_others_hang_and_die(make_pool):
    """The hanging clip's decoder is waited for; the other one works on and is recycled."""
    clips = clips_of("hang", *["fine", "fine", "crash"] * 2, "fine")
    decoded = collect(make_pool(clips_per_decoder=2), items_of(clips))
    expected = dict.fromkeys((3, 6), "decode_crash") | {0: "decode_timeout"}
    assert statuses(decoded) == expected
    processes = {result.facts["process"] for result in decoded.values() if result.facts}
    assert len(processes) >= 2


def test_bug_in_the_decoder_is_a_status_and_kills_no_process(make_pool, tmp_path):
    decoded = collect(make_pool(), items_of(clips_of("fine", "raise", "fine")))
    assert statuses(decoded) == {1: "decode_crash"}
    assert "ZeroDivisionError('a bug')" in decoded[1].problems["video"][1]
    assert len(list(tmp_path.glob("1.*"))) == 1


@pytest.mark.slow
def test_shard_of_nothing_but_killers_ends(make_pool):
    decoded = collect(make_pool(), items_of(clips_of(*["crash"] * 4)))
    assert statuses(decoded) == dict.fromkeys(range(4), "decode_crash")


def test_bytes_in_flight_stay_within_the_window(make_pool, tmp_path):
    """While clip 0 hangs, the other decoder stops at the window's end, and the caller hears it."""
    pool, silent = make_pool(window_bytes=5000), 0
    pool.submit(items := items_of(clips_of("hang", *["fine"] * 20)))
    while not (came := pool.poll(0.1)):
        silent += 1
        assert pool.bytes_in_flight <= 5000
    assert came[0] is items[0] and silent > 1
    assert max(int(path.stem) for path in tmp_path.glob("[0-9]*")) == 4
    pool.release(came[0])
    assert [item.ticket for item, _ in drain(pool, 20)] == list(range(1, 21))


def test_clip_bigger_than_the_window_is_decoded_alone(make_pool):
    pool = make_pool(window_bytes=1500)
    pool.submit(items := items_of(clips_of(*["fine"] * 4), num_bytes=2000))
    for item in items:
        while not (came := pool.poll(0.5)):
            assert pool.bytes_in_flight <= 2000
        assert came[0] is item
        pool.release(item)


def test_encoder_that_holds_clips_gets_another_one(make_pool):
    """One clip at least moves, though those held fill the window: a batch may wait for it."""
    pool = make_pool(window_bytes=1000)
    pool.submit(items_of(clips_of(*["fine"] * 3)))
    held = []
    while len(held) < 3:
        if came := pool.poll(0.5):
            held.append(came[0].ticket)
        assert pool.bytes_in_flight <= 1000 * (len(held) + 1)
    assert held == [0, 1, 2]


def test_caller_that_is_slow_costs_no_clip(make_pool):
    """Results that wait for the caller are not late: the clock is the decoder's, not ours."""
    pool, found = make_pool(decode_timeout_s=1.0), {}
    pool.submit(items_of(clips_of(*["fine"] * 4)))
    while len(found) < 4:
        if came := pool.poll(0.5):
            pool.release(came[0])
            found[came[0].ticket] = came[1]
            time.sleep(1.3)
    assert statuses(found) == {}
    assert [decoded.facts["attempts"] for decoded in found.values()] == [0] * 4


def test_caller_that_is_slow_gets_rid_of_a_clip_that_hangs(make_pool):
    """Deadlines count while the caller is busy, and with polls that don't wait at all."""
    pool, found = make_pool(decode_timeout_s=1.0), {}
    pool.submit(items_of(clips_of("hang", "fine")))
    while len(found) < 2:
        time.sleep(1.3)
        if came := pool.poll(0):
            pool.release(came[0])
            found[came[0].ticket] = came[1]
    assert statuses(found) == {0: "decode_timeout"}


def test_frames_for_which_shared_memory_had_no_room_are_decoded_again(make_pool):
    decoded = collect(make_pool(), items_of(clips_of("fine", "fullonce", "fine", "fine")))
    assert statuses(decoded) == {}
    assert decoded[1].facts["attempts"] == 1


def test_shared_memory_that_stays_full_is_an_error_and_no_clip_s(make_pool):
    pool = make_pool()
    pool.submit(items_of(clips_of("fine", "full", "fine")))
    with pytest.raises(ObjectStoreFullError):
        drain(pool, 3)


def test_frames_that_are_lost_again_and_again_are_the_cell_s_fault(make_pool):
    pool = make_pool()
    pool.submit(items_of(clips_of("lost")))
    with pytest.raises(CellLostError, match="ObjectLostError"):
        drain(pool, 1)


def test_death_for_lack_of_memory_is_said():
    message = decoders._cause_of(OutOfMemoryError("Task was killed due to the node running low"))
    assert "out of memory" in message and "lower `decoders`" in message


def test_idle_decoder_that_dies_costs_no_clip(make_pool):
    pool = make_pool()
    first = collect(pool, items_of(clips_of("fine", "fine")))
    for result in first.values():
        psutil.Process(result.facts["process"]).kill()
    assert statuses(collect(pool, items_of(clips_of(*["fine"] * 6), first=2))) == {}


def test_time_to_fetch_a_file_is_not_the_decoder_s(make_pool):
    """Members of tars and remote files are copied first, and that has a deadline of its own."""
    clips = [replace(clip, uri=f"a.tar#0+4/{clip.uri}") for clip in clips_of("fine", "fine")]
    decoded = collect(make_pool(SlowToFetch), items_of(clips))
    assert decoded.keys() == {0, 1} and statuses(decoded) == {}


def test_file_that_never_comes_costs_its_clip_only_and_says_so(make_pool):
    clips = [replace(clip, uri=f"a.tar#0+4/{clip.uri}") for clip in clips_of("hang", "hang")]
    clips.append(Clip("fine-2", "2.mp4", 0, 10))  # a local file is not fetched
    pool = make_pool(SlowToFetch, fetch_timeout_s=1.0)
    decoded = collect(pool, items_of(clips))
    assert statuses(decoded) == dict.fromkeys((0, 1), "unreadable")
    assert "not fetched in 1 s" in decoded[0].problems["video"][1]
    assert "fetch_timeout_s" in decoded[0].problems["video"][1]


def test_time_to_start_a_decoder_is_not_the_clip_s(make_pool):
    pool = make_pool(decoder=SlowToStart)
    assert statuses(collect(pool, items_of(clips_of("fine", "fine", "fine")))) == {}


def test_decoder_that_can_not_start_is_blamed_on_no_clip(make_pool):
    pool = make_pool(decoder=NeverStarts)
    with pytest.raises(CellError, match=r"can't start: .*libavcodec.so.62 is missing"):
        collect(pool, items_of(clips_of("fine", "fine")))


def test_real_decoder_decodes_and_gives_statuses(make_pool, tmp_path):
    frames = np.random.default_rng(0).integers(0, 255, (50, 64, 64, 3), dtype=np.uint8)
    write_mp4(tmp_path / "0.mp4", frames, 25, np.zeros(32000) + 0.1, 16000)
    (tmp_path / "1.mp4").write_bytes(b"garbage")
    pool = make_pool(decoder=None, decode_timeout_s=60)
    decoded = collect(pool, items_of(clips_of("fine", "fine", "fine")))
    assert statuses(decoded) == {1: "unreadable", 2: "missing"}
    assert decoded[0].frames.shape == (16, 64, 64, 3)
    assert decoded[0].sound.shape == (1, 32000) and decoded[0].seconds > 0


def test_real_decoder_decodes_members_of_a_tar(make_pool, tmp_path):
    frames = np.random.default_rng(0).integers(0, 255, (50, 64, 64, 3), dtype=np.uint8)
    write_mp4(tmp_path / "0.mp4", frames, 25, np.zeros(32000) + 0.1, 16000)
    size = (tmp_path / "0.mp4").stat().st_size
    (tmp_path / "0.mp4").rename(tmp_path / "a.tar")  # where members are is the plan's to know
    names = (f"a.tar#0+{size}/0.mp4", f"a.tar#0+{2 * size}/1.mp4", f"b.tar#0+{size}/2.mp4")
    clips = [Clip(f"fine-{row}", uri, 0, 10) for row, uri in enumerate(names)]
    pool = make_pool(decoder=None, decode_timeout_s=60, cache_dir=str(tmp_path / "cache"))
    decoded = collect(pool, items_of(clips))
    assert statuses(decoded) == {1: "unreadable", 2: "missing"}
    assert decoded[0].frames.shape == (16, 64, 64, 3)


@pytest.mark.slow
def test_decoder_of_1080p_stays_small(make_pool, tmp_path, tmp_path_factory):
    film = tmp_path_factory.getbasetemp() / "1080p.mp4"
    if not film.exists():
        write_full_hd(film)
    os.link(film, tmp_path / "0.mp4")
    pool = make_pool(decoder=None, decode_timeout_s=60)
    clips = [Clip(f"a-{row}", "0.mp4", 0, 10) for row in range(4)]
    assert statuses(collect(pool, items_of(clips))) == {}
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
