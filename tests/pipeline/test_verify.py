"""Whatever is wrong with a data set is found, named once, and nothing else is."""

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from dataclasses import replace

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.files import write_json
from pipeline.format import STATUS_CODE, FormatError, read_json
from pipeline.shards import ShardWriter, create_column, member_header
from pipeline.tables import write_parquet
from pipeline.verify import verify
from tests.train.columns import Dataset, flip_last_byte


def write_captions(dataset, captions=None):
    """Write captions.parquet as pipeline.encode does."""
    rows = range(dataset.num_captions)
    captions = captions or ["", *(f"caption {row}" for row in rows[1:])]
    keys = [f"caption{row:05d}" for row in rows]
    table = pa.table({"row": rows, "key": keys, "caption": captions})
    write_parquet(folder_of(dataset, "text") / "captions.parquet", table)


def folder_of(dataset, modality):
    return dataset.root / dataset.spec(modality).directory


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    root = tmp_path_factory.mktemp("verify") / "data"
    dataset = Dataset(root, failed={2: "no_video", 9: "silent"}, short_s={4: 3.0}).build()
    write_captions(dataset)
    return dataset


@pytest.fixture
def dataset(built, tmp_path):
    shutil.copytree(built.root, tmp_path / "data")
    return replace(built, root=tmp_path / "data")


def findings(dataset, full=False, wanted=None):
    found = []
    verify(dataset.root, found.append, wanted, full)
    for finding in found:
        assert "\n" not in finding.message
    return found


