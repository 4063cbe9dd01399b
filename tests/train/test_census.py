"""Properties of a census: made once per node and data, whole or not there, nothing trusted."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.format import FormatError, open_column
from pipeline.settings import ConfigError
from tests.train.columns import Dataset
from train.data import survey
from train.data.census import NOT_USABLE, Census, CensusWriter, ClipClass, Tally
from train.data.census_cache import KEPT_S, held, made_once, remove_unused, views_folder
from train.data.config import DataConfig
from train.data.view import View, open_view

CLASSES = [ClipClass((2, 3, 3), (4, 2)), ClipClass((2, 3, 6), None), ClipClass(None, (4, 2))]
SUMS = {name: {"count": 1, "sum": [1.0], "sum_of_squares": [2.0]} for name in ("video", "audio")}
NAMES = ("planned", "heldout", "outside", "filtered", "wanted", "complete", "video_only")
TALLY = Tally(
    **{name: 1 + place for place, name in enumerate((*NAMES, "audio_only"))},
    statuses={"video": {"ok": 1}},
    reasons={"silent": 1},
)


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return Dataset(tmp_path / "shards").build()


def view_of(dataset: Dataset, **config: Any) -> View:
    cache = dataset.root.parent / "cache"
    return open_view(DataConfig(root=str(dataset.root), cache_dir=str(cache), **config), "all")


def censuses(dataset: Dataset) -> list[Path]:
    return sorted(path for path in (dataset.root.parent / "cache").glob("*/[0-9a-f]*"))


def name_of(wanted: str, state: str = "0") -> str:
    return f"{wanted * 16}-{state * 16}"


# -- files


@given(shards=st.lists(st.lists(st.sampled_from([0, 1, 2, NOT_USABLE]), min_size=1, max_size=9)))
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, shards: Any) -> None:
    folder = tmp_path_factory.mktemp("census")
    with CensusWriter(folder) as writer:
        for shard, codes in enumerate(shards):
            keys = [f"s{shard}-{row}" for row in range(len(codes))]
            text_rows = np.arange(len(codes)) + 2**40
            crcs = {"video": shard, "audio": 2**32 - 1 - shard}
            writer.add(np.array(codes, np.uint8), text_rows, keys, crcs)
        writer.finish(CLASSES, SUMS, Tally(planned=7), [5, 6])
    rows_per_shard = np.array([len(codes) for codes in shards], np.int64)
    census = Census(folder, rows_per_shard, 2)
    assert census.head.classes == tuple(CLASSES) and census.head.tally.planned == 7
    assert census.index_crc32c["text"].tolist() == [5, 6]
    for shard, codes in enumerate(shards):
        assert census.codes(shard).tolist() == codes
        assert census.text_rows(shard).tolist() == (np.arange(len(codes)) + 2**40).tolist()
        assert census.keys(shard) == [f"s{shard}-{row}" for row in range(len(codes))]
        assert census.class_counts[shard].tolist() == [codes.count(code) for code in range(3)]
        assert census.index_crc32c["audio"][shard] == 2**32 - 1 - shard


def written(folder: Path) -> Census:
    folder.mkdir()
    with CensusWriter(folder) as writer:
        for shard in range(3):
            keys = [f"s{shard}-{row}" for row in range(4)]
            codes, rows = np.arange(4, dtype=np.uint8) % 3, np.arange(4)
            writer.add(codes, rows, keys, {"video": shard, "audio": shard})
        writer.finish(CLASSES, SUMS, TALLY, [0])
    return Census(folder, np.array([4, 4, 4]), 1)


FILES = (
    *("head.json", "codes.bin", "text_rows.bin", "keys.bin", "range_crc32c.bin", "key_ends.bin"),
    *("class_counts.bin", "video.bin", "audio.bin", "text.bin"),
)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["missing", "empty", "short", "folder"])
def test_damaged_files_are_named(tmp_path: Path, name: str, damage: str) -> None:
    census = written(tmp_path / "census")
    path = census.folder / name
    data = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage != "missing":
        path.write_bytes(b"" if damage == "empty" else data[:-1])
    with pytest.raises(FormatError, match=f"not whole .*{name}.*remove it"):
        Census(census.folder, np.array([4, 4, 4]), 1)


def test_file_with_more_than_the_plan_has_is_named(tmp_path: Path) -> None:
    census = written(tmp_path / "census")
    with (census.folder / "codes.bin").open("ab") as file:
        file.write(bytes(4))
    with pytest.raises(FormatError, match=r"codes.bin: 16 bytes, expected 12"):
        Census(census.folder, np.array([4, 4, 4]), 1)


def test_census_of_another_plan_is_refused(tmp_path: Path) -> None:
    census = written(tmp_path / "census")
    for rows_per_shard in ([4, 4], [4, 4, 5], [4, 4, 4, 4]):
        with pytest.raises(FormatError, match="not whole"):
            Census(census.folder, np.array(rows_per_shard), 1)


def test_census_of_another_version_is_refused(tmp_path: Path) -> None:
    census = written(tmp_path / "census")
    path = census.folder / "head.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 99}))
    with pytest.raises(FormatError, match="version 99"):
        Census(census.folder, np.array([4, 4, 4]), 1)


@pytest.mark.parametrize("name", FILES)
def test_every_byte_is_bound(tmp_path: Path, name: str) -> None:
    """A census of other bytes is not opened, or the shard that they are of is not read."""
    census = written(tmp_path / "census")
    path = census.folder / name
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(FormatError, match="not whole"):
            found = Census(census.folder, np.array([4, 4, 4]), 1)
            for shard in range(3):
                _ = found.codes(shard), found.text_rows(shard), found.keys(shard)


def test_shards_of_a_table_can_not_be_swapped(tmp_path: Path) -> None:
    census = written(tmp_path / "census")
    path = census.folder / "text_rows.bin"
    path.write_bytes(path.read_bytes()[::-1])
    found = Census(census.folder, np.array([4, 4, 4]), 1)
    with pytest.raises(FormatError, match=r"text_rows.bin: other bytes of shard 1 .*remove it"):
        found.text_rows(1)
    assert found.codes(1).tolist() == [0, 1, 2, 0]


def test_file_that_shrinks_while_it_is_open_is_named(tmp_path: Path) -> None:
    census = written(tmp_path / "census")
    os.truncate(census.folder / "keys.bin", 5)
    with pytest.raises(FormatError, match=r"keys.bin was cut short"):
        census.keys(2)


def test_content_names_all_that_was_written(tmp_path: Path) -> None:
    def content(name: str, change: dict[str, Any]) -> str:
        values = {"codes": [0, 1], "rows": [0, 1], "keys": ["a", "b"], "crc": 1, "text": [1]}
        values |= {"classes": CLASSES, "sums": SUMS} | change
        (tmp_path / name).mkdir()
        with CensusWriter(tmp_path / name) as writer:
            crcs = {"video": values["crc"], "audio": 1}
            codes = np.array(values["codes"], np.uint8)
            writer.add(codes, np.array(values["rows"]), values["keys"], crcs)
            writer.finish(values["classes"], values["sums"], Tally(), values["text"])
        return Census(tmp_path / name, np.array([2]), 1).head.content

    changes: list[dict[str, Any]] = [
        *({"codes": [0, 2]}, {"rows": [0, 2]}, {"keys": ["a", "c"]}, {"crc": 2}, {"text": [2]}),
        *({"classes": CLASSES[::-1]}, {"sums": SUMS | {"video": {**SUMS["video"], "count": 2}}}),
    ]
    found = [content(str(place), change) for place, change in enumerate([{}, *changes])]
    assert len(set(found)) == len(found)
    assert content("again", {}) == found[0]


# -- made once


def test_second_view_looks_at_no_shard(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    first = view_of(dataset)

    def fail(*_: Any) -> None:
        raise AssertionError("looked at a shard")

    monkeypatch.setattr(survey, "read_committed", fail)
    second = view_of(dataset, missing="drop", read_threads=1)
    assert second.view_id == first.view_id and len(censuses(dataset)) == 1


def test_encoded_again_means_counted_again(tmp_path: Path) -> None:
    dataset = Dataset(tmp_path / "shards", failed={3: "unreadable"}).build()
    before = view_of(dataset, missing="drop")
    mended = dataclasses.replace(dataset, failed={})
    column_name = dataset.spec("video").directory
    for modality in ("video", "audio"):
        name = dataset.spec(modality).directory
        column = open_column(dataset.root, name, dataset.plan.plan_id)
        (column.path / "000000.json").unlink()
        mended.write_shard(column, 0, "mended")
    after = view_of(mended)
    assert (before.num_clips, after.num_clips) == (39, 40) and after.view_id != before.view_id
    with pytest.raises(FormatError, match=rf"{column_name}/000000.*encoded again since"):
        before.parts[0].shard_rows(0)


def test_many_at_once_make_it_once(tmp_path: Path) -> None:
    folder, built = views_folder(str(tmp_path)) / name_of("0"), []
    together = threading.Barrier(8)

    def build(into: Path) -> None:
        built.append(threading.get_ident())
        time.sleep(0.05)
        (into / "head.json").write_text("{}")

    def make(_: int) -> str:
        together.wait()
        return made_once(folder, build, (folder / "head.json").read_text)

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(make, range(8))) == {"{}"}
    assert len(built) == 1


KILLED = """
import os, sys
from pathlib import Path
from train.data.census_cache import made_once
def build(into):
    (into / "head.json").write_text("half")
    print("building", flush=True)
    sys.stdin.read()
