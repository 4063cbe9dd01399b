"""Properties of a census: made once per node and data, whole or not there, nothing trusted."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
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
from train.data.census_cache import KEPT_S, made_once, remove_unused, views_folder
from train.data.config import DataConfig
from train.data.view import View, open_view

CLASSES = [ClipClass((2, 3, 3), (4, 2)), ClipClass((2, 3, 6), None), ClipClass(None, (4, 2))]
SUMS = {name: {"count": 1, "sum": [1.0], "sum_of_squares": [2.0]} for name in ("video", "audio")}


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return Dataset(tmp_path / "shards").build()


def view_of(dataset: Dataset, **config: Any) -> View:
    cache = dataset.root.parent / "cache"
    return open_view(DataConfig(root=str(dataset.root), cache_dir=str(cache), **config), "all")


def censuses(dataset: Dataset) -> list[Path]:
    return sorted(path for path in (dataset.root.parent / "cache").glob("*/[0-9a-f]*"))


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
    census = Census(folder, rows_per_shard, np.array([2**41, 9]))
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
        writer.finish(CLASSES, SUMS, Tally(), [0])
    return Census(folder, np.array([4, 4, 4]), np.array([9]))


@pytest.mark.parametrize(
    "name", ["head.json", "codes.bin", "text_rows.bin", "keys.bin", "class_counts.npy", "video.npy"]
)
@pytest.mark.parametrize("damage", ["missing", "empty", "short"])
def test_damaged_files_are_named(tmp_path: Path, name: str, damage: str) -> None:
    census = written(tmp_path / "census")
    path = census.folder / name
    data = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(b"" if damage == "empty" else data[:-1])
    with pytest.raises(FormatError, match=f"not whole .*{name}.*remove it"):
        Census(census.folder, np.array([4, 4, 4]), np.array([9]))


def test_file_with_more_than_the_plan_has_is_named(tmp_path: Path) -> None:
    census = written(tmp_path / "census")
    with (census.folder / "codes.bin").open("ab") as file:
        file.write(bytes(4))
    with pytest.raises(FormatError, match=r"codes.bin: 16 bytes, expected 12"):
        Census(census.folder, np.array([4, 4, 4]), np.array([9]))


def test_census_of_another_plan_is_refused(tmp_path: Path) -> None:
    census = written(tmp_path / "census")
    for rows_per_shard in ([4, 4], [4, 4, 5], [4, 4, 4, 4]):
        with pytest.raises(FormatError, match="not whole"):
            Census(census.folder, np.array(rows_per_shard), np.array([9]))


def test_census_of_another_version_is_refused(tmp_path: Path) -> None:
    census = written(tmp_path / "census")
    path = census.folder / "head.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 99}))
    with pytest.raises(FormatError, match="version 99"):
        Census(census.folder, np.array([4, 4, 4]), np.array([9]))


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    census = written(tmp_path / "census")
    np.save(census.folder / "video.npy", np.array([1, "a", None], object), allow_pickle=True)
    with pytest.raises(FormatError, match=r"video.npy: .*allow_pickle"):
        Census(census.folder, np.array([4, 4, 4]), np.array([9]))


def test_file_that_shrinks_while_it_is_open_is_named(tmp_path: Path) -> None:
    census = written(tmp_path / "census")
    os.truncate(census.folder / "keys.bin", 5)
    with pytest.raises(FormatError, match=r"keys.bin was cut short"):
        census.keys(2)


def test_captions_outside_the_plan_are_refused(tmp_path: Path) -> None:
    census = written(tmp_path / "census")
    assert census.text_rows(1).tolist() == [0, 1, 2, 3]
    fewer = Census(census.folder, np.array([4, 4, 4]), np.array([3]))
    with pytest.raises(FormatError, match="a caption outside the 3"):
        fewer.text_rows(1)


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
        return Census(tmp_path / name, np.array([2]), np.array([9])).head.content

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
    folder, built = views_folder(str(tmp_path)) / ("0" * 32), []
    together = threading.Barrier(8)

    def build(into: Path) -> None:
        built.append(threading.get_ident())
        time.sleep(0.05)
        (into / "head.json").write_text("{}")

    def make(_: int) -> bool:
        together.wait()
        made_once(folder, build)
        return (folder / "head.json").exists()

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(make, range(8)))
    assert len(built) == 1


KILLED = """
import os, sys
from pathlib import Path
from train.data.census_cache import made_once
def build(into):
    (into / "head.json").write_text("half")
    print("building", flush=True)
    sys.stdin.read()
made_once(Path(sys.argv[1]), build)
"""


def test_killed_build_leaves_nothing_that_counts(tmp_path: Path) -> None:
    folder = views_folder(str(tmp_path)) / ("0" * 32)
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", KILLED, str(folder)], **pipes) as process:
        assert process.stdout and process.stdout.readline() == b"building\n"
        process.send_signal(signal.SIGKILL)
    assert not folder.exists() and list(folder.parent.glob(".*.tmp/head.json"))

    def build(into: Path) -> None:
        assert not list(into.iterdir())
        (into / "head.json").write_text("whole")

    made_once(folder, build)
    assert (folder / "head.json").read_text() == "whole"
    assert not list(folder.parent.glob(".*.tmp"))


def test_failed_build_leaves_nothing(dataset: Dataset) -> None:
    (dataset.column_path("video") / "000003.tar").unlink()
    with pytest.raises(FormatError, match=r"000003.tar is missing"):
        view_of(dataset)
    folder = views_folder(str(dataset.root.parent / "cache"))
    assert [path.suffix for path in folder.iterdir()] == [".lock"]


def test_full_disk_is_named(tmp_path: Path) -> None:
    def build(into: Path) -> None:
        (into / "codes.bin").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    folder = views_folder(str(tmp_path)) / ("0" * 32)
    with pytest.raises(ConfigError, match=r"no room .* bytes free; .*set data.cache_dir"):
        made_once(folder, build)
    assert [path.suffix for path in folder.parent.iterdir()] == [".lock"]


def test_those_who_wait_say_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, building = views_folder(str(tmp_path)) / ("0" * 32), threading.Event()
    go_on = threading.Event()

    def build(_: Path) -> None:
        building.set()
        assert go_on.wait(60)

    with ThreadPoolExecutor(2) as pool, caplog.at_level("INFO"):
        first = pool.submit(made_once, folder, build)
        assert building.wait(60)
        second = pool.submit(made_once, folder, build)
        while "waiting for it" not in caplog.text:
            time.sleep(0.01)
        go_on.set()
        first.result()
        second.result()


def test_long_unused_censuses_are_removed(tmp_path: Path) -> None:
    folder = views_folder(str(tmp_path))
    old, recent, other = (folder / name for name in ("0" * 32, "1" * 32, "notes"))
    for path, age_s in ((old, KEPT_S + 60), (recent, KEPT_S - 3600), (other, 2 * KEPT_S)):
        path.mkdir()
        (path / "head.json").write_text("{}")
        os.utime(path / "head.json", (time.time() - age_s,) * 2)
    remove_unused(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["1" * 32, "notes"]


def test_opening_counts_as_use(dataset: Dataset) -> None:
    view_of(dataset)
    (folder,) = censuses(dataset)
    os.utime(folder / "head.json", (1, 1))
    view_of(dataset)
    remove_unused(folder.parent)
    assert censuses(dataset) == [folder]


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
    assert len(censuses(dataset)) == 4
    os.utime(dataset.column_path("audio"), (1, 1))
    view_of(dataset)
    assert len(censuses(dataset)) == 5
