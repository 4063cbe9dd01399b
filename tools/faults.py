"""Faults to be injected: which, when, and how. Victims are sought among given processes only."""

from __future__ import annotations

import contextlib
import errno
import random
import signal
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

KINDS = ("decoder", "encoder", "driver", "node", "disk")
# Ray names the processes of actors after their class.
TITLES = {"decoder": "ray::DecoderActor", "encoder": "ray::EncoderActor"}
# Faults that come while a run starts, of all.
EARLY_SHARE = 0.2
MAX_EARLY_S, MAX_WAIT_S = 8.0, 1.5


@dataclass(frozen=True)
class Fault:
    """One fault of a plan.

    Attributes:
        kind: of ``KINDS``.
        early: whether it comes some time after the command was typed or the fault before, whatever
            has happened; else some time after a few commits since then.
        after_s: that time.
        choice: in [0, 1): which of several victims.
    """

    kind: str
    early: bool
    after_s: float
    choice: float


def draw(kinds: Sequence[str], count: int, seed: int) -> list[Fault]:
    """Draw faults, every kind as often as the others, in random order."""
    rng = random.Random(seed)
    names = [kinds[number % len(kinds)] for number in range(count)]
    rng.shuffle(names)
    faults = []
    for kind in names:
        early = rng.random() < EARLY_SHARE
        after_s = rng.uniform(0, MAX_EARLY_S if early else MAX_WAIT_S)
        faults.append(Fault(kind, early, after_s, rng.random()))
    return faults


def actors(raylets: Sequence[int], kind: str) -> list[psutil.Process]:
    """Return the actors of a kind among the processes that these raylets started."""
    found = []
    for raylet in raylets:
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in psutil.Process(raylet).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess, IndexError):
                    if process.cmdline()[0].startswith(TITLES[kind]):
                        found.append(process)
    return sorted(found, key=lambda process: process.pid)


def kill_one(processes: Sequence[psutil.Process], choice: float) -> bool:
    """Kill one of the processes; return whether there was one."""
    for process in processes[int(choice * len(processes)) :]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGKILL)
            return True
    return False


@contextlib.contextmanager
def small_disk(folder: Path, num_bytes: int) -> Iterator[bool]:
    """Mount a file system of this size on a folder; False where that is not allowed."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(folder)]
    try:
        is_mounted = subprocess.run(command, check=False, capture_output=True).returncode == 0
    except FileNotFoundError:
        is_mounted = False
    try:
        yield is_mounted
    finally:
        if is_mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(ballast: Path) -> None:
    """Fill the disk to its last byte."""
    with ballast.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            block = bytes(size)
            try:
                while True:
                    file.write(block)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