made_once(Path(sys.argv[1]), build, lambda: None)
"""


def kill_while_building(folder: Path) -> None:
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", KILLED, str(folder)], **pipes) as process:
        assert process.stdout and process.stdout.readline() == b"building\n"
        process.send_signal(signal.SIGKILL)


def test_killed_build_leaves_nothing_that_counts(tmp_path: Path) -> None:
    folder = views_folder(str(tmp_path)) / name_of("0")
    kill_while_building(folder)
    assert not folder.exists() and list(folder.parent.glob(".*.tmp/head.json"))

    def build(into: Path) -> None:
        assert not list(into.iterdir())
        (into / "head.json").write_text("whole")

    assert made_once(folder, build, (folder / "head.json").read_text) == "whole"
    assert not list(folder.parent.glob(".*.tmp"))


def test_what_killed_builders_left_is_removed_by_the_next(tmp_path: Path) -> None:
    folder = views_folder(str(tmp_path))
    kill_while_building(folder / name_of("0"))
    (folder / f".{name_of('2')}.tmp").mkdir()  # whose lock was removed by somebody else
    assert made_once(folder / name_of("1"), lambda into: None, lambda: 7) == 7
    assert sorted(path.name for path in folder.iterdir()) == [f".{name_of('1')}.lock", name_of("1")]


def test_what_is_being_built_is_left_alone(tmp_path: Path) -> None:
    folder = views_folder(str(tmp_path))
    first, second = folder / name_of("0"), folder / name_of("1")

    def build(into: Path) -> None:
        (into / "head.json").write_text("first")
        made_once(second, lambda into: None, lambda: None)

    assert made_once(first, build, (first / "head.json").read_text) == "first"


def test_lock_that_was_removed_while_waiting_for_it_is_made_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "lock"

    def take() -> bool:
        with held(path), held(path, is_waiting=False) as is_held_twice:
            return path.exists() and not is_held_twice

    with ThreadPoolExecutor(1) as pool, caplog.at_level("INFO"):
        with held(path):
            waiting = pool.submit(take)
            while "waiting for it" not in caplog.text:
                time.sleep(0.01)
            path.unlink()
        assert waiting.result()


def test_census_that_is_not_whole_is_made_anew(
    dataset: Dataset, caplog: pytest.LogCaptureFixture
) -> None:
    view_id = view_of(dataset).view_id
    (folder,) = censuses(dataset)

    def lose_head() -> None:
        (folder / "head.json").unlink()

    def lose_all() -> None:
        for path in folder.iterdir():
            path.unlink()

    def cut() -> None:
        os.truncate(folder / "keys.bin", 3)

    def age() -> None:
        head = json.loads((folder / "head.json").read_text())
        (folder / "head.json").write_text(json.dumps({"version": head["version"] - 1}))

    def replace() -> None:
        shutil.rmtree(folder)
        folder.write_text("a file")

    def dangle() -> None:
        shutil.rmtree(folder)
        folder.symlink_to("nowhere")
        folder.with_name(f".{folder.name}.tmp").write_text("a file")

    for damage in (lose_head, lose_all, cut, age, replace, dangle):
        damage()
        caplog.clear()
        assert view_of(dataset).view_id == view_id
        assert caplog.text.count("is not whole") == (damage is not dangle), damage
        assert censuses(dataset) == [folder] and len(list(folder.iterdir())) == len(FILES)


def test_census_that_can_not_be_opened_now_is_kept(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    view_of(dataset)
    (folder,) = censuses(dataset)
    names = sorted(folder.iterdir())

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="Too many open files"):
        patched.setattr(Path, "open", fail)
        view_of(dataset)
    assert sorted(folder.iterdir()) == names


def test_failed_build_leaves_nothing(dataset: Dataset) -> None:
    (dataset.column_path("video") / "000003.tar").unlink()
    with pytest.raises(FormatError, match=r"000003.tar is missing"):
        view_of(dataset)
    folder = views_folder(str(dataset.root.parent / "cache"))
    assert [path.suffix for path in folder.iterdir()] == [".lock"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS])
def test_cache_that_takes_nothing_is_named(tmp_path: Path, code: int) -> None:
    def build(into: Path) -> None:
        (into / "codes.bin").write_bytes(b"half")
        raise OSError(code, os.strerror(code))

    folder = views_folder(str(tmp_path)) / name_of("0")
    message = rf"{folder.parent} can't take .*{os.strerror(code)}; .* free\): .*data.cache_dir"
    with pytest.raises(ConfigError, match=message):
        made_once(folder, build, lambda: None)
    assert [path.suffix for path in folder.parent.iterdir()] == [".lock"]


def test_disk_that_is_full_at_the_end_is_named(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pipeline.files.os.fsync", fail)
    with pytest.raises(ConfigError, match=r"can't take .*set data.cache_dir"):
        view_of(dataset)


def test_lock_that_can_not_be_opened_is_named(tmp_path: Path) -> None:
    folder = views_folder(str(tmp_path)) / name_of("0")
    folder.with_name(f".{folder.name}.lock").mkdir()
    with pytest.raises(ConfigError, match=r"0.lock: Is a directory; .*set data.cache_dir"):
        made_once(folder, lambda into: None, lambda: None)


def test_errors_of_the_data_are_not_the_cache_s(tmp_path: Path) -> None:
    def build(into: Path) -> None:
        raise OSError(errno.EIO, "Input/output error", "/data/000000.json")

    with pytest.raises(OSError, match=r"/data/000000\.json"):
        made_once(views_folder(str(tmp_path)) / name_of("0"), build, lambda: None)


def test_those_who_wait_say_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, building = views_folder(str(tmp_path)) / name_of("0"), threading.Event()
    go_on = threading.Event()

    def build(_: Path) -> None:
        building.set()
        assert go_on.wait(60)

    with ThreadPoolExecutor(2) as pool, caplog.at_level("INFO"):
        first = pool.submit(made_once, folder, build, lambda: None)
        assert building.wait(60)
        second = pool.submit(made_once, folder, build, lambda: None)
        while "waiting for it" not in caplog.text:
            time.sleep(0.01)
        go_on.set()
        first.result()
        second.result()


def test_long_unused_censuses_are_removed(tmp_path: Path) -> None:
    folder = views_folder(str(tmp_path))
    old, recent, other = (folder / name for name in (name_of("0"), name_of("1"), "notes"))
    for path, age_s in ((old, KEPT_S + 60), (recent, KEPT_S - 3600), (other, 2 * KEPT_S)):
        path.mkdir()
        (path / "head.json").write_text("{}")
        os.utime(path / "head.json", (time.time() - age_s, time.time() - age_s))
    remove_unused(folder / name_of("2"))
    assert sorted(path.name for path in folder.iterdir()) == [name_of("1"), "notes"]


def test_opening_counts_as_use(dataset: Dataset) -> None:
    view_of(dataset)
    (folder,) = censuses(dataset)
    for path in folder.iterdir():  # programs that clean temporary folders look at every file
        os.utime(path, (1, 1))
    view_of(dataset)
    remove_unused(folder.with_name(name_of("0")))
    assert censuses(dataset) == [folder]
    assert all(path.stat().st_mtime > 1 for path in folder.iterdir())


def test_folder_that_others_may_write_to_is_refused(tmp_path: Path) -> None:
    views_folder(str(tmp_path)).chmod(0o770)
    with pytest.raises(ConfigError, match=r"mode 0700.*data.cache_dir"):
        views_folder(str(tmp_path))
    with pytest.raises(ConfigError, match=r"set data.cache_dir"):
        views_folder("/dev/null/x")


def test_folder_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    folder = views_folder(str(tmp_path))
    folder.rmdir()
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="expected a folder that is yours"):
        views_folder(str(tmp_path))


def test_views_are_not_sent_to_other_processes(dataset: Dataset) -> None:
    with pytest.raises(TypeError, match="open it in the process that uses it"):
        pickle.dumps(view_of(dataset))


def test_long_passes_say_how_far_they_are(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(survey, "REPORT_AFTER_S", -1.0)
    with caplog.at_level("INFO"):
        view_of(dataset)
    assert f"looking at every shard of {dataset.root}, once: 0 of 5" in caplog.text


def test_census_folder_follows_wishes_and_data(dataset: Dataset) -> None:
    view_of(dataset)
    view_of(dataset, seconds=4.0)
    view_of(dataset, heldout_share=0.1)
    view_of(dataset, filter="label == 'thing'")
    before = censuses(dataset)
    assert len(before) == 4
    os.utime(dataset.column_path("audio"), (1, 1))
    view_of(dataset)
    kept = set(before) & set(censuses(dataset))
    assert len(kept) == 3 and len(censuses(dataset)) == 4  # that of the old state is gone


def test_view_of_a_removed_census_is_read_on(dataset: Dataset) -> None:
    before = view_of(dataset)
    os.utime(dataset.column_path("audio"), (1, 1))
    view_of(dataset)
    assert not before.parts[0].census.folder.exists()
    assert before.parts[0].shard_rows(1).keys[0] == dataset.key(8)
