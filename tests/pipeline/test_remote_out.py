"""A data set on an object store: what a reader sees is committed, whole and committed once.

The server is a real S3 server (SeaweedFS) on loopback.
"""

import io
import itertools
import json
import subprocess
import sys
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import google_crc32c
import numpy as np
import pytest

from pipeline import storage
from pipeline.config import CheckSettings, EncodeConfig
from pipeline.data_root import RemotePath, open_root
from pipeline.duplicates import read_settled, settle_duplicates
from pipeline.files import NoRoomError
from pipeline.format import find_column, read_plan
from pipeline.pack import pack
from pipeline.plan import ensure_plan, extend_plan
from pipeline.plan_table import PlanTable
from pipeline.records import sum_records
from pipeline.settings import ConfigError
from pipeline.shards import ShardWriter, create_column
from pipeline.status import data_set_status
from pipeline.verify import verify
from tests.pipeline.servers import s3_bucket
from tests.pipeline.test_duplicates import CONTENTS, write_all_facts
from tests.pipeline.test_plan import captions_of, clips_named, shards_of, source_of
from tests.pipeline.test_verify import write_captions
from tests.train.columns import Dataset

NUMBERS = itertools.count()


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    """A bucket of an own S3 server, as fsspec's file system."""
    with s3_bucket(tmp_path_factory.mktemp("s3"), "data") as files:
        yield files


@pytest.fixture
def root(s3):
    return open_root(f"s3://data/{next(NUMBERS)}")


@pytest.fixture
def dataset(root):
    return Dataset(root, failed={2: "no_video", 5: "decode_timeout"})


@pytest.fixture
def column(dataset):
    return create_column(dataset.root, dataset.spec("video"), dataset.plan.plan_id)


@pytest.fixture(scope="module")
def built(s3):
    """A whole data set, which no test changes."""
    dataset = Dataset(open_root("s3://data/built"), failed={2: "no_video", 5: "silent"}).build()
    write_captions(dataset)
    return dataset


@pytest.fixture(scope="module")
def local(built, tmp_path_factory):
    """The same data set in a folder."""
    dataset = replace(built, root=tmp_path_factory.mktemp("local") / "data").build()
    write_captions(dataset)
    return dataset


def names(column):
    return {entry.name for entry in column.path.scan()}


def files_of(column, attempt, shard=0):
    return {f"{shard:06d}.{attempt}.tar", f"{shard:06d}.{attempt}.idx.npy"}


# -- plan


def test_plan_is_that_of_a_local_folder_and_found_again(root, tmp_path):
    config, source = EncodeConfig(shard_size=4), source_of("src", clips_named(10))
    plan = ensure_plan(root, source, config)
    assert (
        plan == ensure_plan(tmp_path / "local", source, config) == ensure_plan(root, source, config)
    )
    assert shards_of(root) == shards_of(tmp_path / "local")
    with pytest.raises(ConfigError, match="holds plan"):
        ensure_plan(root, source_of("src", clips_named(9)), config)


def test_drivers_that_plan_at_once_make_one_plan(root, tmp_path):
    config, source = EncodeConfig(shard_size=4), source_of("src", clips_named(10))
    expected = ensure_plan(tmp_path / "local", source, config)
    for folder in (root, tmp_path / "shared"):
        with ThreadPoolExecutor(4) as pool:
            plans = list(pool.map(lambda _, to=folder: ensure_plan(to, source, config), range(4)))
        assert plans == [expected] * 4
        assert shards_of(folder) == shards_of(tmp_path / "local")


def test_extended_plan_moves_no_clip(root):
    config = EncodeConfig(shard_size=4)
    ensure_plan(root, source_of("src", clips_named(10)), config)
    before, captions = shards_of(root), captions_of(root)
    extend_plan(root, source_of("src", clips_named(13, captions=5)), config)
    assert shards_of(root)[:3] == before and len(shards_of(root)) == 4
    assert captions_of(root)[: len(captions)] == captions


def test_other_files_below_the_address_are_refused(root):
    (root / "film.mp4").write_bytes(b"film")
    with pytest.raises(ConfigError, match=r"neither empty nor a data set \(it holds film.mp4\)"):
        ensure_plan(root, source_of("src", clips_named()), EncodeConfig())


def test_bucket_is_never_made(s3):
    root = open_root("s3://nobody-made-this/data")
    with pytest.raises(FileNotFoundError) as error:
        ensure_plan(root, source_of("src", clips_named()), EncodeConfig())
    assert "no bucket 'nobody-made-this'" in str(error.value)
    assert not s3.exists("nobody-made-this")


