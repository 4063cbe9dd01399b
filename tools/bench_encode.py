"""``python -m tools.bench_encode``: how near encoding is to the speed of its own parts, and peers.

Two cases: real clips, where decoding is the bound, and clips that are light to decode, where the
codecs are. In each, side by side on the same clips: ours with one cell and with two (an encoder
and a decoder each, one thread a process); the same decoders that do nothing else; the same codecs
fed from memory (the speed of light); a plain loop that writes with ``webdataset.ShardWriter``, as
video2dataset does; Ray Data's ``map_batches`` and ``write_webdataset``. Rates are steady ones, from
the first shard, clip or batch to the last; "all" divides by the whole time, start-up included.

"of the limit" is our rate over the lesser of two: as many decoders alone, as many codecs alone,
each with the machine to themselves. "of pairs" is over the rate of as many decoders and codecs at
once, a process each, of which a codec waits for its decoder but gets no frames from it: what this
machine leaves of the limit when both work, with a hand-over and tars that cost nothing. With fewer
CPUs than processes the limit is out of reach, and pairs tell what can be had. Compare ratios: rates
change with the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipeline.config import EncodeConfig, column_specs
from pipeline.demux import probing
from pipeline.settings import ConfigError, load
from pipeline.wording import share_text
from tools.bouncing import ClipSettings
from tools.contenders import SIZE, Task
from tools.encode_runs import EncodeRun, encode_run
from tools.make_clips import make_clips
from tools.peers_encode import PeerJob, check_tars, loop, ray_data
from tools.side_by_side import Timing
from tools.stage_rates import (
    StageJob,
    codecs_only,
    decode_only,
    pairs_only,
    repeated,
    whole_clips,
)

REAL_CLIPS = Path(__file__).resolve().parents[2] / "shared/clips/vggsound/video"
SHARD_SIZE = 16
# Light to decode: as many frames in the file as are wanted of it, and few pixels.
LIGHT_CLIPS = ClipSettings(seconds=10, size=64, fps=8)
# As many values in a latent as by default, for some more arithmetic.
HEAVIER_CODEC = ("video.codec.frames=8", "video.codec.channels=128")
CELLS = (1, 2)


@dataclass
class Measured:
    """One contender: steady rates and rates over all, one a round; or why there are none."""

    name: str
    rates: list[float] = field(default_factory=list)
    overall: list[float] = field(default_factory=list)
    problem: str = ""

    @property
    def clips_per_s(self) -> float:
        """Median of the steady rates."""
        return statistics.median(self.rates) if self.rates else 0.0

    def add(self, timing: Timing) -> None:
        """Take in one round."""
        self.rates.append(timing.clips_per_s)
        self.overall.append(timing.num_clips / timing.seconds)


@dataclass
class Case:
    """One set of clips with its settings, and what was measured on it.

    Attributes:
        ours: by number of cells.
        decoding, codecs, pairs: limits, by number of cells.
        peers: by name.
        runs: what our runs say of themselves, and their memory; of the last round, by cells.
    """

    name: str
    job: StageJob
    clips: Path
    settings: list[str]
    ours: dict[int, Measured] = field(default_factory=dict)
    decoding: dict[int, Measured] = field(default_factory=dict)
    codecs: dict[int, Measured] = field(default_factory=dict)
    pairs: dict[int, Measured] = field(default_factory=dict)
    peers: dict[str, Measured] = field(default_factory=dict)
    runs: dict[int, EncodeRun] = field(default_factory=dict)

    def limits(self, cells: int) -> dict[str, float]:
        """Return what so many cells can reach at most, by what bounds them."""
        return {
            "decoders": self.decoding[cells].clips_per_s,
            "codecs": self.codecs[cells].clips_per_s,
        }

    def share(self, cells: int) -> float:
        """Return how much of the least limit so many cells reach."""
        return self.ours[cells].clips_per_s / min(self.limits(cells).values())

    def share_of_pairs(self, cells: int) -> float:
        """Return how much so many cells reach of what this machine leaves of the limit."""
        return self.ours[cells].clips_per_s / self.pairs[cells].clips_per_s


def num_cpus() -> int:
    """Return the CPUs that this process may use."""
    return len(os.sched_getaffinity(0))


def prepare(name: str, sources: list[Path], folder: Path, count: int, extra: Sequence[str]) -> Case:
    """Lay out a case's clips and work out its settings."""
    settings = [f"shard_size={SHARD_SIZE}", "decoders=1", *extra]
    config = load(EncodeConfig, None, settings)
    specs = {m: spec for m, spec in column_specs(config).items() if m != "text"}
    paths = repeated(sources, folder / "clips", count)
    return Case(name, StageJob(paths, config, specs), folder / "clips", settings)


