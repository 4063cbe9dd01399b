"""One pass over a data set for its census: every shard checked, every clip given a class.

Streams: what is held in memory is per shard, and a byte per unique caption.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa

from pipeline.files import map_ahead
from pipeline.format import OK, STATUSES, Column, FormatError, Plan, keys_hash, shard_name
from pipeline.plan_table import PlanTable
from pipeline.records import ChannelSums, record_path, repair
from pipeline.tables import open_parquet
from train.data.census import NOT_USABLE, CensusWriter, ClipClass, Tally
from train.data.committed import CommittedShard, check_all_committed, read_committed
from train.data.filters import ClipFilter

log = logging.getLogger(__name__)

Subset = Literal["train", "heldout", "all"]

CLIP_MODALITIES = ("video", "audio")
SHORT = len(STATUSES)  # code of a clip that is shorter than the crop
STATUS_NAMES = (*STATUSES, "short")
REPORT_AFTER_S, REPORT_EVERY_S = 5.0, 30.0


@dataclass(frozen=True)
class Wish:
    """Which clips of a data set a view wants, and for what.

    Attributes:
        subset: "train", "heldout" or "all".
        heldout_share: share of the clips of split "train" that are held out.
        lengths: latents in a crop, by modality.
        clip_filter: None takes all.
    """

    subset: Subset
    heldout_share: float
    lengths: Mapping[str, int]
    clip_filter: ClipFilter | None


class Looked(NamedTuple):
    """What was read of a shard, in any thread."""

    columns: dict[str, CommittedShard]
    facts: pa.Table | None


def write_census(
    writer: CensusWriter, root: Path, plan: Plan, opened: Mapping[str, Column], wish: Wish
) -> None:
    """Look at all shards of a data set and write its census.

    Raises:
        FormatError: a shard is not committed or is damaged, or plan and columns don't fit together.
        ConfigError: the filter asks for what is not there.
        OSError: a file can't be read.
    """
    rows_per_shard = plan.shard_rows()
    for column in opened.values():
        num_shards = len(plan.shard_rows(text=column.spec.modality == "text"))
        check_all_committed(column, num_shards)
    text_status, text_crcs = read_text(opened["text"], plan)
    columns = {name: opened[name] for name in CLIP_MODALITIES}
    fact_names = list(wish.clip_filter.facts) if wish.clip_filter else []
    table, names = PlanTable(root, plan), ["split"]
    names += [] if wish.clip_filter is None else wish.clip_filter.plan_columns

    def look(shard: int) -> Looked:
        read = {
            name: read_committed(column, shard, rows_per_shard) for name, column in columns.items()
        }
        return Looked(read, read_facts(root, shard, read, fact_names) if fact_names else None)

    count = _Count(root, wish, text_status)
    sums = {name: _Sums(column) for name, column in columns.items()}
    shards = range(len(rows_per_shard))
    for shard, looked in enumerate(reporting(map_ahead(root, look, shards), len(shards), root)):
        clips = table.read(shard, names)
        check_keys(columns, shard, looked, clips["key"])
        for name, column in looked.columns.items():
            sums[name].add(shard, column.record.channels)
        codes = count.codes_of(clips, looked)
        crcs = {name: column.record.index_crc32c for name, column in looked.columns.items()}
        writer.add(codes, np.array(clips["text_row"], np.int64), clips["key"], crcs)
    all_sums = {name: found.as_record() for name, found in sums.items()}
    writer.finish(list(count.classes), all_sums, count.tally(), text_crcs)


def read_text(column: Column, plan: Plan) -> tuple[np.ndarray, list[int]]:
    """Return the status of every caption, uint8, and the crc32c of every index.

    Raises:
        FormatError, OSError: as ``read_committed``.
    """
    rows_per_shard = plan.shard_rows(text=True)
    shards = range(len(rows_per_shard))

    def read(shard: int) -> tuple[np.ndarray, int]:
        found = read_committed(column, shard, rows_per_shard)
        return found.index["status"].astype(np.uint8), found.record.index_crc32c

    found = list(map_ahead(column.path, read, shards))
    return np.concatenate([np.empty(0, np.uint8), *(one for one, _ in found)]), [
        crc for _, crc in found
    ]


def check_keys(
    columns: Mapping[str, Column], shard: int, looked: Looked, keys: Sequence[str]
) -> None:
    """Compare the keys that columns and facts state with the planned ones.

    Raises:
        FormatError: they are other clips, or the same in another order.
    """
    expected = keys_hash(keys)
    for name, read in looked.columns.items():
        if read.record.keys_hash != expected:
            raise FormatError(
                f"{record_path(columns[name], shard)}: keys_hash is {read.record.keys_hash}, "
                f"expected {expected} as planned; {repair(columns[name], shard)}"
            )
    if looked.facts is not None and looked.facts["key"].to_pylist() != list(keys):
        folder = facts_folder(looked.columns)
        raise FormatError(
            f"{folder} shard {shard}: the facts are not of the planned clips in their order; "
            "remove them and the shard's commit records, and run pipeline.encode again"
        )


def facts_folder(columns: Mapping[str, CommittedShard]) -> str:
    """Return which folder of facts a shard was judged by, video's first; "" where none is told."""
    return next((read.record.facts for read in columns.values() if read.record.facts), "")


