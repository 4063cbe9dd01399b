"""What ``pipeline.verify`` reports, whichever check found it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """Something that is not as it should be.

    Attributes:
        message: one line naming file, row and key, what was found and expected, how to mend it.
        file: the file to blame, where the message is about one row of it.
        row: the row in its shard.
        key: the row's key.
    """

    message: str
    file: str = ""
    row: int | None = None
    key: str | None = None


Report = Callable[[Finding], None]