def measure(case: Case, folder: Path, rounds: int, peer_decoder: str) -> None:
    """Let all contenders have a turn, in every round."""
    tasks = tuple(_task(path, case.job.config.clip.seconds) for path in case.job.paths)
    for turn in range(rounds):
        for cells in CELLS:
            share = len(tasks) // cells
            decoding = case.decoding.setdefault(cells, Measured(f"{cells} decoders alone"))
            _try(decoding, lambda n=cells: decode_only(case.job, n))
            codecs = case.codecs.setdefault(cells, Measured(f"{cells} codecs alone"))
            _try(codecs, lambda n=cells, s=share: codecs_only(case.job, n, s))
            pairs = case.pairs.setdefault(cells, Measured(f"{cells} pairs"))
            _try(pairs, lambda n=cells: pairs_only(case.job, n))
            ours = case.ours.setdefault(cells, Measured(f"ours, {cells} cells"))
            _try(ours, lambda n=cells, t=turn: _ours(case, folder, n, t))
        peers: dict[str, Callable[[PeerJob], Timing]] = {
            f"loop, {num_cpus()} processes": lambda job: loop(job, num_cpus()),
            "Ray Data, 1 + 1 actors": lambda job: ray_data(job, 1, 1),
        }
        for number, (name, run) in enumerate(peers.items()):
            out = folder / f"peer-{number}-{turn}"
            job = PeerJob(tasks, case.job.specs, str(out), SHARD_SIZE, peer_decoder)
            measured = case.peers.setdefault(name, Measured(name))
            _try(measured, lambda j=job, r=run: _checked(r, j))


def _try(measured: Measured, run: Callable[[], Timing]) -> None:
    print(f"  {measured.name} …", file=sys.stderr, flush=True)
    try:
        measured.add(run())
    except (RuntimeError, ValueError) as error:
        measured.problem = str(error)


def _ours(case: Case, folder: Path, cells: int, turn: int) -> Timing:
    out = folder / f"ours-{cells}-{turn}"
    run = encode_run(case.clips, out, [*case.settings, f"cells={cells}"])
    case.runs[cells] = run
    return run.timing


def _checked(run: Callable[[PeerJob], Timing], job: PeerJob) -> Timing:
    timing = run(job)
    check_tars(Path(job.out), job)
    return timing


def _task(path: str, seconds: float) -> Task:
    with probing(Path(path)) as probed:
        if probed.video is None:
            raise ValueError(f"{path} has no picture")
        width, height = probed.video.width, probed.video.height
    scale = SIZE / min(width, height)
    return Task(path, seconds, (round(width * scale), round(height * scale)))


def print_case(case: Case) -> None:
    """Print a case's tables."""
    print(f"\n{case.name}: {len(case.job.paths)} clips, {' '.join(case.settings)}")
    print(f"{'':28}{'clips/s':>8}{'all':>8}  of the limit  of pairs")
    for cells in CELLS:
        limits = case.limits(cells)
        bound = min(limits, key=lambda name: limits[name])
        told = ", ".join(f"{name} {limit:.2f}" for name, limit in limits.items())
        shares = f"{case.share(cells):>14.2f}{case.share_of_pairs(cells):>10.2f}"
        pairs = f"pairs {case.pairs[cells].clips_per_s:.2f}"
        print(_line(case.ours[cells]) + shares, f" (limit: {bound}; {told}; {pairs})")
    for measured in case.peers.values():
        print(_line(measured))
    for cells, run in case.runs.items():
        summary = run.summary
        print(
            f"{cells} cells: start-up {summary['startup_s']:.1f} s; from then to the last "
            f"commit, decoders decode {share_text(summary['decode_busy_share'])}, codecs encode "
            f"{share_text(summary['speed_of_light_share'])}; they wait for tar, crc, index and "
            f"commit {share_text(summary['write_wait_share'], 1)}, which threads write in "
            f"{share_text(summary['write_share'], 1)} of the time"
        )
        for role, peak in run.memory.items():
            print(
                f"    {role:24}{peak.processes:>3} x{peak.resident / 1e6:>7.0f} MB at most, "
                f"{peak.shared / 1e6:.0f} of them shared"
            )


