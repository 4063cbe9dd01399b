"""What the commands that look over a whole data set share: arguments, progress, how they end.

Imports neither torch nor Ray, so that a command starts at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

from pipeline.files import NoRoomError
from pipeline.format import FormatError
from pipeline.settings import ConfigError
from pipeline.storage import scrubbed

INTERRUPTED = 130  # how shells tell that Ctrl-C ended a program: 128 + SIGINT


def command_parser(name: str, description: str) -> argparse.ArgumentParser:
    """Return a parser of what all commands take: DIR and --json."""
    parser = argparse.ArgumentParser(prog=f"python -m pipeline.{name}", description=description)
    parser.add_argument("dir", metavar="DIR", help="data set, a folder or a URL")
    parser.add_argument("--json", action="store_true", help="print JSON for programs")
    return parser


def progress_bar(total: int, unit: str) -> tqdm:
    """Return a bar on stderr; a log file gets a line every 10 s."""
    interval_s = 0.5 if sys.stderr.isatty() else 10.0
    return tqdm(total=total, unit=unit, file=sys.stderr, mininterval=interval_s)


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