# -- commits


def test_record_names_the_files_of_its_attempt(dataset, column):
    assert dataset.write_shard(column, 0, "one")
    assert names(column) == {"column.json", "000000.json", *files_of(column, "one")}
    record = column.committed(0)
    for name in ("tar", "index"):
        data = (column.path / record[name]).read_bytes()
        assert google_crc32c.value(data) == record[f"{name}_crc32c"]
    assert column.committed_shards() == {0}


def test_tar_is_that_of_a_local_folder_and_plain(dataset, column, tmp_path):
    dataset.write_shard(column, 0)
    other = replace(dataset, root=tmp_path)
    there = create_column(other.root, other.spec("video"), other.plan.plan_id)
    other.write_shard(there, 0)
    data = column.tar_path(0).read_bytes()
    assert data == there.tar_path(0).read_bytes()
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        clips = [clip for clip in range(8) if clip not in dataset.failed]
        assert tar.getnames() == [f"{dataset.key(clip)}.video.npy" for clip in clips]
        array = np.load(io.BytesIO(tar.extractfile(tar.getmembers()[0]).read()))
    np.testing.assert_array_equal(array, dataset.video(0))


def test_later_writer_is_told_that_it_lost_and_uploads_nothing(dataset, column, monkeypatch):
    dataset.write_shard(column, 0, "one")
    before = (column.path / "000000.json").read_bytes()
    monkeypatch.delattr(RemotePath, "upload")
    assert not dataset.write_shard(column, 0, "two")
    assert (column.path / "000000.json").read_bytes() == before
    assert names(column) == {"column.json", "000000.json", *files_of(column, "one")}


def test_racing_writers_commit_once_and_losers_take_their_uploads_back(
    dataset, column, monkeypatch
):
    """All have uploaded before the first creates its record; each has other values."""
    barrier, won = threading.Barrier(4, timeout=60), []
    create = RemotePath.create

    def create_together(path, data):
        barrier.wait()
        create(path, data)

    monkeypatch.setattr(RemotePath, "create", create_together)

    def write(number):
        with ShardWriter(column, 0, f"a{number}") as writer:
            writer.add("clip", np.full((2, 2, 3, 3), number, np.float16))
            if writer.commit():
                won.append(number)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = won
    assert names(column) == {"column.json", "000000.json", *files_of(column, f"a{winner}")}
    record, index = column.committed(0), column.index(0, 1)
    assert record["attempt"] == f"a{winner}"
    tar = column.tar_path(0).read_bytes()
    assert google_crc32c.value(tar) == record["tar_crc32c"]
    first, size = int(index["offset"][0]), int(index["nbytes"][0])
    assert (np.frombuffer(tar[first : first + size], np.float16) == winner).all()


def test_exception_inside_the_block_leaves_nothing(dataset, column):
    with pytest.raises(RuntimeError), ShardWriter(column, 0, "a") as writer:
        writer.add(dataset.key(0), dataset.video(0))
        raise RuntimeError("decoder gone")
    assert names(column) == {"column.json"}


KILLED = """
import sys, time
import numpy as np
from pipeline.data_root import RemotePath, open_root
from pipeline.format import find_column
from pipeline.shards import ShardWriter

root, plan_id, step = open_root(sys.argv[1]), sys.argv[2], sys.argv[3]

def hang(*_):
    print("here", flush=True)
    time.sleep(600)

def announce(call):
    def wrapped(*arguments):
        print("here", flush=True)
        return call(*arguments)
    return wrapped

if step == "while the tar goes up":
    RemotePath.upload = announce(RemotePath.upload)
else:
    setattr(RemotePath, {"before the tar": "upload", "before the index": "write_bytes",
                         "before the record": "create"}[step], hang)
with ShardWriter(find_column(root, "video", None, plan_id), 0, "killed") as writer:
    size = 1000 if step == "while the tar goes up" else 1
    writer.add("clip", np.ones((5, 2, size, size), np.float16))
    writer.commit()
"""


@pytest.mark.parametrize(
    ("step", "num_left"),
    [
        ("before the tar", 0),
        ("while the tar goes up", None),
        ("before the index", 1),
        ("before the record", 2),
    ],
)
def test_writer_killed_while_it_uploads_leaves_nothing_that_a_reader_sees(
    dataset, column, step, num_left
):
    dataset.write_plan()
    command = [sys.executable, "-c", KILLED, str(dataset.root), dataset.plan.plan_id, step]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "here\n"
        process.kill()
    assert process.returncode == -9
    assert column.committed_shards() == set() and column.commit(0) is None
    status = data_set_status(dataset.root)
    assert not status["problems"]
    left = {orphan["file"].rpartition("/")[2] for orphan in status["orphans"]}
    assert left <= files_of(column, "killed") and num_left in (None, len(left))
    assert dataset.write_shard(column, 0, "next")
    assert names(column) >= {"000000.json", *files_of(column, "next")}
    np.testing.assert_array_equal(first_array(column), dataset.video(0))


