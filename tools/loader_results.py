"""What the loader benchmark measured: medians, ratios and a table."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from tools.loader_contenders import FOLDER, OURS, PREADV, SHARD_PEERS


@dataclass(frozen=True)
class Turn:
    """One epoch: its wall time, CPU time over all processes, and time to its first batch."""

    wall_s: float
    cpu_s: float
    first_batch_s: float


@dataclass
class Result:
    """What one contender came to with one number of workers.

    Attributes:
        problem: why it could not be measured.
        idle_mb: memory after imports; ``peak_mb``: the most from then on.
        first_batch_s: from opening to the first batch, warm.
        turns: one for each round, warm.
        cold_turns: the same, cold, each in a fresh process.
        cold_first_batch_s: median over those.
        cold_cached: largest share of its files that stayed in the page cache.
    """

    contender: str
    num_workers: int
    version: str = ""
    problem: str = ""
    idle_mb: float = 0.0
    peak_mb: float = 0.0
    first_batch_s: float = 0.0
    turns: list[Turn] = field(default_factory=list)
    cold_turns: list[Turn] = field(default_factory=list)
    cold_first_batch_s: float = 0.0
    cold_cached: float = 0.0
    rows_per_s: float = 0.0
    rows_per_cpu_s: float = 0.0
    of_preadv: float = 0.0
    cold_rows_per_s: float = 0.0
    cold_rows_per_cpu_s: float = 0.0

    @property
    def name(self) -> str:
        """The contender and its workers: processes, or of ours threads."""
        if not self.num_workers:
            return self.contender
        kind = "thread" if self.contender.startswith(OURS) else "worker"
        return f"{self.contender}, {self.num_workers} {kind}{'s' * (self.num_workers > 1)}"


def fastest_each(results: Sequence[Result]) -> list[Result]:
    """Return each contender with the number of workers that gives most rows per CPU second."""
    best: dict[str, Result] = {}
    for result in sorted(measured(results), key=lambda result: result.rows_per_cpu_s):
        best[result.contender] = result
    return [result for result in results if best.get(result.contender) is result]


def measured(results: Sequence[Result]) -> list[Result]:
    """Return the results without a problem."""
    return [result for result in results if not result.problem]


def summarise(results: Sequence[Result], num_rows: int) -> None:
    """Fill in medians over rounds, and the ratios to ``preadv`` beside it in time."""
    limit = next((result for result in measured(results) if result.contender == PREADV), None)
    for result in measured(results):
        result.rows_per_s = statistics.median(num_rows / turn.wall_s for turn in result.turns)
        result.rows_per_cpu_s = statistics.median(num_rows / turn.cpu_s for turn in result.turns)
        if limit:
            result.of_preadv = ratio(result, limit)
        if cold := result.cold_turns:
            result.cold_rows_per_s = statistics.median(num_rows / turn.wall_s for turn in cold)
            result.cold_rows_per_cpu_s = statistics.median(num_rows / turn.cpu_s for turn in cold)
            result.cold_first_batch_s = statistics.median(turn.first_batch_s for turn in cold)


def ratio(result: Result, other: Result) -> float:
    """Return by how much a contender does more rows per CPU second; median over rounds."""
    pairs = zip(result.turns, other.turns, strict=True)
    return statistics.median(theirs.cpu_s / own.cpu_s for own, theirs in pairs)


def ratios(results: Sequence[Result]) -> dict[str, float]:
    """Return ours over the best of the shard formats, over files, and over ``preadv``."""
    best = {result.contender: result for result in fastest_each(results)}
    if OURS not in best:
        return {}
    shards = [best[name] for name in SHARD_PEERS if name in best]
    others = {name: best[name] for name in (FOLDER, PREADV) if name in best}
    if shards:
        peer = max(shards, key=lambda result: result.rows_per_cpu_s)
        others = {f"{peer.name} (best shard format)": peer, **others}
    return {name: ratio(best[OURS], other) for name, other in others.items()}


def print_table(results: Sequence[Result], num_rows: int) -> None:
    """Print what each contender came to."""
    print(
        f"\n{'':33s} |{'page cache warm':^58s}| cold\n{'':33s} |  rows/s  rows/CPU s"
        "   (min - max)  of preadv  first s  peak MB |  rows/s  rows/CPU s  first s  cached"
    )
    for result in results:
        if result.problem:
            print(f"{result.name:33s} | not compared: {result.problem}")
            continue
        rates = [num_rows / turn.cpu_s for turn in result.turns]
        spread = f"({min(rates):.0f} - {max(rates):.0f})"
        line = (
            f"{result.name:33s} |{result.rows_per_s:8.0f}{result.rows_per_cpu_s:12.0f}{spread:>16s}"
            f"{result.of_preadv:9.2f}{result.first_batch_s:9.3f}{result.peak_mb:9.0f} |"
        )
        if result.cold_turns:
            line += (
                f"{result.cold_rows_per_s:8.0f}{result.cold_rows_per_cpu_s:12.0f}"
                f"{result.cold_first_batch_s:9.3f}{result.cold_cached:8.1%}"
            )
        print(line)
    print("\nrows per CPU second, ours over:")
    for name, value in ratios(results).items():
        print(f"  {name:45s}{value:6.2f}")
    versions = {result.contender: result.version for result in results if result.version}
    peers = [f"{name} {versions[name]}" for name in SHARD_PEERS if name in versions]
    print(f"\n{', '.join(peers)}")
