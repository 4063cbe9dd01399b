"""The loader benchmark compares whoever does the whole work, and says who does not, and why."""

import json
import sys

import numpy as np
import psutil
import pytest
import torch

from tools import bench_loader
from tools.bench_loader import Bench, interpreters, run
from tools.loader_cache import cached_share, drop, warm
from tools.loader_contenders import CONTENDERS, FOLDER, MEMCPY, OURS, PREADV, SHARD_PEERS
from tools.loader_data import Rows, check_batch, check_numbers, numbers, pad
from tools.loader_env import PeersError, peers_python
from tools.loader_results import Result, Turn, print_table, ratios, summarise

ROWS = Rows(num_rows=64, video_shape=(6, 4, 4, 4), audio_shape=(20, 4, 2), text_width=8)
BATCH = 4


def needs_a_disk(path):
    """Skip where files live in the page cache alone."""
    mounts = sorted(psutil.disk_partitions(all=True), key=lambda mount: len(mount.mountpoint))
    around = [mount for mount in mounts if path.is_relative_to(mount.mountpoint)]
    if around[-1].fstype in ("tmpfs", "ramfs"):
        pytest.skip(f"{path} is on a {around[-1].fstype}, nothing can be dropped from memory")


# -- whole runs


def test_who_works_is_measured_and_who_does_not_is_named(tmp_path, capsys):
    names = (OURS, "webdataset", "litdata", FOLDER, PREADV)  # litdata is not installed here
    results = [Result(name, int(name == OURS)) for name in names]
    run(Bench(ROWS, BATCH, tmp_path, "cpu", dict.fromkeys(names, sys.executable)), results, 2, 0)
    lacking = results.pop(2)
    assert lacking.problem == "ModuleNotFoundError: No module named 'litdata'"
    assert not lacking.turns
    for result in results:
        assert result.problem == "" and result.version
        assert len(result.turns) == 2 and not result.cold_turns
        assert all(turn.wall_s > 0 and turn.cpu_s > 0 for turn in result.turns)
        assert result.rows_per_s > 0 and result.rows_per_cpu_s > 0 and result.of_preadv > 0
        assert result.first_batch_s > 0 and result.peak_mb >= result.idle_mb > 50
    assert results[-1].of_preadv == 1
    assert list(ratios(results)) == ["webdataset (best shard format)", FOLDER, PREADV]
    print_table([*results, lacking], ROWS.num_rows)
    table = capsys.readouterr().out
    assert all(f"\n{result.name} " in table for result in results)
    assert f"litdata                           | not compared: {lacking.problem}\n" in table


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_peers_read_every_row(tmp_path, capsys):
    try:
        peers_python(tmp_path / "peers")
    except PeersError as error:
        pytest.skip(str(error))
    needs_a_disk(tmp_path)
    arguments = ["--rows", "64", "--batch", "4", "--rounds", "1", "--cold-rounds", "1", "--json"]
    code = bench_loader.main([*arguments, "--folder", str(tmp_path)])
    found = json.loads(capsys.readouterr().out)
    assert [row for row in found["results"] if row["problem"]] == []
    assert code == 0
    assert (found["row_bytes"], found["batch"]) == (752128, 4)
    assert {row["contender"] for row in found["results"]} == {*CONTENDERS}
    cold = {row["contender"] for row in found["results"] if row["cold_turns"]}
    assert cold == {*CONTENDERS} - {MEMCPY}
    assert max(row["cold_cached"] for row in found["results"]) < 0.5
    assert list(found["ours_over"])[1:] == [FOLDER, PREADV]


def test_a_process_that_dies_is_named_with_its_last_words(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho it begins >&2\necho out of luck >&2\nexit 3\n")
    python.chmod(0o755)
    result = Result("webdataset", 0)
    run(Bench(ROWS, BATCH, tmp_path, "cpu", {"webdataset": str(python)}), [result], 1, 0)
    assert result.problem == "its process ended with code 3: out of luck"


def test_only_peers_of_another_environment_fail_with_it(tmp_path, monkeypatch):
    def fail(_):
        raise PeersError("no network")

    monkeypatch.setattr(bench_loader, "peers_python", fail)
    results = [Result(name, 0) for name in CONTENDERS]
    pythons = interpreters(results, tmp_path)
    assert set(pythons.values()) == {sys.executable}
    failed = {result.contender for result in results if result.problem == "no network"}
    assert failed == {*SHARD_PEERS} - {"webdataset"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "1000"], "multiple of 16 batches of 16"),
        (["--rounds", "0"], "1 at least"),
        (["--only", "ours;pandas"], "'pandas' is none of: ours; "),
    ],
)
def test_wrong_arguments_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        bench_loader.main(arguments)
    assert message in capsys.readouterr().err