def first_array(column):
    record = column.committed(0)
    entry = column.index(0, record["rows"])[0]
    payload = column.tar_path(0).read_range(int(entry["offset"]), int(entry["nbytes"]))
    shape = [int(size) for size in entry["shape"] if size]
    return np.frombuffer(payload, np.float16).reshape(shape)


# -- commits over a network that fails


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(storage, "PAUSES_S", (0.0, 0.0))


def test_request_whose_answer_is_lost_wins_when_it_is_sent_again(
    dataset, column, monkeypatch, impatient
):
    create, calls = RemotePath.create, []

    def lose_the_answer(path, data):
        calls.append(path.name)
        create(path, data)
        if len(calls) == 1:
            raise OSError(5, "timed out")

    monkeypatch.setattr(RemotePath, "create", lose_the_answer)
    assert dataset.write_shard(column, 0, "one") and len(calls) == 2
    assert names(column) == {"column.json", "000000.json", *files_of(column, "one")}


def test_files_stay_where_the_record_may_still_arrive(dataset, column, monkeypatch, impatient):
    """It may be on its way: whatever it names must be there when it comes."""
    create, sent = RemotePath.create, []

    def delay(path, data):
        sent.append((path, data))
        raise OSError(5, "timed out")

    monkeypatch.setattr(RemotePath, "create", delay)
    with pytest.raises(OSError, match="timed out"):
        dataset.write_shard(column, 0, "one")
    assert names(column) == {"column.json", *files_of(column, "one")}
    create(*sent[0])
    np.testing.assert_array_equal(first_array(column), dataset.video(0))


def test_loser_whose_first_request_may_still_arrive_leaves_its_files(
    dataset, column, monkeypatch, impatient
):
    """The winner's record may be taken back before it does."""
    create, calls = RemotePath.create, []

    def fail_once(path, data):
        calls.append(path.name)
        if len(calls) == 1:
            path.write_bytes(b'{"attempt": "winner"}')
            raise OSError(5, "timed out")
        create(path, data)

    monkeypatch.setattr(RemotePath, "create", fail_once)
    assert not dataset.write_shard(column, 0, "one") and len(calls) == 2
    assert names(column) == {"column.json", "000000.json", *files_of(column, "one")}


@pytest.mark.parametrize("refused", ["upload", "write_bytes"])
def test_store_that_is_full_is_named_and_uploads_are_taken_back(
    dataset, column, monkeypatch, refused
):
    def fail(path, data):
        raise OSError(28, "QuotaExceeded: Bucket quota exceeded", str(path))

    monkeypatch.setattr(RemotePath, refused, fail)
    with pytest.raises(NoRoomError, match=r"s3://data/.*000000.one.tar \(QuotaExceeded"):
        dataset.write_shard(column, 0, "one")
    assert names(column) == {"column.json"}


def test_store_that_creates_without_a_condition_keeps_a_whole_shard(dataset):
    """Of two that believe to have won, the record names one's files, which nobody removes."""
    root = open_root("memory://unconditional/data")
    column = create_column(root, dataset.spec("video"), dataset.plan.plan_id)
    create = RemotePath.create
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RemotePath, "exists", lambda path: False)
        patch.setattr(RemotePath, "create", lambda path, data: path.write_bytes(data))
        assert dataset.write_shard(column, 0, "one") and dataset.write_shard(column, 0, "two")
    assert RemotePath.create is create
    assert column.committed(0)["attempt"] == "two"
    np.testing.assert_array_equal(first_array(column), dataset.video(0))


# -- reading


def test_resume_finds_the_commits(dataset, column):
    for shard in (0, 3):
        dataset.write_shard(column, shard)
    again = create_column(open_root(str(dataset.root)), dataset.spec("video"), column.plan_id)
    assert again.committed_shards() == {0, 3}


def test_status_and_sums_are_those_of_a_local_folder(built, local):
    found, expected = (data_set_status(dataset.root) for dataset in (built, local))
    assert not found["problems"] and not found["orphans"]
    assert found.pop("dir") == "s3://data/built" and expected.pop("dir") == str(local.root)
    assert found == expected
    for modality in ("video", "audio", "text"):
        remote, there = (
            find_column(dataset.root, modality, None, dataset.plan.plan_id)
            for dataset in (built, local)
        )
        assert sum_records(remote) == sum_records(there)


