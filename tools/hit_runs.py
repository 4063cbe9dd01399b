"""Encode commands that are hit by faults: what hits them, whether they survive, what it costs."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from tools import faults
from tools.faults import Fault

# Small, so that runs are short: what is tested is not how fast they are.
SETTINGS = ["clip.seconds=1", "video.size=64", "shard_size=4", "decoders=1", "cells=2"]
POLL_S = 0.05
# A command that takes longer hangs; no run of these takes a tenth.
MAX_COMMAND_S = 300.0
# A command that runs on despite a full disk gets its room back.
MAX_FULL_S = 20.0
# Before a fault that is not early: the run has recovered from the one before.
NUM_COMMITS_BETWEEN = 6
# Between two kills of decoders: a clip whose decoder dies twice gets a status, as it should.
DECODER_GAP_S = 10.0
# Commands of a data set that fail though nothing hits them.
MAX_FAILED = 3


class Nodes(Protocol):
    """The cluster that commands run on."""

    address: str

    def raylets(self) -> list[int]:
        """Return the processes that start the actors."""
        ...

    def replace_second(self) -> None:
        """Kill a node, and let another one join."""
        ...


class ChaosError(Exception):
    """The cluster or the undisturbed run can't be had, or a command hangs."""


@dataclass
class Hit:
    """A fault that was injected, and what became of it.

    Attributes:
        kind: of fault.
        at: second of ``time.time`` at which it was injected.
        again: whether the command ended over it.
        said: the last line of the command then.
        lost_s: until the next fault or the end, what it took longer than undisturbed for as many
            shards: starts, work done again, and the time of a cell that was not there.
    """

    kind: str
    at: float
    again: bool = False
    said: str = ""
    lost_s: float = 0.0


@dataclass
class Result:
    """All faults of a session.

    Attributes:
        hits: in their order.
        usual_s: mean time between commits of an undisturbed run.
        num_data_sets: finished and compared.
        problems: what was wrong with them.
        seconds: all of it.
    """

    hits: list[Hit] = field(default_factory=list)
    usual_s: float = 0.0
    num_data_sets: int = 0
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0


class Command:
    """The encode command, running."""

    def __init__(self, clips: Path, out: Path, address: str, log: Path) -> None:
        arguments = ["--src", str(clips), "--out", str(out), "--address", address, *SETTINGS]
        self.log = log
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pipeline.encode", *arguments], stdout=file, stderr=file
            )
        self.started_s = time.monotonic()

    def poll(self) -> int | None:
        """Return the exit code, None while it runs.

        Raises:
            ChaosError: it has been running for too long.
        """
        code = self.process.poll()
        if code is None and time.monotonic() - self.started_s > MAX_COMMAND_S:
            self.kill()
            raise ChaosError(f"the command hung for {MAX_COMMAND_S:g} s; see {self.log}")
        return code

    def kill(self) -> None:
        """End it without notice."""
        self.process.kill()
        self.process.wait()

    def last_line(self) -> str:
        """Return the last thing it said."""
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return lines[-1][:300] if lines else ""


class Session:
    """Runs commands, injects faults into them, and keeps count.

    Args:
        clips: folder of clips to encode.
        folder: for logs.
        disk: where data sets are written, and the ballast that fills it.
        nodes: where the commands run.
    """

    def __init__(self, clips: Path, folder: Path, disk: Path, nodes: Nodes) -> None:
        self._clips, self._folder, self._disk, self._nodes = clips, folder, disk, nodes
        self._ballast = disk / "ballast"
        self._num_commands = 0
        self.result = Result()

    def undisturbed(self, out: Path) -> None:
        """Write the reference, and take the time between its commits.

        Raises:
            ChaosError: the command fails.
        """
        command = self._start(out)
        code = self._attend(command, out, [])
        if code:
            raise ChaosError(f"undisturbed, the command fails: {command.last_line()}")
        times = commit_times(out)
        self.result.usual_s = (times[-1] - times[0]) / max(1, len(times) - 1)

    def data_set(self, out: Path, pending: list[Fault]) -> None:
        """Write one data set, hit by faults from the front of ``pending``, which are taken out.

        Raises:
            ChaosError: a command hangs, or none succeeds.
        """
        hits = self.result.hits
        num_before, num_failed = len(hits), 0
        while num_failed < MAX_FAILED:
            command, num_hits = self._start(out), len(hits)
            code = self._attend(command, out, pending)
            if code == 0:
                self._account(hits[num_before:], commit_times(out))
                return
            if len(hits) > num_hits:
                hits[-1].again = True
                hits[-1].said = "" if hits[-1].kind == "driver" else command.last_line()
            else:
                num_failed += 1
                self.result.problems.append(
                    f"a command failed though nothing hit it: {command.last_line()} ({command.log})"
                )
        raise ChaosError(f"no command succeeds, at last: {command.last_line()} ({command.log})")

    def _start(self, out: Path) -> Command:
        self._num_commands += 1
        log = self._folder / f"command-{self._num_commands:03d}.log"
        return Command(self._clips, out, self._nodes.address, log)

    def _attend(self, command: Command, out: Path, pending: list[Fault]) -> int:
        """Watch a command to its end, inject what is due, and return its exit code."""
        armed_s, num_armed, due_s = time.monotonic(), len(commit_times(out)), None
        full_until_s = math.inf
        try:
            while (code := command.poll()) is None:
                time.sleep(POLL_S)
                now_s = time.monotonic()
                if now_s > full_until_s:
                    self._ballast.unlink(missing_ok=True)
                if not pending:
                    continue
                fault = pending[0]
                num_new = len(commit_times(out)) - num_armed
                if due_s is None and (fault.early or num_new >= NUM_COMMITS_BETWEEN):
                    due_s = (armed_s if fault.early else now_s) + fault.after_s
                if due_s is not None and now_s >= due_s and self._inject(fault, command):
                    pending.pop(0)
                    armed_s, num_armed, due_s = now_s, len(commit_times(out)), None
                    full_until_s = now_s + MAX_FULL_S if fault.kind == "disk" else full_until_s
            return code
        finally:
            command.kill()
            self._ballast.unlink(missing_ok=True)

    def _inject(self, fault: Fault, command: Command) -> bool:
        """Inject a fault; return False where there is nothing yet to be hit by it."""
        at = time.time()
        if fault.kind in faults.TITLES:
            last = max((hit.at for hit in self.result.hits if hit.kind == "decoder"), default=0.0)
            if fault.kind == "decoder" and at - last < DECODER_GAP_S:
                return False
            victims = faults.actors(self._nodes.raylets(), fault.kind)
            if not faults.kill_one(victims, fault.choice):
                return False
        elif fault.kind == "driver":
            command.kill()
        elif fault.kind == "node":
            self._nodes.replace_second()
        else:
            faults.fill(self._ballast)
        self.result.hits.append(Hit(fault.kind, at))
        return True

    def _account(self, hits: list[Hit], commits: list[float]) -> None:
        """Work out what each hit cost, once the data set is complete."""
        for number, hit in enumerate(hits):
            is_last = number == len(hits) - 1
            end = max(hit.at, commits[-1]) if is_last else hits[number + 1].at
            after = [at for at in commits if hit.at < at <= end]
            hit.lost_s = max(0.0, end - hit.at - len(after) * self.result.usual_s)


def commit_times(out: Path) -> list[float]:
    """Return when each commit record of all columns was written, sorted."""
    records = (path for path in out.glob("*@*/*.json") if path.stem.isdecimal())
    return sorted(path.stat().st_mtime for path in records)
