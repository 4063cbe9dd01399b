"""A function called in a child process, which may hang or die over it.

Media decoders run native code: it can sleep with the interpreter's lock held or crash, and only
another process survives that. ``pipeline.decoders`` does the same with Ray's actors, with the same
words for it.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from typing import Any

from pipeline.media import ClipError
from pipeline.settings import ConfigError

START_TIMEOUT_S = 120.0  # to load torch and PyAV takes 3 s, and a minute on a busy machine


def took_too_long(timeout_s: float) -> ClipError:
    """Return what is wrong with a clip whose decoder had to be killed."""
    return ClipError(
        "decode_timeout",
        f"not decoded in {timeout_s:g} s and stopped, expected less: damaged, or decode_timeout_s "
        "is too short for it",
    )


def not_fetched(timeout_s: float) -> ClipError:
    """Return what is wrong with a clip whose file did not come."""
    return ClipError(
        "unreadable",
        f"not fetched in {timeout_s:g} s and stopped, expected less: slow network or server, or "
        "fetch_timeout_s is too short for it",
    )


def died(cause: str) -> ClipError:
    """Return what is wrong with a clip whose decoder died or raised an error of no clip's."""
    return ClipError("decode_crash", f"the decoder died of it ({cause}), expected frames and sound")


class ChildProcess:
    """Calls a function in a process that is killed when it hangs and replaced when it dies.

    Attributes:
        timeout_s: of one call; the process may take longer to start.
    """

    def __init__(self, prepare: Callable[[], Callable[[Any], Any]], timeout_s: float) -> None:
        """``prepare`` runs in the child, loads what is slow to load, and returns the function."""
        self._prepare, self.timeout_s = prepare, timeout_s
        self._process: Any = None

    def __enter__(self) -> ChildProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def call(self, argument: Any) -> Any:
        """Return what the function makes of ``argument``.

        Raises:
            ClipError: the function's own, ``decode_timeout``, or ``decode_crash`` where the
                process died or the function raised anything else.
        """
        if self._process is None:
            self._start()
        try:
            self._pipe.send(argument)
            if not self._pipe.poll(self.timeout_s):
                self._end()
                raise took_too_long(self.timeout_s)
            result = self._pipe.recv()
        except (EOFError, ConnectionError):
            raise died(self._cause_of_death()) from None
        if isinstance(result, ClipError):
            raise result
        return result

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._prepare), daemon=True)
        with _child_ignores_ctrl_c():
            self._process.start()
        theirs.close()
        try:
            if self._pipe.poll(START_TIMEOUT_S) and self._pipe.recv() == "ready":
                return
            cause = f"nothing heard in {START_TIMEOUT_S:g} s"
        except (EOFError, ConnectionError):
            cause = self._cause_of_death()
        self._end()
        raise ConfigError(f"the decoder can't start ({cause}); is the installation whole?")

    def _cause_of_death(self) -> str:
        self._process.join(5)
        code = self._process.exitcode
        self._end()
        if code is None or code >= 0:
            return f"exit code {code}"
        return signal.Signals(-code).name

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._pipe.close()
            self._process = None


@contextmanager
def _child_ignores_ctrl_c() -> Iterator[None]:
    """The terminal sends it to the child too, which is ours to end, without a traceback.

    Blocked, which children inherit: handlers can be set in the main thread only.
    """
    resource_tracker.ensure_running()  # with the first child, it would unblock the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(pipe: Any, prepare: Callable[[], Callable[[Any], Any]]) -> None:
    """Run in the child: answer calls until the other end is closed."""
    function = prepare()
    pipe.send("ready")
    while True:
        try:
            argument = pipe.recv()
        except EOFError:
            return
        try:
            result = function(argument)
        except ClipError as error:
            result = ClipError(error.status, error.message)
        except Exception as error:  # as the cell does: a bug costs one clip, not the run
            result = died(repr(error))
        pipe.send(result)
