"""Peak memory of a program and all processes below it, by their role. Linux only: reads /proc."""

from __future__ import annotations

import contextlib
import re
import threading
from dataclasses import dataclass
from pathlib import Path

import psutil

INTERVAL_S = 0.2
# Ray names the processes of actors after class and method: ray::EncoderActor.run.
ACTOR = re.compile(r"ray::([A-Za-z]+)")


@dataclass
class Peak:
    """Processes of one role: how many there were, and the memory of the largest, in bytes.

    Attributes:
        resident: at its peak, as the kernel counts it.
        shared: of that, pages of Ray's object store, which all its processes share.
    """

    processes: int = 0
    resident: int = 0
    shared: int = 0


class PeakMemory:
    """Watches a process and its descendants from a thread; a context manager.

    Args:
        pid: the process at the top.
    """

    def __init__(self, pid: int) -> None:
        self._pid, self._stop = pid, threading.Event()
        self._seen: dict[tuple[int, float], tuple[str, int, int]] = {}
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def by_role(self) -> dict[str, Peak]:
        """Return what was seen so far, largest first."""
        roles: dict[str, Peak] = {}
        for role, resident, shared in list(self._seen.values()):
            peak = roles.setdefault(role, Peak())
            peak.processes += 1
            peak.resident, peak.shared = max(peak.resident, resident), max(peak.shared, shared)
        return dict(sorted(roles.items(), key=lambda item: -item[1].resident))

    def _watch(self) -> None:
        while not self._stop.wait(INTERVAL_S):
            with contextlib.suppress(psutil.NoSuchProcess):
                top = psutil.Process(self._pid)
                for process in (top, *top.children(recursive=True)):
                    with contextlib.suppress(psutil.NoSuchProcess, FileNotFoundError):
                        self._look_at(process)

    def _look_at(self, process: psutil.Process) -> None:
        resident = memory_bytes(process.pid, "VmHWM")
        if resident is None:  # it has ended, and nobody has asked for its exit code yet
            return
        name = (process.pid, process.create_time())
        role, _, shared = self._seen.get(name, ("", 0, 0))
        is_top = process.pid == self._pid
        role = "command" if is_top else max(role, role_of(process.cmdline()), key=_certainty)
        shared = max(shared, memory_bytes(process.pid, "RssShmem") or 0)
        self._seen[name] = (role, resident, shared)


def role_of(command: list[str]) -> str:
    """Name a process by its command line: an actor by its class, a program by its file."""
    if not command or not command[0]:
        return ""
    if actor := ACTOR.match(command[0]):
        return f"ray::{actor[1]}"
    words = [word for word in command[0].split() + command[1:] if not word.startswith("-")]
    program = Path(words[0]).name
    is_script = program.startswith("python") and len(words) > 1 and words[1].endswith(".py")
    return Path(words[1]).name if is_script else program


def _certainty(role: str) -> int:
    """Rate names: a worker gets its actor's only after a while, and loses it while it ends."""
    if not role:
        return 0
    if role.startswith("python") or role in ("default_worker.py", "setup_worker.py"):
        return 1
    return 2 if role == "ray::IDLE" else 3


def memory_bytes(pid: int, entry: str) -> int | None:
    """Return an entry of /proc/PID/status in bytes, None where it has none."""
    found = re.search(rf"^{entry}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.M)
    return int(found[1]) * 1024 if found else None
