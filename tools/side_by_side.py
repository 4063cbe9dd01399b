"""Processes that start together on a signal and note when each piece of work is done.

What takes long to load is loaded before the signal, so that start-up and steady work are told
apart. Times are seconds of ``time.monotonic``, which all processes of a machine share.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from pipeline.calibrate import child_threads

# Loads and returns what does the work: yields how many clips each step did.
Prepare = Callable[[Any], Callable[[], Iterator[int]]]
START_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Lane:
    """One process: when it began, and after every step the time and the clips of the step."""

    begun_s: float
    steps: tuple[tuple[float, int], ...]

    @property
    def num_clips(self) -> int:
        """Clips of all steps."""
        return sum(clips for _, clips in self.steps)

    @property
    def clips_per_s(self) -> float:
        """Rate after the first step, in which much is done for the first time.

        Raises:
            ValueError: there are too few steps to tell.
        """
        if len(self.steps) < 2:
            raise ValueError(f"{len(self.steps)} steps, expected 2 at least: give it more clips")
        clips = sum(clips for _, clips in self.steps[1:])
        return clips / (self.steps[-1][0] - self.steps[0][0])


@dataclass(frozen=True)
class Timing:
    """What lanes side by side came to.

    Attributes:
        launched_s: when the first process was started, or the command typed.
        ended_s: when all was done.
    """

    lanes: tuple[Lane, ...]
    launched_s: float
    ended_s: float

    @property
    def num_clips(self) -> int:
        """Clips of all lanes."""
        return sum(lane.num_clips for lane in self.lanes)

    @property
    def clips_per_s(self) -> float:
        """Steady rate of all lanes together."""
        return sum(lane.clips_per_s for lane in self.lanes)

    @property
    def seconds(self) -> float:
        """From launch to end, all start-up included."""
        return self.ended_s - self.launched_s


def run_side_by_side(prepare: Prepare, arguments: Sequence[Any]) -> Timing:
    """Run one process for each argument, all from the same moment on.

    Raises:
        RuntimeError: one of them died or raised; the others are ended.
    """
    launched_s, context = time.monotonic(), multiprocessing.get_context("spawn")
    pipes, processes = [], []
    with child_threads(1):
        for argument in arguments:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, prepare, argument), daemon=True)
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
    try:
        for pipe in pipes:
            if not pipe.poll(START_TIMEOUT_S):
                raise RuntimeError(f"a process did not start in {START_TIMEOUT_S:g} s")
            _receive(pipe)
        for pipe in pipes:
            pipe.send("go")
        lanes = tuple(Lane(*_receive(pipe)) for pipe in pipes)
        return Timing(lanes, launched_s, time.monotonic())
    finally:
        for process in processes:
            process.kill()
            process.join()


def _receive(pipe: Connection) -> Any:
    try:
        value = pipe.recv()
    except EOFError:
        raise RuntimeError("a process died; what it said is above") from None
    if isinstance(value, Exception):
        raise RuntimeError(f"{type(value).__name__}: {value}") from value
    return value


def _serve(pipe: Connection, prepare: Prepare, argument: Any) -> None:
    """Run in the child."""
    try:
        work = prepare(argument)
        pipe.send("ready")
        pipe.recv()
        begun_s, steps = time.monotonic(), []
        for clips in work():
            steps.append((time.monotonic(), clips))
        pipe.send((begun_s, tuple(steps)))
    except Exception as error:  # whatever a contender raises; the parent says it
        pipe.send(RuntimeError(f"{type(error).__name__}: {error}"))
