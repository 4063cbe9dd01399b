"""Properties of the loader: one stream for all layouts, exact resume, crops, shapes, waiting."""

from __future__ import annotations

import gc
import itertools
import logging
import os
import pickle
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.settings import ConfigError
from tests.train.batches import (
    GLOBAL_BATCH,
    clip_of,
    global_batches,
    keys_of,
    loader_of,
    rows_of,
    view_of,
)
from tests.train.columns import AUDIO_RATE_HZ, VIDEO_RATE_HZ, Dataset
from train.data.config import PartConfig
from train.data.loader import LatentLoader
from train.data.retry import LoaderClosed
from train.data.view import View
from train.errors import ResumeError
from train.latents import LatentBatch

LAYOUTS = [(1, 8), (1, 2), (2, 4), (2, 1), (4, 2), (8, 1)]  # ranks, micro-batch


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    root = tmp_path_factory.mktemp("data") / "shards"
    failed = {3: "silent", 17: "missing"}
    return Dataset(root, num_clips=45, failed=failed, short_s={30: 9.0}).build()


@pytest.fixture(scope="module")
def view(dataset: Dataset) -> View:
    return view_of(dataset)


def start_of(crop: np.ndarray, whole: np.ndarray) -> int:
    """Return where a crop lies in a clip; fails unless there is one place."""
    places = [
        first
        for first in range(len(whole) - len(crop) + 1)
        if np.array_equal(whole[first : first + len(crop)], crop)
    ]
    assert len(places) == 1
    return places[0]


# -- the stream


@settings(max_examples=20)
@given(st.integers(0, 2**31), st.integers(1, 43))
def test_an_epoch_holds_every_clip_once_but_for_the_tail(
    view: View, dataset: Dataset, seed: int, global_batch: int
) -> None:
    with loader_of(view, seed=seed, global_batch=global_batch) as loader:
        (steps,) = loader.steps_per_epoch
        assert steps == 43 // global_batch
        for epoch in range(2):
            batches = list(itertools.islice(loader, steps))
            keys = [key for batch in batches for key in batch.keys]
            assert len(set(keys)) == len(keys) == 43 - 43 % global_batch
            assert {clip_of(key) for key in keys} <= set(range(45)) - {3, 17}
            assert int(batches[0].samples[0]) == epoch * steps * global_batch


def test_samples_count_the_stream(view: View) -> None:
    batches = global_batches(view, steps=12, num_ranks=2, micro_batch=2)  # over two epochs of 5
    samples = [row[0] for rows in batches for row in rows]
    assert samples == list(range(12 * GLOBAL_BATCH))


@pytest.mark.parametrize(("num_ranks", "micro_batch"), LAYOUTS[1:])
def test_any_layout_gives_the_same_global_batches(
    view: View, num_ranks: int, micro_batch: int
) -> None:
    expected = global_batches(view, steps=7)
    assert global_batches(view, 7, num_ranks, micro_batch) == expected


def test_three_ranks_give_the_global_batches_of_one(view: View) -> None:
    expected = global_batches(view, 4, global_batch=12, micro_batch=12)
    for num_ranks, micro_batch in ((3, 4), (3, 2), (6, 1)):
        assert global_batches(view, 4, num_ranks, micro_batch, global_batch=12) == expected


def test_checks_threads_and_reading_ahead_do_not_change_the_stream(
    dataset: Dataset, view: View
) -> None:
    other = view_of(dataset, verify_crc="always", read_threads=5, prefetch_steps=7, text_cache_mb=1)
    assert other.view_id == view.view_id
    assert global_batches(other, steps=6) == global_batches(view, steps=6)


def test_one_row_shards_are_read(tmp_path: Path) -> None:
    dataset = Dataset(tmp_path / "shards", num_clips=9, shard_size=1, captions_per_shard=1).build()
    view = view_of(dataset, window_shards=1)
    with loader_of(view, global_batch=9, micro_batch=3) as loader:
        keys = [key for batch in itertools.islice(loader, 3) for key in batch.keys]
    assert sorted(keys) == [dataset.key(clip) for clip in range(9)]