def _line(measured: Measured) -> str:
    if measured.problem:
        return f"{measured.name:28}not compared: {measured.problem}"
    overall = statistics.median(measured.overall)
    return f"{measured.name:28}{measured.clips_per_s:>8.2f}{overall:>8.2f}"


def as_json(case: Case) -> dict[str, Any]:
    """Return what was measured, for programs."""
    measured = {
        name: {str(key): asdict(one) for key, one in getattr(case, name).items()}
        for name in ("ours", "decoding", "codecs", "pairs", "peers")
    }
    runs = {
        str(cells): {
            "summary": run.summary,
            "memory": {role: asdict(peak) for role, peak in run.memory.items()},
        }
        for cells, run in case.runs.items()
    }
    limits = {str(cells): case.limits(cells) for cells in CELLS}
    shares = {str(cells): case.share(cells) for cells in CELLS}
    told = {"clips": len(case.job.paths), "settings": case.settings}
    told |= {"limits": limits, "share_of_limit": shares}
    told |= {"share_of_pairs": {str(cells): case.share_of_pairs(cells) for cells in CELLS}}
    return {**told, **measured, "runs": runs}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 1 where a run of ours fails."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench_encode",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--clips", type=Path, default=REAL_CLIPS, help="folder of real clips")
    parser.add_argument("--num-clips", type=int, default=136, help="real ones, repeated")
    parser.add_argument("--num-light", type=int, default=480, help="light ones, repeated")
    parser.add_argument("--rounds", type=int, default=1, help="medians are taken of more")
    parser.add_argument("--peer-decoder", default="decord", help="or PyAV, of tools.contenders")
    parser.add_argument("--folder", type=Path, help="kept (default: a temporary folder)")
    parser.add_argument("--json", action="store_true", help="print JSON for programs")
    options = parser.parse_args(arguments)
    if min(options.num_clips, options.num_light) < 4 * SHARD_SIZE or options.rounds < 1:
        parser.error(f"{4 * SHARD_SIZE} clips at least, and one round")
    cases = []
    with tempfile.TemporaryDirectory(prefix="bench-encode-") as temporary:
        folder = options.folder or Path(temporary)
        try:
            real = whole_clips(options.clips, EncodeConfig())
            make_clips(folder / "light", LIGHT_CLIPS, 16)
            light = sorted((folder / "light").glob("*.mp4"))
            for name, sources, count, extra in (
                ("real clips", real, options.num_clips, ()),
                ("light clips", light, options.num_light, HEAVIER_CODEC),
            ):
                place = folder / name.replace(" ", "-")
                cases.append(prepare(name, sources, place, count, extra))
                print(f"{name}:", file=sys.stderr)
                measure(cases[-1], place, options.rounds, options.peer_decoder)
        except ConfigError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    packages = ("ray", "webdataset", "decord2", "av", "torch", "numpy")
    about = {"cpus": num_cpus(), "machine": platform.processor() or platform.machine()}
    about |= {name: version(name) for name in packages}
    if options.json:
        print(json.dumps({"about": about, **{c.name: as_json(c) for c in cases}}, indent=1))
    else:
        for case in cases:
            print_case(case)
        print("\n" + ", ".join(f"{name} {value}" for name, value in about.items()))
    failed = [one.problem for case in cases for one in case.ours.values() if one.problem]
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
