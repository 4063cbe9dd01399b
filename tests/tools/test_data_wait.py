"""The share of waiting is that of a real run, and a run that fails is told."""

import re
import sys

import pytest

from tools import data_wait

pytestmark = pytest.mark.slow  # both start `deepspeed`


def test_the_share_of_a_real_run_is_printed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["data_wait", "--steps", "4", "checkpoint.every_steps=100"])
    data_wait.main()
    printed = capsys.readouterr().out
    found = re.fullmatch(
        r"4 steps of [\d.]+ s on 2 ranks waited for data ([\d.]+)% of the time, ([\d.]+)% in the "
        r"worst window\n",
        printed,
    )
    assert found
    share, worst = (float(value) for value in found.groups())
    assert 0 <= share <= worst <= 100


def test_a_run_that_fails_is_told_with_its_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["data_wait", "--data", str(tmp_path), "stepz=1"])
    with pytest.raises(SystemExit, match=r"unknown setting 'stepz'; did you mean 'steps'\?"):
        data_wait.main()