def run(*arguments):
    command = [sys.executable, "-m", "pipeline.verify", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def edit_record(dataset, modality="video", of_shard=1, **values):
    path = folder_of(dataset, modality) / f"{of_shard:06d}.json"
    write_json(path, {**read_json(path), **values})
    return path


def spoil(path, place, bits=1):
    data = bytearray(path.read_bytes())
    data[place] ^= bits
    path.write_bytes(data)


def rewrite_index(dataset, shard, change):
    """Change an index and its checksum in the commit record, as a faulty writer would."""
    path = folder_of(dataset, "video") / f"{shard:06d}.idx.npy"
    index = np.load(path)
    change(index)
    buffer = io.BytesIO()
    np.save(buffer, index)
    path.write_bytes(buffer.getvalue())
    edit_record(dataset, of_shard=shard, index_crc32c=google_crc32c.value(buffer.getvalue()))


def rewrite_tar(dataset, shard, data):
    """Change a tar and its checksum and size in the commit record, as a faulty writer would."""
    (folder_of(dataset, "video") / f"{shard:06d}.tar").write_bytes(data)
    facts = {"tar_bytes": len(data), "tar_crc32c": google_crc32c.value(data)}
    edit_record(dataset, of_shard=shard, **facts)


@pytest.mark.parametrize("full", [False, True])
def test_sound_data_set_has_no_finding_and_is_summed(dataset, full):
    found = []
    summary = verify(dataset.root, found.append, None, full)
    columns = {column["column"]: column for column in summary["columns"]}
    assert not found and len(columns) == 3
    video = columns[dataset.spec("video").directory]
    assert (video["shards"], video["shards_planned"], video["rows"], video["ok"]) == (5, 5, 40, 38)
    assert video["bytes"] == sum(
        p.stat().st_size for p in folder_of(dataset, "video").glob("*.tar")
    )


def test_what_the_writer_writes_is_what_the_header_should_be(dataset):
    index = np.load(folder_of(dataset, "audio") / "000000.idx.npy")
    data = (folder_of(dataset, "audio") / "000000.tar").read_bytes()
    shape = dataset.audio(0).shape
    header = member_header(f"{dataset.key(0)}.audio.npy", shape, np.dtype("float16"))
    assert data[: int(index["offset"][0])] == header


@pytest.mark.parametrize("full", [False, True])
def test_uncommitted_shards_and_leftovers_are_neither_counted_nor_findings(dataset, full):
    folder = folder_of(dataset, "video")
    (folder / "000001.json").unlink()
    (folder / "000001.tar").write_bytes(b"half a tar")
    (folder / ".000003.dead.tmp").write_bytes(b"x")
    found = []
    (video,) = verify(dataset.root, found.append, ["video"], full)["columns"]
    assert not found and (video["shards"], video["rows"], video["ok"]) == (4, 32, 31)


def test_run_in_progress_is_no_finding(dataset):
    column = create_column(dataset.root, dataset.spec("video"), dataset.plan.plan_id)
    (column.path / "000004.json").unlink()
    with ShardWriter(column, 4, "b") as writer:
        writer.add(*dataset.rows("video", 4)[0])
        assert not findings(dataset, full=True)


def test_only_the_chosen_columns_are_looked_at(dataset):
    (folder_of(dataset, "audio") / "000001.tar").unlink()
    assert not findings(dataset, wanted=["video", "text"])
    assert findings(dataset, wanted=["audio"])
    assert findings(dataset, wanted=[dataset.spec("audio").directory])
    with pytest.raises(FormatError, match="no column 'smell'; there: audio@"):
        findings(dataset, wanted=["smell"])


# -- quick: records, plan, indices, sizes


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"plan_id": "other"}, "plan_id is 'other'"),
        ({"shard": 3}, "shard is 3, expected 1"),
        ({"rows": 7, "ok": 6, "status_counts": {"ok": 6, "silent": 1}}, "rows is 7, expected 8"),
        ({"ok": 8}, "status_counts"),
        ({"status_counts": {"ok": 7, "lost": 1}}, "status_counts"),
        ({"status_counts": {"ok": 7, "missing": 1}}, "statuses are"),
        ({"keys_hash": "0" * 16}, "keys_hash is 0000000000000000, expected"),
        ({"tar_bytes": 512}, "bytes, expected 512 bytes"),
        ({"tar": "../000000.tar"}, "tar is '../000000.tar'"),
        ({"tar": "000009.tar"}, "000009.tar is missing"),
        ({"index": "000000.idx.npy"}, "crc32c is"),
        ({"index_crc32c": 7}, "expected 00000007"),
        ({"index_crc32c": "7"}, "index_crc32c is '7'"),
        ({"channels": {"count": 1}}, "channels.sum is missing"),
    ],
)
def test_record_that_differs_from_plan_or_files_is_named(dataset, values, message):
    edit_record(dataset, **values)
    found = findings(dataset)
    assert found and all("000001" in finding.message for finding in found)
    assert any(message in finding.message for finding in found), [f.message for f in found]
    assert all("encode" in finding.message for finding in found)  # says how to mend it


@pytest.mark.parametrize("text", ["", "[]", "\x00", "{"])
def test_record_that_is_no_json_object_is_named(dataset, text):
    (folder_of(dataset, "video") / "000001.json").write_text(text)
    (finding,) = findings(dataset)
    assert "000001.json" in finding.message


def test_shard_beyond_the_plan_is_named(dataset):
    folder = folder_of(dataset, "text")
    shutil.copy(folder / "000002.json", folder / "000007.json")
    assert any("shard 7 of a plan of 3 shards" in f.message for f in findings(dataset))


@pytest.mark.parametrize("ending", ["tar", "idx.npy"])
@pytest.mark.parametrize("damage", ["gone", "short", "long"])
def test_file_of_another_size_is_named(dataset, ending, damage):
    path = folder_of(dataset, "audio") / f"000002.{ending}"
    data = path.read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes(data[:-1] if damage == "short" else data + b"\0")
    (finding,) = findings(dataset)
    assert str(path) in finding.message
    assert any(str(path) in finding.message for finding in findings(dataset, full=True))


@pytest.mark.parametrize("full", [False, True])
def test_pipe_in_place_of_a_tar_is_named_and_not_waited_for(dataset, full):
    tar = folder_of(dataset, "video") / "000001.tar"
    tar.unlink()
    os.mkfifo(tar)
    [found] = [f.message for f in findings(dataset, full) if "000001.tar" in f.message]
    assert "is no file, expected" in found


