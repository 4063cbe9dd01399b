"""What a loader is given, checked: ranks and batches, and the counts of a saved state."""

from __future__ import annotations

from typing import Any

from pipeline.settings import ConfigError
from train.data.stream import Cursor
from train.errors import ResumeError

MOST_SAMPLES = 2**24  # of a step; far from any use, and from filling the memory


def check_layout(global_batch: int, micro_batch: int | None, rank: int, num_ranks: int) -> int:
    """Return the micro-batch of a rank.

    Raises:
        ConfigError: a number is none, or they don't fit together.
    """
    limits = {
        "num_ranks": (num_ranks, 1, MOST_SAMPLES),
        "rank": (rank, 0, num_ranks - 1),
        "global_batch": (global_batch, 1, MOST_SAMPLES),
    }
    if micro_batch is not None:
        limits["micro_batch"] = (micro_batch, 1, MOST_SAMPLES)
    for name, (value, least, most) in limits.items():
        if type(value) is not int or not least <= value <= most:
            raise ConfigError(f"{name} is {value!r}, expected a whole number of {least} to {most}")
    size = micro_batch or max(1, global_batch // num_ranks)
    if global_batch % (size * num_ranks):
        raise ConfigError(
            f"global_batch={global_batch} is not a multiple of {num_ranks} ranks × "
            f"micro_batch={size}; choose one that is"
        )
    return size


def check_counts(cursor: Cursor, samples: Any, global_batch: Any) -> None:
    """Check what a saved state holds beside its cursor.

    Raises:
        ResumeError: it can't be, or isn't of the same state.
    """
    faults = {
        f"samples_consumed is {samples!r}, but the cursor is at {cursor.samples}": (
            type(samples) is not int or samples != cursor.samples
        ),
        f"global_batch is {global_batch!r}, expected a whole number above 0": (
            type(global_batch) is not int or global_batch < 1
        ),
    }
    for fault, is_there in faults.items():
        if is_there:
            raise ResumeError(f"{fault}; the saved state is damaged: use an older checkpoint")
