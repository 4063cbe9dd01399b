"""The benchmark of encoding: rates and limits are what they are called, all do the same work."""

import json
import subprocess
import sys
import tarfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from pipeline.config import EncodeConfig, column_specs
from pipeline.settings import load
from tools import bench_encode, stage_rates
from tools.bench_encode import CELLS, Case, Measured
from tools.bouncing import ClipSettings
from tools.contenders import Task
from tools.make_clips import make_clips
from tools.peers_encode import PeerJob, check_tars, loop
from tools.process_memory import Peak, PeakMemory, role_of
from tools.side_by_side import Lane, Timing, run_side_by_side
from tools.stage_rates import (
    StageJob,
    codecs_only,
    decode_only,
    pairs_only,
    repeated,
    whole_clips,
)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    make_clips(folder, ClipSettings(seconds=2, size=64), 4)
    return folder


@pytest.fixture
def job(clips, tmp_path):
    config = load(EncodeConfig, None, ["clip.seconds=2"])
    specs = {m: spec for m, spec in column_specs(config).items() if m != "text"}
    paths = repeated(whole_clips(clips, config), tmp_path / "clips", 10)
    return StageJob(paths, config, specs)


def test_steady_rates_leave_the_first_step_out():
    slow_start = Lane(0.0, ((10.0, 5), (12.0, 4), (14.0, 4)))
    other = Lane(0.0, ((3.0, 1), (4.0, 3)))
    assert (slow_start.clips_per_s, other.clips_per_s) == (2.0, 3.0)
    timing = Timing((slow_start, other), launched_s=-4.0, ended_s=16.0)
    assert (timing.clips_per_s, timing.num_clips, timing.seconds) == (5.0, 17, 20.0)
    with pytest.raises(ValueError, match="expected 2 at least"):
        _ = Lane(0.0, ((1.0, 5),)).clips_per_s


def counting(argument):
    if argument < 0:
        raise ValueError("below zero")

    def work():
        for _ in range(argument):
            yield 2

    return work


def test_processes_side_by_side_tell_their_steps_or_their_error():
    timing = run_side_by_side(counting, [3, 1])
    assert [lane.num_clips for lane in timing.lanes] == [6, 2]
    begun_s = [lane.begun_s for lane in timing.lanes]
    assert timing.launched_s < min(begun_s) <= max(begun_s) < timing.ended_s
    with pytest.raises(RuntimeError, match="below zero"):
        run_side_by_side(counting, [1, -1])


def test_broken_clips_are_left_out_and_the_others_repeated(clips, tmp_path):
    broken = clips / "broken.mp4"
    broken.write_bytes(b"no film")
    try:
        whole = whole_clips(clips, EncodeConfig())
    finally:
        broken.unlink()
    assert whole == sorted(clips.glob("clip-*.mp4"))
    paths = [Path(path) for path in repeated(whole, tmp_path / "many", 9)]
    assert len({path.name for path in paths}) == 9
    assert paths[8].read_bytes() == whole[0].read_bytes()


def test_stages_alone_do_all_their_clips(job):
    decoding = decode_only(job, 2)
    assert [lane.num_clips for lane in decoding.lanes] == [5, 5]
    codecs = codecs_only(job, 1, 12)
    assert codecs.num_clips == 12 and codecs.clips_per_s > 0


def test_codecs_of_pairs_encode_whole_batches_of_what_is_decoded(job):
    config = replace(job.config, video=replace(job.config.video, batch=2))
    pairs = pairs_only(replace(job, config=config), 2)
    assert [lane.num_clips for lane in pairs.lanes] == [4, 4]
    assert pairs.clips_per_s > 0


def test_half_of_a_pair_without_the_other_ends(job, monkeypatch):
    monkeypatch.setattr(stage_rates, "PARTNER_TIMEOUT_S", 0.01)
    work = stage_rates._encoding_half(job, threading.Semaphore(0), threading.Semaphore(1))
    with pytest.raises(RuntimeError, match="nothing heard of the other half"):
        next(work())


