"""One pass over a data set for its census: every shard checked, every clip given a class.

Streams: what is held in memory is per shard, and a byte per unique caption.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from pipeline.files import map_ahead
from pipeline.format import OK, Column, FormatError, Plan, keys_hash, shard_name
from pipeline.plan_table import PlanTable
from pipeline.records import ChannelSums, record_path, repair
from pipeline.tables import open_parquet
from train.data.census import CensusWriter
from train.data.classes import CLIP_MODALITIES, Classifier, Selection
from train.data.committed import CommittedShard, check_all_committed, read_committed

log = logging.getLogger(__name__)

REPORT_AFTER_S, REPORT_EVERY_S = 5.0, 30.0


class ShardFiles(NamedTuple):
    """What was read of a shard, in any thread."""

    columns: dict[str, CommittedShard]
    facts: pa.Table | None


def write_census(
    writer: CensusWriter, root: Path, plan: Plan, opened: Mapping[str, Column], selection: Selection
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
    fact_names = list(selection.clip_filter.facts) if selection.clip_filter else []
    table, names = PlanTable(root, plan), ["split"]
    names += [] if selection.clip_filter is None else selection.clip_filter.plan_columns

    def look(shard: int) -> ShardFiles:
        read = {
            name: read_committed(column, shard, rows_per_shard) for name, column in columns.items()
        }
        return ShardFiles(read, read_facts(root, shard, read, fact_names) if fact_names else None)

    classifier = Classifier(root, selection, text_status)
    sums = {name: _Sums(column) for name, column in columns.items()}
    shards = range(len(rows_per_shard))
    for shard, files in enumerate(reporting(map_ahead(root, look, shards), len(shards), root)):
        clips = table.read(shard, names)
        check_keys(columns, shard, files, clips["key"])
        for name, column in files.columns.items():
            sums[name].add(shard, column.record.channels)
        index = {name: column.index for name, column in files.columns.items()}
        codes = classifier.codes_of(clips, index, files.facts)
        crcs = {name: column.record.index_crc32c for name, column in files.columns.items()}
        writer.add(codes, np.array(clips["text_row"], np.int64), clips["key"], crcs)
    all_sums = {name: found.as_record() for name, found in sums.items()}
    writer.finish(list(classifier.classes), all_sums, classifier.tally(), text_crcs)


def read_text(column: Column, plan: Plan) -> tuple[np.ndarray, list[int]]:
    """Return the status of every caption, uint8, and the crc32c of every index.

    Raises:
        FormatError, OSError: as ``read_committed``; or captions have several widths.
    """
    rows_per_shard = plan.shard_rows(text=True)
    shards = range(len(rows_per_shard))
    status, crcs, widths = [np.empty(0, np.uint8)], [], set()

    def read(shard: int) -> CommittedShard:
        return read_committed(column, shard, rows_per_shard)

    for shard, found in enumerate(map_ahead(column.path, read, shards)):
        status.append(found.index["status"].astype(np.uint8))
        crcs.append(found.record.index_crc32c)
        widths |= set(found.index["shape"][found.index["status"] == OK, 1].tolist())
        if len(widths) > 1:
            raise FormatError(
                f"{column.path} shard {shard}: tokens are {sorted(widths)} wide, expected one "
                f"width in the whole column; {repair(column, shard)}"
            )
    return np.concatenate(status), crcs


def check_keys(
    columns: Mapping[str, Column], shard: int, files: ShardFiles, keys: Sequence[str]
) -> None:
    """Compare the keys that columns and facts state with the planned ones.

    Raises:
        FormatError: they are other clips, or the same in another order.
    """
    expected = keys_hash(keys)
    for name, read in files.columns.items():
        if read.record.keys_hash != expected:
            raise FormatError(
                f"{record_path(columns[name], shard)}: keys_hash is {read.record.keys_hash}, "
                f"expected {expected} as planned; {repair(columns[name], shard)}"
            )
    if files.facts is not None and files.facts["key"].to_pylist() != list(keys):
        folder = facts_folder(files.columns)
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
        with np.errstate(over="ignore"):
            # A mean square is no less than the square of the mean, but for rounding.
            most = (1 + 1e-6) * squares * channels.count
            is_wrong = ~(np.isfinite(most) & (total**2 <= most))
        if is_wrong.any():
            channel = int(np.flatnonzero(is_wrong)[0])
            raise FormatError(
                f"{record_path(self.column, shard)}: channel {channel} has the sum "
                f"{total[channel]} and the sum of squares {squares[channel]}, which no "
                f"{channels.count} values have; {repair(self.column, shard)}"
            )
        self.count += channels.count
        self.total, self.squares = self.total + total, self.squares + squares

    def as_record(self) -> dict[str, Any]:
        """Return "channels" as of a commit record."""
        total, squares = self.total.tolist(), self.squares.tolist()
        return {"count": self.count, "sum": total, "sum_of_squares": squares}


def reporting(items: Iterator[ShardFiles], num_items: int, root: Path) -> Iterator[ShardFiles]:
    """Yield ``items``; say once in a while how far that is, where it takes long."""
    started = time.monotonic()
    report_at = started + REPORT_AFTER_S
    for number, item in enumerate(items):
        if time.monotonic() > report_at:
            report_at = time.monotonic() + REPORT_EVERY_S
            log.info("looking at every shard of %s, once: %d of %d", root, number, num_items)
        yield item
