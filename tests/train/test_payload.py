"""Properties of payloads: what is read is what was written, or it is named."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.format import Column, FormatError
from tests.train.columns import Dataset
from train.data.payload import DamagedPayload, Seen, ShardPayloads, read_row
from train.data.retry import LoaderClosed, Patience
from train.data.tar_bytes import LocalTar, PatientTar, RemoteTar, TarFacts, first_member

VIDEO_LATENT_BYTES = 2 * 3 * 3 * 2


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return Dataset(tmp_path_factory.mktemp("data") / "shards", failed={8: "missing"}).build()


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return Dataset(tmp_path / "shards", num_clips=16).build()


def column_of(dataset: Dataset) -> Column:
    return Column(dataset.column_path("video"), dataset.spec("video"), dataset.plan.plan_id)


def tar_of(dataset: Dataset, shard: int, retry_s: float = 0.0) -> PatientTar:
    column = column_of(dataset)
    record = column.committed(shard)
    facts = TarFacts(column.path / record["tar"], record["tar_bytes"], record["tar_crc32c"], "mend")
    patience = Patience(retry_s, threading.Event())
    return PatientTar(facts, lambda facts: LocalTar(facts, facts.path), patience)


def payloads_of(dataset: Dataset, shard: int) -> ShardPayloads:
    keys = [dataset.key(clip) for clip in dataset.shard_clips(shard)]
    index = column_of(dataset).index(shard, len(keys))
    return ShardPayloads(tar_of(dataset, shard), index, keys, "video")


def read(payloads: ShardPayloads, row: int, first: int, num_latents: int) -> np.ndarray:
    out, start = np.empty(num_latents * VIDEO_LATENT_BYTES, np.uint8), first * VIDEO_LATENT_BYTES
    payloads.read_checked(row, start, out)
    return out.view(np.float16).reshape(num_latents, 2, 3, 3)


def change(path: Path, offset: int, data: bytes) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[:offset] + data + whole[offset + len(data) :])


# -- reading


@settings(max_examples=30)
@given(st.integers(0, 7), st.data())
def test_any_span_is_that_of_the_clip(whole: Dataset, row: int, data: st.DataObject) -> None:
    shard = data.draw(st.sampled_from([0, 2]))
    first = data.draw(st.integers(0, 39))
    length = data.draw(st.integers(1, 40 - first))
    expected = whole.video(shard * 8 + row)[first : first + length]
    np.testing.assert_array_equal(read(payloads_of(whole, shard), row, first, length), expected)


def test_single_row_is_read_with_its_shape(whole: Dataset) -> None:
    column = column_of(whole)
    record = column.index(0, 8)[3].copy()
    tar = column.committed(0)["tar"]
    found = read_row(column.path, tar, record, whole.key(3))
    assert found.dtype == np.float16
    np.testing.assert_array_equal(found, whole.video(3))
    record["crc32c"] ^= 1
    with pytest.raises(DamagedPayload, match=rf"{tar} \(clip00003\): crc32c is"):
        read_row(column.path, tar, record, whole.key(3))


def test_threads_share_payloads(whole: Dataset) -> None:
    payloads, wrong = payloads_of(whole, 2), []

    def work() -> None:
        for turn in range(200):
            row, first = turn % 8, turn % 5
            if not np.array_equal(
                read(payloads, row, first, 20), whole.video(16 + row)[first : first + 20]
            ):
                wrong.append(turn)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# -- checking


@given(st.sets(st.integers(0, 999)))
def test_seen_holds_what_was_added_and_nothing_else(rows: set[int]) -> None:
    seen = Seen(1000)
    for row in rows:
        seen.add(row)
    assert {row for row in range(1000) if row in seen} == rows


@pytest.mark.parametrize("length", [10, 40])
def test_flipped_bit_is_found_wherever_it_is_even_outside_the_crop(
    dataset: Dataset, length: int
) -> None:
    column = column_of(dataset)
    index = column.index(1, 8)
    path = column.tar_path(1)
    last = int(index["offset"][5] + index["nbytes"][5]) - 1
    change(path, last, bytes([path.read_bytes()[last] ^ 64]))
    payloads = payloads_of(dataset, 1)
    pattern = rf"{path} row 5 \(clip00013\): crc32c is [0-9a-f]{{8}}, expected [0-9a-f]{{8}}; mend"
    with pytest.raises(DamagedPayload, match=pattern):
        read(payloads, 5, 0, length)
    np.testing.assert_array_equal(read(payloads, 4, 0, length), dataset.video(12)[:length])


def test_tar_of_another_shard_is_told_from_a_damaged_one(dataset: Dataset) -> None:
    column = column_of(dataset)
    path, other = column.tar_path(0), column.tar_path(1)
    path.write_bytes(other.read_bytes())
    with pytest.raises(FormatError, match=r"begins with 'clip00008\.video\.npy', expected") as e:
        read(payloads_of(dataset, 0), 3, 0, 40)
    assert not isinstance(e.value, DamagedPayload)
    assert "expected 'clip00000.video.npy': it is the tar of another shard" in str(e.value)


def test_tar_whose_first_header_is_gone_counts_as_damaged(dataset: Dataset) -> None:
    path = column_of(dataset).tar_path(0)
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(DamagedPayload):
        read(payloads_of(dataset, 0), 3, 0, 40)
    assert first_member(tar_of(dataset, 0)) is None
    assert first_member(tar_of(dataset, 1)) == "clip00008.video.npy"


# -- files


def test_tar_of_another_size_is_named_when_it_is_opened(dataset: Dataset) -> None:
    path = column_of(dataset).tar_path(0)
    size = path.stat().st_size
    with path.open("ab") as file:
        file.write(b"more")
    message = rf"{path}: {size + 4} bytes, expected {size} as committed.*; mend"
    with pytest.raises(FormatError, match=message):
        tar_of(dataset, 0).open()


def test_tar_cut_while_it_is_open_is_named(dataset: Dataset) -> None:
    payloads, path = payloads_of(dataset, 0), column_of(dataset).tar_path(0)
    read(payloads, 7, 0, 40)
    end = int(column_of(dataset).index(0, 8)["offset"][7]) + 100
    with path.open("r+b") as file:
        file.truncate(end)
    with pytest.raises(FormatError, match=rf"{path} ends at byte {end}, 1340 bytes short"):
        read(payloads, 7, 0, 40)


def test_missing_tar_is_tried_again_for_a_while_then_named(dataset: Dataset) -> None:
    path = column_of(dataset).tar_path(0)
    path.rename(path.with_name("elsewhere"))
    with pytest.raises(FormatError, match=rf"{path} can't be read \(No such file.*retry_s=0\.2 s"):
        tar_of(dataset, 0, retry_s=0.2).open()


def test_tar_that_comes_back_in_time_is_read(dataset: Dataset) -> None:
    path = column_of(dataset).tar_path(0)
    away = path.with_name("elsewhere")
    path.rename(away)
    payloads = payloads_of(dataset, 0)
    payloads.tar = tar_of(dataset, 0, retry_s=60)
    timer = threading.Timer(0.3, lambda: away.rename(path))
    timer.start()
    np.testing.assert_array_equal(read(payloads, 1, 0, 40), dataset.video(1))
    timer.join()


def test_stale_handle_is_opened_anew(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    payloads, failures = payloads_of(dataset, 0), []
    payloads.tar = tar_of(dataset, 0, retry_s=60)
    read(payloads, 1, 0, 40)
    whole = LocalTar.read_into

    def fail_twice(tar: LocalTar, out: np.ndarray, offset: int) -> None:
        if len(failures) < 2:
            failures.append(tar)
            raise OSError(116, "Stale file handle")
        whole(tar, out, offset)

    monkeypatch.setattr(LocalTar, "read_into", fail_twice)
    np.testing.assert_array_equal(read(payloads, 1, 3, 5), dataset.video(1)[3:8])
    assert failures[0] is not failures[1]


def test_waiting_for_a_file_ends_when_the_loader_is_closed() -> None:
    closing = threading.Event()
    patience = Patience(3600, closing)

    def fail() -> None:
        raise OSError("gone")

    threading.Timer(0.1, closing.set).start()
    with pytest.raises(LoaderClosed):
        patience.call("a file", fail)


def test_rows_of_a_tar_are_read_one_by_one_without_opening_it(dataset: Dataset) -> None:
    tar = tar_of(dataset, 0)
    record = column_of(dataset).index(0, 8)[6]
    out = np.empty(int(record["nbytes"]), np.uint8)
    RemoteTar(tar.facts).read_into(out, int(record["offset"]))
    assert out.tobytes() == dataset.video(6).tobytes()
    with pytest.raises(FormatError, match="ends at byte"):
        RemoteTar(tar.facts).read_into(out, tar.facts.nbytes - 100)
