"""A random choice of rows of a data set by a seed: the same data set and seed, the same rows."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np


def pick_rows(
    shards: Collection[int], fitting: Callable[[int], Sequence[int]], num: int, seed: int
) -> list[tuple[int, int]]:
    """Choose rows from random shards, as few of each as will do.

    A plan is shuffled as a whole, so that rows of few shards are as good as any; no more shards
    are looked into than it takes.

    Args:
        shards: to choose from.
        fitting: returns the rows of a shard that may be chosen.
        num: how many.
        seed: of the choice.

    Returns:
        (shard, row) of ``num`` rows, or of all that fit if there are fewer.
    """
    generator = np.random.default_rng(seed)
    chosen, spare = list[tuple[int, int]](), list[tuple[int, int]]()
    of_each = -(-num // max(1, len(shards)))
    for shard in generator.permutation(sorted(shards)).tolist():
        rows = generator.permutation(np.array(fitting(shard), np.int64)).tolist()
        chosen += [(shard, row) for row in rows[:of_each]]
        spare += [(shard, row) for row in rows[of_each : of_each + num - len(spare)]]
        if len(chosen) >= num:
            break
    return (chosen + spare)[:num]
