"""A plan's tables, read a shard at a time: plan.parquet has its clips, captions.parquet its texts.

A row group is a shard. An extension replaces both tables before plan.json, so they may hold more
shards than plan.json knows of; those don't count.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import format as fmt
from pipeline.captions import CAPTIONS_NAME
from pipeline.media import Clip
from pipeline.tables import open_parquet

PLAN_NAME = "plan.parquet"


class PlanTable:
    """The rows of a plan, by shard; plan.parquet stays open, for a big plan has a long footer.

    Raises:
        FormatError: plan.parquet can't be read, or not a row group of its size for every shard.
    """

    def __init__(self, root: Path, plan: fmt.Plan) -> None:
        self.path = root / PLAN_NAME
        self._rows_per_shard = plan.shard_rows()
        self._captions_per_shard = plan.shard_rows(text=True)
        self._num_captions = int(self._captions_per_shard.sum())
        self._file = self._open(self.path, self._rows_per_shard)
        self._captions: pq.ParquetFile | None = None

    def read(self, shard: int, columns: Sequence[str]) -> dict[str, list[Any]]:
        """Return columns of a shard's clips in row order; ``key`` and ``text_row`` always.

        Raises:
            FormatError: the rows are not those of the shard, or a key or text row is impossible.
        """
        names = dict.fromkeys(["shard", "row", "key", "text_row", *columns])
        values = self._row_group(self._file, self.path, shard, list(names))
        num_rows = int(self._rows_per_shard[shard])
        keys, text_rows = values["key"], values["text_row"]
        if values["shard"] != [shard] * num_rows or values["row"] != list(range(num_rows)):
            raise fmt.FormatError(
                f"{self.path}: row group {shard} does not hold the {num_rows} rows of shard "
                f"{shard} in order; restore it"
            )
        for key in keys:
            fmt.check_key(key)
        is_known = {type(row) for row in text_rows} == {int}  # 1.5 is no row
        is_known &= all(0 <= row < self._num_captions for row in text_rows)
        if len(set(keys)) < num_rows or not is_known:
            raise fmt.FormatError(
                f"{self.path}: shard {shard} holds a key twice, or a text row outside the "
                f"{self._num_captions} captions; restore it"
            )
        return values

    def clips(self, shard: int) -> list[Clip]:
        """Return a shard's clips in row order.

        Raises:
            FormatError: as ``read``.
        """
        names = list(Clip.__dataclass_fields__)
        values = self.read(shard, names)
        return [Clip(*row) for row in zip(*(values[name] for name in names), strict=True)]

    def captions(self, shard: int) -> list[str]:
        """Return the captions of a shard of the text column in row order.

        Raises:
            FormatError: captions.parquet can't be read, or the rows are not those of the shard.
        """
        path = self.path.with_name(CAPTIONS_NAME)
        if self._captions is None:
            self._captions = self._open(path, self._captions_per_shard)
        values = self._row_group(self._captions, path, shard, ["row", "caption"])
        first = int(self._captions_per_shard[:shard].sum())
        if values["row"] != list(range(first, first + int(self._captions_per_shard[shard]))):
            raise fmt.FormatError(
                f"{path}: row group {shard} does not hold the captions of text shard {shard} in "
                "order; restore it"
            )
        return values["caption"]

    def read_through(self) -> None:
        """Read every page of both tables, whose checksums are compared.

        Raises:
            FormatError: one of them is damaged.
        """
        for path in (self.path, self.path.with_name(CAPTIONS_NAME)):
            with self._naming_damage(path), open_parquet(path) as file:
                for group in range(file.num_row_groups):
                    file.read_row_group(group)

    def _open(self, path: Path, rows_per_shard: np.ndarray) -> pq.ParquetFile:
        with self._naming_damage(path):
            file = open_parquet(path)
        groups = range(min(file.num_row_groups, len(rows_per_shard)))
        if [file.metadata.row_group(g).num_rows for g in groups] != rows_per_shard.tolist():
            raise fmt.FormatError(
                f"{path} holds {file.num_row_groups} row groups, expected one for each "
                f"of the {len(rows_per_shard)} shards of plan.json, of its size; restore both"
            )
        return file

    def _row_group(
        self, file: pq.ParquetFile, path: Path, shard: int, names: list[str]
    ) -> dict[str, list[Any]]:
        with self._naming_damage(path):
            table = file.read_row_group(shard, columns=names)
            missing = set(names) - set(table.column_names)
            if missing or any(table[name].null_count for name in names):
                raise pa.ArrowInvalid(f"columns {sorted(missing)} missing, or values missing")
            return {name: table[name].to_pylist() for name in names}

    @staticmethod
    @contextmanager
    def _naming_damage(path: Path) -> Iterator[None]:
        try:
            yield
        except (OSError, pa.ArrowException) as error:
            reason = " ".join(str(error).split())[:200]
            raise fmt.FormatError(f"{path} can't be read ({reason}); restore it") from None
