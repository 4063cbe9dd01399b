"""The fields that a row of a table, or the JSON beside a member of a tar, may give a clip."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.settings import ConfigError
from pipeline.sources.listing import MAX_KEY_LENGTH, MAX_START_S

FIELDS = ("uri", "start_s", "duration_s", "caption", "label", "split", "key")


@dataclass(frozen=True)
class Fields:
    """A row with its types checked; None or "" where the row has nothing.

    Attributes:
        start_s: second of the file at which the clip starts.
        duration_s: its length at most.
        caption: on one line.
        label: on one line.
        split: "train" where the row has nothing.
        key: ``[A-Za-z0-9_-]+``.
    """

    uri: str
    start_s: float | None
    duration_s: float | None
    caption: str
    label: str
    split: str
    key: str


def read_fields(row: Mapping[str, Any], where: str) -> Fields:
    """Check a row.

    Raises:
        ConfigError: a field has another type or range than it should; with the row's place.
    """
    fields = Fields(
        uri=_text(row, "uri", where),
        start_s=_seconds(row, "start_s", where),
        duration_s=_seconds(row, "duration_s", where),
        caption=" ".join(_text(row, "caption", where).split()),
        label=" ".join(_text(row, "label", where).split()),
        split=_text(row, "split", where) or "train",
        key=_text(row, "key", where),
    )
    if fields.duration_s == 0:
        raise ConfigError(f"{where}: duration_s is 0, expected more")
    if not re.fullmatch(r"[A-Za-z0-9_-]+", fields.split):
        raise ConfigError(f"{where}: split {fields.split!r} is no name such as train or test")
    if not re.fullmatch(r"[A-Za-z0-9_-]*", fields.key) or len(fields.key) > MAX_KEY_LENGTH:
        raise ConfigError(
            f"{where}: key {fields.key!r}, expected letters, digits, _ and -, at most "
            f"{MAX_KEY_LENGTH} of them"
        )
    return fields


def _text(row: Mapping[str, Any], name: str, where: str) -> str:
    value = row.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ConfigError(f"{where}: {name} is {value!r:.80}, expected text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{where}: {name} {value!a:.80} is not Unicode") from None
    return value


def _seconds(row: Mapping[str, Any], name: str, where: str) -> float | None:
    value = row.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{where}: {name} is {value!r:.80}, expected a number of seconds")
    if not math.isfinite(value) or not 0 <= value < MAX_START_S:
        raise ConfigError(f"{where}: {name} is {value}, expected 0 to {MAX_START_S:g} seconds")
    return float(value)
