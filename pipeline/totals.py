"""summary.json of a run with the names and units that people use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.wording import duration_text, rate_text, share_text

# Names in summary.json -> what people call them.
GROUPS = {"statuses": "clips", "flagged": "flagged, but kept"}
LABELS = {
    "plan_id": "plan",
    "shards": "shards committed, those of captions too",
    "caption_shards": "shards of captions committed",
    "duplicates_dropped": "duplicates dropped",
    "cells": "cells at one time, at most",
    "decoders": "decoders at one time, at most",
    "attempts_lost": "attempts at shards lost",
    "seconds": "time",
    "startup_s": "of it until the first cell was ready",
    "clips_per_s": "clips/s over all of the time",
    "clips_per_s_after_startup": "clips/s since the first cell was ready",
    "media_h": "length of the clips",
    "media_h_per_h": "hours of clips per hour over all of the time",
    "media_h_per_h_after_startup": "hours of clips per hour since the first cell was ready",
    "decode_s": "time decoding, summed over decoders",
    "encode_s": "time encoding, summed over cells",
    "write_s": "time writing beside encoding, summed over cells",
    "write_wait_s": "of it, time encoders waited for",
    "speed_of_light_share": "of the cells' time encoding",
    "decode_busy_share": "of the decoders' time decoding",
    "write_share": "of the cells' time writing beside encoding",
    "write_wait_share": "of the cells' time waiting for writing",
}


def labelled(summary: Mapping[str, Any]) -> dict[str, str]:
    """Return a summary with the names and units that people use."""
    found = {}
    for name, value in flattened(summary).items():
        group, _, status = name.partition(".")
        label = f"{GROUPS[group]}: {status}" if group in GROUPS else LABELS.get(name, name)
        found[label] = value_text(name, value)
    return found


def value_text(name: str, value: Any) -> str:
    """Return a value of summary.json with its unit, which its name tells."""
    if value is None or name.endswith("_share"):
        return share_text(value)
    if not isinstance(value, int | float):
        return ", ".join(value) if isinstance(value, list) else str(value)
    if "_per_" in name:
        return rate_text(value)
    if name.endswith("_h"):
        return f"{value:,.3g} h"
    if name == "seconds" or name.endswith("_s"):
        return duration_text(value)
    return f"{value:,}"


def flattened(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one with dotted names."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= flattened(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found
