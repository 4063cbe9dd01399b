"""The stream of training: global batches without end, over epochs and data sets.

A pure function of its cursor: every rank cuts the same batches, and a run goes on anywhere. Each
step takes its batch from one data set, so that all samples of a step have one shape.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from math import floor
from typing import Any

import numpy as np

from pipeline.format import FormatError
from pipeline.settings import ConfigError
from train.data.order import EpochOrder, Layout, Tail, permutation, shards_of, wraps
from train.errors import ResumeError
from train.rng import seed_of, uniform

ROUND_STEPS = 1024  # data sets share every so many steps by their weights
MOST_ROWS = 1 << 20  # of a global batch
MOST_COUNTED = 1 << 62  # samples, steps or rows: what is added to them must fit 64 bits


@dataclass(frozen=True)
class Place:
    """Where the stream is in one data set.

    Attributes:
        epoch: number of the data set's epoch.
        consumed: rows of each bucket used in this epoch; one used again to fill up a batch is not
            counted again.
    """

    epoch: int
    consumed: tuple[int, ...]


@dataclass(frozen=True)
class Cursor:
    """Where the stream is: all of its state.

    Attributes:
        samples: samples before it.
        steps: global batches before it.
        places: one for each data set.
    """

    samples: int
    steps: int
    places: tuple[Place, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the cursor as JSON values."""
        places = [{"epoch": place.epoch, "consumed": [*place.consumed]} for place in self.places]
        return {"samples": self.samples, "steps": self.steps, "places": places}

    @classmethod
    def from_json(cls, value: Any) -> Cursor:
        """Return the cursor that ``to_json`` gave.

        Raises:
            ResumeError: ``value`` is no cursor; names the field.
        """
        fields = _fields(value, "cursor", ("samples", "steps", "places"))
        places = []
        for number, place in enumerate(_list(fields["places"], "cursor.places")):
            name = f"cursor.places[{number}]"
            of_place = _fields(place, name, ("epoch", "consumed"))
            consumed = _list(of_place["consumed"], f"{name}.consumed")
            places.append(
                Place(
                    epoch=_count(of_place["epoch"], f"{name}.epoch"),
                    consumed=tuple(
                        _count(rows, f"{name}.consumed[{bucket}]")
                        for bucket, rows in enumerate(consumed)
                    ),
                )
            )
        samples, steps = (_count(fields[name], f"cursor.{name}") for name in ("samples", "steps"))
        used = sum(sum(place.consumed) for place in places)
        if not max(steps, used) <= samples <= steps * MOST_ROWS:
            expected = f"what {steps} steps and {used} rows used in these epochs can be"
            raise _damaged("cursor.samples", samples, expected)
        return cls(samples, steps, tuple(places))


@dataclass(frozen=True, eq=False)
class GlobalBatch:
    """The rows of one optimiser step over all ranks. G samples.

    Attributes:
        first_sample: place of the first sample in the stream.
        part: number of the data set.
        bucket: number of the shapes that all samples share.
        rows: int64 [G], rows of the data set in plan order.
        cursor: the stream behind this batch.
    """

    first_sample: int
    part: int
    bucket: int
    rows: np.ndarray
    cursor: Cursor


