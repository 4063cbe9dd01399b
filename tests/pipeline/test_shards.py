"""Properties of the column writer: deterministic bytes, all-or-nothing commits, plain tars."""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
from webdataset import WebDataset  # pyright: ignore[reportAttributeAccessIssue]

from pipeline.files import NoRoomError, read_range
from pipeline.format import OK, STATUS_CODE, Column, FormatError, keys_hash, open_column
from pipeline.records import sum_records
from pipeline.shards import ShardWriter, channel_sums, create_column
from tests.train.columns import Dataset


def read_row(column, shard, row, num_rows):
    """Return a row by its index record, as a trainer reads it, or None for a tombstone."""
    record = column.index(shard, num_rows)[row]
    if record["status"] != OK:
        return None
    data = read_range(column.tar_path(shard), int(record["offset"]), int(record["nbytes"]))
    assert google_crc32c.value(data) == record["crc32c"]
    shape = [int(size) for size in record["shape"] if size]
    return np.frombuffer(data, column.spec.dtype).reshape(shape)


CRASH_EVENTS = {"open", "os.rename", "os.link", "os.remove"}


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return Dataset(tmp_path / "shards", failed={2: "no_video", 5: "decode_timeout"})


@pytest.fixture
def column(dataset: Dataset) -> Column:
    return create_column(dataset.root, dataset.spec("video"), dataset.plan.plan_id)


def names(column: Column) -> set[str]:
    return {path.name for path in column.path.iterdir()}


def test_same_rows_write_the_same_bytes(dataset: Dataset, tmp_path: Path) -> None:
    other = Dataset(tmp_path / "other", failed=dataset.failed)
    for built, attempt in ((dataset, "one"), (other, "two")):
        column = create_column(built.root, built.spec("video"), built.plan.plan_id)
        built.write_shard(column, 0, attempt)
    for name in ("000000.tar", "000000.idx.npy", "column.json"):
        first, second = (next(root.glob(f"*/{name}")) for root in (dataset.root, other.root))
        assert first.read_bytes() == second.read_bytes()


def test_members_are_ustar_without_owner_or_time_and_hold_what_np_save_writes(
    dataset: Dataset, column: Column
) -> None:
    dataset.write_shard(column, 0)
    path = column.path / "000000.tar"
    with tarfile.open(path) as tar:
        members = tar.getmembers()
        for member in members:
            owner = (member.uid, member.gid, member.uname, member.gname)
            assert owner == (0, 0, "", "") and (member.mtime, member.mode) == (0, 0o644)
        clips = [clip for clip in range(8) if clip not in dataset.failed]
        assert [member.name for member in members] == [
            f"{dataset.key(clip)}.video.npy" for clip in clips
        ]
        expected = io.BytesIO()
        np.save(expected, dataset.video(0))
        file = tar.extractfile(members[0])
        assert file is not None and file.read() == expected.getvalue()
    assert path.read_bytes()[257:265] == b"ustar\x0000"
    assert path.stat().st_size % tarfile.RECORDSIZE == 0


@pytest.mark.parametrize("num_rows", [0, 1, 8])
def test_standard_tarfile_writes_the_same_archive(
    dataset: Dataset, column: Column, num_rows: int
) -> None:
    expected = io.BytesIO()
    with (
        tarfile.open(fileobj=expected, mode="w", format=tarfile.USTAR_FORMAT) as tar,
        ShardWriter(column, 0, "a") as writer,
    ):
        for clip in range(num_rows):
            writer.add(dataset.key(clip), dataset.video(clip))
            buffer = io.BytesIO()
            np.save(buffer, dataset.video(clip))
            member = tarfile.TarInfo(f"{dataset.key(clip)}.video.npy")
            member.size = buffer.tell()
            buffer.seek(0)
            tar.addfile(member, buffer)
        assert writer.commit()
    assert (column.path / "000000.tar").read_bytes() == expected.getvalue()


def test_plain_webdataset_reads_the_same_arrays(dataset: Dataset, column: Column) -> None:
    dataset.write_shard(column, 0)
    samples = list(WebDataset(str(column.path / "000000.tar"), shardshuffle=False).decode())
    clips = [clip for clip in range(8) if clip not in dataset.failed]
    assert [sample["__key__"] for sample in samples] == [dataset.key(clip) for clip in clips]
    for sample, clip in zip(samples, clips, strict=True):
        np.testing.assert_array_equal(sample["video.npy"], dataset.video(clip))


