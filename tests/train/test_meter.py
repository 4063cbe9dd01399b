from dataclasses import dataclass

import pytest
import torch

from train import meter as meter_module
from train.engine import StepResult
from train.meter import Meter
from train.objective.flow import FlowLoss
from train.objective.tasks import task_by_name
from train.ranks import Ranks

T2AV, V2A = task_by_name("T2AV"), task_by_name("V2A")


@dataclass(frozen=True)
class WithTwin(Ranks):
    """A rank whose only peer went through the same, but waited ``twin_s`` seconds for data."""

    twin_s: float

    def sum(self, values):
        twin = values.clone()
        twin[-3:] = torch.tensor([0.0, self.twin_s, values[-1]])
        return values + twin


class Clock:
    """Seconds that pass only when told."""

    def __init__(self, monkeypatch):
        self.now_s = 100.0
        monkeypatch.setattr(meter_module.time, "perf_counter", lambda: self.now_s)


def loss(video, audio, counts, num_unserved=0.0):
    sums = torch.tensor([video, audio])
    total = sums.sum() / (max(counts) + num_unserved)
    return FlowLoss(total, sums, torch.tensor(counts), torch.tensor(num_unserved))


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def meter_with_twin(twin_s=0.0):
    return Meter(WithTwin(0, 2, torch.device("cpu"), twin_s), global_batch=8)


def take_step(meter, clock, seconds, waited_s=0.0):
    with meter.waiting():
        clock.now_s += waited_s
    clock.now_s += seconds - waited_s
    meter.add_step(StepResult(True, 1.0))


def test_losses_are_means_over_the_samples_where_they_count(clock):
    meter = meter_with_twin()
    meter.add_micro_batch(T2AV, loss(6.0, 2.0, [4.0, 2.0]), 4)
    meter.add_micro_batch(T2AV, loss(2.0, 2.0, [2.0, 2.0], num_unserved=2.0), 4)
    meter.add_micro_batch(V2A, loss(0.0, 0.0, [0.0, 0.0], num_unserved=4.0), 4)
    take_step(meter, clock, 1.0)
    found = meter.summary()
    assert found["loss/t2av/video"] == pytest.approx(8 / 6)
    assert found["loss/t2av/audio"] == pytest.approx(4 / 4)
    assert found["loss/t2av/total"] == pytest.approx(12 / 6)
    # Of this rank and its twin; nothing was learned of V2A, and no sample was left out of T2AV's.
    assert (found["unserved/t2av"], found["unserved/v2a"]) == (4, 8)
    assert not any(name.startswith(("loss/v2a", "unserved/a2v")) for name in found)


def test_waiting_is_the_share_of_the_rank_that_waited_longest(clock):
    meter = meter_with_twin(twin_s=0.5)
    take_step(meter, clock, seconds=2.0, waited_s=0.1)
    take_step(meter, clock, seconds=3.0, waited_s=0.1)
    assert meter.summary()["data_wait"] == pytest.approx(0.5 / 5)
    take_step(meter, clock, seconds=15.0, waited_s=3.0)
    assert meter.summary()["data_wait"] == pytest.approx(3 / 15)
    # Over the run this rank waited 3.2 s of 20 s, its twin 1 s.
    assert meter.data_wait == pytest.approx(3.2 / 20)


def test_time_before_the_meter_is_start_up_and_a_failed_wait_counts(clock):
    clock.now_s += 50
    meter = meter_with_twin()
    with pytest.raises(OSError), meter.waiting():
        clock.now_s += 1
        raise OSError("gone")
    take_step(meter, clock, seconds=3.0)
    assert meter.summary()["step_s"] == 4
    assert meter.data_wait == pytest.approx(1 / 4)


def test_replaced_payloads_are_told_where_there_are_any(clock):
    meter = meter_with_twin()
    for num_substituted, expected in ((0, None), (3, 6)):
        take_step(meter, clock, 1.0)
        assert meter.summary(num_substituted).get("substituted") == expected
