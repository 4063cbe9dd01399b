"""Two real ranks: what fails on one of them ends all, with one message."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.train.launch import spawn
from tests.train.test_ema import build
from train.engine import join_ranks
from train.errors import ResumeError
from train.ranks import AgreedError


def fail_on_one_rank(file: Path) -> None:
    ranks = join_ranks()
    mine = file if ranks.rank == 0 else file / "below"
    with pytest.raises(AgreedError, match=r"^rank 1: .*Not a directory.*below"):
        ranks.together(mine.read_text)
    with pytest.raises(AgreedError, match=r"^rank 0: .*File exists"):
        ranks.on_first(file.mkdir)
    assert ranks.together(file.read_text) == "here"


def load_nothing(folder: Path) -> None:
    engine = build(1, "fp32", join_ranks())
    with pytest.raises(ResumeError, match=r"can't read .*step_00000001.*checkpoint before"):
        engine.load(folder)


def test_a_file_that_one_rank_cannot_open_ends_all_ranks_with_its_number(tmp_path):
    file = tmp_path / "file"
    file.write_text("here")
    spawn(fail_on_one_rank, 2, file)


def test_a_checkpoint_without_weights_is_refused(tmp_path):
    folder = tmp_path / "step_00000001"
    folder.mkdir()
    spawn(load_nothing, 2, folder)
