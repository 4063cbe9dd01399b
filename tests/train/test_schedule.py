import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.schedule import ema_decay, learning_rate


@given(st.integers(0, 50), st.integers(51, 500))
def test_cosine_rises_to_the_peak_and_falls_to_zero(warmup_steps, steps):
    rates = [
        learning_rate(step, peak=2.0, warmup_steps=warmup_steps, steps=steps, shape="cosine")
        for step in range(steps + 1)
    ]
    assert rates[0] > 0
    assert rates[warmup_steps] == max(rates) == 2.0
    assert rates[:warmup_steps] == sorted(rates[:warmup_steps])
    assert rates[warmup_steps:] == sorted(rates[warmup_steps:], reverse=True)
    assert rates[steps] == pytest.approx(0)


@given(st.integers(0, 50), st.integers(0, 500))
def test_constant_schedule_does_not_depend_on_the_length_of_the_run(warmup_steps, step):
    rates = {
        learning_rate(step, peak=1.0, warmup_steps=warmup_steps, steps=steps, shape="constant")
        for steps in (600, 1000)
    }
    assert len(rates) == 1
    assert step < warmup_steps or rates == {1.0}


@given(st.integers(0, 10**7), st.floats(0, 0.99999))
def test_ema_decay_warms_up_to_its_limit(step, limit):
    assert ema_decay(step, limit) <= ema_decay(step + 1, limit) <= limit
    assert ema_decay(0, limit) <= 0.1
    assert ema_decay(10**9, limit) == limit
