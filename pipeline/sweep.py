"""What the commands that look over a whole data set share: status, verify and pack.

The plan, read one shard at a time, and how such a command shows progress and ends. Imports
neither torch nor Ray, so that a command starts at once.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from pipeline import format as fmt
from pipeline.shards import NoRoomError


def read_plan(root: Path) -> fmt.Plan:
    """Read the plan's head and check the numbers in it.

    Raises:
        FormatError: there is none, or it is damaged.
    """
    plan = fmt.read_plan(root)
    sizes = [(s.first_shard, s.num_clips, s.shard_size) for s in (*plan.clips, *plan.captions)]
    is_sound = all(type(size) is int and size >= 0 for three in sizes for size in three)
    is_sound = is_sound and all(shard_size > 0 for _, _, shard_size in sizes)
    if not (is_sound and isinstance(plan.plan_id, str) and isinstance(plan.source, dict)):
        raise fmt.FormatError(
            f"{root / 'plan.json'} is damaged (plan_id {plan.plan_id!r:.40}, segments {sizes}, "
            f"source {plan.source!r:.80}; expected text, counts and an object); restore it"
        )
    return plan


class PlanTable:
    """plan.parquet, read one shard at a time.

    Raises:
        FormatError: it can't be read, or has not one row group a shard.
    """

    def __init__(self, root: Path, plan: fmt.Plan) -> None:
        self.path = root / "plan.parquet"
        self._rows_per_shard = plan.shard_rows()
        self._num_captions = sum(segment.num_clips for segment in plan.captions)
        with self._naming_damage():
            self._file = pq.ParquetFile(self.path)
        if self._file.num_row_groups != len(self._rows_per_shard):
            raise fmt.FormatError(
                f"{self.path} holds {self._file.num_row_groups} row groups, expected one for each "
                f"of the {len(self._rows_per_shard)} shards of plan.json; restore both"
            )

    def read(self, shard: int, columns: Sequence[str]) -> dict[str, list[Any]]:
        """Return columns of a shard's clips in row order; ``key`` and ``text_row`` always.

        Raises:
            FormatError: the rows are not those of the shard, or a key or text row is impossible.
        """
        names = dict.fromkeys(["shard", "row", "key", "text_row", *columns])
        with self._naming_damage():
            table = self._file.read_row_group(shard, columns=list(names))
            missing = set(names) - set(table.column_names)
            if missing or any(table[name].null_count for name in names):
                raise pa.ArrowInvalid(f"columns {sorted(missing)} missing, or values missing")
            values = {name: table[name].to_pylist() for name in names}
        num_rows = int(self._rows_per_shard[shard])
        keys, text_rows = values["key"], values["text_row"]
        if values["shard"] != [shard] * num_rows or values["row"] != list(range(num_rows)):
            raise fmt.FormatError(
                f"{self.path}: row group {shard} does not hold the {num_rows} rows of shard "
                f"{shard} in order; restore it"
            )
        for key in keys:
            fmt.check_key(key)
        if len(set(keys)) < num_rows or not all(0 <= r < self._num_captions for r in text_rows):
            raise fmt.FormatError(
                f"{self.path}: shard {shard} holds a key twice, or a text row outside the "
                f"{self._num_captions} captions; restore it"
            )
        return values

    @contextmanager
    def _naming_damage(self) -> Iterator[None]:
        try:
            yield
        except (OSError, pa.ArrowException) as error:
            reason = " ".join(str(error).split())[:200]
            raise fmt.FormatError(f"{self.path} can't be read ({reason}); restore it") from None


def progress_bar(total: int, unit: str) -> tqdm:
    """Return a bar on stderr; a log file gets a line every 10 s."""
    interval_s = 0.5 if sys.stderr.isatty() else 10.0
    return tqdm(total=total, unit=unit, file=sys.stderr, mininterval=interval_s)


@contextmanager
def one_line_errors(after_stop: str) -> Iterator[None]:
    """End the program with one line and exit code 1 where an expected error comes up.

    Args:
        after_stop: what to say after Ctrl-C.
    """
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(f"\nstopped; {after_stop}")
    except (fmt.FormatError, NoRoomError) as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        sys.exit(f"error:{where}: {error.strerror or error}")
