"""Two real ranks: what fails on one of them ends all, with one message."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline import settings
from tests.train.columns import Dataset
from tests.train.launch import spawn
from tests.train.test_ema import build
from train.config import TrainConfig
from train.engine import join_ranks
from train.errors import ResumeError
from train.ranks import AgreedError, Verdict
from train.trainer import Trainer


def fail_on_one_rank(file: Path) -> None:
    ranks = join_ranks()
    mine = file if ranks.rank == 0 else file / "below"
    with pytest.raises(AgreedError, match=r"^rank 1: .*Not a directory.*below"):
        ranks.together(mine.read_text)
    with pytest.raises(AgreedError, match=r"^rank 0: .*File exists"):
        ranks.on_first(file.mkdir)
    assert ranks.together(file.read_text) == "here"
    mine = Verdict.GO if ranks.rank == 0 else Verdict.NO_DATA
    assert ranks.agree(mine) == Verdict.NO_DATA
    assert ranks.agree(Verdict.GO) == Verdict.GO


def start_where_the_same_path_is_another_data_set(folder: Path) -> None:
    ranks = join_ranks()
    os.chdir(folder / f"node{ranks.rank}")
    data = {"root": "shards", "seconds": 2, "cache_dir": str(folder / "cache")}
    model = {"video_patch": [1, 0, 0]}
    config = settings.build(
        TrainConfig,
        {"data": data, "model": model, "global_batch": 8, "micro_batch": 4},
        "test",
    )
    with pytest.raises(AgreedError, match=r"differ in data: rank 1 has \w{8}, the others \w{8}"):
        Trainer(config, ranks)


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


def test_a_rank_that_sees_another_data_set_is_named_before_the_first_step(tmp_path):
    for node, num_clips in enumerate((40, 48)):
        Dataset(tmp_path / f"node{node}" / "shards", num_clips=num_clips).build()
    spawn(start_where_the_same_path_is_another_data_set, 2, tmp_path)
