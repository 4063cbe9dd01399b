"""A contender's process, both ends: it reads epochs when told to, and says what they cost.

CPU time is that of the process and of all processes below it, user and system. Memory is the
resident memory of the same processes, with pages that several of them share counted once (PSS).
Linux only.
"""

from __future__ import annotations

import json
import os
import resource
import selectors
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from tools.loader_contenders import CONTENDERS, MEMCPY, PREADV
from tools.loader_data import Batch, Rows, check_batch, check_numbers, numbers
from tools.loader_peers import Epochs, Job

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT_S, END_S = 300.0, 20.0  # for an answer, and to end
MEMORY_EVERY = 8  # batches between two looks at the memory


class LaneError(Exception):
    """A contender can't do its work; says why."""


class Lane:
    """A contender's process, seen from the benchmark.

    Args:
        contender: its name in ``CONTENDERS``.
        job: what it has to read.
        checksums: file of `Rows.checksums`.
        python: the interpreter that has the contender.
    """

    def __init__(self, contender: str, job: Job, checksums: Path, python: str) -> None:
        values = {**asdict(job), "folder": str(job.folder), "contender": contender}
        values["checksums"] = str(checksums)
        log = checksums.parent / "logs" / f"{contender}-{job.num_workers}-{time.monotonic_ns()}"
        log.parent.mkdir(exist_ok=True)
        self._log = log
        # Some leave locks and sockets behind. A short path: those of sockets have a limit.
        self._temporary = tempfile.TemporaryDirectory(prefix="loader-")
        litdata = ("DATA_OPTIMIZER_CACHE_FOLDER", "DATA_OPTIMIZER_DATA_CACHE_FOLDER")
        folders = dict.fromkeys(("TMPDIR", *litdata), self._temporary.name)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **folders}
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                [python, "-m", "tools.loader_lane", json.dumps(values)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                cwd=ROOT,
                env=environment,
            )

    def ask(self, command: str) -> dict[str, Any]:
        """Send a command and return the answer.

        Raises:
            LaneError: the contender failed, died or does not answer.
        """
        self.tell(command)
        return self.answer()

    def tell(self, command: str) -> None:
        """Send a command; where the process has ended, its answer says so."""
        assert self._process.stdin
        with suppress(BrokenPipeError):
            self._process.stdin.write(f"{command}\n".encode())
            self._process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """Return the answer to a command that was sent.

        Raises:
            LaneError: the contender failed, died or does not answer.
        """
        process = self._process
        assert process.stdout
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            if not selector.select(TIMEOUT_S):
                raise LaneError(f"no answer in {TIMEOUT_S:g} s")
        line = process.stdout.readline()
        answer = json.loads(line) if line else {"problem": self._end()}
        if "problem" in answer:
            raise LaneError(answer["problem"])
        return answer

    def dismiss(self) -> None:
        """Let the process end by itself, so that its loader cleans up."""
        assert self._process.stdin
        with suppress(BrokenPipeError):  # of a command that was not taken
            self._process.stdin.close()

    def close(self) -> None:
        """Wait until the process has ended; kill it if it won't."""
        assert self._process.stdout
        self.dismiss()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._temporary.cleanup()

    def _end(self) -> str:
        code = self._process.wait(END_S)
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return f"its process ended with code {code}: {lines[-1] if lines else 'no message'}"


