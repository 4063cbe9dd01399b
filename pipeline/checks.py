"""What is known of every clip after decoding: facts, one parquet per shard, and its verdicts.

Facts do not depend on codecs, on the sample rate or on the columns of a run: a second column of
the same plan reuses them, and comes to the same verdicts though it decodes one modality only.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from pipeline import format as fmt
from pipeline.config import DECODER_VERSION, THRESHOLDS, CheckSettings, EncodeConfig
from pipeline.files import map_ahead, scan
from pipeline.media import Clip, Decoded
from pipeline.tables import read_parquet, write_parquet

FACTS_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("row", pa.int32()),
        ("status", pa.string()),
        ("message", pa.string()),
        ("video_status", pa.string()),
        ("audio_status", pa.string()),
        ("flags", pa.list_(pa.string())),
        ("duration_s", pa.float64()),
        ("video_codec", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("pixel_aspect", pa.float64()),
        ("rotation", pa.int32()),
        ("fps", pa.float64()),
        ("video_s", pa.float64()),
        ("num_frames", pa.int32()),
        ("video_decoded_share", pa.float64()),
        ("pts_hash", pa.string()),
        ("decoder", pa.string()),
        ("motion", pa.float64()),
        ("frozen_s", pa.float64()),
        ("black_share", pa.float64()),
        ("audio_codec", pa.string()),
        ("sample_rate", pa.int32()),
        ("channels", pa.int32()),
        ("audio_s", pa.float64()),
        ("audio_offset_s", pa.float64()),
        ("audio_decoded_share", pa.float64()),
        ("loudness_dbfs", pa.float64()),
        ("silent_share", pa.float64()),
        ("content_hash", pa.string()),
    ]
)
MEASURES = FACTS_SCHEMA.names[7:]
FACTS_FILE = re.compile(r"(\d{6,})\.parquet")
# Raise the version when a fact is added or measured in another way: the facts get a new folder.
FACTS_VERSION = 3

# Verdicts over clips that are whole: decisions, not failures. Encoding them again would decide
# the same, and no number of them means that something is wrong with the run.
DECISIONS = frozenset(("silent", "still", "low_fps", "duplicate"))
BOTH = ("video", "audio")
# Lengths and rates count as reached from here on: streams of "10 s" end some milliseconds early
# as often as late, and the frames of a file of 8 fps come out as 7.99 a second.
REACHED_SHARE = 0.98


class FailedCheck(NamedTuple):
    """A check that a clip, or one modality of it, did not pass."""

    check: str
    modalities: tuple[str, ...]
    message: str


def judge(decoded: Decoded, checks: CheckSettings) -> Decoded:
    """Turn facts into verdicts: a problem where the policy is "drop", else a flag.

    The first of several counts: what the decoder could not do, then the checks in the order
    truncated (each modality for itself), too_short, silent, still, low_fps (the whole clip).
    """
    problems, flags = dict(decoded.problems), set[str]()
    for failed in _failed_checks(decoded.facts, checks):
        if getattr(checks, failed.check) == "flag":
            flags.add(failed.check)
            continue
        for modality in failed.modalities:
            problems.setdefault(modality, (failed.check, failed.message))
    return Decoded(
        frames=None if "video" in problems else decoded.frames,
        sound=None if "audio" in problems else decoded.sound,
        problems=problems,
        facts={**decoded.facts, "flags": sorted(flags)},
    )


def _failed_checks(facts: dict[str, Any], checks: CheckSettings) -> Iterator[FailedCheck]:
    """Yield what the facts fail, in the order of `judge`; a fact that is not there fails none."""
    limits = {check: getattr(checks, name) for check, name in THRESHOLDS.items()}
    for modality, what in (("video", "frames"), ("audio", "samples")):
        share, least = facts.get(f"{modality}_decoded_share"), limits["truncated"]
        if share is not None and share < least:
            yield FailedCheck(
                "truncated",
                (modality,),
                f"{share:.1%} of the {what} that its span should have can be decoded, expected "
                f"at least {least:.1%}: the file is cut off or damaged",
            )
    duration_s, least = facts.get("duration_s"), limits["too_short"]
    if duration_s is not None and duration_s < REACHED_SHARE * least:
        message = f"{duration_s:.2f} s of picture and sound together, expected at least "
        yield FailedCheck("too_short", BOTH, f"{message}{least:g} s")
    silent_share, most = facts.get("silent_share"), limits["silent"]
    if silent_share is not None and silent_share > most:
        message = f"{silent_share:.1%} of the sound is below -60 dBFS, expected at most "
        yield FailedCheck("silent", BOTH, f"{message}{most:.1%}")
    motion, least = facts.get("motion"), limits["still"]
    if motion is not None and motion < least:
        message = f"frames differ by {motion:.2g} of white on average, expected at least "
        yield FailedCheck("still", BOTH, f"{message}{least:g}")
    fps, least = facts.get("fps"), limits["low_fps"]
    if fps is not None and fps < REACHED_SHARE * least:
        message = f"{fps:.3g} frames a second in the file, expected at least "
        yield FailedCheck("low_fps", BOTH, f"{message}{least:g}")


def is_settled(stored: dict[str, Any]) -> bool:
    """Return whether an earlier run's facts of a clip hold: it was whole, and all was measured.

    What was missing or broken then may be mended by now, and is measured again.
    """
    return {stored[f"{modality}_status"] for modality in BOTH} <= DECISIONS | {"ok"}


def with_facts(decoded: Decoded, stored: dict[str, Any] | None) -> Decoded:
    """Fill in the facts of an earlier run, which win over those measured now.

    A file that was replaced since fails: else the picture of one would get the other's sound.
    """
    measured = {name: value for name, value in (stored or {}).items() if name in MEASURES}
    there = {name: value for name, value in measured.items() if value is not None}
    then, now = there.get("content_hash"), decoded.facts.get("content_hash")
    if then and now and then != now:
        return Decoded.failed(
            "unreadable",
            f"the file changed since its facts were measured: found content {now}, expected "
            f"{then}; put the old file back, or encode into another --out",
        )
    return replace(decoded, facts={**decoded.facts, **there})


def verdict_without_decoding(stored: dict[str, Any], checks: CheckSettings) -> Decoded | None:
    """Return the decision over the whole clip that an earlier run's facts settle, or None."""
    statuses = {stored[f"{modality}_status"] for modality in BOTH}
    if len(statuses) > 1 or not statuses <= DECISIONS:
        return None
    return judge(with_facts(Decoded(None, None), stored), checks)