def test_fewer_clips_than_a_batch_are_repeated(
    view: View, caplog: pytest.LogCaptureFixture
) -> None:
    with loader_of(view, global_batch=86) as loader:
        counts = Counter(next(loader).keys)
    assert len(counts) == 43
    assert set(counts.values()) == {2}
    assert "43 clips are of shapes that have fewer than the global batch of 86" in caplog.text


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"micro_batch": 3}, "not a multiple of 1 ranks × micro_batch=3"),
        ({"num_ranks": 3}, "not a multiple of 3 ranks × micro_batch=2"),
        ({"rank": 2, "num_ranks": 2}, "rank is 2, expected a whole number of 0 to 1"),
        ({"rank": -1}, "rank is -1"),
        ({"rank": "0"}, "rank is '0'"),
        ({"num_ranks": 0}, "num_ranks is 0"),
        ({"micro_batch": 0}, "micro_batch is 0"),
        ({"micro_batch": -4}, "micro_batch is -4"),
        ({"global_batch": 8.0}, r"global_batch is 8\.0"),
        ({"global_batch": 10**12}, "global_batch is 1000000000000"),
    ],
)
def test_ranks_and_batches_that_do_not_fit_are_refused(
    view: View, layout: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        loader_of(view, **layout)


# -- its state


@settings(max_examples=15, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.integers(0, 11),
    st.sampled_from(LAYOUTS),
    st.sampled_from(LAYOUTS),
    st.integers(1, 5),
    st.integers(1, 5),
)
def test_resume_at_any_position_with_another_layout_continues_the_stream(
    dataset: Dataset,
    view: View,
    position: int,
    before: tuple[int, int],
    after: tuple[int, int],
    threads_before: int,
    threads_after: int,
) -> None:
    expected = global_batches(view, steps=14)
    num_ranks, micro_batch = before
    first = view_of(dataset, read_threads=threads_before)
    with loader_of(first, num_ranks=num_ranks, micro_batch=micro_batch) as loader:
        for _ in range(position * GLOBAL_BATCH // (num_ranks * micro_batch)):
            next(loader)
        state = loader.state_dict()
    assert state["samples_consumed"] == position * GLOBAL_BATCH
    second = view_of(dataset, read_threads=threads_after)
    assert global_batches(second, 14 - position, *after, state=state) == expected[position:]


def test_state_counts_whole_global_batches_and_not_what_was_read_ahead(view: View) -> None:
    with loader_of(view, micro_batch=4) as loader:
        consumed = []
        for _ in range(5):
            next(loader)
            consumed.append(loader.state_dict()["samples_consumed"])
    assert consumed == [0, 8, 8, 16, 16]


def test_state_saved_within_a_step_is_that_before_it(view: View) -> None:
    with loader_of(view, micro_batch=2) as loader:
        for _ in range(2 * 4 + 3):
            next(loader)
        state = loader.state_dict()
    assert global_batches(view, 2, state=state) == global_batches(view, 4)[2:]


def test_state_loaded_into_a_running_loader_moves_it(view: View) -> None:
    with loader_of(view) as loader:
        start = loader.state_dict()
        expected = rows_of(next(loader))
        next(loader)
        loader.load_state_dict(start)
        assert rows_of(next(loader)) == expected


def test_another_global_batch_goes_on_at_the_same_sample(
    view: View, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with loader_of(view) as loader:
        before = [key for batch in itertools.islice(loader, 3) for key in batch.keys]
        state = loader.state_dict()
    with loader_of(view, global_batch=4) as loader:
        loader.load_state_dict(state)
        batches = list(itertools.islice(loader, 4))  # 24 + 16 of 43 clips
    assert int(batches[0].samples[0]) == 24
    keys = before + [key for batch in batches for key in batch.keys]
    assert len(set(keys)) == len(keys) == 40
    assert "the global batch was 8 and is 4 now" in caplog.text


@pytest.mark.parametrize("name", ["view_id", "plan_id", "seed"])
def test_state_of_another_stream_is_refused_by_name(view: View, name: str) -> None:
    with loader_of(view) as loader, pytest.raises(ResumeError, match=name):
        loader.load_state_dict({**loader.state_dict(), name: "other"})


@pytest.mark.parametrize("samples", [-8, 3, None, 8.0, "8"])
def test_state_that_contradicts_itself_is_refused(view: View, samples: Any) -> None:
    with loader_of(view) as loader:
        next(loader)
        state = loader.state_dict()
        with pytest.raises(ResumeError, match="samples_consumed"):
            loader.load_state_dict({**state, "samples_consumed": samples})


@pytest.mark.parametrize("cursor", [None, {}, {"samples": 0, "steps": 0, "places": []}])
def test_state_without_a_sound_cursor_is_refused(view: View, cursor: Any) -> None:
    with loader_of(view) as loader, pytest.raises(ResumeError, match="cursor"):
        loader.load_state_dict({**loader.state_dict(), "cursor": cursor})


@pytest.mark.parametrize("state", [None, [], "state"])
def test_state_that_is_none_is_refused(view: View, state: Any) -> None:
    with loader_of(view) as loader, pytest.raises(ResumeError, match="expected what state_dict"):
        loader.load_state_dict(state)


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 0},
        {"steps": 10**30},
        {"samples": 2**63 - 8},
        {"places": [{"epoch": 10**30, "consumed": [8]}]},
    ],
)
def test_impossible_cursor_is_refused(view: View, changes: dict[str, Any]) -> None:
    with loader_of(view) as loader:
        next(loader)
        state = loader.state_dict()
        cursor = {**state["cursor"], **changes}
        damaged = {**state, "cursor": cursor, "samples_consumed": cursor["samples"]}
        with pytest.raises(ResumeError, match=r"cursor\."):
            loader.load_state_dict(damaged)


