"""Disks and networks fail for moments: reading is tried again for a while, then stops clearly."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

from pipeline.format import FormatError

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 2.0

Result = TypeVar("Result")


class LoaderClosed(Exception):  # noqa: N818 (no error: it ends what waits)
    """The loader was closed, so that nobody waits for this any more."""


class Patience:
    """Tries again what fails with an `OSError`.

    Args:
        retry_s: seconds from the first failure on for which it is tried again.
        closing: ends all waiting.
    """

    def __init__(self, retry_s: float, closing: threading.Event) -> None:
        self._retry_s, self._closing = retry_s, closing

    def call(self, what: object, call: Callable[[], Result]) -> Result:
        """Return what ``call`` returns.

        Args:
            what: is read, for the message: a path.
            call: reads.

        Raises:
            FormatError: it failed for ``retry_s``.
            LoaderClosed: the loader was closed meanwhile.
        """
        give_up, pause_s = time.monotonic() + self._retry_s, FIRST_PAUSE_S
        while True:
            try:
                return call()
            except OSError as error:
                if self._closing.is_set():
                    raise LoaderClosed from None
                if time.monotonic() >= give_up:
                    reason = error.strerror or error
                    if error.filename and str(error.filename) != str(what):
                        reason = f"{error.filename}: {reason}"
                    raise FormatError(
                        f"{what} can't be read ({reason}), tried for data.retry_s={self._retry_s:g}"
                        " s; are disk and network there? Put the file back, or remove the commit "
                        "record of its shard (.json) and run pipeline.encode again"
                    ) from None
            self._closing.wait(min(pause_s, max(0.0, give_up - time.monotonic())))
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
