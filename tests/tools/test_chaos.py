"""Faults that hit encode runs cost time and nothing else; and what was lost would be noticed."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from pipeline import settings
from pipeline.config import EncodeConfig
from pipeline.format import STATUS_CODE
from pipeline.plan_table import PlanTable
from pipeline.shards import ShardWriter
from tests.pipeline.encoded import SETTINGS, Encoded, record_films
from tools import chaos, faults, hit_runs
from tools.bouncing import ClipSettings
from tools.faults import KINDS
from tools.hit_runs import Hit, Session
from tools.make_clips import make_clips
from tools.same_data import differences


class NoNodes:
    address = "nowhere"

    def raylets(self):
        return []

    def replace_second(self):
        raise AssertionError("there is none")


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chaos")
    src = record_films(folder / "src", 3)
    return Encoded(folder / "data", src, settings.build(EncodeConfig, SETTINGS, "test")).build()


@pytest.fixture
def copy(reference, tmp_path):
    shutil.copytree(reference.root, tmp_path / "data")
    return replace(reference, root=tmp_path / "data")


def test_a_copy_is_the_same_and_what_killed_writers_leave_is_removed(reference, copy):
    leftover = copy.columns["video"].path / ".000000.run-2.tmp"
    leftover.write_bytes(b"half a tar")
    (copy.root / "runs" / "second").mkdir(parents=True)
    assert differences(copy.root, reference.root) == []
    assert not leftover.exists()


def spoil_byte(copy):
    path = copy.columns["video"].path / "000001.tar"
    data = bytearray(path.read_bytes())
    data[1500] ^= 1
    path.write_bytes(data)


def lose_commit(copy):
    (copy.columns["audio"].path / "000000.json").unlink()


def leave_stranger(copy):
    (copy.columns["audio"].path / "notes.txt").write_text("mine")


def lose_facts(copy):
    (copy.facts / "000001.parquet").unlink()


def write_tombstones(copy):
    """Commit a shard that is sound in itself, but has no clip."""
    column = copy.columns["video"]
    (column.path / "000000.json").unlink()
    with ShardWriter(column, 0, "b-1") as writer:
        for clip in PlanTable(copy.root, copy.plan).clips(0):
            writer.add(clip.key, None, STATUS_CODE["missing"])
        assert writer.commit({"facts": copy.facts.name})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (spoil_byte, "000001.tar has other bytes"),
        (lose_commit, "are not committed"),
        (leave_stranger, "notes.txt is left over"),
        (lose_facts, "000001.parquet is missing"),
        (write_tombstones, "000000.tar has other bytes"),
    ],
)
def test_what_is_lost_or_left_is_found(reference, copy, damage, message):
    damage(copy)
    assert any(message in found for found in differences(copy.root, reference.root))


def test_faults_are_drawn_by_seed_every_kind_as_often():
    drawn = faults.draw(KINDS, 100, seed=3)
    assert Counter(fault.kind for fault in drawn) == dict.fromkeys(KINDS, 20)
    assert drawn == faults.draw(KINDS, 100, seed=3) != faults.draw(KINDS, 100, seed=4)
    assert 5 < sum(fault.early for fault in drawn) < 40
    assert all(0 <= fault.after_s <= faults.MAX_EARLY_S for fault in drawn)


def test_only_processes_of_the_given_ones_are_victims():
    title = ["ray::DecoderActor.decode", "60"]
    stranger = subprocess.Popen(title, executable=shutil.which("sleep"))
    code = "import subprocess, sys; subprocess.Popen(sys.argv[1:], executable='%s').wait()"
    parent = subprocess.Popen([sys.executable, "-c", code % shutil.which("sleep"), *title])
    try:
        deadline_s = time.monotonic() + 30
        while not (found := faults.actors([parent.pid], "decoder")):
            assert time.monotonic() < deadline_s
            time.sleep(0.05)
        assert [process.ppid() for process in found] == [parent.pid]
        assert not faults.actors([parent.pid], "encoder")
        assert faults.kill_one(found, 0.99)
        parent.wait(30)
        assert not psutil.pid_exists(found[0].pid) and stranger.poll() is None
        assert not faults.actors([parent.pid], "decoder")  # it has gone, and that is no error
        assert not faults.kill_one([], 0.5)
    finally:
        for process in (stranger, parent):
            process.kill()
            process.wait()


def test_a_small_disk_is_filled_to_its_last_byte(tmp_path):
    with faults.small_disk(tmp_path / "disk", 1 << 20) as is_mounted:
        if not is_mounted:
            pytest.skip("mounting a tmpfs is not allowed here")
        faults.fill(tmp_path / "disk" / "ballast")
        assert os.statvfs(tmp_path / "disk").f_bavail == 0
        with pytest.raises(OSError, match="No space left"):
            (tmp_path / "disk" / "more").write_bytes(b"1")
        (tmp_path / "disk" / "ballast").unlink()
        (tmp_path / "disk" / "more").write_bytes(b"1")
    assert not list((tmp_path / "disk").iterdir())


def test_what_a_fault_costs_is_the_time_beyond_that_of_as_many_commits(tmp_path):
    session = Session(tmp_path, tmp_path, tmp_path, NoNodes())
    session.result.usual_s = 0.5
    hits = [Hit("decoder", at=100.0), Hit("driver", at=110.0), Hit("node", at=111.0)]
    session._account(hits, [99.0, 108.0, 109.0, 109.5, 120.0, 121.0])
    # 10 s for 3 commits of .5 s; 1 s for none; 10 s to the last, for two.
    assert [hit.lost_s for hit in hits] == [8.5, 1.0, 9.0]


def test_a_command_that_fails_by_itself_is_a_problem_and_not_repeated_for_ever(
    tmp_path, monkeypatch
):
    class Failing(hit_runs.Command):
        def __init__(self, clips, out, address, log):
            self.log, self.started_s = log, time.monotonic()
            code = "import sys; sys.exit('error: out of luck')"
            with log.open("wb") as file:
                self.process = subprocess.Popen([sys.executable, "-c", code], stderr=file)

    monkeypatch.setattr(hit_runs, "Command", Failing)
    session = Session(tmp_path, tmp_path, tmp_path, NoNodes())
    with pytest.raises(hit_runs.ChaosError, match="out of luck"):
        session.data_set(tmp_path / "out", [])
    assert len(session.result.problems) == hit_runs.MAX_FAILED
    with pytest.raises(hit_runs.ChaosError, match="undisturbed"):
        session.undisturbed(tmp_path / "out")


def test_a_command_that_hangs_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(hit_runs, "MAX_COMMAND_S", 0)
    command = hit_runs.Command(tmp_path, tmp_path / "out", "nowhere", tmp_path / "log")
    with pytest.raises(hit_runs.ChaosError, match="hung"):
        command.poll()
    assert command.process.poll() is not None


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    make_clips(folder, ClipSettings(seconds=1, size=64), 8)
    return folder


def test_six_faults_lose_nothing(clips, tmp_path, capsys):
    """The short version of ``python -m tools.chaos``; about half a minute."""
    arguments = ["--faults", "6", "--clips", str(clips), "--num-clips", "320", "--json"]
    assert chaos.main([*arguments, "--folder", str(tmp_path / "kept")]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["problems"] == [] and result["num_data_sets"] >= 1
    hits = Counter(hit["kind"] for hit in result["hits"])
    expected = set(KINDS) if can_mount(tmp_path / "try") else set(KINDS) - {"disk"}
    assert set(hits) == expected
    assert all(hit["again"] for hit in result["hits"] if hit["kind"] == "driver")


def can_mount(folder: Path) -> bool:
    with faults.small_disk(folder, 1 << 20) as is_mounted:
        return is_mounted


def test_impossible_plans_are_refused(capsys):
    for wrong in (["--kinds", "flood"], ["--faults", "0"], ["--num-clips", "3"]):
        with pytest.raises(SystemExit):
            chaos.main(wrong)
    assert "kinds are decoder" in capsys.readouterr().err
