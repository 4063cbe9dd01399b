"""Daemon threads that work off a queue; one that hangs in a read must not hold up an exit."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable

END_S = 5.0  # for threads to end; those that hang are left alone


class Workers:
    """Threads that make calls, in the order in which they were given.

    Args:
        num_threads: calls made at once.
        name: of the threads.
    """

    def __init__(self, num_threads: int, name: str) -> None:
        self._is_closed, self._closing = False, threading.Lock()
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._work, name=name, daemon=True) for _ in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def put(self, call: Callable[[], None]) -> None:
        """Have a call made, which raises nothing; once this is closed, by the caller itself."""
        with self._closing:
            if not self._is_closed:
                self._calls.put(call)
                return
        call()

    def close(self) -> None:
        """End the threads, behind the calls that were given before."""
        with self._closing:
            self._is_closed = True
            for _ in self._threads:
                self._calls.put(None)
        give_up = time.monotonic() + END_S
        for thread in self._threads:
            if thread is not threading.current_thread():  # the garbage collector runs in any
                thread.join(max(0.0, give_up - time.monotonic()))

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            call()
            del call  # what it refers to may be waited for: memory of a batch, the hold of a copy
