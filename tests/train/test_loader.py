"""Properties of the loader: one stream for all layouts, exact resume, named damage."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.format import FormatError
from tests.train.columns import AUDIO_RATE_HZ, VIDEO_RATE_HZ, Dataset
from train.data.loader import LatentLoader
from train.data.config import DataConfig
from train.data.view import View, open_view
from train.errors import ResumeError
from train.latents import LatentBatch

GLOBAL_BATCH = 8
LAYOUTS = [(1, 8), (1, 2), (2, 4), (2, 1), (4, 2), (4, 1), (8, 1)]  # ranks, micro-batch


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    root = tmp_path_factory.mktemp("data") / "shards"
    failed = {3: "silent", 17: "missing"}
    return Dataset(root, num_clips=45, failed=failed, short_s={30: 9.0}).build()


@pytest.fixture(scope="module")
def view(dataset: Dataset) -> View:
    return view_of(dataset)


def view_of(dataset: Dataset, **config: Any) -> View:
    settings_ = {"seconds": 6.0, "window_shards": 2, "missing": "drop", "retry_s": 0.1, **config}
    cache = dataset.root.with_name("cache")
    return open_view(DataConfig(root=str(dataset.root), cache_dir=str(cache), **settings_), "all")


def loader_of(view: View, **changes: Any) -> LatentLoader:
    arguments = {"seed": 5, "global_batch": GLOBAL_BATCH, "micro_batch": GLOBAL_BATCH}
    return LatentLoader(view, **{**arguments, **changes})


def global_batches(
    view: View, num_ranks: int, micro_batch: int, steps: int, state: dict | None = None
) -> list[list[tuple]]:
    """Return each global batch as sorted rows of (sample, key, bytes of all tensors)."""
    found: list[list[tuple]] = [[] for _ in range(steps)]
    for rank in range(num_ranks):
        with loader_of(view, micro_batch=micro_batch, rank=rank, num_ranks=num_ranks) as loader:
            if state:
                loader.load_state_dict(state)
            for step, _ in itertools.product(
                range(steps), range(GLOBAL_BATCH // (num_ranks * micro_batch))
            ):
                found[step] += rows_of(next(loader))
    return [sorted(rows) for rows in found]


def rows_of(batch: LatentBatch) -> list[tuple]:
    return [
        (
            int(batch.samples[place]),
            batch.keys[place],
            batch.video[place].numpy().tobytes(),
            batch.audio[place].numpy().tobytes(),
            float(batch.audio_start_s[place]),
            batch.text[place][batch.text_mask[place]].numpy().tobytes(),
        )
        for place in range(len(batch.keys))
    ]


def clip_of(key: str) -> int:
    return int(key.removeprefix("clip"))


def start_of(crop: np.ndarray, whole: np.ndarray) -> int:
    """Return where a crop lies in a clip; fails unless there is one place."""
    places = [
        first
        for first in range(len(whole) - len(crop) + 1)
        if np.array_equal(whole[first : first + len(crop)], crop)
    ]
    assert len(places) == 1
    return places[0]


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**31), st.integers(1, 43))
def test_an_epoch_holds_every_clip_once_but_for_the_tail(
    view: View, seed: int, global_batch: int
) -> None:
    with loader_of(view, seed=seed, global_batch=global_batch, micro_batch=global_batch) as loader:
        (steps,) = loader.steps_per_epoch
        assert steps == 43 // global_batch
        for epoch in range(2):
            batches = list(itertools.islice(loader, steps))
            keys = [key for batch in batches for key in batch.keys]
            assert len(set(keys)) == len(keys) == 43 - 43 % global_batch
            assert set(keys) <= {f"clip{clip:05d}" for clip in range(45)}
            first = int(batches[0].samples[0])
            assert first == epoch * steps * global_batch


def test_samples_count_the_stream(view: View) -> None:
    batches = global_batches(view, 2, 2, steps=12)  # more than two epochs of 5
    samples = [row[0] for rows in batches for row in rows]
    assert samples == list(range(12 * GLOBAL_BATCH))


@pytest.mark.parametrize(("num_ranks", "micro_batch"), LAYOUTS[1:])
def test_any_layout_gives_the_same_global_batches(
    view: View, num_ranks: int, micro_batch: int
) -> None:
    expected = global_batches(view, 1, GLOBAL_BATCH, steps=7)
    assert global_batches(view, num_ranks, micro_batch, steps=7) == expected


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 11), st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS))
def test_resume_at_any_position_with_another_layout_continues_the_stream(
    view: View, position: int, before: tuple[int, int], after: tuple[int, int]
) -> None:
    expected = global_batches(view, 1, GLOBAL_BATCH, steps=14)
    num_ranks, micro_batch = before
    with loader_of(view, num_ranks=num_ranks, micro_batch=micro_batch) as loader:
        for _ in range(position * GLOBAL_BATCH // (num_ranks * micro_batch)):
            next(loader)
        state = loader.state_dict()
    assert state["samples_consumed"] == position * GLOBAL_BATCH
    found = global_batches(view, *after, steps=14 - position, state=state)
    assert found == expected[position:]


def test_state_counts_whole_global_batches_and_not_what_was_read_ahead(view: View) -> None:
    with loader_of(view, micro_batch=4) as loader:
        consumed = []
        for _ in range(5):
            next(loader)
            consumed.append(loader.state_dict()["samples_consumed"])
    assert consumed == [0, 8, 8, 16, 16]


def test_state_loaded_into_a_running_loader_moves_it(view: View) -> None:
    with loader_of(view) as loader:
        start = loader.state_dict()
        expected = rows_of(next(loader))
        next(loader)
        loader.load_state_dict(start)
        assert rows_of(next(loader)) == expected


@pytest.mark.parametrize("name", ["view_id", "plan_id", "seed", "global_batch"])
def test_state_of_another_stream_is_refused_by_name(view: View, name: str) -> None:
    with loader_of(view) as loader, pytest.raises(ResumeError, match=name):
        loader.load_state_dict({**loader.state_dict(), name: "other"})


@pytest.mark.parametrize("samples", [-8, 3, None, 8.0])
def test_impossible_position_is_refused(view: View, samples: Any) -> None:
    with loader_of(view) as loader, pytest.raises(ResumeError, match="samples_consumed"):
        loader.load_state_dict({**loader.state_dict(), "samples_consumed": samples})


def test_position_names_epoch_sample_and_next_keys(view: View) -> None:
    with loader_of(view) as loader:
        loader.load_state_dict({**loader.state_dict(), "samples_consumed": 56})
        position = loader.position()
        assert position.startswith("epoch 1, sample 16 of 40; next ")
        assert position.endswith(", ".join(next(loader).keys[:3]))


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


def test_text_is_padded_with_zeros_to_a_multiple_of_four(dataset: Dataset, view: View) -> None:
    with loader_of(view) as loader:
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


def test_batches_kept_by_the_caller_are_not_overwritten(view: View) -> None:
    with loader_of(view) as loader:
        kept = list(itertools.islice(loader, 12))
    assert [rows_of(batch) for batch in kept] == global_batches(view, 1, GLOBAL_BATCH, steps=12)


def test_memory_of_batches_let_go_is_used_again(view: View) -> None:
    with loader_of(view) as loader:
        places = set()
        for batch in itertools.islice(loader, 40):
            places.add(batch.video.data_ptr())
            del batch
    assert len(places) <= view.config.prefetch_steps + 2


def test_checks_and_threads_do_not_change_the_stream(dataset: Dataset, view: View) -> None:
    other = view_of(dataset, verify_crc=False, read_threads=5, prefetch_steps=7)
    found = global_batches(other, 1, GLOBAL_BATCH, steps=6)
    assert found == global_batches(view, 1, GLOBAL_BATCH, steps=6)


def test_one_row_shards_are_read(tmp_path: Path) -> None:
    dataset = Dataset(tmp_path / "shards", num_clips=9, shard_size=1, captions_per_shard=1).build()
    with loader_of(view_of(dataset, window_shards=1), global_batch=9, micro_batch=3) as loader:
        keys = [key for batch in itertools.islice(loader, 3) for key in batch.keys]
    assert sorted(keys) == [dataset.key(clip) for clip in range(9)]


def test_close_ends_threads_and_closes_tars(view: View) -> None:
    def open_tars() -> int:
        links = (path for path in Path("/proc/self/fd").iterdir() if path.exists())
        return sum(path.resolve().suffix == ".tar" for path in links)

    before = threading.active_count(), open_tars()
    with loader_of(view) as loader:
        next(loader)
        assert open_tars() > before[1]
    assert (threading.active_count(), open_tars()) == before


def test_fewer_clips_than_a_batch_are_repeated(view: View) -> None:
    with loader_of(view, global_batch=86, micro_batch=86) as loader:
        counts = Counter(next(loader).keys)
    assert len(counts) == 43
    assert set(counts.values()) == {2}


# Damage that happened after the view was opened, or that its checks of sizes can't see.


def damage(dataset: Dataset, clip: int, modality: str, is_cut: bool) -> Path:
    """Flip one bit of a clip's payload, or cut the tar inside it."""
    view = view_of(dataset)
    place = view.clips.keys.index(dataset.key(clip))
    path = view.opened[modality].tar_path(clip // dataset.shard_size)
    data = bytearray(path.read_bytes())
    middle = int(view.index[modality][place]["offset"]) + 100
    data[middle] ^= 16
    path.write_bytes(data[:middle] if is_cut else data)
    return path


@pytest.mark.parametrize("modality", ["video", "audio"])
def test_flipped_bit_is_found_and_named_at_every_call(tmp_path: Path, modality: str) -> None:
    dataset = Dataset(tmp_path / "shards", num_clips=8).build()
    path = damage(dataset, 5, modality, is_cut=False)
    pattern = rf"{path} row 5 \(clip00005\): crc32c is [0-9a-f]{{8}}, expected [0-9a-f]{{8}}"
    with loader_of(view_of(dataset), micro_batch=8) as loader:
        for _ in range(2):
            with pytest.raises(FormatError, match=pattern):
                next(loader)
        assert loader.state_dict()["samples_consumed"] == 0


@pytest.mark.parametrize("verify_crc", [True, False])
def test_tar_cut_short_while_training_is_named(tmp_path: Path, verify_crc: bool) -> None:
    dataset = Dataset(tmp_path / "shards", num_clips=8).build()
    view = view_of(dataset, verify_crc=verify_crc, seconds=10.0)
    path = damage(dataset, 7, "video", is_cut=True)
    with loader_of(view) as loader, pytest.raises(FormatError, match=f"{path} ends at byte"):
        next(loader)


def test_flipped_bit_in_a_caption_is_found(tmp_path: Path) -> None:
    dataset = Dataset(tmp_path / "shards", num_clips=8).build()
    view = view_of(dataset)
    column = view.opened["text"]
    path, record = column.tar_path(1), column.index(1, 3)[0]
    data = bytearray(path.read_bytes())
    data[int(record["offset"])] ^= 1
    path.write_bytes(data)
    with loader_of(view) as loader, pytest.raises(FormatError, match=r"row 0 .caption 3"):
        next(loader)
