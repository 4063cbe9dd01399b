"""However a command ends, it says so in one line."""

import errno
import io
import sys

import pytest

from pipeline import sweep
from pipeline.files import NoRoomError
from pipeline.format import FormatError
from pipeline.settings import ConfigError
from pipeline.sweep import command_parser, one_line_errors, progress_bar


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (FormatError("plan.json is damaged"), "error: plan.json is damaged"),
        (ConfigError("no such codec"), "error: no such codec"),
        (NoRoomError("no room"), "error: no room"),
        (OSError(errno.EACCES, "Permission denied", "/x"), "error: /x: Permission denied"),
        (OSError(errno.EIO, "timed out", "s3://b/x"), "error: s3://b/x: timed out"),
        (
            OSError("at https://key:hush@host/\nsecond line"),
            "error: OSError: at https://host/",
        ),
    ],
)
def test_expected_errors_are_one_line(error, line):
    with pytest.raises(SystemExit) as end, one_line_errors("nothing was changed"):
        raise error
    assert end.value.code == line


def test_interruption_is_told_as_shells_do(capsys):
    with pytest.raises(SystemExit) as end, one_line_errors("nothing was changed"):
        raise KeyboardInterrupt
    assert end.value.code == 130
    assert capsys.readouterr().err == "\nstopped; nothing was changed\n"


def test_mistakes_in_the_program_are_not_hidden():
    with pytest.raises(KeyError), one_line_errors("nothing was changed"):
        raise KeyError


def test_commands_take_a_data_set_and_json():
    arguments = command_parser("status", "…").parse_args(["s3://b/x", "--json"])
    assert arguments.dir == "s3://b/x" and arguments.json


def test_a_log_gets_a_line_now_and_then_and_one_at_the_end(monkeypatch):
    log, now = io.StringIO(), [0.0]
    monkeypatch.setattr(sys, "stderr", log)
    monkeypatch.setattr(sweep.time, "monotonic", lambda: now[0])
    with progress_bar(2000, "shard") as bar:
        for _ in range(25):
            now[0] += 1
            bar.update(80)
    assert log.getvalue().splitlines() == [
        "800 of 2,000 shards, 0:10",
        "1,600 of 2,000 shards, 0:20",
        "2,000 of 2,000 shards, 0:25",
    ]


def test_a_log_of_what_is_quick_has_no_progress(monkeypatch):
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    with progress_bar(3, "shard") as bar:
        bar.update(3)
    assert log.getvalue() == ""