def test_tombstones_keep_their_row_and_status(dataset: Dataset, column: Column) -> None:
    dataset.write_shard(column, 0)
    index = column.index(0, 8)
    assert index["status"][2] == STATUS_CODE["no_video"] and index["nbytes"][2] == 0
    for row in range(8):
        array = read_row(column, 0, row, 8)
        if row in dataset.failed:
            assert array is None
        else:
            np.testing.assert_array_equal(array, dataset.video(row))


def test_record_states_what_the_files_hold(dataset: Dataset, column: Column) -> None:
    dataset.write_shard(column, 0)
    record = column.commit(0)
    assert record is not None
    assert (record["rows"], record["ok"], record["shard"]) == (8, 6, 0)
    assert record["status_counts"] == {"ok": 6, "no_video": 1, "decode_timeout": 1}
    assert record["keys_hash"] == keys_hash(dataset.key(clip) for clip in range(8))
    assert record["wall_s"] == 0.5
    for name in ("tar", "index"):
        data = (column.path / record[name]).read_bytes()
        assert google_crc32c.value(data) == record[f"{name}_crc32c"]
    assert record["tar_bytes"] == (column.path / record["tar"]).stat().st_size


def test_statistics_are_those_of_all_values(dataset: Dataset, column: Column) -> None:
    dataset.write_shard(column, 0)
    dataset.write_shard(column, 1)
    clips = [clip for clip in range(16) if clip not in dataset.failed]
    values = np.concatenate([dataset.video(clip) for clip in clips]).astype(np.float64)
    found = sum_records(column).statistics()
    np.testing.assert_allclose(found["mean"], values.mean(axis=(0, 2, 3)), atol=1e-9)
    np.testing.assert_allclose(found["std"], values.std(axis=(0, 2, 3)), rtol=1e-9)


@pytest.mark.parametrize("modality", ["video", "audio"])
def test_statistics_of_moments_are_those_of_latents_drawn_from_them(
    tmp_path: Path, modality: str
) -> None:
    dataset = Dataset(tmp_path / "shards", moments=frozenset([modality])).build()
    column = open_column(dataset.root, dataset.spec(modality).directory, dataset.plan.plan_id)
    axis = column.spec.channel_axis
    stored = [getattr(dataset, modality)(clip) for clip in range(40)]
    mean, log_variance = np.split(np.concatenate(stored).astype(np.float64), 2, axis)
    noise = np.random.default_rng(0).standard_normal((50, *mean.shape))
    drawn = np.moveaxis(mean + np.exp(0.5 * log_variance) * noise, axis + 1, 0)
    found = sum_records(column).statistics()
    assert found and found["count"] == mean.size // mean.shape[axis]
    channels = drawn.reshape(len(drawn), -1)
    np.testing.assert_allclose(found["mean"], channels.mean(axis=1), atol=3e-3)
    np.testing.assert_allclose(found["std"], channels.std(axis=1), rtol=3e-3)


def test_extreme_log_variances_count_as_what_is_drawn_from_them(tmp_path: Path) -> None:
    spec = Dataset(tmp_path, moments=frozenset(["video"])).spec("video")
    moments = np.zeros((1, 4, 1, 1), np.float16)
    moments[0, 2:, 0, 0] = 60_000, -60_000
    total, squares = channel_sums(moments, spec)
    np.testing.assert_allclose(total, [0, 0])
    np.testing.assert_allclose(squares, np.exp([20.0, -30.0]))


def test_means_without_log_variances_are_refused(tmp_path: Path) -> None:
    dataset = Dataset(tmp_path / "shards", moments=frozenset(["video"]))
    column = create_column(dataset.root, dataset.spec("video"), dataset.plan.plan_id)
    with (
        ShardWriter(column, 0, "first") as writer,
        pytest.raises(FormatError, match="3 channels of means and log-variances"),
    ):
        writer.add("key", np.zeros((5, 3, 2, 2), np.float16))


def test_column_json_is_left_alone_when_it_is_the_same(dataset: Dataset, column: Column) -> None:
    path = column.path / "column.json"
    os.utime(path, ns=(1, 1))
    create_column(dataset.root, dataset.spec("video"), dataset.plan.plan_id)
    assert path.stat().st_mtime_ns == 1


def test_edited_column_json_is_refused(dataset: Dataset, column: Column) -> None:
    path = column.path / "column.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rate_hz": 5.0}))
    with pytest.raises(FormatError, match="hashes to"):
        create_column(dataset.root, dataset.spec("video"), dataset.plan.plan_id)


def test_exception_inside_the_block_leaves_nothing(dataset: Dataset, column: Column) -> None:
    with pytest.raises(RuntimeError), ShardWriter(column, 0, "a") as writer:
        writer.add(dataset.key(0), dataset.video(0))
        raise RuntimeError("decoder gone")
    assert names(column) == {"column.json"}


