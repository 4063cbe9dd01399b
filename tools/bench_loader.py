"""What loading latents costs: ours against the loaders people know, and against copying alone.

All read the same rows of video, audio and text, shuffled, each from the format that its
documentation advises, and give batches of tensors, pinned on their way to a GPU where there is
one. Each has a process of its own; peers are measured without and with worker processes, ours with
one and two threads that read. They take turns, so that other load on the machine hits all alike, of
two epochs each, and the second is measured. Before that, every row of an epoch is compared with
what was written, and every measured epoch must hold every row once.

warm: the files are in the page cache, as reading leaves them there. cold: they were dropped from
it before a fresh process reads its first epoch (needs no root; "cached" is the share that stayed).
first s: from opening to the first batch, imports done. peak MB: resident memory of all processes
of a contender, shared pages counted once. Compare the ratios: rates change with the machine.

Needs 6 times the rows on disk (1,024 rows: 4.6 GB), and 10 GB of memory. Linux only.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tools.loader_cache import cached_share, drop, warm
from tools.loader_contenders import CONTENDERS, MEMCPY, OURS, SHARD_PEERS, folder_of
from tools.loader_data import NUM_SHARDS, Rows
from tools.loader_env import PeersError, peers_python
from tools.loader_lane import Lane, LaneError
from tools.loader_peers import Job
from tools.loader_results import (
    Result,
    Turn,
    fastest_each,
    measured,
    print_table,
    ratios,
    summarise,
)

HERE = ("webdataset",)  # a peer that this project's own environment has


@dataclass(frozen=True)
class Bench:
    """The rows, where they lie, and how they are read.

    Attributes:
        pythons: interpreter of each contender.
    """

    rows: Rows
    batch: int
    folder: Path
    device: str
    pythons: dict[str, str]

    @property
    def checksums(self) -> Path:
        """File of the rows' checksums."""
        return self.folder / "checksums.npy"

    def lane(self, contender: str, num_workers: int) -> Lane:
        """Start a contender's process."""
        folder = folder_of(self.folder, contender)
        job = Job(self.rows, folder, self.batch, num_workers, self.device)
        return Lane(contender, job, self.checksums, self.pythons[contender])

    def write(self, contender: str) -> None:
        """Write the rows in a contender's format, unless a run before has.

        Raises:
            LaneError: it can't.
        """
        data, rows = CONTENDERS[contender].data, json.dumps(asdict(self.rows))
        folder, stamp = self.folder / data, self.folder / f"{data}.json"
        if stamp.exists() and stamp.read_text() == rows:
            return
        stamp.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        lane = self.lane(contender, 0)
        try:
            lane.ask("load")
            lane.ask("write")
        finally:
            lane.close()
        stamp.write_text(rows)

    def prepare(self, results: Sequence[Result]) -> None:
        """Write the rows in all formats needed; note which contenders can't."""
        np.save(self.checksums, np.array(self.rows.checksums(), np.uint32))
        problems: dict[str, str] = {}
        for result in results:
            data = CONTENDERS[result.contender].data
            if data not in problems and not result.problem:
                problems[data], begun_s = "", time.monotonic()
                try:
                    self.write(result.contender)
                    say(f"written: {data} in {time.monotonic() - begun_s:.1f} s")
                except LaneError as error:
                    problems[data] = str(error)
            result.problem = result.problem or problems[data]
        for data in problems:
            drop(self.folder / data)
            warm(self.folder / data)  # as reading leaves them: pages just written are dearer


def say(text: str) -> None:
    """Tell how far it is, apart from the results."""
    print(text, file=sys.stderr, flush=True)


class Field:
    """Contenders' processes, and what they came to; one that fails takes no further part.

    Args:
        bench: what they read.
        results: to be filled in.
    """

    def __init__(self, bench: Bench, results: Sequence[Result]) -> None:
        self._bench = bench
        self._lanes: list[tuple[Lane, Result]] = []
        for result in measured(results):
            lane = bench.lane(result.contender, result.num_workers)
            lane.tell("load")
            if self._lanes:  # two at a time
                self._note(*self._lanes[-1], Lane.answer)
            self._lanes.append((lane, result))
        if self._lanes:
            self._note(*self._lanes[-1], Lane.answer)

    def close(self) -> None:
        """End the processes."""
        for lane, _ in self._lanes:
            lane.dismiss()
        for lane, _ in self._lanes:
            lane.close()

    def check(self) -> None:
        """Let each read an epoch whose every byte is checked."""
        for lane, result in self._lanes:
            self._note(lane, result, lambda lane: lane.ask("check"))

    def run_warm(self, rounds: int) -> None:
        """Let each read an epoch in turn, and again."""
        for _ in range(rounds):
            for lane, result in self._lanes:
                if turn := self._asked(lane, result, lambda lane: lane.ask("epoch")):
                    result.turns.append(Turn(**turn))

    def run_cold(self) -> None:
        """Let each open its files after they were dropped, and read an epoch."""
        for lane, result in self._lanes:
            folder = folder_of(self._bench.folder, result.contender)
            drop(folder)
            result.cold_cached = max(result.cold_cached, cached_share(folder))
            if turn := self._asked(lane, result, lambda lane: lane.ask("cold")):
                result.cold_turns.append(Turn(**turn))

    def _asked(
        self, lane: Lane, result: Result, ask: Callable[[Lane], dict[str, Any]]
    ) -> dict[str, Any]:
        """Return a contender's answer; an empty one where it has, or now meets, a problem."""
        if result.problem:
            return {}
        try:
            return ask(lane)
        except LaneError as error:
            result.problem = str(error)
            return {}

    def _note(self, lane: Lane, result: Result, ask: Callable[[Lane], dict[str, Any]]) -> None:
        for name, value in self._asked(lane, result, ask).items():
            setattr(result, name, value)


