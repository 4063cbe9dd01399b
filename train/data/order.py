"""The order of an epoch: a pure function of (seed, epoch), the same on every rank.

Shards are permuted, then rows are permuted inside windows of shards, so that reading stays near
a few files at a time. Global batches are cut from that order; what does not fill a batch at the
end is dropped, other rows in every epoch. Fewer rows than one batch are passed through several
times: such an epoch is one batch.
"""

from __future__ import annotations

import numpy as np

from train.rng import seed_of


def epoch_batches(
    rows_per_shard: np.ndarray, global_batch: int, window: int, seed: int, epoch: int
) -> np.ndarray:
    """Return the global batches of an epoch, int64 [steps_per_epoch, global_batch]."""
    num_rows = int(rows_per_shard.sum())
    passes = -(-global_batch // num_rows)
    orders = [
        pass_order(rows_per_shard, window, seed, epoch * passes + one) for one in range(passes)
    ]
    steps = steps_per_epoch(num_rows, global_batch)
    return np.concatenate(orders)[: steps * global_batch].reshape(steps, global_batch)


def steps_per_epoch(num_rows: int, global_batch: int) -> int:
    """Return the whole global batches in an epoch, at least 1."""
    return max(1, num_rows // global_batch)


def pass_order(rows_per_shard: np.ndarray, window: int, seed: int, number: int) -> np.ndarray:
    """Return every row once, in the order of one pass.

    Args:
        rows_per_shard: int [num_shards], usable rows of each shard; rows are counted through
            all shards.
        window: shards whose rows are mixed with one another.
        seed: seed of the run.
        number: number of the pass, from 0.

    Returns:
        int64 [sum(rows_per_shard)], a permutation of the rows.
    """
    generator = np.random.Generator(np.random.Philox(key=seed_of(seed, "order", number)))
    ends = np.cumsum(rows_per_shard, dtype=np.int64)
    rows_of = np.split(np.arange(ends[-1]), ends[:-1])
    shards = generator.permutation(len(rows_per_shard))
    parts = []
    for first in range(0, len(shards), window):
        rows = [rows_of[shard] for shard in shards[first : first + window]]
        parts.append(generator.permutation(np.concatenate(rows)))
    return np.concatenate(parts)
