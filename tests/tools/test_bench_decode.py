"""The decoder benchmark compares whoever is there, doing the same work, and says who is not."""

import json
import subprocess
import sys

import numpy as np
import pytest

from tools import bench_decode
from tools.bench_decode import Result, render_source
from tools.contenders import CONTENDERS, Task


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return render_source(tmp_path_factory.mktemp("source") / "world.mp4", seconds=2.0)


def bench(*arguments):
    command = [sys.executable, "-m", "tools.bench_decode", "--seconds", "2", "--repeats", "1"]
    command += map(str, arguments)
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def test_a_row_for_every_contender_measured_or_with_the_reason(source, tmp_path):
    clips = tmp_path / "clips"
    table = bench("--source", source, "--clips", clips, "--heights", "96")
    for contender in CONTENDERS:
        assert f"\n{contender} " in table
    made = (clips / "96.mp4").stat().st_mtime_ns

    found = json.loads(bench("--source", source, "--clips", clips, "--heights", "96", "--json"))
    assert (clips / "96.mp4").stat().st_mtime_ns == made, "a clip that is there is made again"
    rows = {row["contender"]: row for row in found["heights"]["96"]}
    assert list(rows) == list(CONTENDERS)
    assert rows["ours"]["num_samples"] == 32000
    for contender in ("ours", "ours/decord", "decord", "PyAV"):  # the others may not be installed
        row = rows[contender]
        assert row["problem"] == "" and found["versions"][contender]
        assert row["cpu_s"] > 0 and row["peak_mb"] > row["idle_mb"] > 0
    peers = [row for row in rows.values() if not (row["problem"] or "ours" in row["contender"])]
    assert min(row["of_fastest_peer"] for row in peers) == 1
    for row in rows.values():
        assert (row["cpu_s"] > 0) != bool(row["problem"])


def test_less_work_is_not_compared(tmp_path):
    task = Task(path="", seconds=2.0, scaled=(256, 256))
    frames, sound = np.zeros((16, 256, 256, 3), np.uint8), np.zeros(32100, np.float32)
    bench_decode.check_work(frames, sound, task, max_off_s=0.1)
    for other in (frames[1:], frames[:, :, :128], frames.astype(np.float32)):
        with pytest.raises(ValueError, match=r"expected uint8 \(16, 256, 256, 3\)"):
            bench_decode.check_work(other, sound, task, max_off_s=0.1)
    with pytest.raises(ValueError, match="expected 2 s"):
        bench_decode.check_work(frames, sound, task, max_off_s=0.0)


def test_other_pictures_are_not_compared():
    results = [
        Result(name, turns_s=turns, brightness=brightness)
        for name, turns, brightness in (
            ("ours", [3.0, 9.0, 3.0], 100.0),
            ("decord", [2.0, 6.0, 3.0], 101.0),
            ("PyAV", [1.0, 1.0, 1.0], 0.0),
        )
    ]
    bench_decode.compare(results)
    ours, decord, pyav = results
    assert "mean 0.0, others 100.0" in pyav.problem and not decord.problem and not ours.problem
    assert (ours.cpu_s, decord.cpu_s) == (3.0, 3.0)
    assert (ours.of_fastest_peer, decord.of_fastest_peer) == (1.5, 1.0)