@pytest.mark.parametrize("full", [False, True])
def test_verify_finds_nothing_in_a_sound_data_set(built, full):
    findings = []
    verify(built.root, findings.append, None, full)
    assert findings == []


def test_verify_finds_what_is_damaged(dataset):
    dataset.build()
    write_captions(dataset)
    column = find_column(dataset.root, "video", None, dataset.plan.plan_id)
    tar = column.tar_path(1)
    data = bytearray(tar.read_bytes())
    data[2000] ^= 1
    tar.write_bytes(bytes(data))
    column.tar_path(2).unlink()
    for full in (False, True):
        findings = []
        verify(dataset.root, findings.append, ["video"], full)
        assert sum("is missing" in finding.message for finding in findings) == 1
        assert sum("crc32c is" in finding.message for finding in findings) == full
        assert len(findings) == 1 + full


@pytest.mark.parametrize("source", ["built", "local"])
@pytest.mark.parametrize("target", ["local", "remote"])
def test_pack_writes_the_same_bytes_wherever_from_and_to(
    source, target, local, root, tmp_path, request
):
    data = request.getfixturevalue(source).root
    names_of = dict.fromkeys(("video", "audio", "text"))
    out = tmp_path / "out" if target == "local" else root / "packed"
    summary = pack(data, out, names_of, "drop")
    pack(local.root, tmp_path / "expected", names_of, "drop")
    expected = {path.name: path.read_bytes() for path in (tmp_path / "expected").iterdir()}
    assert {path.name: path.read_bytes() for path in out.iterdir()} == expected
    assert summary["shards_there"] == 0
    assert pack(data, out, names_of, "drop")["shards_there"] == summary["shards"] == 5


def test_duplicates_are_dropped_by_new_files_and_a_new_record(dataset):
    dataset.build()
    statuses = [dataset.failed.get(clip, "ok") for clip in range(dataset.num_clips)]
    contents = [CONTENTS.get(clip, clip) for clip in range(dataset.num_clips)]
    facts = dataset.root / "facts@probe-00000000"
    write_all_facts(facts, statuses, contents, dataset.shard_size)
    columns = {
        m: find_column(dataset.root, m, None, dataset.plan.plan_id) for m in ("video", "audio")
    }
    before = columns["video"].committed(1)
    settled = settle_duplicates(dataset.plan, columns, facts, CheckSettings(duplicate="drop"))
    assert settled.complaint is None and settled.num_dropped == len(CONTENTS)
    assert read_settled(facts, columns.values()) == settled
    record = columns["video"].committed(1)  # holds clip 9
    assert record["status_counts"] == {"ok": 7, "duplicate": 1}
    assert record["tar"] != before["tar"] and record["wall_s"] == before["wall_s"]
    assert (columns["video"].path / before["tar"]).exists()  # for those who read it right now
    write_captions(dataset)
    findings = []
    verify(dataset.root, findings.append, None, True)
    assert findings == []


def test_text_rows_of_a_plan_are_read(built):
    table = PlanTable(built.root, read_plan(built.root))
    assert table.read(1, ["caption"])["key"] == [built.key(clip) for clip in built.shard_clips(1)]


# -- command lines


def run(command, *arguments):
    line = [sys.executable, "-m", f"pipeline.{command}", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, check=False)


def test_commands_take_urls(built, tmp_path):
    done = run("status", "s3://data/built/", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["plan"]["clips"] == built.num_clips
    done = run("verify", built.root, "--full", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["dir"] == "s3://data/built"
    done = run("pack", built.root, "--out", tmp_path / "out", "--missing", "drop", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["clips"] == built.num_clips - 2


@pytest.mark.parametrize(
    ("address", "message"),
    [
        (
            "s3://data/nothing",
            "s3://data/nothing/plan.json is missing; is s3://data/nothing a data",
        ),
        ("s3://key:secret@data/x", "holds a password"),
        ("nosuch://x", "nosuch://x can't be opened"),
    ],
)
@pytest.mark.parametrize("command", ["status", "verify"])
def test_commands_refuse_in_one_line(s3, command, address, message):
    done = run(command, address)
    assert done.returncode == 1 and "secret" not in done.stderr
    assert done.stderr.startswith("error: ") and message in done.stderr
    assert done.stderr.count("\n") == 1


def test_server_that_does_not_answer_is_one_line(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    done = run("status", "s3://data/x")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "s3://data/x/plan.json" in done.stderr and "connect" in done.stderr.lower()
