"""Clips to shards: the fixed assignment that every column, resume and view refers to."""

from __future__ import annotations

import random
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import format as fmt
from pipeline.config import EncodeConfig
from pipeline.media import Clip
from pipeline.settings import ConfigError
from pipeline.sources import Source
from pipeline.tables import write_parquet

PLAN_SCHEMA = pa.schema(
    [
        ("shard", pa.int32()),
        ("row", pa.int32()),
        ("key", pa.string()),
        ("uri", pa.string()),
        ("start_s", pa.float64()),
        ("duration_s", pa.float64()),
        ("caption", pa.string()),
        ("label", pa.string()),
        ("split", pa.string()),
        ("text_row", pa.int64()),
    ]
)


def shuffled(clips: list[Clip], seed: int) -> list[Clip]:
    """Return the clips in the plan's order: sorted by key, then shuffled by the seed."""
    ordered = sorted(clips, key=lambda clip: clip.key)
    random.Random(seed).shuffle(ordered)
    return ordered


def unique_captions(clips: list[Clip]) -> list[str]:
    """Return the captions without repeats, in order of appearance; the empty one is first."""
    return list(dict.fromkeys(["", *(clip.caption for clip in clips)]))


def make_plan(source: Source, config: EncodeConfig) -> tuple[fmt.Plan, list[Clip]]:
    """Assign every clip of a source to a row of a shard."""
    clips = shuffled(source.clips, config.seed)
    for clip in clips:
        fmt.check_key(clip.key)
    identity = {
        "format_version": fmt.FORMAT_VERSION,
        "seed": config.seed,
        "shard_size": config.shard_size,
        "clips": [list(asdict(clip).values()) for clip in clips],
    }
    plan = fmt.Plan(
        plan_id=fmt.fingerprint(identity),
        seed=config.seed,
        source={"kind": source.kind, "root": source.root},
        clips=(fmt.PlanSegment(0, len(clips), config.shard_size),),
        captions=(fmt.PlanSegment(0, len(unique_captions(clips)), config.shard_size),),
    )
    return plan, clips


def ensure_plan(root: Path, source: Source, config: EncodeConfig) -> fmt.Plan:
    """Write the plan into an empty output folder, or check that the one there is the same.

    Raises:
        ConfigError: the folder holds another plan, or files that are no data set.
    """
    plan, clips = make_plan(source, config)
    if (root / "plan.json").exists():
        found = fmt.read_plan(root)
        if found.plan_id != plan.plan_id:
            raise ConfigError(_difference(root, found, plan, clips))
        return found
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {root}: {error.strerror}") from None
    others = [name for name in sorted(p.name for p in root.iterdir()) if name != "plan.parquet"]
    if [name for name in others if not name.startswith(".")]:
        raise ConfigError(
            f"--out {root} is neither empty nor a data set (it holds {others[0]}); "
            "name another folder"
        )
    write_clips(root / "plan.parquet", plan, clips)
    fmt.write_plan(root, plan)
    return plan


def write_clips(path: Path, plan: fmt.Plan, clips: list[Clip]) -> None:
    """Write plan.parquet: one row group a shard."""
    text_rows = {caption: row for row, caption in enumerate(unique_captions(clips))}
    shard_size = plan.clips[0].shard_size
    records = [
        {
            **asdict(clip),
            "shard": place // shard_size,
            "row": place % shard_size,
            "text_row": text_rows[clip.caption],
        }
        for place, clip in enumerate(clips)
    ]
    write_parquet(path, pa.Table.from_pylist(records, PLAN_SCHEMA), rows_per_group=shard_size)


def read_clips(root: Path, shard: int) -> list[Clip]:
    """Return a shard's clips in row order."""
    with pq.ParquetFile(root / "plan.parquet") as file:
        table = file.read_row_group(shard, columns=list(Clip.__dataclass_fields__))
    return [Clip(**record) for record in table.to_pylist()]


def read_captions(root: Path) -> list[str]:
    """Return the unique captions in text-row order."""
    with pq.ParquetFile(root / "plan.parquet") as file:
        captions = {"": 0}
        for batch in file.iter_batches(columns=["caption"]):
            for caption in batch.column(0).to_pylist():
                captions.setdefault(caption, len(captions))
    return list(captions)


def _difference(root: Path, found: fmt.Plan, plan: fmt.Plan, clips: list[Clip]) -> str:
    """Say how two plans differ, and what can be done."""
    there = {
        clip.key for shard in range(len(found.shard_rows())) for clip in read_clips(root, shard)
    }
    now = {clip.key for clip in clips}
    details = [
        f"{name} {getattr(found, name)} there, {getattr(plan, name)} now"
        for name in ("seed", "num_clips")
        if getattr(found, name) != getattr(plan, name)
    ]
    if found.clips[0].shard_size != plan.clips[0].shard_size:
        details.append(
            f"shard_size {found.clips[0].shard_size} there, {plan.clips[0].shard_size} now"
        )
    for names, what in ((now - there, "new"), (there - now, "gone")):
        if names:
            details.append(f"{len(names)} clips {what} (such as {min(names)})")
    what = "; ".join(details) or "captions, labels, splits or lengths of clips differ"
    return (
        f"--out {root} holds plan {found.plan_id} of {found.source.get('root')}, this run would "
        f"make plan {plan.plan_id}: {what}. Use another --out, or the settings of that plan"
    )