def test_the_loop_writes_every_clip_once_and_less_would_be_noticed(job, tmp_path):
    tasks = tuple(Task(path, 2.0, (256, 256)) for path in job.paths)
    peer = PeerJob(tasks, job.specs, str(tmp_path / "tars"), shard_size=2)
    assert loop(peer, 2).num_clips == len(tasks)
    check_tars(tmp_path / "tars", peer)
    with tarfile.open(sorted((tmp_path / "tars").glob("*.tar"))[0]) as tar:
        assert len(tar.getnames()) == 2 * len(job.specs)
    more = replace(peer, tasks=(*tasks, Task("/another.mp4", 2.0, (256, 256))))
    with pytest.raises(ValueError, match="expected 22"):
        check_tars(tmp_path / "tars", more)


def measured(rate):
    return Measured("", rates=[rate], overall=[rate])


def test_the_least_limit_counts(job, tmp_path):
    case = Case("", job, tmp_path, [])
    case.decoding = {1: measured(4.0), 2: measured(8.0)}
    case.codecs = {1: measured(4.0), 2: measured(6.0)}
    case.pairs = {1: measured(4.0), 2: measured(3.75)}
    case.ours = {1: measured(3.0), 2: measured(3.0)}
    assert case.limits(2) == {"decoders": 8.0, "codecs": 6.0}
    assert (case.share(1), case.share(2)) == (0.75, 0.5)
    assert (case.share_of_pairs(1), case.share_of_pairs(2)) == (0.75, 0.8)
    assert Measured("", rates=[1.0, 9.0, 2.0]).clips_per_s == 2.0


@pytest.mark.parametrize(
    ("command", "role"),
    [
        (["ray::EncoderActor.run", "", ""], "ray::EncoderActor"),
        (["ray::DecoderActor"], "ray::DecoderActor"),
        (["/x/ray/core/src/ray/raylet/raylet", "--a=b"], "raylet"),
        (["/usr/bin/python3", "-u", "/x/log_monitor.py", "--a"], "log_monitor.py"),
        (["/usr/bin/python3", "-c", "pass"], "python3"),
        ([""], ""),
    ],
)
def test_processes_are_named_by_what_they_do(command, role):
    assert role_of(command) == role


def test_peaks_outlive_the_processes_and_what_they_held():
    child = "import sys; held = bytearray(80_000_000); sys.stdin.readline()"
    code = (
        "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', sys.argv[1]], "
        "stdin=sys.stdin); p.wait(); sys.stdin.readline()"
    )
    command = [sys.executable, "-c", code, child]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, text=True)
    try:
        with PeakMemory(process.pid) as memory:
            deadline_s = time.monotonic() + 60
            while not any(p.resident > 80e6 for p in memory.by_role().values()):
                assert time.monotonic() < deadline_s
                time.sleep(0.05)
            for descendant in psutil.Process(process.pid).children():
                descendant.kill()
            time.sleep(0.5)
            roles = memory.by_role()
    finally:
        process.kill()
        process.communicate()
    assert roles.keys() == {"command", Path(sys.executable).name}
    assert roles["command"].processes == 1 and roles["command"].resident < 80e6
    assert roles[Path(sys.executable).name].resident > 80e6
    assert isinstance(roles["command"], Peak)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_all_contenders_do_the_same_work(clips, tmp_path, capsys):
    """The whole command on few small clips; a minute or two."""
    arguments = ["--clips", str(clips), "--num-clips", "96", "--num-light", "96", "--json"]
    assert bench_encode.main([*arguments, "--folder", str(tmp_path / "kept")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["about"]["ray"] and found["about"]["cpus"] >= 1
    for name in ("real clips", "light clips"):
        case = found[name]
        everyone = [*case["ours"].values(), *case["peers"].values()]
        for one in [*everyone, *case["decoding"].values(), *case["codecs"].values()]:
            assert one["problem"] == "" and one["rates"][0] > 0, one
        assert len(case["ours"]) == len(CELLS) and len(case["peers"]) == 2
        for cells in map(str, CELLS):
            assert case["share_of_limit"][cells] > 0 < case["share_of_pairs"][cells]
            roles = case["runs"][cells]["memory"]
            assert roles["ray::DecoderActor"]["processes"] == int(cells)
            assert roles["ray::EncoderActor"]["resident"] > 50e6
            assert case["runs"][cells]["summary"]["write_s"] > 0