class Stream:
    """Global batches of one or several data sets, epoch after epoch.

    Of every 1,024 steps each data set has its share by weight, rounded up or down at random; so
    shares are exact in the long run, however small. Inside, steps are in random order.

    Args:
        parts: the data sets.
        weights: their shares of the steps, relative to one another, above 0.
        global_batch: rows of a batch, G.
        window_shards: shards whose rows are mixed with one another.
        tail: what becomes of rows that do not fill a batch at the end of an epoch.
        seed: seed of the run.

    Raises:
        FormatError: a data set has no usable clip.
        ConfigError: the global batch is too large.
    """

    def __init__(
        self,
        parts: Sequence[Layout],
        weights: Sequence[float],
        *,
        global_batch: int,
        window_shards: int,
        tail: Tail,
        seed: int,
    ) -> None:
        if global_batch > MOST_ROWS:
            raise ConfigError(f"global_batch={global_batch}: expected at most {MOST_ROWS} clips")
        self._parts, self._global_batch = tuple(parts), global_batch
        self._tail: Tail = tail
        self._window_shards, self._seed = window_shards, seed
        total = sum(map(Fraction, weights))
        self._shares = [Fraction(weight) / total for weight in weights]
        self._round = lru_cache(2)(self._parts_of_round)
        #: int64 [num_buckets] for each data set: its usable rows by bucket.
        self.num_rows = tuple(part.counts.sum(axis=0, dtype=np.int64) for part in self._parts)
        for number, rows in enumerate(self.num_rows):
            if not rows.sum():
                raise FormatError(
                    f"data set {number} (of {len(self._parts)}) has no usable clip; see what "
                    "data.seconds, data.filter and the split leave of it"
                )

    @property
    def steps_per_epoch(self) -> tuple[int, ...]:
        """Global batches in an epoch of each data set."""
        size = self._global_batch
        return tuple(
            int((-(-rows // size) if wraps(rows, size, self._tail) else rows // size).sum())
            for rows in self.num_rows
        )

    def start(self) -> Cursor:
        """Return the cursor before the first sample."""
        return Cursor(0, 0, tuple(Place(0, (0,) * len(rows)) for rows in self.num_rows))

    def batches(self, start: Cursor) -> Iterator[GlobalBatch]:
        """Return the global batches behind a cursor, without end.

        Raises:
            ResumeError: the cursor is of other data sets; names the field.
            FormatError: while iterating, a shard's rows are not those of its counts.
        """
        self._check(start)
        return self._batches(start)

    def shards_of(self, batch: GlobalBatch) -> list[int]:
        """Return the shards of its data set that a batch needs, in the order of first need."""
        shards = shards_of(self._parts[batch.part].first_rows, batch.rows)
        return list(dict.fromkeys(shards.tolist()))

    def part_of(self, step: int) -> int:
        """Return the number of the data set that a step takes its batch from."""
        number, place = divmod(step, ROUND_STEPS)
        return int(self._round(number)[place])

    def _batches(self, cursor: Cursor) -> Iterator[GlobalBatch]:
        epochs = [self._epochs(part, place) for part, place in enumerate(cursor.places)]
        while True:
            part, first_sample = self.part_of(cursor.steps), cursor.samples
            bucket, rows, place = next(epochs[part])
            places = (*cursor.places[:part], place, *cursor.places[part + 1 :])
            cursor = Cursor(first_sample + self._global_batch, cursor.steps + 1, places)
            yield GlobalBatch(first_sample, part, bucket, rows, cursor)

    def _epochs(self, part: int, place: Place) -> Iterator[tuple[int, np.ndarray, Place]]:
        """Yield bucket, rows and the place behind them of a data set's batches, without end."""
        num_rows, seed = self.num_rows[part], seed_of(self._seed, "part", part)
        while True:
            order = EpochOrder(
                self._parts[part],
                self._global_batch,
                self._window_shards,
                seed,
                place.epoch,
                self._tail,
                place.consumed,
            )
            for bucket, rows in order:
                consumed = list(place.consumed)
                used = consumed[bucket] + self._global_batch
                consumed[bucket] = min(used, int(num_rows[bucket]))
                place = replace(place, consumed=tuple(consumed))
                yield bucket, rows, place
            place = Place(place.epoch + 1, (0,) * len(num_rows))

    def _parts_of_round(self, number: int) -> np.ndarray:
        """Return the data set of each step of a round, int64 [ROUND_STEPS]."""
        # Systematic sampling: one draw, added to the cumulative shares, rounds all of them.
        draw = Fraction(uniform(self._seed, "round", number))
        quotas = [share * ROUND_STEPS for share in self._shares]
        ends = [floor(sum(quotas[: part + 1]) + draw) for part in range(len(quotas))]
        parts = np.repeat(np.arange(len(ends)), np.diff([0, *ends]))
        return parts[permutation(ROUND_STEPS, self._seed, "steps", number)]

    def _check(self, cursor: Cursor) -> None:
        if len(cursor.places) != len(self._parts):
            raise _damaged("cursor.places", len(cursor.places), f"{len(self._parts)} places")
        for number, (place, num_rows) in enumerate(zip(cursor.places, self.num_rows, strict=True)):
            name = f"cursor.places[{number}].consumed"
            if len(place.consumed) != len(num_rows):
                raise _damaged(name, [*place.consumed], f"{len(num_rows)} counts, one per bucket")
            if (np.array(place.consumed) > num_rows).any():
                raise _damaged(name, [*place.consumed], f"no more than {num_rows.tolist()}")


def _damaged(name: str, found: Any, expected: str) -> ResumeError:
    return ResumeError(
        f"the saved stream has {name} {found!r}, expected {expected}; the checkpoint is damaged or "
        "of other data: use another one"
    )


def _fields(value: Any, name: str, expected: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(value, dict) or set(value) != set(expected):
        found = sorted(value) if isinstance(value, dict) else value
        raise _damaged(name, found, f"the fields {', '.join(expected)}")
    return value


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise _damaged(name, value, "a list")
    return value


def _count(value: Any, name: str) -> int:
    if type(value) is not int or not 0 <= value < MOST_COUNTED:  # True is an int too
        raise _damaged(name, value, f"a whole number from 0 to {MOST_COUNTED}")
    return value
