"""What the commands that look over a whole data set share: status, verify and pack.

The plan's head, and how such a command shows progress and ends. Imports neither torch nor Ray, so
that a command starts at once.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from pipeline import format as fmt
from pipeline.shards import NoRoomError


def read_plan(root: Path) -> fmt.Plan:
    """Read the plan's head and check the numbers in it.

    Raises:
        FormatError: there is none, or it is damaged.
    """
    plan = fmt.read_plan(root)
    sizes = [(s.first_shard, s.num_clips, s.shard_size) for s in (*plan.clips, *plan.captions)]
    is_sound = all(type(size) is int and size >= 0 for three in sizes for size in three)
    is_sound = is_sound and all(shard_size > 0 for _, _, shard_size in sizes)
    if not (is_sound and isinstance(plan.plan_id, str) and isinstance(plan.source, dict)):
        raise fmt.FormatError(
            f"{root / 'plan.json'} is damaged (plan_id {plan.plan_id!r:.40}, segments {sizes}, "
            f"source {plan.source!r:.80}; expected text, counts and an object); restore it"
        )
    return plan


def progress_bar(total: int, unit: str) -> tqdm:
    """Return a bar on stderr; a log file gets a line every 10 s."""
    interval_s = 0.5 if sys.stderr.isatty() else 10.0
    return tqdm(total=total, unit=unit, file=sys.stderr, mininterval=interval_s)


@contextmanager
def one_line_errors(after_stop: str) -> Iterator[None]:
    """End the program with one line and exit code 1 where an expected error comes up.

    Args:
        after_stop: what to say after Ctrl-C.
    """
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(f"\nstopped; {after_stop}")
    except (fmt.FormatError, NoRoomError) as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        sys.exit(f"error:{where}: {error.strerror or error}")
