"""``python -m tools.simulate_cluster``: what VGGSound-size work takes on 1, 8, 64 GPUs.

Simulates the cells of a cluster clip by clip (``tools.simulated_cells``) with measured rates:
``--calibration`` takes what ``python -m pipeline.encode --src … --calibrate --json`` printed,
``--src`` measures at once. A GPU's rate is an assumption unless the calibration ran on one; every
number assumed is printed. Two answers for every size of cluster: the hours for the whole of it,
first start to last commit, and what 24 hours of steady work give.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pipeline.settings import ConfigError
from tools.simulated_cells import CellModel, simulate

VGGSOUND_CLIPS = 190_983  # rows of ../shared/clips/vggsound_rows.csv; of 10 s each
DAY_S = 86400.0
# Cells that are simulated for the 24 hours: without a last shard they don't depend on each other.
CELLS_PER_DAY = 4

ASSUMPTIONS = {
    "encode-clips-per-s": (
        10.0,
        "of one GPU; an autoencoder like Stable Diffusion's needs about 22 TFLOP for the 80 "
        "frames of a clip at 256², which is 5 to 18 clips/s on an A100 or H100 at 40 %% of peak",
    ),
    "decode-cv": (0.5, "spread of decode times: standard deviation over mean"),
    "cpus-per-gpu": (12, "cores a node has for each GPU, one of them the encoder's"),
    "window-clips": (32, "decoded clips in flight in a cell"),
    "clip-mb": (1.0, "of a clip's file, read over the network; 0: local disk"),
    "latent-mb": (2.7, "of a clip's latents, written over the network; 0: local disk"),
    "network-gbps": (3.0, "of one cell: a GPU's share of its node's network"),
    "commit-s": (0.5, "of a shard besides the transfer: checksum, index, record"),
    "start-s": (20.0, "until a cell's first clip is decoded"),
    "fault-hours": (200.0, "mean time of a cell between losses of it; 0: never"),
    "detect-s": (30.0, "until a lost cell is noticed and its shard given out again"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    options = parse(arguments)
    try:
        measured, told = measured_rates(options)
        model = cell_model(options, measured)
        rows = [figures(model, num_gpus, options) for num_gpus in options.gpus]
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps({"cell": asdict(model), "rates": told, "clusters": rows}, indent=1))
    else:
        print_assumptions(options, model, measured, told)
        print_table(rows)
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.simulate_cluster",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    rates = parser.add_mutually_exclusive_group(required=True)
    rates.add_argument("--calibration", type=Path, help="output of --calibrate --json")
    rates.add_argument("--src", help="clips to measure decoding on, here and now")
    rates.add_argument("--decode-clips-per-s", type=float, help="of one decoder process")
    parser.add_argument("--gpus", type=_numbers, default=[1, 8, 64], help="such as 1,8,64")
    parser.add_argument("--clips", type=int, default=VGGSOUND_CLIPS, help="default: %(default)s")
    parser.add_argument("--clip-s", type=float, default=10.0, help="default: %(default)s")
    parser.add_argument("--shard-size", type=int, default=512, help="default: %(default)s")
    parser.add_argument("--decoders", type=int, help="of a cell (default: as many as it needs)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print JSON for programs")
    for name, (value, meaning) in ASSUMPTIONS.items():
        help_text = f"{meaning} (default: %(default)s)"
        parser.add_argument(f"--{name}", type=type(value), default=value, help=help_text)
    options = parser.parse_args(arguments)
    rate = options.decode_clips_per_s
    positive = (options.encode_clips_per_s, options.network_gbps, options.clips, options.clip_s)
    counts = (options.shard_size, options.window_clips, *options.gpus, options.cpus_per_gpu - 1)
    if min(positive) <= 0 or min(counts) < 1 or (rate is not None and rate <= 0):
        parser.error("rates, clips and the network must be more than 0, counts 1 or more, 2 CPUs")
    others = [getattr(options, name.replace("-", "_")) for name in ASSUMPTIONS]
    if min(others) < 0 or (options.decoders is not None and options.decoders < 1):
        parser.error("no number may be negative, and decoders must be 1 or more")
    return options


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def measured_rates(options: argparse.Namespace) -> tuple[dict[str, float], str]:
    """Return the rates that replace options, and in words where they come from.

    Raises:
        ConfigError: the file is no calibration; ``--src`` holds too few clips.
    """
    if options.decode_clips_per_s is not None:
        return {"decode_clips_per_s": options.decode_clips_per_s}, "as given"
    if options.calibration is not None:
        value, where = _read_calibration(options.calibration), f"measured ({options.calibration})"
    else:
        from pipeline.calibrate import calibrate
        from pipeline.config import EncodeConfig
        from pipeline.sources import open_source

        config = EncodeConfig()
        value = asdict(calibrate(open_source(options.src, config), config))
        where = f"measured here on {value['num_clips']} clips of {options.src}"
    measured = {
        "decode_clips_per_s": value["decode_clips_per_s"],
        "decode_cv": value["decode_cv"],
        "window_clips": max(1, value["window_clips"]),
    }

    if value["encoder_gpus"]:
        measured["encode_clips_per_s"] = value["encode_clips_per_s"]["all"]
    return measured, where


def _read_calibration(path: Path) -> dict[str, Any]:
    needed = {"decode_clips_per_s", "decode_cv", "window_clips", "encoder_gpus"}
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"--calibration {path} can't be read: {error}") from None
    missing = needed - set(value) if isinstance(value, dict) else needed
    if missing:
        raise ConfigError(
            f"--calibration {path} lacks {', '.join(sorted(missing))}; expected what "
            "`python -m pipeline.encode --src CLIPS --out DIR --calibrate --json` prints"
        )
    return value


def cell_model(options: argparse.Namespace, measured: dict[str, float]) -> CellModel:
    """Describe a cell by the options and what was measured; measured rates win."""
    values: dict[str, Any] = {
        name: measured.get(name, value) for name, value in vars(options).items()
    }
    bytes_per_s = options.network_gbps * 1e9 / 8
    decode, encode = measured["decode_clips_per_s"], values["encode_clips_per_s"]
    most = options.cpus_per_gpu - 1
    decoders = options.decoders or min(most, math.ceil(encode / decode))
    return CellModel(
        num_decoders=decoders,
        decode_s=1 / decode,
        decode_cv=values["decode_cv"],
        encode_s=1 / encode,
        window_clips=int(values["window_clips"]),
        read_s=options.clip_mb * 1e6 / bytes_per_s,
        write_s=options.latent_mb * 1e6 / bytes_per_s,
        commit_s=options.commit_s,
        start_s=options.start_s,
        fault_every_s=options.fault_hours * 3600,
        detect_s=options.detect_s,
    )


def figures(model: CellModel, num_gpus: int, options: argparse.Namespace) -> dict[str, Any]:
    """Simulate one size of cluster."""
    whole = simulate(model, num_gpus, options.clips, options.shard_size, options.seed)
    num_cells = min(num_gpus, CELLS_PER_DAY)
    day = simulate(model, num_cells, None, options.shard_size, options.seed, horizon_s=DAY_S)
    day_clips = day.num_clips * num_gpus / num_cells
    return {
        "gpus": num_gpus,
        "hours": whole.seconds / 3600,
        "clips_per_s": whole.num_clips / whole.seconds,
        "media_hours_per_hour": whole.num_clips * options.clip_s / whole.seconds,
        "of_speed_of_light": whole.num_clips * model.encode_s / num_gpus / whole.seconds,
        "busy": whole.busy,
        "bound": bound(model),
        "tail_s": whole.tail_s,
        "faults": whole.num_faults,
        "given_up_shards": whole.num_given_up,
        "day_clips": day_clips,
        "day_of_the_whole": day_clips / options.clips,
    }


def bound(model: CellModel) -> str:
    """Return the slowest stage of a cell."""
    seconds = {
        "decoding": (model.decode_s + model.read_s * model.num_decoders) / model.num_decoders,
        "encoding": model.encode_s,
        "network": model.read_s + model.write_s,
    }
    return max(seconds, key=lambda name: seconds[name])


def alone(model: CellModel) -> float:
    """Return the share of its encoder's speed that a cell reaches, started and without faults."""
    num_clips = 20_000
    free = replace(model, start_s=0, fault_every_s=0, commit_s=0)
    return num_clips * model.encode_s / simulate(free, 1, num_clips, 512, 0).seconds