def tree_cpu_s() -> float:
    """Return CPU seconds of this process and those below it, ended ones too."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = time.process_time() + ended.ru_utime + ended.ru_stime
    for child in psutil.Process().children(recursive=True):
        # The CPU clock of another process, as clock_getcpuclockid(3) makes it: to the nanosecond,
        # where /proc counts hundredths of a second.
        seconds += time.clock_gettime((~child.pid << 3) | 2)
    return seconds


def tree_memory_mb() -> float:
    """Return resident memory of this process and those below it, shared pages counted once."""
    total = 0
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        text = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
        total += int(text.split("\nPss:")[1].split()[0])
    return total / 1024


class Server:
    """A contender in its own process: one method for every command."""

    def __init__(self, job: Job, contender: str, checksums: Path) -> None:
        self._job, self._loader, self._checksums = job, CONTENDERS[contender], checksums
        # Limits are limits of reading: what they read stays where it is.
        self._device = "cpu" if contender in (PREADV, MEMCPY) else job.device
        self._epochs: Epochs | None = None
        self._idle_mb = 0.0

    def load(self) -> dict[str, Any]:
        """Import what the contender needs."""
        self._loader.load()
        self._idle_mb = tree_memory_mb()
        return {"version": version(self._loader.package), "idle_mb": self._idle_mb}

    def write(self) -> dict[str, Any]:
        """Write the rows in the contender's format."""
        self._loader.write(self._job.rows, self._job.folder)
        return {}

    def check(self) -> dict[str, Any]:
        """Open, and read an epoch whose every byte is checked."""
        checksums, found = np.load(self._checksums), []
        # Shared pages count in parts for the processes that share them, so that what is there after
        # imports may be less by now.
        memory_mb = [self._idle_mb, tree_memory_mb()]
        begun_s, first_batch_s = time.monotonic(), 0.0
        self._epochs = self._loader.open(self._job)
        for count, batch in enumerate(self._batches()):
            first_batch_s = first_batch_s or time.monotonic() - begun_s
            check_batch(batch, self._job.rows, checksums)
            found.append(numbers(batch))
            if count % MEMORY_EVERY == MEMORY_EVERY - 1:
                memory_mb.append(tree_memory_mb())
        memory_mb.append(tree_memory_mb())
        check_numbers(found, self._job.rows)
        return {"first_batch_s": first_batch_s, "peak_mb": max(memory_mb)}

    def cold(self) -> dict[str, Any]:
        """Open, and measure the first epoch."""
        begun_s = time.monotonic()
        self._epochs = self._loader.open(self._job)
        opened_s = time.monotonic() - begun_s
        turn = self._measure()
        return {**turn, "first_batch_s": opened_s + turn["first_batch_s"]}

    def epoch(self) -> dict[str, Any]:
        """Measure an epoch, after one that brings the contender into its stride."""
        self._measure()
        return self._measure()

    def _measure(self) -> dict[str, float]:
        found: list[torch.Tensor] = []
        cpu_s, begun_s, first_batch_s = tree_cpu_s(), time.monotonic(), 0.0
        for batch in self._batches():
            first_batch_s = first_batch_s or time.monotonic() - begun_s
            found.append(numbers(batch))
        if self._device != "cpu":
            torch.cuda.synchronize()
        wall_s = time.monotonic() - begun_s
        cpu_s = tree_cpu_s() - cpu_s
        check_numbers(found, self._job.rows)
        return {"wall_s": wall_s, "cpu_s": cpu_s, "first_batch_s": first_batch_s}

    def _batches(self) -> Iterator[Batch]:
        assert self._epochs is not None
        for batch in self._epochs():
            if self._device == "cpu":
                yield batch
            else:
                yield {n: t.to(self._device, non_blocking=True) for n, t in batch.items()}


def main() -> None:
    """Serve commands from standard input, one a line, until it ends."""
    # What loaders print must not come between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    values = json.loads(sys.argv[1])
    contender, checksums = values.pop("contender"), Path(values.pop("checksums"))
    rows = values.pop("rows")
    shapes = {name: tuple(rows[name]) for name in ("video_shape", "audio_shape")}
    job = Job(rows=replace(Rows(**rows), **shapes), **{**values, "folder": Path(values["folder"])})
    server = Server(job, contender, checksums)
    for line in sys.stdin:
        try:
            answer = getattr(server, line.strip())()
        except Exception as error:  # whatever a loader raises where it does not work
            traceback.print_exc()
            text = (str(error).strip() or "no message").splitlines()[0]
            answer = {"problem": f"{type(error).__name__}: {text}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
