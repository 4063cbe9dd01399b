import json
import os
from pathlib import Path

import pytest

from pipeline.files import write_json
from train.checkpoint import STATE_VERSION, load_model_for_sampling, read_state
from train.checkpoint_folders import (
    MARKER,
    checkpoint_folder,
    find_checkpoints,
    mark_complete,
    newest_checkpoint,
    prune,
)
from train.errors import ResumeError
from train.identity import check_continues

VIEW = {
    "view_id": "a",
    "settings": {"data.video": "video@dct-1"},
    "data": {"data": {"root": "shards", "usable clips": 39}},
}
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


def test_newest_complete_checkpoint_is_chosen_and_broken_off_ones_are_named(tmp_path):
    assert newest_checkpoint(tmp_path) is None
    write_checkpoint(tmp_path, 1, complete=False)
    assert newest_checkpoint(tmp_path) is None
    older, newer = (write_checkpoint(tmp_path, step) for step in (2, 10))
    killed = write_checkpoint(tmp_path, 12, complete=False)
    assert newest_checkpoint(tmp_path) == newer
    found = find_checkpoints(tmp_path)
    assert found.complete == [older, newer]
    assert found.broken_off == [checkpoint_folder(tmp_path, 1), killed]
    assert found.damaged == {}


SHARD = "zero_pp_rank_1_mp_rank_00_optim_states.pt"


def cut(folder):
    (folder / SHARD).write_bytes(b"opt")
    return f"{folder / SHARD} has 3 bytes, expected 9"


def lose(folder):
    (folder / SHARD).unlink()
    return f"{folder / SHARD} is missing"


def edit(folder):
    path = folder / "state.json"
    path.write_bytes(path.read_bytes().replace(b"version", b"Version"))
    return f"{path} has SHA-256 .*: it was changed"


def grow(folder):
    path = folder / "state.json"
    path.write_bytes(path.read_bytes() + b"\n")
    return f"{path} has .* bytes, expected"


def spoil(folder):
    (folder / MARKER).write_text("{")
    return f"{folder / MARKER} is not as it was written"


damages = pytest.mark.parametrize("damage", [cut, lose, edit, grow, spoil])


@damages
def test_a_run_does_not_go_on_behind_a_damaged_checkpoint_nor_remove_it(tmp_path, damage):
    older, newer = (write_checkpoint(tmp_path, step) for step in (1, 2))
    expected = damage(newer)
    with pytest.raises(ResumeError, match=expected) as caught:
        newest_checkpoint(tmp_path)
    assert f"remove {newer} to go on from step_00000001;" in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(ResumeError, match=expected):
        load_model_for_sampling(tmp_path)
    with pytest.raises(ResumeError, match=f"{expected}.*name another"):
        load_model_for_sampling(newer)
    write_checkpoint(tmp_path, 3)
    prune(tmp_path, keep_last=1)
    assert (newer / MARKER).exists() and not older.exists()
    # It is in nobody's way any more.
    assert newest_checkpoint(tmp_path) == checkpoint_folder(tmp_path, 3)
    assert list(find_checkpoints(tmp_path).damaged) == [newer]


@damages
def test_a_run_whose_only_checkpoints_are_damaged_does_not_start_at_step_0(tmp_path, damage):
    first, last = (write_checkpoint(tmp_path, step) for step in (1, 3))
    write_checkpoint(tmp_path, 2, complete=False)
    damage(first)
    with pytest.raises(ResumeError, match=damage(last)) as caught:
        newest_checkpoint(tmp_path)
    assert f"remove {first} and {last} to start again from step 0; or" in str(caught.value)


def test_a_checkpoint_without_every_rank_s_file_is_never_marked(tmp_path):
    folder = write_checkpoint(tmp_path, 1, complete=False)
    (folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(ResumeError, match=r"1 files .*optim_states.pt, expected 2"):
        mark_complete(folder, num_ranks=2, has_shards=True)
    assert newest_checkpoint(tmp_path) is None


def test_prune_keeps_the_newest_complete_ones_and_what_is_newer(tmp_path):
    for step in (1, 2, 4, 6):
        write_checkpoint(tmp_path, step)
    for step in (3, 5):
        write_checkpoint(tmp_path, step, complete=False)
    being_written = write_checkpoint(tmp_path, 7, complete=False)
    foreign = tmp_path / "checkpoints" / "step_4_notes"
    foreign.mkdir()
    prune(tmp_path, keep_last=2)
    found = find_checkpoints(tmp_path)
    assert [folder.name for folder in found.complete] == ["step_00000004", "step_00000006"]
    assert found.broken_off == [being_written]
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
        ({"view": {**VIEW, "view_id": "b"}}, "view_id was 'a', is now 'b'"),
        (
            {"view": {**VIEW, "view_id": "b", "settings": {"data.video": "video@dct-2"}}},
            "data.video was 'video@dct-1', is now 'video@dct-2'",
        ),
    ],
)
def test_a_changed_run_is_refused_with_the_field_and_both_values(tmp_path, change, expected):
    with pytest.raises(ResumeError, match=expected) as caught:
        check_continues(tmp_path, {"run": RUN, "layout": LAYOUT}, {**RUN, **change}, LAYOUT)
    assert str(caught.value).count(", is now ") == 1


def test_another_number_of_ranks_is_refused_with_the_number_that_wrote_it(tmp_path):
    with pytest.raises(ResumeError, match=r"written by 2 ranks .* num_ranks was 2, is now 3"):
        state = {"run": RUN, "layout": LAYOUT}
        check_continues(tmp_path, state, RUN, {**LAYOUT, "num_ranks": 3})


def test_a_checkpoint_of_an_older_version_is_refused_by_its_version_and_not_as_damaged(tmp_path):
    folder = write_checkpoint(tmp_path, 1)
    write_json(folder / "state.json", {"version": 2})
    files = json.loads((folder / MARKER).read_text())["files"]
    files["state.json"] = (folder / "state.json").stat().st_size
    write_json(folder / MARKER, {"files": files})
    assert newest_checkpoint(tmp_path) == folder
    with pytest.raises(ResumeError, match=f"version 2, this program reads {STATE_VERSION}"):
        load_model_for_sampling(tmp_path)


def test_state_of_another_version_is_refused(tmp_path):
    write_json(tmp_path / "state.json", {"version": STATE_VERSION + 1})
    with pytest.raises(ResumeError, match=f"version {STATE_VERSION + 1}"):
        read_state(tmp_path)


def test_sampling_from_a_folder_without_checkpoint_says_what_to_name(tmp_path):
    with pytest.raises(ResumeError, match="no complete checkpoint"):
        load_model_for_sampling(tmp_path)
