"""The status says what the commit records say, whatever else lies in the folder."""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace

import pyarrow.parquet as pq
import pytest

from pipeline.files import write_json
from pipeline.format import Column, Plan, PlanSegment, canonical_json, read_json, write_plan
from pipeline.gc import collect
from pipeline.shards import ShardWriter, create_column
from pipeline.status import as_text, data_set_status
from pipeline.verify import verify
from tests.train.columns import Dataset

NOTES = {"run_id": "run-a", "host": "node-1", "seconds": 4.0, "encode_s": 1.0}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    root = tmp_path_factory.mktemp("status") / "data"
    return Dataset(root, failed={2: "no_video", 5: "silent"}, short_s={0: 5.0}).build()


@pytest.fixture
def dataset(built, tmp_path):
    shutil.copytree(built.root, tmp_path / "data")
    return replace(built, root=tmp_path / "data")


def column_of(status, modality):
    (found,) = [column for column in status["columns"] if column["modality"] == modality]
    return found


def run(*arguments):
    command = [sys.executable, "-m", "pipeline.status", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_columns_are_summed_by_status(dataset):
    video = column_of(data_set_status(dataset.root), "video")
    assert video["name"] == dataset.spec("video").directory
    assert (video["shards"], video["shards_planned"], video["rows"]) == (5, 5, 40)
    assert (video["ok"], video["statuses"]) == (38, {"ok": 38, "no_video": 1, "silent": 1})
    tars = dataset.root.glob("video@*/*.tar")
    assert video["bytes"] == sum(path.stat().st_size for path in tars)
    assert video["mean_clip_s"] == pytest.approx((37 * 10 + 5) / 38, abs=1e-3)


def test_head_of_the_plan_is_told(dataset):
    plan = data_set_status(dataset.root)["plan"]
    assert plan["plan_id"] == dataset.plan.plan_id and plan["source"] == {"name": "synthetic"}
    assert (plan["clips"], plan["shards"], plan["captions"]) == (40, 5, 7)


def test_speed_and_hosts_are_those_of_the_commit_records(dataset):
    path = dataset.root / dataset.spec("video").directory
    shutil.rmtree(path)
    column = create_column(dataset.root, dataset.spec("video"), dataset.plan.plan_id)
    notes = [NOTES, NOTES, {**NOTES, "seconds": 8.0, "host": "node-2", "run_id": "run-b"}]
    for shard, extra in zip((1, 2, 4), notes, strict=True):
        with ShardWriter(column, shard, "a") as writer:
            for row in dataset.rows("video", shard):
                writer.add(*row)
            writer.commit(extra)
    video = column_of(data_set_status(dataset.root), "video")
    assert (video["shards"], video["shards_planned"]) == (3, 5)
    assert video["hosts"] == {"node-1": 2, "node-2": 1}
    assert video["runs"] == {"run-a": 2, "run-b": 1}
    assert video["speed"] == {
        "seconds": 16.0,
        "encode_s": 3.0,
        "clips_per_s": 24 / 16,
        "clips_per_s_median_shard": 2.0,
        "clips_per_s_slowest_shard": 1.0,
        "slowest_shard": 4,
        "clips_per_encode_s": 8.0,
        "hours_per_hour": 15.0,
    }


def test_untimed_columns_have_no_speed(dataset):
    assert column_of(data_set_status(dataset.root), "audio")["speed"] is None


def test_orphans_are_named_with_their_size(dataset):
    folder = dataset.root / dataset.spec("audio").directory
    (folder / "000003.json").unlink()  # taken back: its tar and index are named by nothing
    (folder / ".000004.dead-1.tmp").write_bytes(b"x" * 10)
    (dataset.root / ".plan.json.77.tmp").write_bytes(b"x")
    status = data_set_status(dataset.root)
    sizes = {orphan["file"]: orphan["bytes"] for orphan in status["orphans"]}
    tar = folder / "000003.tar"
    assert sizes == {
        ".plan.json.77.tmp": 1,
        f"{folder.name}/.000004.dead-1.tmp": 10,
        f"{folder.name}/000003.idx.npy": (folder / "000003.idx.npy").stat().st_size,
        f"{folder.name}/000003.tar": tar.stat().st_size,
    }
    assert not status["problems"]


def test_run_in_progress_is_no_damage(dataset):
    column = create_column(dataset.root, dataset.spec("video"), dataset.plan.plan_id)
    (column.path / "000004.json").unlink()
    with ShardWriter(column, 4, "b") as writer:
        for row in dataset.rows("video", 4):
            writer.add(*row)
        (dataset.root / "runs" / "20990101-000000-abcdef").mkdir(parents=True)
        status = data_set_status(dataset.root)
        assert not status["problems"]
        assert column_of(status, "video")["shards"] == 4
        assert any(orphan["file"].endswith("000004.b.tmp") for orphan in status["orphans"])
        assert "under way" in status["runs"]["last"][0]["outcome"]


def test_shard_committed_between_listing_and_reading_leaves_no_orphan(dataset, monkeypatch):
    record = dataset.root / dataset.spec("video").directory / "000004.json"
    kept, committed_shards = record.read_bytes(), Column.committed_shards
    record.unlink()

    def commit_first(column):
        record.write_bytes(kept)
        return committed_shards(column)

    monkeypatch.setattr(Column, "committed_shards", commit_first)
    status = data_set_status(dataset.root)
    assert column_of(status, "video")["shards"] == 5 and not status["orphans"]


def test_facts_and_runs_are_listed(dataset):
    facts = dataset.root / "facts@probe-12345678"
    facts.mkdir()
    (facts / "000000.parquet").write_bytes(b"x" * 7)
    (facts / ".000001.parquet.9.tmp").write_bytes(b"x")
    summary = {"outcome": "complete", "clips": 40, "seconds": 8, "clips_per_s": 5.0}
    for number in range(7):
        folder = dataset.root / "runs" / f"2026110{number}-000000-abcdef"
        folder.mkdir(parents=True)
        write_json(folder / "summary.json", summary)
    status = data_set_status(dataset.root)
    assert status["facts"] == [{"name": facts.name, "shards": 1, "bytes": 7}]
    assert status["orphans"][0]["file"] == f"{facts.name}/.000001.parquet.9.tmp"
    assert status["runs"]["count"] == 7 and len(status["runs"]["last"]) == 5
    assert status["runs"]["last"][-1] == {"run_id": "20261106-000000-abcdef", **summary}


# -- damage

WRONG = [None, -1, 1.5, "x", True, [], {}, [[1]], 2**70, float("nan")]


@pytest.mark.parametrize(
    "name",
    [
        *("shard", "tar", "index", "rows", "ok", "status_counts", "keys_hash", "tar_bytes"),
        *("tar_crc32c", "index_crc32c", "channels", "plan_id", "column"),
    ],
)
def test_damaged_records_are_named_and_the_others_still_counted(dataset, name):
    folder = dataset.root / dataset.spec("video").directory
    path = folder / "000001.json"
    record = read_json(path)
    sound = json.loads(path.read_text())
    damaged = [{**record, name: value} for value in WRONG if value != sound[name]]
    if name in ("keys_hash", "tar", "index"):
        damaged = [value for value in damaged if value[name] != "x"]
    damaged.append({key: value for key, value in record.items() if key != name})
    for value in damaged:
        path.write_text(json.dumps(value))
        status = data_set_status(dataset.root)
        assert any(str(path) in problem for problem in status["problems"]), value
        assert column_of(status, "video")["shards"] >= 4
        assert not status["orphans"]
        assert "damaged" in as_text(status)


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00", '{"shard": 1}', "3"])
def test_record_that_is_no_json_object_is_named(dataset, text):
    path = dataset.root / dataset.spec("video").directory / "000001.json"
    path.write_text(text)
    assert [str(path) in problem for problem in data_set_status(dataset.root)["problems"]] == [True]


def test_record_beyond_the_plan_is_named(dataset):
    folder = dataset.root / dataset.spec("video").directory
    record = read_json(folder / "000001.json")
    write_json(folder / "000009.json", {**record, "shard": 9})
    (problem,) = data_set_status(dataset.root)["problems"]
    assert "000009.json" in problem and "5 shards" in problem


def test_damaged_column_and_summary_are_named(dataset):
    path = dataset.root / dataset.spec("video").directory / "column.json"
    path.write_text("{}")
    summary = dataset.root / "runs" / "20261101-000000-abcdef" / "summary.json"
    summary.parent.mkdir(parents=True)
    summary.write_text('{"outcome": 3}')
    problems = data_set_status(dataset.root)["problems"]
    assert [str(p) in problem for p, problem in zip((path, summary), problems, strict=True)]


@pytest.mark.parametrize("name", ["000001.tar", "000001.idx.npy"])
def test_file_that_is_missing_though_committed_is_named(dataset, name):
    path = dataset.root / dataset.spec("text").directory / name
    path.unlink()
    (problem,) = data_set_status(dataset.root)["problems"]
    assert problem.startswith(f"{path} is missing though committed; remove ")


def test_folder_that_a_removed_column_left_empty_is_no_column(dataset):
    folder = dataset.root / "video@gone-12345678"
    folder.mkdir()  # as stores that list folders without files do
    status = data_set_status(dataset.root)
    assert not status["problems"] and len(status["columns"]) == 3
    findings = []
    verify(dataset.root, findings.append, ["video"])
    assert not findings and not collect(dataset.root, [], 0).problems
    (folder / "000000.tar").touch()
    (problem,) = data_set_status(dataset.root)["problems"]
    assert "column.json is missing" in problem


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("clips", [{"first_shard": 0, "num_clips": "5", "shard_size": 8}]),
        ("clips", [{"first_shard": 0, "num_clips": 5, "shard_size": 0}]),
        ("captions", [{"first_shard": 0, "num_clips": -5, "shard_size": 8}]),
        ("captions", 7),
        ("source", "x"),
        ("plan_id", None),
    ],
)
def test_damaged_plan_is_one_line(dataset, name, value):
    path = dataset.root / "plan.json"
    write_json(path, {**read_json(path), name: value})
    done = run(dataset.root)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith(f"error: {path}") and done.stderr.count("\n") == 1