@pytest.mark.parametrize(
    ("array", "status"),
    [
        (np.zeros((2, 2, 3, 3), np.float32), OK),
        (np.zeros((2, 3, 3), np.float16), OK),
        (np.zeros((3, 3, 2, 2), np.float16).T, OK),
        (np.zeros((0, 2, 3, 3), np.float16), OK),
        (np.zeros((2, 2, 3, 3), np.float16), STATUS_CODE["missing"]),
        (None, OK),
    ],
    ids=["dtype", "axes", "order", "empty", "failed with array", "ok without array"],
)
def test_row_that_breaks_the_contract_is_refused(
    column: Column, array: np.ndarray | None, status: int
) -> None:
    with ShardWriter(column, 0, "a") as writer, pytest.raises(FormatError, match="row clip"):
        writer.add("clip", array, status)


def test_second_writer_is_told_that_it_lost(dataset: Dataset, column: Column) -> None:
    assert dataset.write_shard(column, 0, "one")
    before = (column.path / "000000.json").read_bytes()
    assert not dataset.write_shard(column, 0, "two")
    assert (column.path / "000000.json").read_bytes() == before
    assert names(column) == {"column.json", "000000.tar", "000000.idx.npy", "000000.json"}


def test_loser_clears_what_a_winner_killed_right_after_its_commit_left(
    dataset: Dataset, column: Column
) -> None:
    assert dataset.write_shard(column, 0, "one")
    (column.path / ".000000.one.json.tmp").hardlink_to(column.path / "000000.json")
    assert not dataset.write_shard(column, 0, "two")
    assert names(column) == {"column.json", "000000.tar", "000000.idx.npy", "000000.json"}


def test_writer_overtaken_while_writing_ends_quietly(dataset: Dataset, column: Column) -> None:
    with ShardWriter(column, 0, "slow") as writer:
        writer.add(dataset.key(0), dataset.video(0))
        assert dataset.write_shard(column, 0, "fast")
        (column.path / "000000.json").rename(column.path / "kept")  # as a retry would
        writer.add(dataset.key(1), dataset.video(1))
        assert not writer.commit()
    assert names(column) == {"column.json", "000000.tar", "000000.idx.npy", "kept"}


