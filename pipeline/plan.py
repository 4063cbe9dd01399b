"""Clips to shards: the fixed assignment that every column, resume and view refers to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import format as fmt
from pipeline.captions import CAPTIONS_NAME, CAPTIONS_SCHEMA, write_captions
from pipeline.config import EncodeConfig
from pipeline.draft import PLAN_SCHEMA, ClipsHash, Draft, draft_shards
from pipeline.files import create_file
from pipeline.plan_table import PLAN_NAME
from pipeline.settings import ConfigError
from pipeline.sources import CLIP_SCHEMA, Listing, Source
from pipeline.tables import open_parquet, parquet_writer, pc

CLAIM_NAME = ".planning.tmp"


def ensure_plan(root: Path, source: Source, config: EncodeConfig) -> fmt.Plan:
    """Write the plan into an empty output folder, or check that the one there is the same.

    Where the source's state is the one that was planned, its clips are not even listed.

    Raises:
        ConfigError: the source holds no clips fit for a plan; the folder holds another plan, or
            files that are no data set; another driver is planning something else into it.
    """
    others = _other_files(root)  # listed first: another driver may be making the same plan
    if (root / "plan.json").exists():
        return _check_plan(root, source, config)
    if others:
        raise ConfigError(
            f"--out {root} is neither empty nor a data set (it holds {others[0]}); "
            "name another folder"
        )
    draft, told = _draft(source, config)
    root.mkdir(parents=True, exist_ok=True)
    with _claimed(root, source, config):
        if (root / "plan.json").exists():  # made while the clips were listed
            return _check_plan(root, source, config)
        clips_hash = _write_tables(root, draft)
        plan = fmt.Plan(
            plan_id=_plan_id(clips_hash, config),
            seed=config.seed,
            source=told | {"clips_hash": clips_hash},
            clips=(draft.segment,),
            captions=(fmt.PlanSegment(0, len(draft.captions), config.shard_size),),
        )
        fmt.write_plan(root, plan)
    return plan


def extend_plan(root: Path, source: Source, config: EncodeConfig) -> fmt.Plan:
    """Append the clips of a source whose keys the plan lacks, as shards of their own.

    No clip moves: what was encoded stays good, also of clips that the source has no longer, and a
    clip that the source now describes otherwise stays as it was planned. The plan_id stays, too.

    Raises:
        ConfigError: seed or shard_size are not those of the plan; as ``ensure_plan``.
    """
    if not (root / "plan.json").exists():
        return ensure_plan(root, source, config)
    plan = fmt.read_plan(root)
    if details := _other_settings(plan, config):
        raise ConfigError(f"--out {root} was planned with {'; '.join(details)}; extend it with its")
    if plan.source.get("state") == source.state:
        return plan
    listing = source.read()
    known_keys = _read_column(root / PLAN_NAME, "key", plan.num_clips)
    is_new = pc.invert(pc.is_in(listing.clips["key"], known_keys.combine_chunks()))
    known = _read_column(root / CAPTIONS_NAME, "caption", int(plan.shard_rows(text=True).sum()))
    num_shards = len(plan.shard_rows())
    draft = draft_shards(
        listing.clips.filter(is_new),
        plan.seed,
        config.shard_size,
        num_shards,
        known.combine_chunks(),
    )
    clips_hash = _hash(draft_shards(listing.clips, config.seed, config.shard_size))
    captions = fmt.PlanSegment(
        len(plan.shard_rows(text=True)), len(draft.captions), config.shard_size
    )
    if draft.segment.num_clips:
        _write_tables(root, draft, plan)
    extended = replace(
        plan,
        source=_describe(source, listing, plan.source["longest_s"]) | {"clips_hash": clips_hash},
        clips=plan.clips + (draft.segment,) * bool(draft.segment.num_clips),
        captions=plan.captions + (captions,) * bool(captions.num_clips),
    )
    fmt.write_plan(root, extended)
    return extended


@contextmanager
def _claimed(root: Path, source: Source, config: EncodeConfig) -> Iterator[None]:
    """Keep out who plans anything else into the folder at the same time, for the block.

    Who plans the same may come in: all write the same bytes.

    Raises:
        ConfigError: another driver is planning something else.
    """
    claim = root / CLAIM_NAME
    identity = [source.kind, source.state, config.seed, config.shard_size]
    mine = fmt.canonical_json(identity).encode()
    try:
        create_file(claim, mine)
    except FileExistsError:
        with suppress(FileNotFoundError):  # that driver is done
            if claim.read_bytes() != mine:
                raise ConfigError(
                    f"--out {root}: another run is planning other clips, or with other settings, "
                    f"into it; wait for that one, or remove {claim} if it was killed"
                ) from None
    try:
        yield
    finally:
        claim.unlink(missing_ok=True)


def _other_files(root: Path) -> list[str]:
    """Return the names of files that no run leaves which was stopped before it wrote plan.json."""
    try:
        names = sorted(path.name for path in root.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ConfigError(f"--out {root}: {error.strerror or error}") from None
    return [n for n in names if n not in (PLAN_NAME, CAPTIONS_NAME) and not n.startswith(".")]


def _write_tables(root: Path, draft: Draft, before: fmt.Plan | None = None) -> str:
    """Write plan.parquet and captions.parquet, behind what an earlier plan has in them.

    Returns:
        The hash of the clips of the draft.
    """
    clips_hash, size = ClipsHash(), draft.segment.shard_size
    num_shards = len(before.shard_rows()) if before else 0
    with parquet_writer(root / PLAN_NAME, PLAN_SCHEMA) as writer:
        _copy_groups(root / PLAN_NAME, num_shards, writer)
        for block in draft.blocks():
            clips_hash.update(block)
            writer.write_table(block, row_group_size=size)
    rows = before.shard_rows(text=True) if before else []
    with parquet_writer(root / CAPTIONS_NAME, CAPTIONS_SCHEMA) as writer:
        _copy_groups(root / CAPTIONS_NAME, len(rows), writer)
        write_captions(writer, draft.captions, int(sum(rows)), size)
    return clips_hash.hexdigest()


def _copy_groups(path: Path, num_groups: int, writer: pq.ParquetWriter) -> None:
    if num_groups:
        with open_parquet(path) as file:
            for group in range(num_groups):
                writer.write_table(file.read_row_group(group))


def _check_plan(root: Path, source: Source, config: EncodeConfig) -> fmt.Plan:
    """Return the plan that is there if the source still makes it.

    Raises:
        ConfigError: it doesn't; says how the two differ, and what can be done.
    """
    plan = fmt.read_plan(root)
    details = _other_settings(plan, config)
    if not details and plan.source.get("state") == source.state:
        return plan
    draft, told = _draft(source, config, plan.source.get("longest_s", 0.0))
    clips_hash = _hash(draft)
    if not details and plan.source.get("clips_hash") == clips_hash:
        # Files were touched or moved, but the clips are the same: the next run need not list them.
        plan = replace(plan, source=told | {"clips_hash": clips_hash})
        fmt.write_plan(root, plan)
        return plan
    details += _other_clips(root, plan, draft.clips["key"])
    what = "; ".join(details) or (
        "captions, labels, splits or lengths of clips differ, which the source and the settings "
        "clip, windows and caption_template decide"
    )
    raise ConfigError(
        f"--out {root} holds plan {plan.plan_id} of {plan.source.get('root')}, this run would "
        f"make plan {_plan_id(clips_hash, config)}: {what}. Use another --out, or the settings of "
        "that plan; --extend appends clips that are new"
    )


def _other_settings(plan: fmt.Plan, config: EncodeConfig) -> list[str]:
    there = {"seed": plan.seed, "shard_size": plan.clips[0].shard_size}
    return [
        f"{name} {value} there, {getattr(config, name)} now"
        for name, value in there.items()
        if getattr(config, name) != value
    ]


def _other_clips(root: Path, plan: fmt.Plan, now: pa.ChunkedArray) -> list[str]:
    there = _read_column(root / PLAN_NAME, "key", plan.num_clips)
    details = []
    if len(there) != len(now):
        details.append(f"num_clips {len(there)} there, {len(now)} now")
    for keys, others, what in ((now, there, "new"), (there, now, "gone")):
        names = keys.filter(pc.invert(pc.is_in(keys, others.combine_chunks())))
        if len(names):
            details.append(f"{len(names)} clips {what} (such as {pc.min(names)})")
    return details


def _read_column(path: Path, name: str, num_rows: int) -> pa.ChunkedArray:
    """Read a text column of the plan's tables without what a stopped extension left behind it.

    Raises:
        FormatError: it can't be read.
    """
    try:
        with open_parquet(path) as file:
            column = file.read(columns=[name])[name]
    except (OSError, pa.ArrowException, KeyError) as error:
        raise fmt.FormatError(f"{path} can't be read ({error}); restore it") from None
    return column.slice(0, num_rows).cast(CLIP_SCHEMA.field("key").type)


def _hash(draft: Draft) -> str:
    clips_hash = ClipsHash()
    for block in draft.blocks():
        clips_hash.update(block)
    return clips_hash.hexdigest()


def _plan_id(clips_hash: str, config: EncodeConfig) -> str:
    identity = {
        "format_version": fmt.FORMAT_VERSION,
        "seed": config.seed,
        "shard_size": config.shard_size,
        "clips": clips_hash,
    }
    return fmt.fingerprint(identity)


def _draft(
    source: Source, config: EncodeConfig, before_s: float = 0.0
) -> tuple[Draft, dict[str, Any]]:
    """List all clips; return their shards and what is to be told of the source.

    The listing is let go here: its captions are as large as the draft's.
    """
    listing = source.read()
    told = _describe(source, listing, before_s)
    return draft_shards(listing.clips, config.seed, config.shard_size), told


def _describe(source: Source, listing: Listing, before_s: float) -> dict[str, Any]:
    """Return what plan.json says of the source: where it is, and by what it is known again.

    ``clips_hash``, that of all clips listed, is to be added. ``before_s`` is the length of the
    longest clip planned before.
    """
    return {
        "kind": source.kind,
        "root": source.root,
        "state": source.state,
        "num_skipped": listing.num_skipped,
        "longest_s": max(before_s, pc.max(listing.clips["duration_s"]).as_py()),
    }
