"""The data set that is opened is a sound one; its figures are of what was really read."""

import json
import sys

import numpy as np
import pytest

from tools import bench_view
from tools.bench_view import GLOBAL_BATCH, be_a_rank, first_shards, middle_of, stream_over
from tools.made_up_view import MadeUpView, key_of, write_view
from train.data import DataConfig, open_view

NUM_ROWS, SHARD_SIZE = 20_010, 50  # the last shard has 10 rows


@pytest.fixture
def config(tmp_path):
    return DataConfig(root=str(tmp_path / "shards"), cache_dir=str(tmp_path / "cache"))


@pytest.fixture
def view(tmp_path):
    return MadeUpView(tmp_path / "shards", NUM_ROWS, SHARD_SIZE)


def test_what_is_made_up_is_what_is_opened(view, config):
    write_view(view, config, [0, 400])
    opened = open_view(config)
    (part,) = opened.parts
    assert [bucket.video.shape for bucket in opened.buckets] == [(16, 16, 32, 32), (16, 16, 32, 48)]
    np.testing.assert_array_equal(part.counts, view.counts)
    np.testing.assert_array_equal(part.first_rows, view.first_rows)
    for shard in (0, 7, 400):
        np.testing.assert_array_equal(part.buckets_of(shard), view.buckets_of(shard))
    rows = part.shard_rows(400)
    assert rows.keys == [key_of(row) for row in range(20_000, 20_010)]
    assert rows.has["video"].all() and rows.has["audio"].all()


def test_the_middle_is_behind_half_of_the_whole_batches_of_each_bucket(view, config):
    middle = middle_of(view)
    totals = view.counts.sum(axis=0)
    assert middle.places[0].consumed == tuple(totals // GLOBAL_BATCH // 2 * GLOBAL_BATCH)
    assert middle.samples == middle.steps * GLOBAL_BATCH > 0.4 * NUM_ROWS
    stream = stream_over(view, config)
    shards = first_shards(stream, middle, config)
    assert len(set(shards)) == len(shards) >= 96
    assert set(stream.shards_of(next(stream.batches(middle)))) <= set(shards)


def test_a_rank_opens_starts_and_goes_on(tmp_path, monkeypatch, capsys):
    command = ["bench_view", "--rows", str(NUM_ROWS), "--shard-size", str(SHARD_SIZE), "--json"]
    monkeypatch.setattr(sys, "argv", [*command, "--folder", str(tmp_path)])
    bench_view.main()
    figures = json.loads(capsys.readouterr().out)
    assert figures["shards"] == 401
    assert len(figures["stages"]) == 5
    known_s = sum(stage["seconds"] for stage in figures["stages"][1:])
    assert 0 < known_s < figures["wall_s"]
    peaks = [stage["peak_rss_mb"] for stage in figures["stages"]]
    assert peaks == sorted(peaks)
    assert list(tmp_path.iterdir()) == []  # nothing is left
    assert "first micro-batch, middle of the epoch" in bench_view.as_text(figures)


def test_other_rows_than_expected_are_no_figure(view, config, tmp_path):
    stream = stream_over(view, config)
    start = stream.start()
    write_view(view, config, first_shards(stream, start, config))
    settings = {"root": config.root, "cache_dir": config.cache_dir}
    starts = [{"cursor": start.to_json(), "keys": [key_of(0)] * 4}]
    task = tmp_path / "task.json"
    task.write_text(json.dumps({"config": settings, "starts": starts * 2}))
    with pytest.raises(SystemExit, match=r"start: read .*, expected \['clip"):
        be_a_rank(task)