@pytest.mark.parametrize(
    ("name", "value"),
    [("offset", 2**60), ("nbytes", 6), ("shape", 7), ("status", 77), ("status", 3)],
)
def test_index_that_fits_its_checksum_but_not_its_tar_is_named(dataset, name, value):
    def change(index):
        index[name][3] = value

    rewrite_index(dataset, 1, change)
    (finding,) = findings(dataset)
    assert "000001.idx.npy" in finding.message


def test_failed_row_with_bytes_is_named(dataset):
    def change(index):
        index["nbytes"][2] = 36

    rewrite_index(dataset, 0, change)
    (finding,) = findings(dataset)
    assert "row 2: 36 bytes of a row that failed" in finding.message


@pytest.mark.parametrize("name", ["key", "shard", "row", "text_row"])
def test_plan_that_is_not_in_order_is_named(dataset, name):
    path = dataset.root / "plan.parquet"
    table = pq.read_table(path)
    values = table[name].to_pylist()
    values[7], values[8] = values[8], values[7]
    place = table.column_names.index(name)
    table = table.set_column(place, name, pa.array(values, table[name].type))
    pq.write_table(table, path, row_group_size=8)
    found = findings(dataset, full=True)
    assert found and any(text in found[0].message for text in (str(path), "keys_hash"))


def test_caption_that_is_not_the_plans_is_named_with_its_clip(dataset):
    write_captions(dataset, ["", *(f"caption {row}" for row in (1, 2, 3, 5, 4, 6))])
    found = findings(dataset)
    assert len(found) == 5  # one a shard, by its first clip
    assert found[0].row == 3 and found[0].key == dataset.key(3)
    assert "'caption 4'" in found[0].message


@pytest.mark.parametrize("damage", ["gone", "text", "short", "long", "not empty", "keys"])
def test_damaged_captions_are_named_and_the_rest_still_checked(dataset, damage):
    path = folder_of(dataset, "text") / "captions.parquet"
    table = pq.read_table(path)
    if damage == "gone":
        path.unlink()
    elif damage == "text":
        path.write_bytes(b"no parquet")
    elif damage == "not empty":
        write_captions(dataset, [f"caption {row}" for row in range(7)])
    elif damage == "keys":
        write_parquet(path, table.rename_columns(["row", "name", "caption"]))
    else:
        write_parquet(path, table[:5] if damage == "short" else pa.concat_tables([table, table]))
    (folder_of(dataset, "text") / "000002.tar").unlink()
    first, second = findings(dataset)
    assert str(path) in first.message and "000002" in second.message


@pytest.mark.parametrize("damage", ["gone", "short"])
def test_captions_of_the_plan_are_checked(dataset, damage):
    path = dataset.root / "captions.parquet"
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-50])
    for wanted in (None, ["video"]):
        (finding,) = findings(dataset, wanted=wanted)
        assert finding.message.startswith(f"{path} can't be read") and "restore" in finding.message


def test_a_flipped_byte_of_a_table_is_found_by_full(dataset):
    for name in ("plan.parquet", "captions.parquet"):
        whole = flip_last_byte(dataset.root / name, "key")
        found = findings(dataset, full=True)
        assert name in found[0].message and "CRC checksum" in found[0].message
        (dataset.root / name).write_bytes(whole)
    assert not findings(dataset, full=True)


# -- full: every byte of the tars


