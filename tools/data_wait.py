"""``python -m tools.data_wait``: the share of a training run that is spent waiting for data.

Trains configs/train/demo.yaml by `deepspeed`, on random latents of the demo's shapes or on a data
set of yours (``--data``), and prints the share of the time in which the loader kept the rank that
waited longest from computing. The time until the first batch is there is start-up, and apart.
"""

from __future__ import annotations

import argparse
import json
import re
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tools.loader_data import Rows, write_columns

REPOSITORY = Path(__file__).resolve().parents[1]
# The demo's clips of 2 s, see configs/train/demo.yaml; the hash codec's text is 256 wide.
DEMO = Rows(
    num_rows=512,
    video_shape=(32, 16, 8, 8),
    audio_shape=(50, 16, 8),
    text_width=256,
    clip_s=2.0,
)


@dataclass(frozen=True)
class Waiting:
    """How long a run waited.

    Attributes:
        steps: optimiser steps.
        step_s: seconds of one, on average.
        share: share of the time of all steps that was spent waiting for data.
        worst_share: the same of the worst window between two log lines.
    """

    steps: int
    step_s: float
    share: float
    worst_share: float


def main() -> None:
    """Train, and print the share."""
    parser = argparse.ArgumentParser(prog="python -m tools.data_wait", description=__doc__)
    parser.add_argument("--data", type=Path, help="data set (default: random latents)")
    parser.add_argument("--ranks", type=int, default=2, help="ranks (default 2)")
    parser.add_argument("--steps", type=int, default=100, help="optimiser steps (default 100)")
    arguments, overrides = parser.parse_known_args()
    with tempfile.TemporaryDirectory(prefix="data_wait-") as folder:
        data, settings = arguments.data, [f"steps={arguments.steps}", *overrides]
        if data is None:
            data = Path(folder) / "shards"
            write_columns(DEMO, data)
        waiting = measure(data, Path(folder) / "run", arguments.ranks, settings)
    print(
        f"{waiting.steps} steps of {waiting.step_s:.3f} s on {arguments.ranks} ranks waited for "
        f"data {waiting.share:.2%} of the time, {waiting.worst_share:.2%} in the worst window"
    )


def measure(data: Path, run_dir: Path, num_ranks: int, settings: list[str]) -> Waiting:
    """Train to the end and read what the run says of itself.

    Raises:
        SystemExit: the run failed; its last words are shown.
    """
    command = [
        str(Path(sys.executable).with_name("deepspeed")),
        f"--num_accelerators={num_ranks}",
        f"--master_port={free_port()}",
        "--master_addr=127.0.0.1",
        "train/main.py",
        "--config=configs/train/demo.yaml",
        f"data.root={data.resolve()}",
        f"run_dir={run_dir}",
        *settings,
    ]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    said = re.search(r"waited for data ([\d.]+)% of the time", done.stderr)
    if done.returncode or not said:
        sys.exit(f"error: the run failed\n{done.stderr[-3000:]}")
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    first = [0, *(line["step"] for line in lines)]
    took_s = sum(
        (line["step"] - before) * line["step_s"] for before, line in zip(first, lines, strict=False)
    )
    return Waiting(
        steps=lines[-1]["step"],
        step_s=took_s / lines[-1]["step"],
        share=float(said[1]) / 100,
        worst_share=max(line["data_wait"] for line in lines),
    )


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    main()