def read_facts(
    root: Path, shard: int, columns: Mapping[str, CommittedShard], names: Sequence[str]
) -> pa.Table:
    """Read facts of a shard: ``key`` and those of ``names`` that there are.

    Raises:
        FormatError: there are no facts, or they can't be read.
    """
    folder = facts_folder(columns)
    if not folder:
        raise FormatError(
            f"{root} shard {shard}: its commit records name no facts, which data.filter asks for; "
            "leave facts out of the filter, or encode the shard again"
        )
    path = root / folder / f"{shard_name(shard)}.parquet"
    try:
        with open_parquet(path) as file:
            there = file.schema_arrow.names
            # All of them where one is not there, to be told which there are.
            table = file.read(["key", *names] if set(names) <= set(there) else there)
    except (OSError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())[:200]
        raise FormatError(
            f"{path} can't be read ({reason}), which data.filter asks for; restore it, or remove "
            "the shard's commit records and run pipeline.encode again"
        ) from None
    if "key" not in table.column_names:
        raise FormatError(f"{path} has no column key: they are no facts of clips; restore it")
    return table


@dataclass
class _Sums:
    """The channel sums of a column's shards, added up in their order."""

    column: Column
    count: int = 0
    total: np.ndarray = field(default_factory=lambda: np.zeros(0))
    squares: np.ndarray = field(default_factory=lambda: np.zeros(0))

    def add(self, shard: int, channels: ChannelSums) -> None:
        if not channels.count:
            return
        total, squares = np.array(channels.sum), np.array(channels.sum_of_squares)
        if not self.count:
            self.total, self.squares = np.zeros(len(total)), np.zeros(len(total))
        if not len(total) == len(squares) == len(self.total):
            raise FormatError(
                f"{record_path(self.column, shard)}: sums of {len(total)} and squares of "
                f"{len(squares)} channels, expected {len(self.total)} as in the shards before; "
                f"{repair(self.column, shard)}"
            )
        self.count += channels.count
        self.total, self.squares = self.total + total, self.squares + squares

    def as_record(self) -> dict[str, Any]:
        """Return "channels" as of a commit record."""
        total, squares = self.total.tolist(), self.squares.tolist()
        return {"count": self.count, "sum": total, "sum_of_squares": squares}


