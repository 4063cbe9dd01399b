"""Simulated clusters take as long as can be computed where that can be computed."""

import json
import math
from dataclasses import replace

import pytest

from tools import simulate_cluster
from tools.simulated_cells import MAX_ATTEMPTS, CellModel, simulate

# Seconds are powers of two, so that sums are exact.
CELL = CellModel(num_decoders=4, decode_s=0.5, encode_s=0.0625, window_clips=64)


def test_a_cell_bound_by_decoding_takes_its_clips_over_its_decoders_rate():
    started = replace(CELL, start_s=8.0)
    outcome = simulate(started, 1, 1024, 128, seed=0)
    assert outcome.num_clips == 1024
    assert outcome.seconds == 8.0 + 1024 * 0.5 / 4 + 4 * 0.0625  # the last 4 come together
    assert outcome.busy["decoders"] == pytest.approx(1024 * 0.5 / 4 / outcome.seconds)


def test_a_cell_bound_by_encoding_takes_its_clips_over_its_encoders_rate():
    outcome = simulate(replace(CELL, encode_s=0.25), 1, 1024, 128, seed=0)
    assert outcome.seconds == 0.5 + 1024 * 0.25  # but for the first clip, it never waits
    assert outcome.busy["encoders"] == pytest.approx(1, abs=0.002)


def test_a_window_of_one_clip_makes_stages_wait_for_each_other():
    outcome = simulate(replace(CELL, window_clips=1), 1, 256, 64, seed=0)
    assert outcome.seconds == 256 * (0.5 + 0.0625)


def test_commits_are_hidden_but_for_the_last_unless_the_network_is_the_bound():
    few = replace(CELL, write_s=0.03125, commit_s=1.0)
    alone = simulate(CELL, 1, 1024, 128, seed=0)
    assert simulate(few, 1, 1024, 128, 0).seconds == alone.seconds + 128 * 0.03125 + 1.0
    slow = replace(CELL, write_s=1.0)
    first_shard_s = simulate(CELL, 1, 128, 128, 0).seconds
    assert simulate(slow, 1, 1024, 128, 0).seconds == first_shard_s + 1024 * 1.0


def test_cells_share_work_perfectly_where_shards_divide_evenly():
    one = simulate(CELL, 1, 64 * 32, 32, seed=0)
    eight = simulate(CELL, 8, 64 * 32, 32, seed=0)
    assert eight.seconds == pytest.approx(one.seconds / 8, rel=0.01)
    assert eight.num_clips == one.num_clips == 64 * 32


def test_the_last_shard_is_a_tail_that_other_cells_wait_for():
    # 9 shards for 8 cells: twice the time of one shard, in which 7 cells wait for one.
    shard_s = simulate(CELL, 1, 256, 256, 0).seconds
    outcome = simulate(CELL, 8, 9 * 256, 256, 0)
    assert outcome.seconds == pytest.approx(2 * shard_s, rel=0.02)
    assert outcome.tail_s == pytest.approx(shard_s, rel=0.02)
    small = simulate(CELL, 8, 9 * 256, 16, 0)
    assert small.seconds < 1.15 * 9 * shard_s / 8  # small shards have a small tail


def test_spread_of_decode_times_costs_little_while_decoders_are_many():
    spread = replace(CELL, decode_cv=0.5)
    mean = simulate(CELL, 1, 8192, 512, 0).seconds
    assert simulate(spread, 1, 8192, 512, 0).seconds == pytest.approx(mean, rel=0.05)
    assert simulate(spread, 1, 8192, 512, 0) == simulate(spread, 1, 8192, 512, 0)
    assert simulate(spread, 1, 8192, 512, 0) != simulate(spread, 1, 8192, 512, 1)


def test_lost_cells_lose_time_but_no_clips():
    shaky = replace(CELL, fault_every_s=200.0, start_s=4.0, detect_s=8.0)
    sound, faulty = simulate(CELL, 4, 16384, 64, 0), simulate(shaky, 4, 16384, 64, 0)
    assert faulty.num_faults > 3 and faulty.num_given_up == 0
    assert faulty.num_clips == 16384
    lost_s = faulty.num_faults * (12 + 16) / 4  # a restart and at most two shards, by four cells
    assert sound.seconds + 4 < faulty.seconds < sound.seconds + lost_s + 4 + 16


def test_shards_longer_than_cells_live_are_given_up():
    hopeless = replace(CELL, fault_every_s=1.0, start_s=100.0)
    outcome = simulate(hopeless, 2, 256, 128, 0)
    assert (outcome.num_clips, outcome.num_given_up) == (0, 2)
    assert outcome.num_faults == 2 * MAX_ATTEMPTS


def test_work_without_end_stops_at_the_horizon():
    day = simulate(CELL, 2, None, 32, 0, horizon_s=1000.0)
    assert day.num_clips == pytest.approx(1000 * 2 * 4 / 0.5, rel=0.01)
    assert day.seconds == 1000


def test_the_table_states_rates_and_assumptions(capsys, tmp_path):
    given = ["--clips", "4096", "--gpus", "1,2", "--json", "--fault-hours", "0"]
    assert simulate_cluster.main([*given, "--decode-clips-per-s", "2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["cell"]["num_decoders"] == 5  # 10 clips/s of the GPU, 2 of a decoder
    assert [row["gpus"] for row in found["clusters"]] == [1, 2]
    assert all(row["bound"] == "decoding" for row in found["clusters"])  # reading comes on top
    one, two = (row["hours"] for row in found["clusters"])
    assert 1.8 < one / two < 2

    measured = {"decode_clips_per_s": 2.0, "decode_cv": 0.1, "window_clips": 9, "encoder_gpus": 1}
    file = tmp_path / "calibration.json"
    file.write_text(json.dumps({**measured, "encode_clips_per_s": {"all": 4.0}}))
    assert simulate_cluster.main([*given[:-3], "--calibration", str(file)]) == 0
    text = capsys.readouterr().out
    assert "encode-clips-per-s 4\n" in text and "window-clips 9\n" in text
    assert "fault-hours 200 " in text and "\n   2 " in text
    assert "1 encoder and 2 decoders" in text

    file.write_text("{}")
    assert simulate_cluster.main(["--calibration", str(file)]) == 1
    assert "lacks decode_clips_per_s" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", ["--clips=0", "--gpus=0", "--decoders=0", "--commit-s=-1"])
def test_impossible_clusters_are_refused(wrong):
    with pytest.raises(SystemExit):
        simulate_cluster.main(["--decode-clips-per-s=1", wrong])


def test_too_few_cores_bound_a_gpu():
    options = simulate_cluster.parse(["--decode-clips-per-s=1", "--cpus-per-gpu=4"])
    model = simulate_cluster.cell_model(options, {"decode_clips_per_s": 1.0})
    assert model.num_decoders == 3 and simulate_cluster.bound(model) == "decoding"
    assert simulate_cluster.alone(model) == pytest.approx(0.3, rel=0.03)
    assert math.isclose(1 / model.encode_s, 10.0)
