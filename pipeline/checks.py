"""What is known of every clip after decoding: facts, one parquet per shard, and its status."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import format as fmt
from pipeline.files import write_atomically
from pipeline.media import Clip, Decoded

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


def clip_status(decoded: Decoded) -> tuple[str, str]:
    """Return the clip's (status, message): that of its picture first, then of its sound."""
    for modality in ("video", "audio"):
        if modality in decoded.problems:
            return decoded.problems[modality]
    return "ok", ""


def facts_row(row: int, clip: Clip, decoded: Decoded) -> dict[str, Any]:
    """Return one row of the facts table."""
    status, message = clip_status(decoded)
    found = {name: decoded.facts.get(name) for name in FACTS_SCHEMA.names[4:]}
    return {"key": clip.key, "row": row, "status": status, "message": message, **found}


def write_facts(folder: Path, shard: int, rows: list[dict[str, Any]]) -> None:
    """Write a shard's facts; a reader sees the whole file or none."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, FACTS_SCHEMA), sink)
    folder.mkdir(exist_ok=True)
    write_atomically(folder / f"{fmt.shard_name(shard)}.parquet", sink.getvalue().to_pybytes())
