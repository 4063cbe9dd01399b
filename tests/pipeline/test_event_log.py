"""The log of a run: whole lines, on a full disk and on an object store that comes and goes."""

import threading
from pathlib import Path

import pytest

from pipeline import event_log
from pipeline.data_root import open_root
from pipeline.event_log import EventLog, read_events
from pipeline.files import NoRoomError
from pipeline.format import FormatError


@pytest.fixture
def store(tmp_path):
    return open_root(f"memory://{tmp_path.name}")


def test_a_full_disk_is_named():
    log = EventLog(Path("/dev/full"), print)
    log.write("clip")
    for tried in (log.flush, lambda: log.write("clip", message="x" * 20_000), log.close):
        with pytest.raises(NoRoomError, match="no room to write /dev/full"):
            tried()


def uploads_of(store, monkeypatch, fail=0):
    """Let a log upload at every flush, and the first ``fail`` uploads fail; return the log."""
    monkeypatch.setattr(event_log, "UPLOAD_INTERVAL_S", 0.0)
    monkeypatch.setattr(event_log, "UPLOAD_SHARE", float("inf"))
    path = store / "runs" / "run-1" / "events.jsonl"
    log, upload = EventLog(path, print), type(path).upload
    failures = iter(range(fail))

    def sometimes(self, file):
        if next(failures, None) is not None:
            raise OSError(5, "the store is away, asked as //name:secret@host")
        upload(self, file)

    monkeypatch.setattr(type(path), "upload", sometimes)
    return log, path


def test_events_are_on_the_object_store_while_the_run_goes_on(store, monkeypatch):
    log, path = uploads_of(store, monkeypatch)
    for number in range(3):
        log.write("clip", key=str(number))
        log.flush()
        log._uploaded.result(timeout=60)
        assert [event["key"] for event in read_events(path)] == [str(n) for n in range(number + 1)]
    log.close()


def test_one_upload_at_a_time_and_nobody_waits_for_it(store, monkeypatch):
    log, path = uploads_of(store, monkeypatch)
    upload, begun, may_end = type(path).upload, [], threading.Event()

    def slow(self, file):
        begun.append(self)
        assert may_end.wait(60)
        upload(self, file)

    monkeypatch.setattr(type(path), "upload", slow)
    for number in range(5):
        log.write("clip", key=str(number))
        log.flush()
    may_end.set()
    log.close()
    assert len(begun) == 2  # the first one and the last one
    assert len(list(read_events(path))) == 5


def test_an_upload_that_fails_is_told_without_secrets_and_made_up_for(store, monkeypatch, capsys):
    log, path = uploads_of(store, monkeypatch, fail=2)
    for number in range(3):
        log.write("clip", key=str(number))
        log.flush()
        log._uploaded.exception(timeout=60)
    log.close()
    assert len(list(read_events(path))) == 3
    told = capsys.readouterr().out
    assert told.count("the store is away") == 2 and "secret" not in told


def test_events_that_cannot_be_uploaded_in_the_end_are_an_error(store, monkeypatch):
    log, _ = uploads_of(store, monkeypatch, fail=9)
    with pytest.raises(OSError, match="the store is away"):
        log.close()


def test_damaged_events_are_named(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_text('{"event": "run"}\n{"event": \n')
    with pytest.raises(FormatError, match=r"events.jsonl line 2 is not JSON"):
        list(read_events(path))