@pytest.mark.parametrize("global_batch", ["x", -1, None, 8.0])
def test_state_with_an_impossible_global_batch_is_refused(view: View, global_batch: Any) -> None:
    with loader_of(view) as loader, pytest.raises(ResumeError, match="global_batch is"):
        loader.load_state_dict({**loader.state_dict(), "global_batch": global_batch})


def test_position_is_told_while_shards_are_away(tmp_path: Path) -> None:
    dataset = Dataset(tmp_path / "shards").build()
    view, folder, away = view_of(dataset, retry_s=60), dataset.column_path("video"), tmp_path / "a"
    with loader_of(view) as loader:
        next(loader)
        state = loader.state_dict()
        rest = [rows_of(next(loader)) for _ in range(2)]
    folder.rename(away)
    with loader_of(view) as loader:
        loader.load_state_dict(state)
        assert loader.position().startswith("epoch 0, clip 8 of 40; next ")
        away.rename(folder)
        assert [rows_of(next(loader)) for _ in range(2)] == rest


def test_position_names_epoch_clip_and_next_keys(
    view: View, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with loader_of(view) as loader:
        for _ in range(7):  # an epoch is 5 steps
            next(loader)
        state = loader.state_dict()
    with loader_of(view) as loader:
        loader.load_state_dict(state)
        position = loader.position()
        assert position.startswith("epoch 1, clip 16 of 43; next ")
        assert position.endswith(", ".join(next(loader).keys[:3]))
    assert position in caplog.text


# -- what a sample is


def test_crops_are_the_same_span_in_both_modalities(dataset: Dataset, view: View) -> None:
    starts = set()
    with loader_of(view) as loader:
        for batch in itertools.islice(loader, 25):
            for place, key in enumerate(batch.keys):
                video = start_of(batch.video[place].numpy(), dataset.video(clip_of(key)))
                audio = start_of(batch.audio[place].numpy(), dataset.audio(clip_of(key)))
                residual_s = audio / AUDIO_RATE_HZ - video / VIDEO_RATE_HZ
                assert abs(residual_s) <= 0.5 / AUDIO_RATE_HZ + 1e-9
                assert float(batch.audio_start_s[place]) == pytest.approx(residual_s, abs=1e-6)
                assert float(batch.video_start_s[place]) == 0
                starts.add(video)
    assert starts == set(range(17))  # 4 s of slack at 4 Hz


def test_column_that_is_not_croppable_is_cut_at_its_start(tmp_path: Path) -> None:
    dataset = Dataset(tmp_path / "shards", video_croppable=False).build()
    with loader_of(view_of(dataset)) as loader:
        batch = next(loader)
    for place, key in enumerate(batch.keys):
        assert start_of(batch.video[place].numpy(), dataset.video(clip_of(key))) == 0
        assert start_of(batch.audio[place].numpy(), dataset.audio(clip_of(key))) == 0


@pytest.mark.parametrize("text_cache_mb", [1, 256])
def test_text_is_padded_with_zeros_to_a_multiple_of_four(
    dataset: Dataset, text_cache_mb: int
) -> None:
    with loader_of(view_of(dataset, text_cache_mb=text_cache_mb)) as loader:
        for batch in itertools.islice(loader, 5):
            captions = [dataset.text(dataset.text_row(clip_of(key))) for key in batch.keys]
            longest = max(map(len, captions))
            assert batch.text.shape == (8, -(-longest // 4) * 4, dataset.text_width)
            assert torch.all(batch.text[~batch.text_mask] == 0)
            for place, caption in enumerate(captions):
                assert batch.text_mask[place].tolist() == [
                    token < len(caption) for token in range(batch.text.shape[1])
                ]
                np.testing.assert_array_equal(batch.text[place, : len(caption)].numpy(), caption)


def test_shapes_change_from_step_to_step_and_every_clip_comes(tmp_path: Path) -> None:
    wide = frozenset(range(0, 40, 3))
    dataset = Dataset(tmp_path / "shards", wide=wide).build()
    view = view_of(dataset, seconds=10.0)
    with loader_of(view, global_batch=2) as loader:
        batches = list(itertools.islice(loader, *loader.steps_per_epoch))
    seen = [key for batch in batches for key in batch.keys]
    assert sorted(map(clip_of, seen)) == list(range(40))
    for batch in batches:
        assert batch.video.shape[1:] == view.buckets[batch.bucket].video.shape
        for place, key in enumerate(batch.keys):
            np.testing.assert_array_equal(batch.video[place].numpy(), dataset.video(clip_of(key)))
    assert {batch.bucket for batch in batches} == {0, 1}


def test_clips_of_shapes_that_are_too_few_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = Dataset(tmp_path / "shards", wide=frozenset([1, 2])).build()
    with loader_of(view_of(dataset)):
        assert "2 clips are never trained on" in caplog.text


def test_clip_without_a_modality_comes_as_zeros_and_says_so(tmp_path: Path) -> None:
    dataset = Dataset(
        tmp_path / "shards", failed_video={1: "no_video"}, failed_audio={5: "no_audio", 6: "silent"}
    ).build()
    with loader_of(view_of(dataset, missing="mask")) as loader:
        batches = list(itertools.islice(loader, *loader.steps_per_epoch))
    seen = set()
    for batch in batches:
        for place, key in enumerate(batch.keys):
            clip = clip_of(key)
            seen.add(clip)
            assert bool(batch.has_video[place]) == (clip != 1)
            assert bool(batch.has_audio[place]) == (clip not in (5, 6))
            assert bool(torch.all(batch.video[place] == 0)) == (clip == 1)
            assert bool(torch.all(batch.audio[place] == 0)) == (clip in (5, 6))
    assert seen == set(range(40))


def test_one_crop_of_a_clip_without_sound_may_start_anywhere(tmp_path: Path) -> None:
    dataset = Dataset(tmp_path / "shards", num_clips=8, failed_audio={5: "no_audio"}).build()
    starts = set()
    with loader_of(view_of(dataset, missing="mask")) as loader:
        for batch in itertools.islice(loader, 100):
            place = batch.keys.index(dataset.key(5))
            starts.add(start_of(batch.video[place].numpy(), dataset.video(5)))
    assert starts == set(range(17))


def test_several_data_sets_come_by_weight_and_go_on_exactly(tmp_path: Path) -> None:
    datasets = [
        Dataset(tmp_path / name / "shards", num_clips=20, seed=seed).build()
        for seed, name in enumerate(("a", "b"))
    ]
    mix = tuple(
        PartConfig(root=str(dataset.root), weight=weight)
        for dataset, weight in zip(datasets, (3.0, 1.0), strict=True)
    )
    view = view_of(datasets[0], mix=mix)
    expected = global_batches(view, steps=16)
    for rows in expected:
        assert len({len(row[1]) for row in rows}) == 1  # one data set in a step
    share = sum(len(key) > len(datasets[0].key(0)) for key in keys_of(expected)) / (16 * 8)
    assert 0.05 < share < 0.6
    with loader_of(view) as loader:
        for _ in range(6):
            next(loader)
        state = loader.state_dict()
    assert global_batches(view, 10, 2, 2, state=state) == expected[6:]


# -- moments


def expected_std(moments: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    mean, log_variance = np.split(moments.astype(np.float32), 2, axis)
    return mean, np.exp(0.5 * log_variance)


def test_moments_are_drawn_from_anew_each_time_and_again_after_a_resume(tmp_path: Path) -> None:
    dataset = Dataset(tmp_path / "shards", num_clips=8, moments=frozenset({"video"})).build()
    view = view_of(dataset, seconds=10.0)
    draws = []
    with loader_of(view) as loader:
        for batch in itertools.islice(loader, 200):
            assert batch.video.shape == (8, 40, 2, 3, 3) and batch.video.dtype == torch.float16
            draws.append(batch.video[batch.keys.index(dataset.key(2))].numpy().astype(np.float32))
    mean, std = expected_std(dataset.video(2), axis=1)
    standard = (np.array(draws) - mean) / std
    assert abs(float(standard.mean())) < 4 / standard.size**0.5 + 1e-3
    assert float(standard.std()) == pytest.approx(1, abs=0.01)
    assert len({draw.tobytes() for draw in draws}) == 200

    expected = global_batches(view, steps=4)
    assert global_batches(view, 4, 2, 2) == expected
    with loader_of(view) as loader:
        next(loader)
        state = loader.state_dict()
    assert global_batches(view, 3, 4, 1, state=state) == expected[1:]


def test_moments_of_a_missing_modality_stay_zeros(tmp_path: Path) -> None:
    dataset = Dataset(
        tmp_path / "shards", num_clips=8, moments=frozenset({"audio"}), failed_audio={3: "silent"}
    ).build()
    with loader_of(view_of(dataset, missing="mask")) as loader:
        batch = next(loader)
    assert batch.audio.shape == (8, 150, 4, 2)
    is_zero = [bool(torch.all(audio == 0)) for audio in batch.audio]
    assert is_zero == [key == dataset.key(3) for key in batch.keys]


@pytest.mark.gpu
@pytest.mark.parametrize("moments", [frozenset(), frozenset({"video"})])
def test_batches_on_a_gpu_are_those_on_the_cpu(tmp_path: Path, moments: frozenset[str]) -> None:
    dataset = Dataset(tmp_path / "shards", num_clips=8, moments=moments).build()
    view = view_of(dataset)
    with loader_of(view) as here, loader_of(view, device="cuda") as there:
        for _ in range(20):
            one, two = next(here), next(there)
            assert two.samples.device.type == "cpu" and one.keys == two.keys
            for name, tensor in vars(two).items():
                if not isinstance(tensor, torch.Tensor) or name == "samples":
                    continue
                assert tensor.is_cuda, name
                if name not in moments:  # what is drawn on a GPU is another stream of numbers
                    assert torch.equal(tensor.cpu(), getattr(one, name)), name


# -- waiting and ending


def test_wait_step_waits_for_all_of_a_step_and_changes_nothing(
    view: View, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = global_batches(view, 3)
    with loader_of(view, micro_batch=2) as loader:
        found = []
        for _ in range(3):
            loader.wait_step()
            loader.wait_step()
            with monkeypatch.context() as patch:
                patch.setattr(threading.Event, "wait", refuse_unset(threading.Event.wait))
                found.append(sorted(itertools.chain(*(rows_of(next(loader)) for _ in range(4)))))
    assert found == expected


def test_steps_come_to_whoever_only_asks_whether_they_are_there(tmp_path: Path) -> None:
    """Also where a step needs more shards than may be open: one that is asked for gets them."""
    dataset = Dataset(tmp_path / "shards", wide=frozenset(range(0, 40, 3))).build()
    with loader_of(view_of(dataset, window_shards=1)) as loader:
        for _ in range(12):
            give_up = time.monotonic() + 60
            while not loader.wait_step(0):
                assert time.monotonic() < give_up
                time.sleep(0.001)
            next(loader)


def test_wait_step_comes_back_in_time_and_goes_on_waiting(tmp_path: Path) -> None:
    dataset = Dataset(tmp_path / "shards", num_clips=8).build()
    view = view_of(dataset, retry_s=3600)
    expected = global_batches(view, 1)
    folder, away = dataset.column_path("audio"), tmp_path / "away"
    folder.rename(away)
    with loader_of(view, micro_batch=4) as loader:
        for _ in range(3):
            assert not loader.wait_step(0.05)
            assert not loader.wait_step(0)
        away.rename(folder)
        assert loader.wait_step()
        assert loader.wait_step(0)
        found = [row for _ in range(2) for row in rows_of(next(loader))]
    assert [found] == expected


def refuse_unset(wait: Any) -> Any:
    """Return an ``Event.wait`` that fails in the main thread where it would have to wait."""

    def checked(event: threading.Event, timeout: float | None = None) -> bool:
        if threading.current_thread() is threading.main_thread():
            assert event.is_set()
        return wait(event, timeout)

    return checked


def test_batches_kept_by_the_caller_are_not_overwritten(view: View) -> None:
    with loader_of(view) as loader:
        kept = list(itertools.islice(loader, 12))
    assert [rows_of(batch) for batch in kept] == global_batches(view, steps=12)


def test_tensors_outlive_their_batch(view: View) -> None:
    with loader_of(view) as loader:
        videos = [batch.video[3:5] for batch in itertools.islice(loader, 12)]
        kept = [video.clone() for video in videos]
        for _ in range(12):
            next(loader)
    assert all(torch.equal(*pair) for pair in zip(videos, kept, strict=True))


def test_memory_of_batches_let_go_is_used_again(dataset: Dataset) -> None:
    view = view_of(dataset, read_threads=1)
    with loader_of(view) as loader:
        places = set()
        for batch in itertools.islice(loader, 40):
            places.add(batch.video.data_ptr())
            del batch
    # Those read ahead, the one in hand, and the one that the thread has filled and is letting go.
    assert len(places) <= view.config.prefetch_steps + 2


def test_reading_goes_no_further_ahead_than_asked(view: View) -> None:
    """A data set smaller than two windows must not make the walk endless."""
    with loader_of(view) as loader:
        next(loader)
        assert loader._shards is not None
        waiting = [len(loader._shards._batches) for _ in range(3)]
    assert max(waiting) * GLOBAL_BATCH <= 2 * 2 * 8 + GLOBAL_BATCH


def open_tars() -> int:
    links = (path for path in Path("/proc/self/fd").iterdir() if path.exists())
    return sum(path.resolve().suffix == ".tar" for path in links)


def test_close_ends_threads_and_closes_tars(view: View) -> None:
    gc.collect()
    before = threading.active_count(), open_tars()
    with loader_of(view) as loader:
        next(loader)
        assert open_tars() > before[1]
        batch = next(loader)
    assert (threading.active_count(), open_tars()) == before
    assert len(batch.keys) == 8
    with loader_of(view) as loader:
        loader.close()
        loader.close()
        with pytest.raises(LoaderClosed, match="closed"):
            next(loader)


def test_close_ends_waiting_in_another_thread(view: View) -> None:
    for turn in range(30):
        loader = loader_of(view, micro_batch=2)
        failures: list[BaseException] = []

        def consume(loader: LatentLoader = loader, failures: list = failures) -> None:
            try:
                while True:
                    loader.wait_step()
                    next(loader)
            except LoaderClosed as error:
                failures.append(error)

        consumer = threading.Thread(target=consume)
        consumer.start()
        threading.Event().wait(turn * 0.002)
        loader.close()
        consumer.join()
        assert len(failures) == 1


def test_tars_of_windows_behind_are_closed(tmp_path: Path) -> None:
    dataset = Dataset(tmp_path / "shards", num_clips=96, shard_size=4).build()  # 24 shards
    gc.collect()
    before = open_tars()
    with loader_of(view_of(dataset), global_batch=4) as loader:
        for _ in range(3 * 24):
            next(loader)
            # Two windows of 2 shards, of video and audio; captions; one more shard in passing.
            assert open_tars() - before <= 2 * 2 * 2 + 3 + 4


def test_more_shards_than_may_be_open_are_refused(
    view: View, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda _: (64, 64))
    with pytest.raises(ConfigError, match=r"open files.*lower data.window_shards"):
        loader_of(view)


def test_loader_needs_no_more_than_the_view(dataset: Dataset, view: View) -> None:
    """A view is a value: the same one serves several loaders at once."""
    other = replace(view, config=replace(view.config, prefetch_steps=1))
    with loader_of(view) as one, loader_of(other) as two:
        for _ in range(6):
            first: LatentBatch = next(one)
            assert rows_of(first) == rows_of(next(two))


def test_forked_process_is_told_to_make_its_own(view: View) -> None:
    with loader_of(view) as loader:
        next(loader)
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            message = "no error"
            try:
                next(loader)
            except RuntimeError as error:
                message = str(error)
            os.write(writing, message.encode())
            os._exit(0)
        os.waitpid(child, 0)
        assert b"make one in the process that uses it" in os.read(reading, 1000)
        os.close(reading)
        os.close(writing)
        with pytest.raises(TypeError, match=r"can't be sent to another process.*num_workers=0"):
            pickle.dumps(loader)


def test_loader_that_nobody_closes_ends_its_threads(view: View) -> None:
    before = threading.active_count()
    loader = loader_of(view)
    next(loader)
    assert threading.active_count() > before
    del loader
    gc.collect()
    assert threading.active_count() == before


def test_loader_alone_imports_neither_the_trainer_nor_what_only_it_needs() -> None:
    names = "deepspeed", "ray", "av", "train.trainer", "train.model"
    code = f"import sys, train.data; print([n for n in {names} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
