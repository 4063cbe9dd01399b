"""What is left to encode: the plan minus the commits, or a part of that by hand.

Imports neither torch nor Ray: a run that finds all committed ends at once.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline import format as fmt
from pipeline.checks import DECISIONS
from pipeline.jobs import ShardTask
from pipeline.old_rows import take_back
from pipeline.plan_table import PlanTable
from pipeline.records import read_record
from pipeline.settings import ConfigError

CLIP_MODALITIES = ("video", "audio")
FAILED = frozenset(fmt.STATUSES) - DECISIONS - {"ok"}


@dataclass(frozen=True)
class Work:
    """A shard to encode: which columns lack it, and how many rows it has."""

    shard: int
    modalities: tuple[str, ...]
    rows: int

    @property
    def is_text(self) -> bool:
        """Whether its rows are captions, not clips."""
        return self.modalities == ("text",)

    def task(self, table: PlanTable) -> ShardTask:
        """Read the rows of the shard from the plan."""
        if self.is_text:
            return ShardTask(self.shard, self.modalities, captions=table.captions(self.shard))
        return ShardTask(self.shard, self.modalities, clips=table.clips(self.shard))


def open_work(
    plan: fmt.Plan, columns: dict[str, fmt.Column], retry: frozenset[str] = frozenset()
) -> list[Work]:
    """Return all that lacks a commit, captions first.

    Args:
        plan: head of the plan.
        columns: by modality.
        retry: shards with clips that failed in one of these ways count as lacking one; they keep
            theirs until `reopen`.
    """
    done = {
        modality: {
            shard
            for shard in column.committed_shards()
            if not (retry and has_failed(column, shard, retry))
        }
        for modality, column in columns.items()
    }
    found = []
    for kind in (("text",), CLIP_MODALITIES):
        wanted = [modality for modality in kind if modality in columns]
        for shard, rows in enumerate(plan.shard_rows(text=kind == ("text",)).tolist()):
            if missing := tuple(m for m in wanted if shard not in done[m]):
                found.append(Work(shard, missing, rows))
    return found


def has_failed(column: fmt.Column, shard: int, statuses: frozenset[str]) -> bool:
    """Return whether a shard is committed and holds a clip that failed in one of the ways."""
    record = read_record(column, shard)
    return record is not None and bool(statuses & set(record.status_counts))


def parse_shards(text: str) -> list[range]:
    """Read ranges of shards such as ``0-15,20``.

    Raises:
        ConfigError: it is something else.
    """
    ranges = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d{1,9})(?:-(\d{1,9}))?\s*", part)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if last < first:
            raise ConfigError(f"--shards {text!r}: expected ranges such as 0-15 or 0-15,20")
        ranges.append(range(first, last + 1))
    return ranges


def restrict(
    work: Sequence[Work], plan: fmt.Plan, shards: list[range] | None, limit: int | None
) -> list[Work]:
    """Return the part of the work that this run is to do.

    Args:
        work: all of it, from ``open_work``.
        plan: head of the plan.
        shards: those to encode, of clips and of captions alike; None: all. Whoever has the last
            shard of clips has the shards of captions beyond it, too.
        limit: no more shards of clips than hold this many; None: all.

    Raises:
        ConfigError: the plan has none of the shards.
    """
    num_shards = len(plan.shard_rows())
    if shards is not None and all(part.start >= num_shards for part in shards):
        raise ConfigError(f"--shards names none of the plan's {num_shards} (0-{num_shards - 1})")

    def is_chosen(item: Work) -> bool:
        shard = min(item.shard, num_shards - 1)
        return shards is None or any(shard in part for part in shards)

    chosen, clips = [], 0
    for item in filter(is_chosen, work):
        if limit is None or item.is_text or clips < limit:
            chosen.append(item)
            clips += 0 if item.is_text else item.rows
    return chosen


def parse_statuses(text: str) -> frozenset[str]:
    """Read the statuses of --retry-failed; none is all.

    Raises:
        ConfigError: one of them is no status of a failed clip.
    """
    names = frozenset(filter(None, text.split(",")))
    if unknown := sorted(names - FAILED):
        raise ConfigError(
            f"--retry-failed={text}: {unknown[0]!r} is no failure; expected some of "
            f"{', '.join(name for name in fmt.STATUSES if name in FAILED)}"
        )
    return names or FAILED


def reopen(item: Work, columns: dict[str, fmt.Column], statuses: frozenset[str]) -> None:
    """Take back the commits of a shard that hold a clip failed with one of the statuses.

    What was found in a failed clip does not count anyway: see ``pipeline.checks.is_settled``.
    """
    for column in (columns[modality] for modality in item.modalities):
        if has_failed(column, item.shard, statuses):
            take_back(column, item.shard)
