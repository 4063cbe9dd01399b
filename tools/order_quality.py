"""``python -m tools.order_quality``: how well an order of training is mixed, in figures.

Rows lie in shards, one behind the other. An order is measured by pairs of rows, each with a
distance in storage (rows between them on disk) and in training (samples between them):

    all pairs     Pearson correlation of the two distances over pairs drawn at random: 1 is the
                  order of storage, 0 a full shuffle, 2 / number of shards (and a few thousandths
                  by chance) shards that are shuffled as wholes
    in a shard    the same over pairs of one shard: whether its rows keep their order
    neighbours    share of a sample's batch-mates that are of its own shard
    spread        distance in training of pairs of one shard, a full shuffle's being 1

Compared are a full shuffle, windows of some sizes (``train.data.order``), and webdataset's own
code for shuffling: all shards, then a buffer of as many rows as the window has. Memory is what
mixing needs: a window holds the numbers of its rows (9 bytes), a buffer the samples themselves.
"""

from __future__ import annotations

import argparse
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass

import numpy as np
from webdataset import filters

from train.data.order import EpochOrder, permutation

NUM_PAIRS = 1_000_000  # an epoch
NUMBER_BYTES = 9  # a row's number and its bucket
DEFAULT_BUFFER = 1000  # of webdataset's shuffle


@dataclass(frozen=True)
class EvenShards:
    """A data set of ``num_shards`` shards of ``shard_size`` rows of one shape, all usable."""

    num_shards: int
    shard_size: int

    @property
    def num_rows(self) -> int:
        """Rows of all shards."""
        return self.num_shards * self.shard_size

    @property
    def counts(self) -> np.ndarray:
        """Usable rows of each shard, int64 [num_shards, 1]."""
        return np.full((self.num_shards, 1), self.shard_size)

    @property
    def first_rows(self) -> np.ndarray:
        """Number of each shard's first row, int64 [num_shards + 1]."""
        return np.arange(self.num_shards + 1) * self.shard_size

    def buckets_of(self, shard: int) -> np.ndarray:
        """Return the one bucket, uint8 [shard_size]."""
        return np.zeros(self.shard_size, dtype=np.uint8)


@dataclass(frozen=True)
class Quality:
    """Figures of one order, see the head of this file."""

    all_pairs: float
    in_a_shard: float
    neighbours: float
    spread: float


def main() -> None:
    """Parse the command line, measure, and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shards", type=int, default=400)
    parser.add_argument("--shard-size", type=int, default=500, help="rows of a shard")
    parser.add_argument("--global-batch", type=int, default=256)
    parser.add_argument("--windows", type=int, nargs="+", default=[1, 8, 32, 128], metavar="SHARDS")
    parser.add_argument("--row-bytes", type=int, default=752_000, help="latents of a clip")
    parser.add_argument("--epochs", type=int, default=8)
    options = parser.parse_args()
    data = EvenShards(options.shards, options.shard_size)
    size, windows = options.global_batch, options.windows
    memory, found = {}, defaultdict(list)
    for epoch in range(options.epochs):
        for name, memory_bytes, order in orders(data, size, windows, options.row_bytes, epoch):
            memory[name] = memory_bytes
            found[name].append(astuple(measure(order, data, size, epoch)))
    print(
        f"{data.num_rows:,} rows in {data.num_shards} shards of {data.shard_size}, global batch "
        f"{size}, mean of {options.epochs} epochs; memory at {options.row_bytes:,} bytes a row\n"
    )
    print(f"{'order':<34}{'memory':>12}{'all pairs':>11}{'in a shard':>12}", end="")
    print(f"{'neighbours':>12}{'spread':>8}")
    for name, epochs in found.items():
        all_pairs, in_a_shard, neighbours, spread = np.mean(epochs, axis=0)
        print(
            f"{name:<34}{memory[name] / 1e6:>9,.1f} MB{all_pairs:>11.4f}{in_a_shard:>12.4f}", end=""
        )
        print(f"{neighbours:>12.2%}{spread:>8.3f}")


def orders(
    data: EvenShards, global_batch: int, windows: Sequence[int], row_bytes: int, epoch: int
) -> Iterator[tuple[str, int, np.ndarray]]:
    """Yield each order's name, the bytes that mixing needs, and its rows, int64 [N]."""
    everything = data.num_rows * NUMBER_BYTES
    yield "storage", 0, np.arange(data.num_rows)
    yield "full shuffle", everything, permutation(data.num_rows, "full", epoch)
    for window in windows:
        rows = min(window, data.num_shards) * data.shard_size
        order = windowed(data, global_batch, window, epoch)
        yield f"windows of {window} shards", rows * NUMBER_BYTES, order
    default = buffered(data, DEFAULT_BUFFER, 100, epoch)
    yield f"webdataset, buffer {DEFAULT_BUFFER:,} (default)", DEFAULT_BUFFER * row_bytes, default
    for window in windows:
        rows = min(window, data.num_shards) * data.shard_size
        yield f"webdataset, buffer {rows:,}", rows * row_bytes, buffered(data, rows, rows, epoch)