class _Count:
    """Gives clips their classes, numbered as they are met, and counts them."""

    def __init__(self, root: Path, wish: Wish, text_status: np.ndarray) -> None:
        self.classes: dict[ClipClass, int] = {}
        self._root, self._wish, self._text_status = root, wish, text_status
        self._statuses = {name: Counter[int]() for name in (*CLIP_MODALITIES, "text")}
        self._reasons: Counter[int] = Counter()
        self._clips: Counter[str] = Counter()

    def codes_of(self, clips: Mapping[str, Sequence[Any]], looked: Looked) -> np.ndarray:
        """Return the codes of a shard's clips, uint8 [R]."""
        wanted = self._wanted(clips, looked.facts)
        status = {name: self._status(name, read) for name, read in looked.columns.items()}
        status["text"] = self._text_status[np.array(clips["text_row"], np.int64)]
        has = {name: (status[name] == OK) & (status["text"] == OK) for name in CLIP_MODALITIES}
        self._take(wanted, status, has)
        sizes = [
            np.where(has[name][:, None], read.index["shape"][:, 1:], 0)
            for name, read in looked.columns.items()
        ]
        codes = np.full(len(wanted), NOT_USABLE, np.uint8)
        usable = wanted & (has["video"] | has["audio"])
        kinds, kind_of = np.unique(
            np.concatenate(sizes, axis=1)[usable], axis=0, return_inverse=True
        )
        numbers = [self._number(ClipClass(size_of(kind[:3]), size_of(kind[3:]))) for kind in kinds]
        codes[usable] = np.array(numbers, np.uint8)[kind_of.reshape(-1)]
        return codes

    def tally(self) -> Tally:
        """Return all that was counted."""
        statuses = {name: by_name(counts) for name, counts in self._statuses.items()}
        return Tally(**self._clips, statuses=statuses, reasons=by_name(self._reasons))

    def _wanted(self, clips: Mapping[str, Sequence[Any]], facts: pa.Table | None) -> np.ndarray:
        is_train = np.array([split == "train" for split in clips["split"]])
        is_heldout = is_train & (key_places(clips["key"]) < self._wish.heldout_share)
        is_train &= ~is_heldout
        every = np.ones_like(is_train)
        inside = {"train": is_train, "heldout": ~is_train, "all": every}[self._wish.subset]
        clip_filter = self._wish.clip_filter
        passes = clip_filter.passes(clips, facts) if clip_filter else every
        counts = {"planned": every, "heldout": is_heldout, "outside": ~inside}
        counts |= {"filtered": inside & ~passes, "wanted": inside & passes}
        self._clips.update({name: int(rows.sum()) for name, rows in counts.items()})
        return inside & passes

    def _status(self, name: str, read: CommittedShard) -> np.ndarray:
        """Return status codes, of which ``SHORT`` is one, [R]."""
        is_short = read.index["shape"][:, 0] < self._wish.lengths[name]
        status = read.index["status"]
        return np.where((status == OK) & is_short, SHORT, status)

    def _take(
        self, wanted: np.ndarray, status: dict[str, np.ndarray], has: dict[str, np.ndarray]
    ) -> None:
        for name, codes in status.items():
            self._statuses[name].update(codes[wanted].tolist())
        complete = has["video"] & has["audio"]
        # A clip counts under its first status that is not ok, and as short only behind all others.
        wrong = list(status.values())
        wrong = [(codes != OK) & (codes != SHORT) for codes in wrong]
        reason = np.select(wrong, list(status.values()), SHORT)
        self._reasons.update(reason[wanted & ~complete].tolist())
        counts = {"complete": complete, "video_only": has["video"] & ~has["audio"]}
        counts["audio_only"] = has["audio"] & ~has["video"]
        self._clips.update({name: int((wanted & rows).sum()) for name, rows in counts.items()})

    def _number(self, clip_class: ClipClass) -> int:
        number = self.classes.setdefault(clip_class, len(self.classes))
        if number >= NOT_USABLE:
            raise FormatError(
                f"{self._root}: its clips have more than {NOT_USABLE} pairs of sizes, such as "
                f"{clip_class}; encode with fewer sizes (video.sizes)"
            )
        return number


def size_of(sizes: np.ndarray) -> tuple[int, ...] | None:
    """Return sizes of an index record without its padding; None where there is nothing."""
    return tuple(size for size in sizes.tolist() if size) or None


def key_places(keys: Sequence[str]) -> np.ndarray:
    """Return where keys lie between 0 and 1, float64 [R]: those below a share are held out.

    Decided by the key alone, so that every view and every seed hold out the same.
    """
    digests = b"".join(hashlib.sha256(key.encode()).digest()[:8] for key in keys)
    return np.frombuffer(digests, ">u8") / 2**64


def by_name(counts: Mapping[int, int]) -> dict[str, int]:
    """Return counts by the name of the status, in the order of the codes."""
    return {STATUS_NAMES[code]: counts[code] for code in sorted(counts)}


def reporting(items: Iterator[Looked], num_items: int, root: Path) -> Iterator[Looked]:
    """Yield ``items``; say once in a while how far that is, where it takes long."""
    started = time.monotonic()
    report_at = started + REPORT_AFTER_S
    for number, item in enumerate(items):
        if time.monotonic() > report_at:
            report_at = time.monotonic() + REPORT_EVERY_S
            log.info("looking at every shard of %s, once: %d of %d", root, number, num_items)
        yield item