# -- the same work


def batch_of(rows, numbers_):
    arrays = [rows.arrays(number) for number in numbers_]
    tensors = {
        name: torch.stack([torch.from_numpy(array[name]) for array in arrays])
        for name in ("video", "audio")
    }
    text, mask = pad([torch.from_numpy(array["text"]) for array in arrays])
    return {**tensors, "text": text, "mask": mask}


@pytest.fixture(scope="module")
def checksums():
    return np.array(ROWS.checksums())


def test_batches_as_written_pass_with_and_without_text(checksums):
    batch = batch_of(ROWS, [5, 0, 63])
    check_batch(batch, ROWS, checksums)
    check_batch({name: batch[name] for name in ("video", "audio")}, ROWS, checksums)
    assert numbers(batch)[:, 0].tolist() == [5, 0, 63]


@pytest.mark.parametrize("name", ["video", "audio", "text"])
def test_one_other_value_is_found(name, checksums):
    batch = batch_of(ROWS, [5, 7])
    batch[name][1].view(-1)[3] += 1
    with pytest.raises(ValueError, match="row 7 is not what was written"):
        check_batch(batch, ROWS, checksums)


def test_less_than_a_row_is_found(checksums):
    batch = batch_of(ROWS, [5, 7])
    with pytest.raises(ValueError, match="video is"):
        check_batch({**batch, "video": batch["video"][:, 1:]}, ROWS, checksums)
    with pytest.raises(ValueError, match="audio is"):
        check_batch({**batch, "audio": batch["audio"].float()}, ROWS, checksums)
    mask = batch["mask"].clone()
    mask[0, 0] = False
    with pytest.raises(ValueError, match="row 5"):
        check_batch({**batch, "mask": mask}, ROWS, checksums)


def test_an_epoch_needs_every_row_once():
    rows = Rows(num_rows=4096, video_shape=(1,), audio_shape=(4, 1, 1))
    found = [torch.tensor([[row % 2048, row // 2048] for row in range(4096)]).half()]
    check_numbers(found, rows)
    with pytest.raises(ValueError, match="4095 rows came, 4095 different"):
        check_numbers([found[0][1:]], rows)
    with pytest.raises(ValueError, match="4096 rows came, 4095 different"):
        check_numbers([found[0][1:], found[0][7:8]], rows)


# -- figures


def test_ratios_compare_turns_beside_each_other():
    def result(name, *cpu_s, workers=0):
        turns = [Turn(wall_s=2 * one, cpu_s=one, first_batch_s=0.1) for one in cpu_s]
        return Result(name, workers, turns=turns)

    ours, limit = result(OURS, 1.0, 4.0, 1.0), result(PREADV, 0.5, 2.0, 0.8)
    slow, fast = result("litdata", 6.0, 9.0, 6.0), result("litdata", 3.0, 8.0, 5.0, workers=2)
    other = result("webdataset", 5.5, 5.5, 5.5)
    broken = Result("megatron-energon", 0, problem="not there")
    results = [ours, slow, fast, other, broken, limit]
    summarise(results, num_rows=12)
    assert (ours.rows_per_cpu_s, ours.rows_per_s, ours.of_preadv) == (12, 6, 0.5)
    assert ratios(results) == {"litdata, 2 workers (best shard format)": 3.0, PREADV: 0.5}
    assert broken.rows_per_s == 0


def test_files_leave_the_page_cache_and_come_back(tmp_path):
    needs_a_disk(tmp_path)
    (tmp_path / "below").mkdir()
    for path in (tmp_path / "one", tmp_path / "below" / "two"):
        path.write_bytes(bytes(1 << 20))
    (tmp_path / "empty").touch()
    drop(tmp_path)
    assert cached_share(tmp_path) == 0
    warm(tmp_path)
    assert cached_share(tmp_path) == 1