# -- the command


def test_command_prints_every_column_and_exits_0(dataset):
    done = run(dataset.root)
    assert (done.returncode, done.stderr) == (0, "")
    for name in ("video", "audio", "text"):
        assert dataset.spec(name).directory in done.stdout
    assert "38 ok; 1 failed (no_video 1); 1 dropped (silent 1)" in done.stdout
    assert "40 clips in 5 shards, 7 captions" in done.stdout


def test_json_is_json_alone_also_when_something_is_damaged(dataset):
    assert json.loads(run(dataset.root, "--json").stdout) == data_set_status(dataset.root)
    path = dataset.root / dataset.spec("video").directory / "000001.json"
    path.write_text("[]")
    done = run(dataset.root, "--json")
    assert done.returncode == 1 and "pipeline.verify" in done.stderr
    assert len(json.loads(done.stdout)["problems"]) == 1


def test_folder_that_is_no_data_set_is_one_line(tmp_path):
    done = run(tmp_path / "nothing")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: {tmp_path / 'nothing' / 'plan.json'} is missing")


# -- size


def grow(dataset: Dataset, num_shards: int) -> None:
    """Make ``num_shards`` committed shards of the first one by copying its small files."""
    for modality in ("video", "audio"):
        folder = dataset.root / dataset.spec(modality).directory
        record, index = read_json(folder / "000000.json"), (folder / "000000.idx.npy").read_bytes()
        for shard in range(num_shards):
            stem = f"{shard:06d}"
            names = {"shard": shard, "tar": f"{stem}.tar", "index": f"{stem}.idx.npy"}
            (folder / f"{stem}.json").write_text(canonical_json({**record, **names, **NOTES}))
            (folder / f"{stem}.idx.npy").write_bytes(index)
            (folder / f"{stem}.tar").touch()


@pytest.mark.slow
def test_20000_committed_shards_in_2_columns_take_seconds_and_little_memory(tmp_path):
    dataset = Dataset(tmp_path / "data", num_clips=512, shard_size=512, clip_s=0.5).build()
    plan = dataset.plan
    clips = (PlanSegment(0, 512 * 20_000, 512),)
    write_plan(dataset.root, Plan(plan.plan_id, 0, plan.source, clips, plan.captions))
    grow(dataset, 20_000)
    started = time.monotonic()
    command = [sys.executable, "-m", "pipeline.status", str(dataset.root), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        status = json.loads(process.stdout.read())
        _, code, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(code)
    print(f"\nstatus: {time.monotonic() - started:.1f} s, peak {usage.ru_maxrss / 1024:.0f} MiB")
    assert process.returncode == 0 and not status["orphans"]
    assert column_of(status, "video")["ok"] == 512 * 20_000
    assert usage.ru_maxrss < 1 << 20  # KiB
    assert pq.ParquetFile(dataset.root / "plan.parquet").num_row_groups == 1  # never opened