def test_any_changed_byte_of_a_tar_is_found_once(tmp_path):
    dataset = Dataset(tmp_path / "data", num_clips=3, clip_s=1.0, failed={1: "silent"})
    dataset.root.mkdir()
    dataset.write_plan()
    path = dataset.write_column("video").path / "000000.tar"
    sound = path.read_bytes()
    ends = np.load(path.with_name("000000.idx.npy"))[["offset", "nbytes"]][[0, 2]].tolist()
    places = [*range(1700), *range(1700, len(sound), 61)]
    for place in places[::7]:
        spoil(path, place, bits=0x41)
        (finding,) = findings(dataset, full=True)
        blocks = [512 * -(-(offset + nbytes) // 512) for offset, nbytes in ends]
        row = 0 if place < blocks[0] else 2 if place < blocks[1] else None
        assert finding.row == row and str(path) in finding.message, place
        path.write_bytes(sound)
    assert not findings(dataset, full=True)


def test_every_wrong_payload_is_named_by_row_and_key(dataset):
    path = folder_of(dataset, "video") / "000001.tar"
    index = np.load(path.with_name("000001.idx.npy"))
    for row in (0, 2, 7):
        spoil(path, int(index["offset"][row]) + row)
    assert not findings(dataset)  # sizes are right: only the bytes tell
    found = findings(dataset, full=True)
    assert [(f.row, f.key, f.file) for f in found] == [
        (row, dataset.key(8 + row), str(path)) for row in (0, 2, 7)
    ]
    assert all("crc32c is" in finding.message for finding in found)


def test_members_in_another_order_are_found(dataset):
    path = folder_of(dataset, "video") / "000003.tar"
    data, buffer = path.read_bytes(), io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(data)) as old:
        members = old.getmembers()
        members[0], members[1] = members[1], members[0]
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as new:
            for member in members:
                new.addfile(member, old.extractfile(member))
    rewrite_tar(dataset, 3, buffer.getvalue())
    found = findings(dataset, full=True)
    assert [finding.row for finding in found] == [0, 1]
    names = [f"{dataset.key(clip)}.video.npy" for clip in (25, 24)]
    assert f"name in the tar header is '{names[0]}', expected '{names[1]}'" in found[0].message


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mtime": 7}, "mtime in the tar header is 7, expected 0"),
        ({"uid": 1000}, "uid"),
        ({"mode": 0o600}, "mode"),
        ({"uname": "root"}, "uname"),
    ],
)
def test_headers_that_are_not_deterministic_are_found(dataset, values, message):
    path = folder_of(dataset, "video") / "000003.tar"
    data = bytearray(path.read_bytes())
    member = tarfile.TarInfo.frombuf(bytes(data[:512]), "ascii", "strict")
    for name, value in values.items():
        setattr(member, name, value)
    data[:512] = member.tobuf(tarfile.USTAR_FORMAT)
    rewrite_tar(dataset, 3, bytes(data))
    (finding,) = findings(dataset, full=True)
    assert finding.row == 0 and message in finding.message


def test_npy_header_of_another_shape_is_found(dataset):
    path = folder_of(dataset, "video") / "000003.tar"
    data = path.read_bytes().replace(b"(40, 2, 3, 3)", b"(20, 4, 3, 3)", 1)
    rewrite_tar(dataset, 3, data)
    (finding,) = findings(dataset, full=True)
    assert "(20, 4, 3, 3)" in finding.message and "(40, 2, 3, 3)" in finding.message


def test_index_offset_inside_the_tar_but_wrong_is_found(dataset):
    def change(index):
        index["offset"][3] += 2

    rewrite_index(dataset, 1, change)
    assert not findings(dataset)
    (finding,) = findings(dataset, full=True)
    assert finding.row == 3 and "the index says" in finding.message


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_found_though_all_checksums_fit(dataset, value):
    path = folder_of(dataset, "video") / "000001.tar"
    entry = np.load(path.with_name("000001.idx.npy"))[2]
    first, end = int(entry["offset"]), int(entry["offset"] + entry["nbytes"])
    data = bytearray(path.read_bytes())
    data[first + 100 : first + 102] = np.float16(value).tobytes()

    def change(index):
        index["crc32c"][2] = google_crc32c.value(bytes(data[first:end]))

    rewrite_index(dataset, 1, change)
    rewrite_tar(dataset, 1, bytes(data))
    (finding,) = findings(dataset, full=True)
    assert (finding.row, finding.key) == (2, dataset.key(10))
    assert "NaN or infinity" in finding.message


