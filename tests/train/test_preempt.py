import os
import signal

import pytest

from train.preempt import SIGNALS, StopRequest


@pytest.fixture(autouse=True)
def restored_handlers():
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_requests_a_stop_and_does_not_kill(tmp_path, number):
    stop = StopRequest(tmp_path, watch_file=True)
    stop.listen()
    assert not stop.is_set()
    os.kill(os.getpid(), number)
    assert stop.is_set()
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.reason == signal.Signals(number).name


def test_stop_file_is_seen_by_the_rank_that_watches_and_goes_when_cleared(tmp_path):
    watching, other = StopRequest(tmp_path, watch_file=True), StopRequest(tmp_path, False)
    (tmp_path / "stop").touch()
    assert watching.is_set()
    assert not other.is_set()
    watching.clear_file()
    assert not StopRequest(tmp_path, watch_file=True).is_set()