def windowed(data: EvenShards, global_batch: int, window: int, epoch: int) -> np.ndarray:
    """Return the rows of an epoch in the order of the loader, int64 [N]; none is dropped."""
    order = EpochOrder(data, global_batch, window, 0, epoch, "wrap", [0])
    return np.concatenate([rows for _, rows in order])[: data.num_rows]


def buffered(data: EvenShards, buffer: int, initial: int, seed: int) -> np.ndarray:
    """Return the rows in webdataset's order, int64 [N]: all shards shuffled, then a buffer.

    Args:
        data: the data set.
        buffer: rows of the buffer.
        initial: rows in it before the first comes out.
        seed: of Python's generator.
    """
    generator = random.Random(seed)
    shards = filters.shuffle(data.num_shards, initial=data.num_shards, rng=generator)
    rows = (
        row
        for shard in shards(iter(range(data.num_shards)))
        for row in range(shard * data.shard_size, (shard + 1) * data.shard_size)
    )
    return np.array(list(filters.shuffle(buffer, initial=initial, rng=generator)(rows)))


def measure(order: np.ndarray, data: EvenShards, global_batch: int, seed: int) -> Quality:
    """Return the figures of an order.

    Args:
        order: int64 [N], the rows in the order of training.
        data: where they lie.
        global_batch: samples of a batch.
        seed: of the pairs.
    """
    generator = np.random.default_rng(seed)
    num_rows, size = data.num_rows, data.shard_size
    place = np.empty(num_rows, dtype=np.int64)
    place[order] = np.arange(num_rows)
    one, other = generator.integers(num_rows, size=(2, NUM_PAIRS))
    all_pairs = correlation(one, other, place)
    other = one // size * size + generator.integers(size, size=NUM_PAIRS)
    distinct = one != other
    one, other = one[distinct], other[distinct]
    in_training = np.abs(place[one] - place[other])
    return Quality(
        all_pairs=all_pairs,
        in_a_shard=correlation(one, other, place),
        neighbours=same_shard_share(order // size, global_batch),
        spread=float(in_training.mean() / ((num_rows + 1) / 3)),
    )


def correlation(one: np.ndarray, other: np.ndarray, place: np.ndarray) -> float:
    """Return Pearson's correlation of the distances of pairs in storage and in training."""
    return float(np.corrcoef(np.abs(one - other), np.abs(place[one] - place[other]))[0, 1])


def same_shard_share(shards: np.ndarray, global_batch: int) -> float:
    """Return the share of pairs within a batch that are of one shard.

    Args:
        shards: shard of every sample in the order of training, int64 [N].
        global_batch: samples of a batch, 2 or more; what doesn't fill one doesn't count.
    """
    batches = shards[: len(shards) // global_batch * global_batch].reshape(-1, global_batch)
    counts = [np.unique(batch, return_counts=True)[1] for batch in batches]
    same = sum(int((count * (count - 1)).sum()) for count in counts)  # ordered pairs
    return same / (batches.size * (global_batch - 1))


if __name__ == "__main__":
    main()
