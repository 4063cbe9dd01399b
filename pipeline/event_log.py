"""events.jsonl of a run: one JSON object a line, appended while the run goes on.

On an object store nothing can be appended: there the file grows in /tmp and goes up as a whole
from time to time, in a thread of its own, so that the driver never waits for it.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pipeline.files import is_local, naming_a_full_disk
from pipeline.format import FormatError
from pipeline.storage import scrubbed

UPLOAD_INTERVAL_S = 60.0
# The file goes up whole every time: of a long run's time no more than this goes into uploads.
UPLOAD_SHARE = 0.05


class EventLog:
    """Writes events to ``path``, which is new; a run killed outright loses a minute's at most.

    Args:
        path: local, or on an object store.
        note: told of uploads that fail, and are tried again.
    """

    def __init__(self, path: Path, note: Callable[[str], None]) -> None:
        self._path, self._note = path, note
        self._is_local = is_local(path)
        if self._is_local:
            self._file = path.open("a", encoding="utf-8")
        else:
            self._file = tempfile.NamedTemporaryFile("w", encoding="utf-8", suffix=".jsonl")  # noqa: SIM115
            self._remote: Any = path
            self._uploader = ThreadPoolExecutor(1, "upload-events")
            self._uploaded: Future[None] = Future()
            self._uploaded.set_result(None)
            self._next_upload_s = time.monotonic() + UPLOAD_INTERVAL_S

    def write(self, event: str, **fields: Any) -> None:
        """Append an event; readers see it after ``flush``.

        Raises:
            NoRoomError: the disk is full.
        """
        record = {"time": round(time.time(), 3), "event": event, **fields}
        with naming_a_full_disk(Path(self._file.name)):
            self._file.write(json.dumps(record) + "\n")

    def flush(self) -> None:
        """Hand on what was written; upload it where that is due.

        Raises:
            NoRoomError: the disk is full.
        """
        self._flush_file()
        if not self._is_local:
            self._upload_if_due()

    def close(self) -> None:
        """Write the rest.

        Raises:
            NoRoomError: the disk is full.
            OSError: the object store does not take it.
        """
        try:
            self._flush_file()
            if not self._is_local:
                self._uploader.shutdown()
                with naming_a_full_disk(self._path), Path(self._file.name).open("rb") as file:
                    self._remote.upload(file)
        finally:
            with naming_a_full_disk(Path(self._file.name)):
                self._file.close()

    def _flush_file(self) -> None:
        with naming_a_full_disk(Path(self._file.name)):
            self._file.flush()

    def _upload_if_due(self) -> None:
        if time.monotonic() < self._next_upload_s or not self._uploaded.done():
            return
        if error := self._uploaded.exception():  # this upload, or that of close(), has it all
            self._note(f"{self._path}: {scrubbed(error)}; trying again")
        self._uploaded = self._uploader.submit(self._upload)

    def _upload(self) -> None:
        started_s = time.monotonic()
        try:
            with tempfile.TemporaryFile() as copy:  # the file itself grows meanwhile
                with Path(self._file.name).open("rb") as file:
                    shutil.copyfileobj(file, copy, 1 << 20)
                self._remote.upload(copy)
        finally:
            pause_s = max(UPLOAD_INTERVAL_S, (time.monotonic() - started_s) / UPLOAD_SHARE)
            self._next_upload_s = time.monotonic() + pause_s


def read_events(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the events of a run, one that is under way or was killed too.

    A last line that is cut off is left out, and so is a file that is not there yet.

    Raises:
        FormatError: a line is not JSON.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                yield json.loads(line)
            except ValueError as error:
                raise FormatError(
                    f"{path} line {number} is not JSON ({error}); remove that line"
                ) from None
