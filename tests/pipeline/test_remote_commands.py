"""preview, verify --reencode and gc over a data set on an object store.

The server is a real S3 server (SeaweedFS) on loopback.
"""

import itertools
import json
import sys

import pytest

from pipeline import gc, preview, removal, settings
from pipeline.config import EncodeConfig
from pipeline.data_root import open_root
from pipeline.files import scan
from pipeline.format import FormatError, read_json
from pipeline.gc import collect
from pipeline.orphans import entries
from pipeline.shards import ShardWriter, create_column
from pipeline.verify import main as verify_main
from pipeline.verify import verify
from tests.pipeline.encoded import SETTINGS, Encoded, record_films
from tests.pipeline.servers import s3_bucket
from tests.train.columns import Dataset

NUMBERS = itertools.count()


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    with s3_bucket(tmp_path_factory.mktemp("s3"), "data") as files:
        yield files


@pytest.fixture(scope="module")
def encoded(s3, tmp_path_factory):
    """A data set of real films, which no test changes."""
    src = record_films(tmp_path_factory.mktemp("media") / "src", 3)
    config = settings.build(EncodeConfig, SETTINGS, "test")
    return Encoded(open_root("s3://data/encoded"), src, config).build()


@pytest.fixture
def dataset(s3):
    return Dataset(open_root(f"s3://data/{next(NUMBERS)}"), num_clips=24).build()


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run a command's main in this process; return what it printed."""

    def run(main, *arguments) -> str:
        monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
        monkeypatch.chdir(tmp_path)
        main()
        return capsys.readouterr().out

    return run


def names(folder):
    return {entry.name for entry in scan(folder)}


def test_preview_reads_rows_of_a_store(encoded, run, tmp_path):
    told = json.loads(run(preview.main, "s3://data/encoded", "--num", 3, "--json"))
    assert told["dir"] == "s3://data/encoded" and len(told["clips"]) == 3
    assert all(clip["psnr_db"] > 20 for clip in told["clips"])
    assert (tmp_path / "preview" / "index.html").exists()


def test_clips_of_a_store_are_encoded_again(encoded, run):
    told = json.loads(run(verify_main, "s3://data/encoded", "--reencode", 9, "--json"))
    assert not told["findings"]
    assert [(one["checked"], one["equal"]) for one in told["reencoded"]] == [(3, 3), (1, 1), (4, 4)]
    assert told["facts"] == [{"facts": encoded.facts.name, "shards": 2, "findings": 0}]


def test_losers_uploads_go_and_nothing_that_a_record_names(dataset):
    column = create_column(dataset.root, dataset.spec("video"), dataset.plan.plan_id)
    for name in ("000001.loser-1.tar", "000001.loser-1.idx.npy"):
        (column.path / name).write_bytes(b"x" * 10)
    listing = collect(dataset.root, [], 3600)
    removal.remove(listing.orphans, listing.holdings, 3600)
    assert {orphan.kept for orphan in listing.orphans} == {"maybe being written"}
    before = names(column.path)
    listing = collect(dataset.root, [], 0)
    removal.remove(listing.orphans, listing.holdings, 0)
    assert before - names(column.path) == {"000001.loser-1.tar", "000001.loser-1.idx.npy"}
    findings = []
    verify(dataset.root, findings.append, ["video"], full=True)
    assert not findings


def test_upload_whose_record_appears_after_the_listing_stays(dataset):
    column = create_column(dataset.root, dataset.spec("video"), dataset.plan.plan_id)
    record = column.path / "000002.json"
    kept = record.read_bytes()
    record.unlink()
    listing = collect(dataset.root, [], 0)
    assert len(listing.orphans) == 2
    record.write_bytes(kept)
    removal.remove(listing.orphans, listing.holdings, 0)
    assert {orphan.kept for orphan in listing.orphans} == {"committed meanwhile"}
    assert column.tar_path(2).exists()


def test_files_of_a_replaced_record_go(dataset):
    column = create_column(dataset.root, dataset.spec("video"), dataset.plan.plan_id)
    old = read_json(column.path / "000001.json")
    with ShardWriter(column, 1, "again-1") as writer:
        for row in dataset.rows("video", 1):
            writer.add(*row)
        assert writer.commit(replacing=True)
    listing = collect(dataset.root, [], 0)
    removal.remove(listing.orphans, listing.holdings, 0)
    assert {o.found.path.name for o in listing.orphans} == {old["tar"], old["index"]}
    assert names(column.path) >= {"000001.again-1.tar", "000001.again-1.idx.npy", "000001.json"}


def test_column_goes_when_named(dataset, run):
    name = dataset.spec("audio").directory
    url = str(dataset.root)
    with pytest.raises(FormatError, match="a run may still write it"):
        collect(dataset.root, [name], 3600)
    told = json.loads(run(gc.main, url, "--columns", name, "--min-age-hours", 0, "--json"))
    (chosen,) = [column for column in told["columns"] if column["name"] == name]
    assert chosen["state"] == "removable" and name in names(dataset.root)
    told = json.loads(run(gc.main, url, "--columns", name, "--min-age-hours", 0, "--json", "--yes"))
    assert told["removed_bytes"] == chosen["bytes"] > 0
    assert not entries(dataset.root / name)  # some stores keep the empty folder for a while
    assert dataset.spec("video").directory in names(dataset.root)
