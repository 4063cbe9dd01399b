"""Facts that are damaged, another shard's, or at odds with the columns judged by them."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import format as fmt
from pipeline import settings
from pipeline.config import EncodeConfig
from pipeline.facts_check import FactsCheck, Judged
from pipeline.plan_table import PlanTable
from pipeline.verify import verify
from tests.pipeline.encoded import SETTINGS, Encoded, record_films
from tests.train.columns import flip_last_byte


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("facts")
    src = record_films(folder / "src", 3)
    return Encoded(folder / "data", src, settings.build(EncodeConfig, SETTINGS, "test")).build()


@pytest.fixture
def encoded(built, tmp_path):
    shutil.copytree(built.root, tmp_path / "data")
    return replace(built, root=tmp_path / "data")


def judged_by(encoded, shard, folder):
    """Return what the columns say of a shard."""
    rows = int(encoded.plan.shard_rows()[shard])
    return [
        Judged(column, shard, folder, column.index(shard, rows)["status"])
        for column in (encoded.columns["video"], encoded.columns["audio"])
    ]


def check(encoded, folder=None):
    """Return the findings, and the summary."""
    found, plan = [], encoded.plan
    checker, table = FactsCheck(encoded.root, found.append), PlanTable(encoded.root, plan)
    for shard in range(len(plan.shard_rows())):
        keys = table.read(shard, [])["key"]
        judged = judged_by(encoded, shard, encoded.facts.name if folder is None else folder)
        checker.take(checker.look(shard, keys, judged))
    checker.beyond_the_plan(len(plan.shard_rows()))
    return found, checker.summary()


def edit(path, **columns):
    """Replace columns of a table."""
    table = pq.read_table(path)
    for name, values in columns.items():
        place = table.column_names.index(name)
        table = table.set_column(place, table.schema.field(name), pa.array(values))
    pq.write_table(table, path)


def test_sound_facts_have_no_findings(built):
    found, summary = check(built)
    assert not found
    assert summary == [{"facts": built.facts.name, "shards": 2, "findings": 0}]


def test_verify_checks_facts_with_the_columns_of_clips(encoded):
    found = []
    summary = verify(encoded.root, found.append, full=True)
    assert not found and summary["facts"] == [
        {"facts": encoded.facts.name, "shards": 2, "findings": 0}
    ]
    edit(encoded.facts / "000001.parquet", audio_status=["missing", "missing"])
    (encoded.facts / "000000.parquet").write_bytes(b"")
    summary = verify(encoded.root, found.append)
    assert len(found) == 2 and summary["facts"][0]["findings"] == 2
    assert all(column["findings"] == 0 for column in summary["columns"])
    found.clear()
    assert verify(encoded.root, found.append, ["text"])["facts"] == [] and not found
    command = [sys.executable, "-m", "pipeline.verify", str(encoded.root), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    told = json.loads(done.stdout)
    assert done.returncode == 1 and len(told["findings"]) == told["facts"][0]["findings"] == 2


@pytest.mark.parametrize("data", [b"", b"PAR1", b"x" * 1000])
def test_file_that_cannot_be_read_is_named(encoded, data):
    path = encoded.facts / "000001.parquet"
    path.write_bytes(data)
    (finding,), summary = check(encoded)
    assert finding.message.startswith(f"{path} can't be read") and summary[0]["findings"] == 1
    assert "\n" not in finding.message and "encode again" in finding.message


def test_a_flipped_byte_of_facts_is_found_by_full(encoded):
    flip_last_byte(encoded.facts / "000001.parquet", "content_hash")
    found = []
    verify(encoded.root, found.append, full=True)
    assert ["000001.parquet can't be read" in finding.message for finding in found] == [True]


def test_file_cut_off_anywhere_is_named(encoded):
    path = encoded.facts / "000001.parquet"
    whole = path.read_bytes()
    for size in range(0, len(whole), 97):
        path.write_bytes(whole[:size])
        (finding,), _ = check(encoded)
        assert str(path) in finding.message


def test_facts_of_another_shard_are_named(encoded):
    path = encoded.facts / "000001.parquet"
    shutil.copy(encoded.facts / "000000.parquet", path)
    (finding,), _ = check(encoded)
    assert str(path) in finding.message and "another shard's" in finding.message


def test_rows_out_of_order_or_too_few_are_named(encoded):
    path = encoded.facts / "000000.parquet"
    table = pq.read_table(path)
    for wrong, text in ((table.take([1, 0]), "row 0: clip"), (table.slice(0, 1), "has 1 rows")):
        pq.write_table(wrong, path)
        (finding,), _ = check(encoded)
        assert text in finding.message


def test_column_that_lacks_or_unknown_status_is_named(encoded):
    path = encoded.facts / "000000.parquet"
    table = pq.read_table(path)
    pq.write_table(table.drop_columns(["audio_status"]), path)
    assert "can't be read" in check(encoded)[0][0].message
    pq.write_table(table, path)
    edit(path, status=["fine", "ok"])
    assert "'fine' is no known status" in check(encoded)[0][0].message


def test_missing_facts_of_a_committed_shard_are_named(encoded):
    (encoded.facts / "000000.parquet").unlink()
    found, summary = check(encoded)
    assert len(found) == 2 and summary[0]["shards"] == 1  # one for each column
    assert all("000000.parquet is missing" in finding.message for finding in found)
    assert not check(encoded, folder="")[0]  # of records that don't tell


def test_folder_that_is_not_there_is_named(encoded):
    found, summary = check(encoded, folder="facts@probe-00000000")
    assert (
        len(found) == 4 and {"facts": "facts@probe-00000000", "shards": 0, "findings": 4} in summary
    )


def test_facts_beyond_the_plan_are_named(encoded):
    shutil.copy(encoded.facts / "000000.parquet", encoded.facts / "000009.parquet")
    (finding,), _ = check(encoded)
    assert "shard 9 of a plan of 2" in finding.message


def test_other_files_beside_facts_are_left_alone(encoded):
    for name in ("duplicates.parquet", ".000001.parquet.0a1b2c3d.tmp", "notes.txt"):
        (encoded.facts / name).write_bytes(b"x")
    assert not check(encoded)[0]


def ok_row(encoded, shard):
    column = encoded.columns["audio"]
    return int(np.flatnonzero(column.index(shard, 2)["status"] == fmt.OK)[0])


@pytest.mark.parametrize("status", ["missing", "silent", "duplicate"])
def test_latents_of_a_clip_whose_facts_say_it_has_none_are_named(encoded, status):
    row = ok_row(encoded, 0)
    stated = pq.read_table(encoded.facts / "000000.parquet")["audio_status"].to_pylist()
    stated[row] = status
    edit(encoded.facts / "000000.parquet", audio_status=stated)
    (finding,), _ = check(encoded)
    assert finding.row == row and f"audio is {status}, expected ok" in finding.message
    assert not check(encoded, folder="")[0]  # judged by other facts


def test_facts_that_were_mended_since_are_sound(encoded):
    """The sound was missing when the column was written, and was found by a later run."""
    for shard in range(2):
        path = encoded.facts / f"{shard:06d}.parquet"
        edit(path, audio_status=["ok", "ok"], status=["ok", "ok"])
    assert not check(encoded)[0]


def test_decision_of_a_check_stays_decided(encoded):
    path = encoded.facts / "000000.parquet"
    plan, shard = encoded.plan, 0
    keys = PlanTable(encoded.root, plan).read(shard, [])["key"]
    decided = np.full(2, fmt.STATUS_CODE["still"], np.uint32)
    judged = Judged(encoded.columns["video"], shard, encoded.facts.name, decided)

    def findings():
        found = FactsCheck(encoded.root, [].append).look(shard, keys, [judged])
        return [finding.message for _, finding in found]

    edit(path, video_status=["still", "still"])
    assert not findings()
    edit(path, video_status=["still", "ok"])
    (message,) = findings()
    assert "row 1" in message and "video is ok, expected still" in message