def test_racing_writers_commit_once(dataset: Dataset, column: Column) -> None:
    barrier, won = threading.Barrier(4), []

    def write(attempt: str) -> None:
        with ShardWriter(column, 0, attempt) as writer:
            for row in dataset.rows("video", 0):
                writer.add(*row)
            barrier.wait()
            if writer.commit():
                won.append(attempt)

    threads = [threading.Thread(target=write, args=(f"a{number}",)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    record = column.commit(0)
    assert record is not None and won == [record["attempt"]]
    assert names(column) == {"column.json", "000000.tar", "000000.idx.npy", "000000.json"}


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders can't be locked, as on NFS."""

    def refuse(*_: object) -> None:
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr(fcntl, "flock", refuse)


def test_without_locks_files_have_the_name_of_their_attempt(
    dataset: Dataset, column: Column, no_locks: None
) -> None:
    assert dataset.write_shard(column, 0, "one")
    assert not dataset.write_shard(column, 0, "two")
    written = {"column.json", "000000.json", "000000.one.tar", "000000.one.idx.npy"}
    assert names(column) == written
    np.testing.assert_array_equal(read_row(column, 0, 7, 8), dataset.video(7))


def test_racing_writers_without_locks_commit_once(
    dataset: Dataset, column: Column, no_locks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    barrier, won, link = threading.Barrier(4), [], Path.hardlink_to

    def link_together(path: Path, target: Path) -> None:
        barrier.wait()
        link(path, target)

    monkeypatch.setattr(Path, "hardlink_to", link_together)

    def write(attempt: str) -> None:
        if dataset.write_shard(column, 0, attempt):
            won.append(attempt)

    threads = [threading.Thread(target=write, args=(f"a{number}",)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    record = column.committed(0)
    assert won == [record["attempt"]]
    assert names(column) == {"column.json", "000000.json", record["tar"], record["index"]}
    np.testing.assert_array_equal(read_row(column, 0, 7, 8), dataset.video(7))


def test_link_that_nfs_made_though_it_says_it_was_there_wins(
    dataset: Dataset, column: Column, no_locks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = Path.hardlink_to

    def link_twice(path: Path, target: Path) -> None:
        link(path, target)
        link(path, target)

    monkeypatch.setattr(Path, "hardlink_to", link_twice)
    assert dataset.write_shard(column, 0, "one")


@pytest.mark.parametrize("locks", ["with locks", "without"])
def test_shard_replaces_the_one_that_is_committed(
    dataset: Dataset, column: Column, locks: str, request: pytest.FixtureRequest
) -> None:
    if locks == "without":
        request.getfixturevalue("no_locks")
    dataset.write_shard(column, 0, "one")
    with ShardWriter(column, 0, "two") as writer:
        for key, array, status in dataset.rows("video", 0):
            writer.add(key, None if array is None else array + np.float16(1), status)
        assert writer.commit(replacing=True)
    assert column.committed(0)["attempt"] == "two"
    np.testing.assert_array_equal(read_row(column, 0, 7, 8), dataset.video(7) + np.float16(1))


@pytest.mark.parametrize("locks", ["with locks", "without"])
def test_two_who_replace_a_shard_at_once_leave_one_committed(
    dataset: Dataset, column: Column, locks: str, request: pytest.FixtureRequest
) -> None:
    if locks == "without":
        request.getfixturevalue("no_locks")
    dataset.write_shard(column, 0, "one")
    with ShardWriter(column, 0, "two") as two, ShardWriter(column, 0, "three") as three:
        for row in dataset.rows("video", 0):
            two.add(*row)
            three.add(*row)
        assert two.commit(replacing=True)
        three_wins = three.commit(replacing=True)
    assert three_wins == (locks == "without")
    assert column.committed(0)["attempt"] == ("three" if three_wins else "two")
    np.testing.assert_array_equal(read_row(column, 0, 7, 8), dataset.video(7))


def test_loser_where_locks_do_not_hold_removes_nothing_that_the_record_names(
    dataset: Dataset, column: Column, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)  # as if each node had its own
    link = Path.hardlink_to

    def link_late(path: Path, target: Path) -> None:
        monkeypatch.setattr(Path, "hardlink_to", link)
        mine = target.read_bytes()
        assert dataset.write_shard(column, 0, "fast")
        target.write_bytes(mine)  # the winner has not swept yet
        link(path, target)

    monkeypatch.setattr(Path, "hardlink_to", link_late)
    assert not dataset.write_shard(column, 0, "slow")
    assert column.committed(0)["attempt"] == "fast"
    np.testing.assert_array_equal(read_row(column, 0, 7, 8), dataset.video(7))


def test_rows_are_added_and_committed_in_different_threads(
    dataset: Dataset, column: Column
) -> None:
    with ShardWriter(column, 0, "one") as writer:
        for row in dataset.rows("video", 0):
            writer.add(*row)
        results: list[bool] = []
        thread = threading.Thread(target=lambda: results.append(writer.commit()))
        thread.start()
        thread.join()
    assert results == [True]
    np.testing.assert_array_equal(read_row(column, 0, 7, 8), dataset.video(7))


def crash_while_committing(dataset: Dataset, column: Column, step: int) -> bool:
    """Commit in a child that dies right before file operation ``step``; True when it finished."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    steps = 0

    def die(event: str, arguments: tuple) -> None:
        nonlocal steps
        if event in CRASH_EVENTS and str(column.path) in str(arguments):
            steps += 1
            if steps > step:
                os._exit(9)

    try:
        with ShardWriter(column, 0, f"step{step}") as writer:
            for row in dataset.rows("video", 0):
                writer.add(*row)
            sys.addaudithook(die)
            writer.commit()
            os._exit(0)
    finally:
        os._exit(1)


def test_crash_at_any_step_leaves_nothing_or_the_whole_shard(
    dataset: Dataset, column: Column
) -> None:
    finished, step, before, after = False, 0, 0, 0
    while not finished:
        finished = crash_while_committing(dataset, column, step)
        if column.commit(0) is None:
            before += 1
        else:
            after += 1
            np.testing.assert_array_equal(read_row(column, 0, 7, 8), dataset.video(7))
            (column.path / "000000.json").unlink()
        step += 1
        assert step < 30
    assert before >= 4 and after >= 2
    assert dataset.write_shard(column, 0, "last")
    assert names(column) == {"column.json", "000000.tar", "000000.idx.npy", "000000.json"}


def test_full_disk_is_named_and_leaves_nothing(dataset: Dataset, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(small)]
    mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"can't mount a small tmpfs here: {mounted.stderr.strip()}")
    try:
        column = create_column(small, dataset.spec("video"), dataset.plan.plan_id)
        with (
            pytest.raises(NoRoomError, match=r"000000.*bytes free"),
            ShardWriter(column, 0, "a") as writer,
        ):
            for number in range(200):
                writer.add(f"clip{number}", dataset.video(0))
            writer.commit()
        assert names(column) == {"column.json"}
    finally:
        subprocess.run(["umount", str(small)], check=True)