def run(bench: Bench, results: Sequence[Result], rounds: int, cold_rounds: int) -> None:
    """Write, check and measure."""
    bench.prepare(results)
    able = [result for result in results if not result.problem]
    say(f"measuring {len(able)} processes in {rounds} rounds, and {cold_rounds} cold")
    with closing(Field(bench, able)) as field:
        field.check()
        field.run_warm(rounds)
    summarise(able, bench.rows.num_rows)
    fastest = [result for result in fastest_each(able) if result.contender != MEMCPY]
    for _ in range(cold_rounds):
        # Others: files that a process has mapped can't be dropped from the page cache.
        with closing(Field(bench, fastest)) as field:
            field.run_cold()
    summarise(able, bench.rows.num_rows)


def choose(names: str) -> list[str]:
    """Return the contenders named, in the order of the table; all where nothing is named."""
    chosen = [name.strip() for name in names.split(";")] if names else list(CONTENDERS)
    unknown = [name for name in chosen if name not in CONTENDERS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of: {'; '.join(CONTENDERS)}")
    return [name for name in CONTENDERS if name in chosen]


def interpreters(results: Sequence[Result], peers_env: Path) -> dict[str, str]:
    """Return the interpreter of each contender; the peers' environment is made where it must be.

    Where it can't be made, the peers' results say why.
    """
    pythons = {result.contender: sys.executable for result in results}
    away = [r for r in results if r.contender in SHARD_PEERS and r.contender not in HERE]
    if not away:
        return pythons
    begun_s = time.monotonic()
    try:
        python = peers_python(peers_env)
    except PeersError as error:
        for result in away:
            result.problem = str(error)
        return pythons
    say(f"environment of the peers: {peers_env}, ready in {time.monotonic() - begun_s:.1f} s")
    return {**pythons, **{result.contender: python for result in away}}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench_loader",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rows", type=int, default=1024, help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=16, help="rows, default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="warm epochs, default: %(default)s")
    parser.add_argument("--cold-rounds", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--only", type=choose, default=choose(""), help="contenders, joined by ;")
    parser.add_argument("--folder", type=Path, help="for data and peers; kept (default: temporary)")
    parser.add_argument("--peers-env", type=Path, help="virtual environment of the peers; kept")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(arguments)
    if options.rows < 1 or options.rows % (NUM_SHARDS * options.batch):
        parser.error(f"--rows must be a multiple of {NUM_SHARDS} batches of {options.batch}")
    if options.rounds < 1 or options.cold_rounds < 0:
        parser.error("--rounds must be 1 at least, --cold-rounds 0 at least")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 1 where ours can't be measured."""
    options = parse(arguments)

    folder = options.folder or Path(tempfile.mkdtemp(prefix="bench-loader-"))
    folder, rows = folder.absolute(), Rows(options.rows)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results = [
        Result(name, workers) for name in options.only for workers in CONTENDERS[name].num_workers
    ]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        pythons = interpreters(results, (options.peers_env or folder / "peers").absolute())
        bench = Bench(rows, options.batch, folder, device, pythons)
        run(bench, results, options.rounds, options.cold_rounds)
    finally:
        if not options.folder:
            shutil.rmtree(folder)
    if options.json:
        found = {
            "rows": asdict(rows),
            "row_bytes": rows.row_bytes,
            "batch": options.batch,
            "device": device,
            "results": [asdict(result) for result in results],
            "ours_over": ratios(results),
        }
        print(json.dumps(found, indent=1))
    else:
        print(f"{rows.num_rows} rows of {rows.row_bytes / 1e3:.0f} kB, batch {options.batch}")
        print_table(results, rows.num_rows)
    return int(any(result.problem for result in results if result.contender.startswith(OURS)))


if __name__ == "__main__":
    sys.exit(main())
