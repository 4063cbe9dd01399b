"""Joint tars hold every usable clip once, as its columns hold it, and never anything else."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace

import numpy as np
import pytest
from webdataset import WebDataset  # pyright: ignore[reportAttributeAccessIssue]

from pipeline import pack as program
from pipeline.files import write_json
from pipeline.format import FormatError, read_json
from pipeline.pack import pack, parse_view
from tests.train.columns import Dataset

ALL = {"video": None, "audio": None, "text": None}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return Dataset(tmp_path_factory.mktemp("pack") / "data", splits={3: "test"}).build()


@pytest.fixture
def dataset(built, tmp_path):
    shutil.copytree(built.root, tmp_path / "data")
    return replace(built, root=tmp_path / "data")


@pytest.fixture
def gappy(tmp_path):
    """Clips 2 and 9 failed; all of shard 4 did."""
    failed = {2: "no_video", 9: "silent", **dict.fromkeys(range(32, 40), "missing")}
    return Dataset(tmp_path / "gappy", failed=failed).build()


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def run(*arguments):
    command = [sys.executable, "-m", "pipeline.pack", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def samples(out):
    tars = sorted(str(path) for path in out.glob("*.tar"))
    return list(WebDataset(tars, shardshuffle=False, empty_check=False).decode())


def digests(out):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.iterdir()}


def spoil(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_plain_webdataset_reads_every_clip_with_its_columns_and_facts(dataset, out):
    pack(dataset.root, out, ALL, "error")
    found = samples(out)
    assert [sample["__key__"] for sample in found] == [dataset.key(clip) for clip in range(40)]
    for clip, sample in enumerate(found):
        np.testing.assert_array_equal(sample["video.npy"], dataset.video(clip))
        np.testing.assert_array_equal(sample["audio.npy"], dataset.audio(clip))
        np.testing.assert_array_equal(sample["text.npy"], dataset.text(dataset.text_row(clip)))
        assert sample["json"] == {
            "caption": f"caption {dataset.text_row(clip)}",
            "label": "thing",
            "split": dataset.splits.get(clip, "train"),
            "uri": f"{dataset.key(clip)}.mp4",
            "start_s": 0.0,
            "duration_s": 10.0,
        }


def test_one_tar_a_shard_of_plain_ustar_members(dataset, out):
    pack(dataset.root, out, ALL, "error")
    assert [path.name for path in sorted(out.glob("*.tar"))] == [f"{s:06d}.tar" for s in range(5)]
    with tarfile.open(out / "000001.tar") as tar:
        members = tar.getmembers()
    key = dataset.key(8)
    names = [f"{key}.{end}" for end in ("video.npy", "audio.npy", "text.npy", "json")]
    assert [member.name for member in members[:4]] == names
    for member in members:
        assert (member.mtime, member.uid, member.gid, member.mode) == (0, 0, 0, 0o644)


def test_same_columns_give_the_same_bytes_whatever_order_they_are_named_in(dataset, out):
    pack(dataset.root, out, ALL, "error")
    other = out.with_name("other")
    assert run(dataset.root, "--out", other, "--view", "text,audio,video").returncode == 0
    assert digests(out) == digests(other)


def test_only_the_chosen_modalities_are_joined(dataset, out):
    shutil.rmtree(dataset.root / dataset.spec("text").directory)
    pack(dataset.root, out, {"audio": None}, "error")
    first = samples(out)[0]
    assert {name for name in first if not name.startswith("__")} == {"audio.npy", "json"}


def test_column_is_chosen_by_codec_fingerprint_or_folder(dataset, out):
    second = replace(dataset, video_name="second")
    second.write_column("video")
    with pytest.raises(FormatError, match="fits several columns"):
        pack(dataset.root, out, ALL, "error")
    spec = second.spec("video")
    names = ("video@second", f"video@{spec.fingerprint}", spec.directory)
    for number, name in enumerate(names):
        view = parse_view(f"{name},audio,text")
        summary = pack(dataset.root, out / str(number), view, "error")
        assert summary["columns"]["video"] == spec.directory


# -- rows that failed


def test_failed_rows_are_an_error_that_says_what_to_do(gappy, out):
    with pytest.raises(FormatError, match=r"10 of 40 rows failed .*missing 8.*--missing drop"):
        pack(gappy.root, out, ALL, "error")
    assert not out.exists()


def test_dropped_rows_leave_all_others(gappy, out):
    summary = pack(gappy.root, out, ALL, "drop")
    keys = [gappy.key(clip) for clip in range(40) if clip not in gappy.failed]
    assert [sample["__key__"] for sample in samples(out)] == keys
    assert (summary["clips"], summary["dropped"], summary["shards"]) == (30, 10, 5)


def test_row_that_failed_in_one_column_only_is_dropped_from_all(gappy, out):
    shutil.rmtree(gappy.root / gappy.spec("audio").directory)
    replace(gappy, failed={4: "no_audio"}).write_column("audio")
    pack(gappy.root, out, ALL, "drop")
    lost = {gappy.key(clip) for clip in (*gappy.failed, 4)}
    assert lost.isdisjoint(sample["__key__"] for sample in samples(out))
    assert len(samples(out)) == 29


def test_uncommitted_shard_is_an_error_under_either_policy(dataset, out):
    (dataset.root / dataset.spec("audio").directory / "000003.json").unlink()
    for missing in ("error", "drop"):
        with pytest.raises(FormatError, match=r"1 of 5 shards .*000003.*run pipeline\.encode"):
            pack(dataset.root, out, ALL, missing)


# -- damage


@pytest.mark.parametrize("modality", ["video", "audio", "text"])
def test_wrong_payload_stops_with_its_name_and_leaves_no_part_of_its_tar(dataset, out, modality):
    folder = dataset.root / dataset.spec(modality).directory
    index = np.load(folder / "000001.idx.npy")
    spoil(folder / "000001.tar", int(index["offset"][2]) + 3)
    done = run(dataset.root, "--out", out)
    assert done.returncode == 1 and f"{folder / '000001.tar'} row 2" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ")
    expected = {"000000.tar", "000000.json"} if modality != "text" else set()
    assert {path.name for path in out.iterdir()} == expected


def test_text_of_the_clip_is_named_where_it_is_damaged(dataset, out):
    folder = dataset.root / dataset.spec("text").directory
    spoil(folder / "000000.tar", int(np.load(folder / "000000.idx.npy")["offset"][1]))
    with pytest.raises(FormatError, match=rf"row 1 \({dataset.key(0)}\): crc32c"):
        pack(dataset.root, out, ALL, "error")


@pytest.mark.parametrize("ending", [".tar", ".idx.npy"])
def test_missing_file_is_named(dataset, out, ending):
    path = dataset.root / dataset.spec("video").directory / f"000001{ending}"
    path.unlink()
    with pytest.raises(FormatError, match=rf"{path.name}.* is missing.*run pipeline\.encode again"):
        pack(dataset.root, out, ALL, "error")


def test_rows_of_other_clips_are_never_joined(dataset, out):
    folder = dataset.root / dataset.spec("audio").directory
    record = read_json(folder / "000000.json")
    write_json(folder / "000000.json", {**record, "keys_hash": "0" * 16})
    with pytest.raises(FormatError, match="keys_hash"):
        pack(dataset.root, out, ALL, "error")


# -- going on


def test_complete_tars_are_skipped(dataset, out):
    pack(dataset.root, out, ALL, "error")
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    summary = pack(dataset.root, out, ALL, "error")
    assert summary["shards_there"] == 5 and summary["clips"] == 40
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


@pytest.mark.parametrize("change", ["json gone", "tar gone", "tar short"])
def test_incomplete_tar_is_packed_again(dataset, out, change):
    pack(dataset.root, out, ALL, "error")
    before = digests(out)
    if change == "tar short":
        os.truncate(out / "000002.tar", 512)
    else:
        (out / f"000002.{change.split()[0]}").unlink()
    assert pack(dataset.root, out, ALL, "error")["shards_there"] == 4
    assert digests(out) == before


def test_tar_of_a_shard_that_was_encoded_again_is_packed_again(gappy, out):
    pack(gappy.root, out, ALL, "drop")
    folder = gappy.root / gappy.spec("audio").directory
    (folder / "000001.json").unlink()
    column = replace(gappy, failed={}).write_column("audio")
    assert column.committed_shards() == set(range(5))
    summary = pack(gappy.root, out, ALL, "drop")
    assert summary["shards_there"] == 4 and summary["clips"] == 30  # video 9 is still missing


def test_killed_pack_goes_on_to_the_same_bytes(tmp_path):
    dataset = Dataset(tmp_path / "data", num_clips=60, shard_size=2, video_size=(64, 8, 8)).build()
    whole, out = tmp_path / "whole", tmp_path / "out"
    pack(dataset.root, whole, ALL, "error")
    out.mkdir()
    (out / ".000001.1.tmp").write_bytes(b"left by a killed one")
    command = [sys.executable, "-m", "pipeline.pack", str(dataset.root), "--out", str(out)]
    for _ in range(3):
        before = len(list(out.glob("*.json")))
        with subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as one:
            while one.poll() is None and len(list(out.glob("*.json"))) < before + 5:
                time.sleep(0.001)
            one.send_signal(signal.SIGKILL)
    done = run(dataset.root, "--out", out, "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["shards_there"] >= 1
    assert digests(out) == digests(whole)


def test_crash_between_tar_and_json_leaves_the_tar_incomplete(dataset, out, monkeypatch):
    def crash(path, value):
        raise RuntimeError("killed")

    monkeypatch.setattr(program, "write_json", crash)
    with pytest.raises(RuntimeError):
        pack(dataset.root, out, ALL, "error")
    monkeypatch.undo()
    assert pack(dataset.root, out, ALL, "error")["shards_there"] == 0
    assert len(samples(out)) == 40


# -- other settings, other folders


@pytest.mark.parametrize("change", ["columns", "missing", "plan"])
def test_other_settings_into_the_same_folder_are_refused(dataset, out, tmp_path, change):
    pack(dataset.root, out, ALL, "error")
    before = digests(out)
    other = Dataset(tmp_path / "other", num_clips=24).build() if change == "plan" else dataset
    names = {"video": None} if change == "columns" else ALL
    what = "plan_id" if change == "plan" else change
    with pytest.raises(FormatError, match=f"packed with {what} .*another --out"):
        pack(other.root, out, names, "drop" if change == "missing" else "error")
    assert digests(out) == before


@pytest.mark.parametrize("where", ["", "video", "home"])
def test_folder_that_holds_other_things_is_refused(dataset, tmp_path, where):
    out = dataset.root if where == "" else tmp_path / "home"
    if where == "video":
        out = dataset.root / dataset.spec("video").directory
    if where == "home":
        out.mkdir()
        (out / "thesis.tex").touch()
    with pytest.raises(FormatError, match="which no pack wrote"):
        pack(dataset.root, out, ALL, "error")


@pytest.mark.parametrize("text", ["{}", "[]", "x", '{"plan_id": 3}'])
def test_damaged_json_beside_a_tar_is_named(dataset, out, text):
    pack(dataset.root, out, ALL, "error")
    (out / "000002.json").write_text(text)
    with pytest.raises(FormatError, match=r"000002\.json"):
        pack(dataset.root, out, ALL, "error")


# -- the command


def test_command_says_what_it_did(gappy, out):
    done = run(gappy.root, "--out", out, "--missing", "drop")
    assert done.returncode == 0
    assert done.stdout.startswith("30 clips in 5 tars (0 were there)")
    assert "10 clips left out" in done.stdout


@pytest.mark.parametrize("view", ["video,smell", "video,video@second", ""])
def test_wrong_view_is_one_line(dataset, out, view):
    done = run(dataset.root, "--out", out, "--view", view)
    assert (done.returncode, done.stdout) == (1, "") and done.stderr.count("\n") == 1


def test_full_disk_is_named_and_leaves_whole_tars(dataset, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "none", str(small)]
    mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"can't mount a small tmpfs here: {mounted.stderr.strip()}")
    try:
        done = run(dataset.root, "--out", small)
        assert done.returncode == 1 and "bytes free" in done.stderr.splitlines()[-1]
        names = {path.name for path in small.iterdir()}
        assert names == {f"{s:06d}.{e}" for s in range(len(names) // 2) for e in ("tar", "json")}
    finally:
        subprocess.run(["umount", str(small)], check=True)
