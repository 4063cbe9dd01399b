"""Counting the news of a run: sums, rates between two times, what is in flight and left to do."""

from collections import Counter

from pipeline.jobs import ShardUpdate
from pipeline.tally import Rates, Tally, rates_between
from tests.pipeline.run_reports import A, B, progress


def test_bytes_in_flight_are_those_of_all_cells_now():
    run = Tally(40, 4, 0.0)
    for cell, task, count in (("n/0", A, 5), ("n/1", B, 7), ("n/0", ("clips", 2), 6)):
        run.update(ShardUpdate("progress", cell, task, bytes_in_flight=count), 1.0)
    assert run.bytes_in_flight == 13
    run.set_cells(1, 1, 2.0)  # whichever was lost, the other one says soon what it holds
    run.update(ShardUpdate("alive", "n/1", bytes_in_flight=8), 3.0)
    assert run.bytes_in_flight == 8


def test_a_run_of_captions_only_has_a_time_left():
    run = Tally(0, 10, 0.0)
    before = run.point(0.0)
    run.update(ShardUpdate("committed", "n/0", ("text", 0)), 5.0)
    assert run.eta_s(rates_between(before, run.point(5.0))) == 45.0
    assert run.eta_s(rates_between(before, before)) is None


def test_there_is_no_cell_before_one_is_told_of():
    run = Tally(40, 4, 0.0)
    assert (run.num_cells, run.most_cells) == (0, 0)
    run.set_cells(1, 2, 1.0)
    run.set_cells(0, 0, 2.0)
    assert (run.num_cells, run.most_cells, run.most_decoders) == (0, 1, 2)


def test_cells_have_time_from_when_they_are_alive():
    run = Tally(40, 4, 0.0)
    run.set_cells(0, 0, 5.0)
    assert run.ready_s is None
    run.set_cells(2, 6, 30.0)
    run.update(ShardUpdate("started", "n/0", A), 35.0)  # decoders have begun long ago
    run.set_cells(1, 3, 40.0)
    assert run.ready_s == 30.0
    point = run.point(50.0)
    assert (point.cell_s, point.decoder_s) == (2 * 10 + 10, 6 * 10 + 3 * 10)


def test_rates_are_differences_over_time():
    run = Tally(100, 4, 0.0)
    run.set_cells(2, 8, 0.0)
    run.update(ShardUpdate("started", "n/0", A), 0.0)
    run.update(progress(A, ok=5, media_s=50.0, decode_s=9.0, encode_s=3.0), 2.0)
    before = run.point(10.0)
    run.update(progress(A, ok=20, media_s=200.0, decode_s=40.0, encode_s=5.0), 12.0)
    run.update(ShardUpdate("committed", "n/0", A), 15.0)
    assert rates_between(before, run.point(20.0)) == Rates(2.0, 0.1, 20.0, 0.5, 0.25)


def test_a_loss_lowers_what_is_done_not_below_zero_and_not_what_was_busy():
    run = Tally(100, 4, 0.0)
    run.set_cells(1, 1, 0.0)
    run.update(progress(A, ok=30, media_s=300.0, encode_s=1.0), 0.0)
    before = run.point(0.0)
    run.update(progress(B, ok=5, media_s=50.0, encode_s=4.0), 5.0)
    run.take_back(A)
    rates = rates_between(before, run.point(10.0))
    assert (rates.clips_per_s, rates.media_h_per_h, rates.encode_busy) == (0.0, 0.0, 0.4)
    assert run.done.statuses == Counter(ok=5)


def test_nobody_is_busy_for_more_than_all_of_the_time():
    run = Tally(100, 4, 0.0)
    run.set_cells(1, 2, 0.0)
    run.update(ShardUpdate("started", "n/0", A), 0.0)
    before = run.point(0.0)
    run.update(progress(A, ok=1, decode_s=90.0, encode_s=50.0), 1.0)  # long clips came to an end
    rates = rates_between(before, run.point(10.0))
    assert (rates.decode_busy, rates.encode_busy) == (1.0, 1.0)