def clip_status(problems: dict[str, tuple[str, str]]) -> tuple[str, str]:
    """Return (status, message) of a clip: that of its picture first, then of its sound."""
    for modality in BOTH:
        if modality in problems:
            return problems[modality]
    return "ok", ""


def facts_directory(plan_id: str, config: EncodeConfig) -> str:
    """Return the name of the folder that holds the facts of a plan's clips.

    It hashes what the facts depend on: the plan, how they are measured (motion: on the frames as
    the codec sees them) and what is checked.
    """
    identity = {
        "version": FACTS_VERSION,
        "plan_id": plan_id,
        "columns": FACTS_SCHEMA.names,
        "decoder_version": DECODER_VERSION,
        "decoder": config.video.decoder,
        "fps": config.video.fps,
        "sizes": config.video.sizes,
        "fit": config.video.fit,
        "checks": asdict(config.checks),
    }
    return f"facts@probe-{fmt.fingerprint(identity)}"


def facts_path(folder: Path, shard: int) -> Path:
    """Return the path of a shard's facts."""
    return folder / f"{fmt.shard_name(shard)}.parquet"


def shards_with_facts(folder: Path) -> list[int]:
    """Return the numbers of the shards that have facts, sorted."""
    try:
        matches = [FACTS_FILE.fullmatch(entry.name) for entry in scan(folder)]
    except FileNotFoundError:
        return []
    return sorted(int(match[1]) for match in matches if match)


def facts_row(row: int, clip: Clip, decoded: Decoded) -> dict[str, Any]:
    """Return one row of the facts table."""
    status, message = clip_status(decoded.problems)
    verdict: dict[str, Any] = {"status": status, "message": message}
    for modality in BOTH:
        verdict[f"{modality}_status"] = decoded.problems.get(modality, ("ok", ""))[0]
    verdict["flags"] = decoded.facts.get("flags", [])
    found = {name: decoded.facts.get(name) for name in MEASURES}
    return {"key": clip.key, "row": row, **verdict, **found}


def write_facts(folder: Path, shard: int, rows: list[dict[str, Any]]) -> None:
    """Write a shard's facts; a reader sees the whole file or none."""
    folder.mkdir(exist_ok=True)
    write_parquet(facts_path(folder, shard), pa.Table.from_pylist(rows, FACTS_SCHEMA))


def read_facts(folder: Path, shard: int) -> list[dict[str, Any]] | None:
    """Return a shard's facts in row order, or None where there are none."""
    try:
        return read_parquet(facts_path(folder, shard)).to_pylist()
    except FileNotFoundError:
        return None


def read_usable(folder: Path, shard: int, name: str) -> list[Any]:
    """Return one fact of a shard's clips in row order; None where picture and sound both fail.

    A film without sound is a clip as good as any other for those who encode the picture.
    """
    columns = ["video_status", "audio_status", name]
    table = read_parquet(facts_path(folder, shard), columns).select(columns)
    rows = zip(*(column.to_pylist() for column in table), strict=True)
    return [value if "ok" in statuses else None for *statuses, value in rows]


def count_flags(folder: Path, shards: list[int], dropped: dict[int, set[int]]) -> Counter[str]:
    """Count the flags in these shards' facts of all clips of which something can be encoded.

    Those of the rows ``dropped``, by shard, don't count.
    """
    counts: Counter[str] = Counter()
    found = map_ahead(folder, lambda shard: read_usable(folder, shard, "flags"), shards)
    for shard, rows in zip(shards, found, strict=True):
        for row, flags in enumerate(rows):
            if row not in dropped.get(shard, ()):
                counts.update(flags or ())
    return counts
