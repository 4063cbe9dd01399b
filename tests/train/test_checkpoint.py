import json
import os
from pathlib import Path

import pytest

from pipeline.files import write_json
from train.checkpoint import (
    MARKER,
    STATE_VERSION,
    checkpoint_folder,
    find_checkpoints,
    latest_complete,
    load_model_for_sampling,
    mark_complete,
    prune,
    read_state,
)
from train.errors import ResumeError
from train.identity import check_continues

VIEW = {"view_id": "a", "columns": {"0": {"video": "video@dct-1"}}}
RUN = {"seed": 0, "model": {"width": 32, "depth": 2}, "view": VIEW}
LAYOUT = {"num_ranks": 2, "zero_stage": 2, "precision": "fp32"}


def write_checkpoint(run_dir, step, complete=True):
    """The files of two ranks, without content that anyone could load."""
    folder = checkpoint_folder(run_dir, step)
    (folder / "ema").mkdir(parents=True)
    for rank in range(2):
        (folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").write_bytes(b"optimiser")
        (folder / "ema" / f"rank_{rank:05d}.safetensors").write_bytes(b"average")
    (folder / "mp_rank_00_model_states.pt").write_bytes(b"weights")
    write_json(folder / "state.json", {"version": STATE_VERSION, "step": step})
    if complete:
        mark_complete(folder, num_ranks=2, has_shards=True)
    return folder


def test_newest_complete_checkpoint_is_chosen_and_incomplete_ones_are_named(tmp_path):
    assert latest_complete(tmp_path) is None
    older, newer = (write_checkpoint(tmp_path, step) for step in (2, 10))
    killed = write_checkpoint(tmp_path, 12, complete=False)
    assert latest_complete(tmp_path) == newer
    assert find_checkpoints(tmp_path) == ([older, newer], [killed])


@pytest.mark.parametrize("damage", ["cut", "lost", "marker"])
def test_a_checkpoint_that_lost_bytes_is_not_chosen(tmp_path, damage):
    older, newer = (write_checkpoint(tmp_path, step) for step in (1, 2))
    shard = newer / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    if damage == "cut":
        shard.write_bytes(b"opt")
    elif damage == "lost":
        shard.unlink()
    else:
        (newer / MARKER).write_text("{")
    assert latest_complete(tmp_path) == older


def test_a_checkpoint_without_every_rank_s_file_is_never_marked(tmp_path):
    folder = write_checkpoint(tmp_path, 1, complete=False)
    (folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(ResumeError, match=r"1 files .*optim_states.pt, expected 2"):
        mark_complete(folder, num_ranks=2, has_shards=True)
    assert latest_complete(tmp_path) is None


def test_prune_keeps_the_newest_complete_ones_and_what_is_newer(tmp_path):
    for step in (1, 2, 4, 6):
        write_checkpoint(tmp_path, step)
    for step in (3, 5):
        write_checkpoint(tmp_path, step, complete=False)
    being_written = write_checkpoint(tmp_path, 7, complete=False)
    foreign = tmp_path / "checkpoints" / "step_4_notes"
    foreign.mkdir()
    prune(tmp_path, keep_last=2)
    complete, incomplete = find_checkpoints(tmp_path)
    assert [folder.name for folder in complete] == ["step_00000004", "step_00000006"]
    assert incomplete == [being_written]
    assert foreign.exists()


def test_files_are_on_the_disk_before_complete_vouches_for_them(tmp_path, monkeypatch):
    folder = write_checkpoint(tmp_path, 1, complete=False)
    synced, sync = [], os.fsync

    def spy(descriptor):
        synced.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        assert not (folder / MARKER).exists() or synced[-1] == str(folder)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", spy)
    mark_complete(folder, num_ranks=2, has_shards=True)
    listed = json.loads((folder / MARKER).read_text())["files"]
    assert {str(folder / name) for name in listed} <= set(synced)
    assert {str(folder), str(folder / "ema"), str(folder.parent)} <= set(synced)


def test_same_run_continues(tmp_path):
    check_continues(tmp_path, {"run": RUN, "layout": LAYOUT}, RUN, LAYOUT)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"model": {"width": 64, "depth": 2}}, "model.width was 32, is now 64"),
        ({"seed": 5}, "seed was 0, is now 5"),
        ({"view": {**VIEW, "view_id": "b"}}, "view.view_id was 'a', is now 'b'"),
        (
            {"view": {**VIEW, "columns": {"0": {"video": "video@dct-2"}}}},
            "view.columns.0.video was 'video@dct-1', is now 'video@dct-2'",
        ),
    ],
)
def test_a_changed_run_is_refused_with_the_field_and_both_values(tmp_path, change, expected):
    with pytest.raises(ResumeError, match=expected) as caught:
        check_continues(tmp_path, {"run": RUN, "layout": LAYOUT}, {**RUN, **change}, LAYOUT)
    assert str(caught.value).count("was") == 1


def test_another_number_of_ranks_is_refused_with_the_number_that_wrote_it(tmp_path):
    with pytest.raises(ResumeError, match=r"written by 2 ranks .* num_ranks was 2, is now 3"):
        state = {"run": RUN, "layout": LAYOUT}
        check_continues(tmp_path, state, RUN, {**LAYOUT, "num_ranks": 3})


def test_state_of_another_version_is_refused(tmp_path):
    write_json(tmp_path / "state.json", {"version": STATE_VERSION + 1})
    with pytest.raises(ResumeError, match=f"version {STATE_VERSION + 1}"):
        read_state(tmp_path)


def test_sampling_from_a_folder_without_checkpoint_says_what_to_name(tmp_path):
    with pytest.raises(ResumeError, match="no complete checkpoint"):
        load_model_for_sampling(tmp_path)
