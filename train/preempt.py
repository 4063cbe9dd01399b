"""Requests to stop early: a signal to any rank, or a file ``stop`` in the run's folder.

A handler only sets a flag. The ranks agree on it between two steps, since the `deepspeed`
launcher signals them one after another, seconds apart, and then save together.
"""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Whether this rank has been asked to stop.

    Args:
        run_dir: where the file ``stop`` may appear.
        watch_file: look for it; one rank of a run is enough.

    Attributes:
        reason: what asked, or None.
    """

    def __init__(self, run_dir: Path, watch_file: bool) -> None:
        self.stop_file = run_dir / "stop"
        self.watch_file = watch_file
        self.reason: str | None = None

    def listen(self) -> None:
        """Take over SIGTERM, SIGUSR1 and SIGINT; main thread only."""
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        # The first tells why: the launcher passes Ctrl-C on as SIGTERM.
        self.reason = self.reason or signal.Signals(number).name

    def is_set(self) -> bool:
        """Return whether a signal came or the stop file is there."""
        if self.reason is None and self.watch_file and self.stop_file.exists():
            self.reason = f"the file {self.stop_file}"
        return self.reason is not None

    def clear_file(self) -> None:
        """Remove the stop file, so that the same command continues the run."""
        self.stop_file.unlink(missing_ok=True)