def print_assumptions(
    options: argparse.Namespace, model: CellModel, measured: dict[str, float], told: str
) -> None:
    """Print what the table is computed from."""
    print(f"{options.clips:,} clips of {options.clip_s:g} s, {options.shard_size} to a shard\n")
    print(f"{told}:")
    for name, value in measured.items():
        print(f"  {name.replace('_', '-')} {value:.3g}")
    print("assumed:")
    for option, (_, meaning) in ASSUMPTIONS.items():
        name = option.replace("-", "_")
        if name not in measured:
            told = f"{option} {getattr(options, name):g}"
            print(f"  {told:22} {meaning.replace('%%', '%')}")
    print(f"a cell: 1 encoder and {model.num_decoders} decoders", end="")
    needed = math.ceil(model.decode_s / model.encode_s)
    if needed > model.num_decoders:
        print(f"; {needed} would keep the encoder busy", end="")
    print(f"; alone, once started, it has {alone(model):.0%} of its encoder's speed")


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print one line for every size of cluster."""
    print(
        "\nGPUs     hours  clips/s  media h/h  of light  decoders encoders network  "
        "tail min  lost cells  24 hours: clips  times the whole  bound"
    )
    for row in rows:
        busy = row["busy"]
        print(
            f"{row['gpus']:>4} {row['hours']:>9.2f} {row['clips_per_s']:>8.1f} "
            f"{row['media_hours_per_hour']:>10,.0f} {row['of_speed_of_light']:>9.1%} "
            f"{busy['decoders']:>9.0%} {busy['encoders']:>8.0%} {busy['network']:>7.0%} "
            f"{row['tail_s'] / 60:>9.1f} {row['faults']:>11} {row['day_clips']:>16,.0f} "
            f"{row['day_of_the_whole']:>16.1f}  {row['bound']}"
        )


if __name__ == "__main__":
    sys.exit(main())