def test_infinite_log_variance_is_found_though_it_is_clipped_when_summed(tmp_path):
    dataset = Dataset(tmp_path / "data", num_clips=9, moments=frozenset(["video"])).build()
    write_captions(dataset)
    assert not findings(dataset, full=True)
    path = folder_of(dataset, "video") / "000001.tar"
    entry = np.load(path.with_name("000001.idx.npy"))[0]
    first, end = int(entry["offset"]), int(entry["offset"] + entry["nbytes"])
    data = bytearray(path.read_bytes())
    data[end - 2 : end] = np.float16(np.inf).tobytes()  # the last channels are log-variances

    def change(index):
        index["crc32c"][0] = google_crc32c.value(bytes(data[first:end]))

    rewrite_index(dataset, 1, change)
    rewrite_tar(dataset, 1, bytes(data))
    (finding,) = findings(dataset, full=True)
    assert "NaN or infinity" in finding.message


@pytest.mark.parametrize("name", ["count", "sum", "sum_of_squares"])
def test_channel_sums_that_are_not_those_of_the_values_are_found(dataset, name):
    path = folder_of(dataset, "video") / "000001.json"
    channels = read_json(path)["channels"]
    value = channels[name]
    other = value + 1 if name == "count" else [v * (1 + 1e-6) + 1e-3 for v in value]
    edit_record(dataset, channels={**channels, name: other})
    assert not findings(dataset)
    (finding,) = findings(dataset, full=True)
    assert "channel sums" in finding.message and finding.row is None


def test_wrong_checksum_of_the_tar_in_the_record_is_found(dataset):
    edit_record(dataset, tar_crc32c=7)
    (finding,) = findings(dataset, full=True)
    assert "expected 00000007 as committed" in finding.message


def test_truncated_tar_names_the_row_in_which_it_ends(dataset):
    path = folder_of(dataset, "video") / "000001.tar"
    index = np.load(path.with_name("000001.idx.npy"))
    data = path.read_bytes()
    path.write_bytes(data[: int(index["offset"][5]) + 1])
    found = findings(dataset, full=True)
    assert [finding.row for finding in found] == [None, 5]
    assert "inside this row" in found[1].message


def test_shard_without_any_ok_row_is_sound(tmp_path):
    failed = dict.fromkeys(range(8), "missing")
    dataset = Dataset(tmp_path / "data", num_clips=9, failed=failed).build()
    write_captions(dataset)
    assert not findings(dataset, full=True)
    assert (
        STATUS_CODE["missing"] in np.load(folder_of(dataset, "video") / "000000.idx.npy")["status"]
    )


# -- the command


def test_command_prints_a_table_and_exits_0(dataset):
    done = run(dataset.root, "--full")
    assert done.returncode == 0 and "error" not in done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("video@")]
    assert line.split()[1:5] == ["5/5", "38", "1", "1"]  # no_video, silent


def test_command_prints_one_line_a_finding_and_exits_1(dataset):
    path = folder_of(dataset, "audio") / "000001.tar"
    path.unlink()
    done = run(dataset.root)
    assert done.returncode == 1 and done.stdout.splitlines()[0].startswith(str(path))
    assert done.stderr.splitlines()[-1] == f"error: 1 finding in {dataset.root}"


def test_json_is_json_alone(dataset):
    path = folder_of(dataset, "video") / "000001.tar"
    spoil(path, int(np.load(path.with_name("000001.idx.npy"))["offset"][2]))
    done = run(dataset.root, "--full", "--json", "--columns", "video")
    value = json.loads(done.stdout)
    assert done.returncode == 1 and value["full"] is True
    assert [column["findings"] for column in value["columns"]] == [1]
    (finding,) = value["findings"]
    assert (finding["row"], finding["key"], finding["file"]) == (2, dataset.key(10), str(path))


@pytest.mark.parametrize("damage", ["gone", "other", "text"])
def test_plan_that_cannot_be_read_is_one_line(dataset, damage):
    path = dataset.root / "plan.parquet"
    table = pq.read_table(path)
    path.unlink()
    if damage == "other":
        pq.write_table(table, path, row_group_size=7)
    elif damage == "text":
        path.write_text("no parquet")
    done = run(dataset.root)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: {path}") and done.stderr.count("\n") == 1
