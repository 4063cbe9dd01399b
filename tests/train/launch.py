"""Starts ranks for tests: processes of this test run, or the real `deepspeed` launcher.

Every start has a port of its own on the loopback interface and a deadline, so that neither two
tests nor a hang can stop the others.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch.multiprocessing as mp

REPOSITORY = Path(__file__).parents[2]


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def rank_environment(rank: int, num_ranks: int, port: int) -> dict[str, str]:
    """Return what a launcher tells a rank."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }


def spawn(function: Callable[..., None], num_ranks: int, *arguments: Any) -> None:
    """Run ``function(*arguments)`` as every rank; raises what a rank raised."""
    mp.spawn(_as_rank, (num_ranks, free_port(), function, arguments), nprocs=num_ranks)


def _as_rank(
    rank: int, num_ranks: int, port: int, function: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    from train.engine import leave_ranks

    os.environ.update(rank_environment(rank, num_ranks, port))
    function(*arguments)
    leave_ranks()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # as train/main.py ends: threads of gloo may abort the interpreter's teardown


@contextmanager
def launched(*settings: str, num_ranks: int) -> Iterator[subprocess.Popen]:
    """Run `deepspeed train/main.py` beside the test; whatever is left of it ends with the block."""
    process = subprocess.Popen(
        [
            str(Path(sys.executable).with_name("deepspeed")),
            f"--num_accelerators={num_ranks}",
            f"--master_port={free_port()}",
            "--master_addr=127.0.0.1",
            "train/main.py",
            *settings,
        ],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def train(*settings: str, num_ranks: int, timeout_s: float = 200) -> subprocess.CompletedProcess:
    """Run `deepspeed train/main.py` to its end; output and errors are text."""
    with launched(*settings, num_ranks=num_ranks) as process:
        output, errors = process.communicate(timeout=timeout_s)
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
