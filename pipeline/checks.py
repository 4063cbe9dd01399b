"""What is known of every clip after decoding: facts, one parquet per shard, and its status."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline import format as fmt
from pipeline.media import Clip, Decoded
from pipeline.shards import naming_a_full_disk
from pipeline.tables import write_parquet

FACTS_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("row", pa.int32()),
        ("status", pa.string()),
        ("message", pa.string()),
        ("duration_s", pa.float64()),
        ("video_codec", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("fps", pa.float64()),
        ("video_s", pa.float64()),
        ("audio_codec", pa.string()),
        ("sample_rate", pa.int32()),
        ("channels", pa.int32()),
        ("audio_s", pa.float64()),
        ("audio_offset_s", pa.float64()),
        ("decoder", pa.string()),
    ]
)
# Raise the version when a fact is added or measured in another way: the facts get a new folder.
FACTS_VERSION = 1


def facts_directory(plan_id: str) -> str:
    """Return the name of the folder that holds the facts of a plan's clips."""
    identity = {"version": FACTS_VERSION, "plan_id": plan_id, "columns": FACTS_SCHEMA.names}
    return f"facts@probe-{fmt.fingerprint(identity)}"


def clip_status(problems: dict[str, tuple[str, str]]) -> tuple[str, str]:
    """Return (status, message) of a clip: that of its picture first, then of its sound."""
    for modality in ("video", "audio"):
        if modality in problems:
            return problems[modality]
    return "ok", ""


def facts_row(row: int, clip: Clip, decoded: Decoded) -> dict[str, Any]:
    """Return one row of the facts table."""
    status, message = clip_status(decoded.problems)
    found = {name: decoded.facts.get(name) for name in FACTS_SCHEMA.names[4:]}
    return {"key": clip.key, "row": row, "status": status, "message": message, **found}


def write_facts(folder: Path, shard: int, rows: list[dict[str, Any]]) -> None:
    """Write a shard's facts; a reader sees the whole file or none."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{fmt.shard_name(shard)}.parquet"
    with naming_a_full_disk(path):
        write_parquet(path, pa.Table.from_pylist(rows, FACTS_SCHEMA))
