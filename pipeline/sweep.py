"""What the commands that look over a whole data set share: arguments, progress, how they end.

Imports neither torch nor Ray, so that a command starts at once.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from pipeline.files import NoRoomError
from pipeline.format import FormatError
from pipeline.settings import ConfigError
from pipeline.storage import scrubbed
from pipeline.wording import counted, duration_text

LOG_INTERVAL_S = 10.0
INTERRUPTED = 130  # how shells tell that Ctrl-C ended a program: 128 + SIGINT


def command_parser(name: str, description: str) -> argparse.ArgumentParser:
    """Return a parser of what all commands take: DIR and --json."""
    parser = argparse.ArgumentParser(prog=f"python -m pipeline.{name}", description=description)
    parser.add_argument("dir", metavar="DIR", help="data set, a folder or a URL")
    parser.add_argument("--json", action="store_true", help="print JSON for programs")
    return parser


class ProgressLines:
    """What a log gets instead of a bar: a line every 10 s and one at the end, where it took 10 s.

    Args:
        total: how many steps there are.
        unit: what one is, such as "shard".
    """

    def __init__(self, total: int, unit: str) -> None:
        self._total, self._unit, self._num_done = total, unit, 0
        self._begun_s = self._shown_s = time.monotonic()

    def __enter__(self) -> ProgressLines:
        return self

    def __exit__(self, *_: object) -> None:
        if self._shown_s > self._begun_s:
            self._show(time.monotonic())

    def update(self, num_steps: int = 1) -> None:
        """Take in that so many steps are done."""
        self._num_done += num_steps
        now_s = time.monotonic()
        if now_s - self._shown_s >= LOG_INTERVAL_S:
            self._show(now_s)

    def _show(self, now_s: float) -> None:
        self._shown_s = now_s
        took = duration_text(now_s - self._begun_s)
        sys.stderr.write(f"{self._num_done:,} of {counted(self._total, self._unit)}, {took}\n")
        sys.stderr.flush()


def progress_bar(total: int, unit: str) -> Any:
    """Return a bar on stderr; a log file gets a line every 10 s, without control characters."""
    if sys.stderr.isatty():
        return tqdm(total=total, unit=unit, file=sys.stderr, mininterval=0.5)
    return ProgressLines(total, unit)


@contextmanager
def one_line_errors(after_stop: str) -> Iterator[None]:
    """End the program with one line and exit code 1 where an expected error comes up.

    Args:
        after_stop: what to say after Ctrl-C, where the exit code is 130.
    """
    try:
        yield
    except KeyboardInterrupt:
        sys.stderr.write(f"\nstopped; {after_stop}\n")
        sys.exit(INTERRUPTED)
    except (FormatError, NoRoomError, ConfigError) as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        where = f" {error.filename}:" if error.filename else ""
        sys.exit(f"error:{where} {error.strerror or scrubbed(error)}")
