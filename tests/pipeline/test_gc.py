"""What is removed is what no commit record names, and what is named by hand; nothing else."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline import gc, orphans, removal
from pipeline.files import write_json
from pipeline.format import Column, FormatError, open_column, read_json
from pipeline.gc import collect
from pipeline.old_rows import take_back
from pipeline.orphans import temporaries
from pipeline.publish import locked_folder
from pipeline.shards import ShardWriter, create_column
from tests.train.columns import Dataset

DAY_S = 86400.0


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    root = tmp_path_factory.mktemp("gc") / "data"
    return Dataset(root, num_clips=24, failed={2: "no_video"}).build()


@pytest.fixture
def dataset(built, tmp_path):
    """A data set that was written two days ago."""
    shutil.copytree(built.root, tmp_path / "data")
    make_older(tmp_path / "data")
    return replace(built, root=tmp_path / "data")


def make_older(path: Path, age_s: float = 2 * DAY_S) -> None:
    then = time.time() - age_s
    for one in [path, *path.rglob("*")]:
        os.utime(one, (then, then), follow_symlinks=False)


def snapshot(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*")}


def run(*arguments):
    command = [sys.executable, "-m", "pipeline.gc", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def removed_by(root, names=(), min_age_s=DAY_S):
    """Remove as --yes does; return the paths that went, and the listing."""
    before, listing = snapshot(root), collect(root, names, min_age_s)
    removal.remove(listing.orphans, listing.holdings, listing.min_age_s)
    return before - snapshot(root), listing


@pytest.fixture
def video(dataset):
    return dataset.root / dataset.spec("video").directory


def write_orphans(dataset, video) -> set[str]:
    """Write one of every kind that can go; return their paths."""
    facts, run_folder = dataset.root / "facts@probe-12345678", dataset.root / "runs" / "20260101-a"
    facts.mkdir()
    run_folder.mkdir(parents=True)
    paths = [
        dataset.root / ".plan.json.0a1b2c3d.tmp",
        video / ".000001.run-1.tmp",
        video / ".000001.run-1.idx.tmp",
        video / ".000001.run-1.json.tmp",
        video / "000001.run-7-2.tar",  # a loser's on an object store
        video / "000001.run-7-2.idx.npy",
        facts / ".000001.parquet.0a1b2c3d.tmp",
        run_folder / ".summary.json.0a1b2c3d.tmp",
    ]
    for path in paths:
        path.write_bytes(b"x" * 10)
    (video / "000002.json").unlink()  # taken back
    paths += [video / "000002.tar", video / "000002.idx.npy"]
    make_older(dataset.root)
    return {str(path.relative_to(dataset.root)) for path in paths}


def test_orphans_go_and_nothing_else(dataset, video):
    orphaned = write_orphans(dataset, video)
    gone, listing = removed_by(dataset.root)
    assert gone == orphaned
    assert {orphan.state for orphan in listing.orphans} == {"removed"}
    assert not collect(dataset.root, [], DAY_S).orphans


def test_without_yes_nothing_goes(dataset, video):
    orphaned, before = write_orphans(dataset, video), snapshot(dataset.root)
    done = run(dataset.root, "--json")
    assert done.returncode == 0 and snapshot(dataset.root) == before
    told = json.loads(done.stdout)
    assert {orphan["file"] for orphan in told["orphans"]} == orphaned
    assert told["removable_bytes"] == sum((dataset.root / name).stat().st_size for name in orphaned)
    assert told["removed_bytes"] == 0
    shown = run(dataset.root).stdout
    assert shown.startswith("files that no commit record names, removable: ")
    assert ".000001.run-1.tmp  10 B, 2.0 days old" in shown and "--yes removes" in shown


def test_yes_removes_and_says_so(dataset, video):
    orphaned = write_orphans(dataset, video)
    before = snapshot(dataset.root)
    done = run(dataset.root, "--yes", "--json")
    assert "nothing to remove" in run(dataset.root).stdout
    told = json.loads(done.stdout)
    assert done.returncode == 0 and before - snapshot(dataset.root) == orphaned
    assert told["removable_bytes"] == 0 and told["removed_bytes"] > 80
    assert json.loads(run(dataset.root, "--json").stdout)["orphans"] == []


def test_sound_data_set_has_nothing_to_remove(dataset):
    gone, listing = removed_by(dataset.root, min_age_s=0)
    assert not gone and not listing.orphans and not listing.problems
    assert [holding.num_shards for holding in listing.holdings] == [3, 3, 3]


def test_what_is_young_may_be_being_written_and_stays(dataset, video):
    orphaned = write_orphans(dataset, video)
    for name in orphaned:
        os.utime(dataset.root / name)
    gone, listing = removed_by(dataset.root)
    assert not gone
    assert {orphan.kept for orphan in listing.orphans} == {"maybe being written"}
    assert removed_by(dataset.root, min_age_s=0)[0] == orphaned


def test_file_of_unknown_age_stays(dataset, video, monkeypatch):
    write_orphans(dataset, video)
    look_at = orphans.look_at

    def of_unknown_age(*arguments):
        found = look_at(*arguments)
        return found and replace(found, age_s=None)

    monkeypatch.setattr(orphans, "look_at", of_unknown_age)
    gone, listing = removed_by(dataset.root, min_age_s=0)
    assert not gone and {orphan.state for orphan in listing.orphans} == {"kept"}


@pytest.mark.parametrize("name", ["notes.txt", ".nfs0001", "000001.tar.gz", "video.tar", "000001"])
def test_files_that_no_writer_of_ours_makes_stay(dataset, video, name):
    (video / name).write_text("mine")
    make_older(dataset.root)
    gone, listing = removed_by(dataset.root)
    assert not gone and [orphan.found.path.name for orphan in listing.orphans] == [name]
    assert "no file that pipeline.encode writes" in gc.as_text(listing)


def test_links_and_folders_stay(dataset, video, tmp_path):
    (tmp_path / "precious").write_text("mine")
    (video / ".000001.link.tmp").symlink_to(tmp_path / "precious")
    (video / "000009.tar").mkdir()
    make_older(dataset.root)
    gone, listing = removed_by(dataset.root)
    assert not gone and (tmp_path / "precious").exists()
    assert {orphan.state for orphan in listing.orphans} == {"kept"}


def test_files_named_by_a_record_stay_whatever_their_name(dataset, video):
    record = read_json(video / "000001.json")
    for name, ending in (("tar", "tar"), ("index", "idx.npy")):
        (video / record[name]).rename(video / f"000001.run-1-1.{ending}")
        record[name] = f"000001.run-1-1.{ending}"
    write_json(video / "000001.json", record)
    (video / "000001.tar").write_bytes(b"x")  # of another attempt
    make_older(dataset.root)
    assert removed_by(dataset.root)[0] == {f"{video.name}/000001.tar"}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"shard": 1}', '{"plan_id": "other"}'])
def test_shard_whose_record_cannot_be_read_keeps_its_files(dataset, video, text):
    (video / "000001.json").write_text(text)
    (video / "000001.run-7-2.tar").write_bytes(b"x")
    make_older(dataset.root)
    gone, listing = removed_by(dataset.root)
    assert not gone and not listing.orphans
    assert len(listing.problems) == 1 and "000001.json" in listing.problems[0]
    done = run(dataset.root, "--yes")
    assert done.returncode == 1 and "left alone" in done.stderr


def test_column_that_cannot_be_read_keeps_its_files(dataset, video):
    (video / "column.json").write_text("{}")
    (video / "000009.tar").write_bytes(b"x")
    make_older(dataset.root)
    gone, listing = removed_by(dataset.root)
    assert not gone and len(listing.problems) == 1


# -- beside a running encode


def commit_again(dataset, shard):
    """Encode a shard of the video column whose record was taken back."""
    column = create_column(dataset.root, dataset.spec("video"), dataset.plan.plan_id)
    with ShardWriter(column, shard, "late-1") as writer:
        for row in dataset.rows("video", shard):
            writer.add(*row)
        assert writer.commit()


def test_record_that_appears_after_the_listing_protects_its_files(dataset, video):
    write_orphans(dataset, video)
    listing = collect(dataset.root, [], DAY_S)
    commit_again(dataset, 2)
    make_older(
        dataset.root
    )  # as on a file system whose clock is off: age must not be what saves it
    removal.remove(listing.orphans, listing.holdings, DAY_S)
    kept = {orphan.found.path.name: orphan.kept for orphan in listing.orphans if orphan.kept}
    assert kept == dict.fromkeys(("000002.tar", "000002.idx.npy"), "committed meanwhile")
    column = open_column(dataset.root, video.name, dataset.plan.plan_id)
    assert len(column.index(2, 8)) == 8 and column.tar_path(2).exists()


def test_shard_that_was_taken_back_keeps_what_its_rows_are_copied_from(dataset, video):
    column = open_column(dataset.root, video.name, dataset.plan.plan_id)
    take_back(column, 2)
    make_older(dataset.root)
    gone, listing = removed_by(dataset.root)
    assert not gone and not listing.orphans
    record = (video / ".000002.reopened.tmp").read_bytes()
    (video / ".000002.reopened.tmp").write_bytes(record[:50])  # nothing can be copied by that
    make_older(dataset.root)
    gone, _ = removed_by(dataset.root)
    kinds = (".000002.reopened.tmp", "000002.tar", "000002.idx.npy")
    assert gone == {f"{video.name}/{name}" for name in kinds}


def test_record_of_a_shard_taken_back_goes_once_it_is_committed_again(dataset, video):
    column = open_column(dataset.root, video.name, dataset.plan.plan_id)
    kept, record = video / ".000002.reopened.tmp", (video / "000002.json").read_bytes()
    take_back(column, 2)
    (video / "000002.json").write_bytes(record)
    make_older(dataset.root)
    assert removed_by(dataset.root)[0] == {str(kept.relative_to(dataset.root))}
    assert column.tar_path(2).exists()


def test_shard_taken_back_after_the_listing_keeps_its_files(dataset, video, monkeypatch):
    column = open_column(dataset.root, video.name, dataset.plan.plan_id)
    committed_shards = Column.committed_shards

    def take_back_first(of):
        if of == column:
            take_back(column, 2)
            make_older(dataset.root)
        return committed_shards(of)

    monkeypatch.setattr(Column, "committed_shards", take_back_first)
    _, listing = removed_by(dataset.root)
    kept = {orphan.found.path.name: orphan.kept for orphan in listing.orphans}
    assert kept == dict.fromkeys(("000002.tar", "000002.idx.npy"), "taken back meanwhile")


def test_file_written_after_the_listing_stays(dataset, video):
    write_orphans(dataset, video)
    listing = collect(dataset.root, [], DAY_S)
    os.utime(video / ".000001.run-1.tmp")
    removal.remove(listing.orphans, listing.holdings, DAY_S)
    kept = [orphan for orphan in listing.orphans if orphan.kept]
    assert [orphan.found.path.name for orphan in kept] == [".000001.run-1.tmp"]
    assert kept[0].kept == "written meanwhile"


def test_removal_waits_for_a_commit_under_way(dataset, video):
    """A commit renames its tar over the orphan, then links the record: nothing may come between."""
    write_orphans(dataset, video)
    listing = collect(dataset.root, [], DAY_S)
    tar, record = video / "000002.tar", {**read_json(video / "000001.json"), "shard": 2}
    record |= {"tar": "000002.tar", "index": "000002.idx.npy"}
    remover = threading.Thread(
        target=removal.remove, args=(listing.orphans, listing.holdings, DAY_S)
    )
    with locked_folder(video):
        remover.start()
        remover.join(0.5)
        assert remover.is_alive() and tar.exists()
        write_json(video / "000002.json", record)
    remover.join(30)
    assert not remover.is_alive() and tar.exists()


def test_files_that_go_meanwhile_are_no_error(dataset, video):
    orphaned = write_orphans(dataset, video)
    listing = collect(dataset.root, [], DAY_S)
    for name in orphaned:
        (dataset.root / name).unlink()
    removal.remove(listing.orphans, listing.holdings, DAY_S)
    assert {orphan.state for orphan in listing.orphans} == {"removed"}


# -- whole columns and facts


def test_column_goes_only_when_named_and_whole(dataset, video):
    gone, listing = removed_by(dataset.root, [video.name])
    assert {name.split("/")[0] for name in gone} == {video.name} and not video.exists()
    (chosen,) = [holding for holding in listing.holdings if holding.is_chosen]
    assert (chosen.state, chosen.num_shards) == ("removed", 3)


def test_column_that_is_named_stays_without_yes(dataset, video):
    before = snapshot(dataset.root)
    told = json.loads(run(dataset.root, "--columns", video.name, "--json").stdout)
    assert snapshot(dataset.root) == before
    states = {column["name"]: column["state"] for column in told["columns"]}
    assert states.pop(video.name) == "removable" and set(states.values()) == {"kept"}
    assert told["removable_bytes"] == sum(path.stat().st_size for path in video.iterdir())


def test_records_go_first_and_column_json_last(dataset, video, monkeypatch):
    names, unlink = [], Path.unlink

    def note(path, missing_ok=False):
        names.append(path.name)
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", note)
    removed_by(dataset.root, [video.name])
    assert names[:3] == ["000000.json", "000001.json", "000002.json"]
    assert names[-1] == "column.json" and len(names) == 10


def test_removal_that_was_stopped_goes_on(dataset, video, monkeypatch):
    unlink, stop_at = Path.unlink, "000001.tar"

    def stop(path, missing_ok=False):
        if path.name == stop_at:
            raise KeyboardInterrupt
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", stop)
    with pytest.raises(KeyboardInterrupt):
        removed_by(dataset.root, [video.name])
    assert not list(video.glob("*[0-9].json")) and (video / "column.json").exists()
    monkeypatch.setattr(Path, "unlink", unlink)
    removed_by(dataset.root, [video.name])
    assert not video.exists()


@pytest.mark.parametrize(
    "name", ["video", "video@test", "video@test-00000000", "..", ".", "", "runs", "plan.json", "/"]
)
def test_names_that_are_no_folder_of_a_column_are_refused(dataset, name):
    before = snapshot(dataset.root)
    with pytest.raises(FormatError, match="has no folder"):
        removed_by(dataset.root, [name])
    assert snapshot(dataset.root) == before


def test_column_that_is_a_link_is_refused(dataset, video, tmp_path):
    video.rename(tmp_path / "elsewhere")
    video.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FormatError, match="is a link"):
        removed_by(dataset.root, [video.name])
    assert len(list((tmp_path / "elsewhere").iterdir())) == 10


def test_column_with_other_files_is_refused(dataset, video):
    (video / "notes.txt").write_text("mine")
    make_older(dataset.root)
    before = snapshot(dataset.root)
    with pytest.raises(FormatError, match=r"notes\.txt is not what pipeline\.encode writes"):
        removed_by(dataset.root, [video.name])
    assert snapshot(dataset.root) == before


def test_column_that_may_be_being_written_is_refused(dataset, video):
    os.utime(video / "000002.tar")
    done = run(dataset.root, "--columns", video.name, "--yes")
    assert done.returncode == 1 and "--min-age-hours 0" in done.stderr
    assert done.stderr.count("\n") == 1 and len(list(video.iterdir())) == 10
    done = run(dataset.root, "--columns", video.name, "--yes", "--min-age-hours", 0)
    assert done.returncode == 0 and not video.exists()


def name_facts(folder: Path, name: str) -> None:
    for path in folder.glob("0*.json"):
        write_json(path, {**read_json(path), "facts": name})


def test_facts_that_records_name_go_only_with_them(dataset, video):
    for name in ("facts@probe-11111111", "facts@probe-22222222"):
        (dataset.root / name).mkdir()
        (dataset.root / name / "000000.parquet").write_bytes(b"x")
        (dataset.root / name / "duplicates.parquet").write_bytes(b"x")
    name_facts(video, "facts@probe-11111111")
    make_older(dataset.root)
    told = collect(dataset.root, [], DAY_S).told()
    assert [facts["named_by"] for facts in told["facts"]] == [{video.name: 3}, {}]
    with pytest.raises(FormatError, match=f"named by the commit records of {video.name}"):
        removed_by(dataset.root, ["facts@probe-11111111"])
    gone, _ = removed_by(dataset.root, ["facts@probe-22222222"])
    assert {name.split("/")[0] for name in gone} == {"facts@probe-22222222"}
    gone, _ = removed_by(dataset.root, ["facts@probe-11111111", video.name])
    assert {name.split("/")[0] for name in gone} == {"facts@probe-11111111", video.name}


def test_facts_by_which_a_shard_taken_back_was_judged_stay(dataset, video):
    (dataset.root / "facts@probe-a").mkdir()
    record = video / "000001.json"
    write_json(record, {**read_json(record), "facts": "facts@probe-a"})
    take_back(open_column(dataset.root, video.name, dataset.plan.plan_id), 1)
    make_older(dataset.root)
    with pytest.raises(FormatError, match="is named by the commit records of video@test"):
        collect(dataset.root, ["facts@probe-a"], DAY_S)


def test_facts_that_a_damaged_record_may_name_stay(dataset, video):
    facts = dataset.root / "facts@probe-11111111"
    facts.mkdir()
    (facts / "000000.parquet").write_bytes(b"x")
    (video / "000001.json").write_text("{")
    make_older(dataset.root)
    with pytest.raises(FormatError, match=r"can't be told.*000001\.json"):
        removed_by(dataset.root, [facts.name])
    removed_by(dataset.root, [facts.name, video.name])
    assert not facts.exists() and not video.exists()


def test_damaged_column_can_be_removed_by_its_name(dataset, video):
    (video / "column.json").write_text("{}")
    make_older(dataset.root)
    gone, listing = removed_by(dataset.root, [video.name])
    assert not video.exists() and not listing.problems and len(gone) == 11


def test_folder_that_is_no_data_set_is_one_line(tmp_path):
    (tmp_path / ".a.tmp").write_text("x")
    done = run(tmp_path, "--yes", "--min-age-hours", 0)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error:") and (tmp_path / ".a.tmp").exists()


def test_temporaries_of_no_folder_are_none(tmp_path):
    assert temporaries(tmp_path / "nothing") == []
