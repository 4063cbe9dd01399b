"""Sums up the steps between two log lines: losses per task and modality, time, trouble.

The losses stay on the device; only a log line makes the ranks, and the host, wait for them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from train.engine import StepResult
from train.objective.flow import FlowLoss
from train.objective.tasks import TASKS, Task
from train.ranks import Ranks

LOSSES = ("video", "audio", "total")


class Meter:
    """The window of steps since the last log line, over all ranks.

    Args:
        ranks: the ranks to sum over.
        global_batch: samples per step.
    """

    def __init__(self, ranks: Ranks, global_batch: int) -> None:
        self.ranks = ranks
        self.global_batch = global_batch
        self.num_skipped = 0  # since this process started
        self._start_window()

    def _start_window(self) -> None:
        self.sums = torch.zeros(
            (2, len(TASKS), len(LOSSES)), dtype=torch.float64, device=self.ranks.device
        )  # [sum or count, task, loss]
        self.num_steps = 0
        self.waiting_s = 0.0
        self.gradient_norm = 0.0
        self.started_s = time.perf_counter()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time spent inside as waiting for data."""
        started_s = time.perf_counter()
        yield
        self.waiting_s += time.perf_counter() - started_s

    def add_micro_batch(self, task: Task, loss: FlowLoss, num_samples: int) -> None:
        """Take in the losses of one micro-batch of this rank."""
        total = loss.total.detach() * num_samples
        self.sums[0, task.number] += torch.cat([loss.sums, total[None]])
        self.sums[1, task.number] += torch.cat(
            [loss.counts, torch.full_like(total, num_samples)[None]]
        )

    def add_step(self, result: StepResult) -> None:
        """Take in how an optimiser step went."""
        self.num_steps += 1
        self.num_skipped += not result.was_applied
        self.gradient_norm = result.gradient_norm

    def summary(self) -> dict[str, float | None]:
        """Return the window's numbers by name and start the next one; collective.

        Names: ``loss/<task>/<video|audio|total>`` for the tasks that occurred, means over samples;
        ``gradient_norm`` of the last step; ``step_s``, ``samples_per_s``, ``data_wait`` (share of
        the time, on this rank); ``skipped_steps`` so far. Numbers that are not finite are None.
        """
        sums, counts = self.ranks.sum(self.sums).tolist()
        values: dict[str, float] = {}
        for task in TASKS:
            for i, name in enumerate(LOSSES):
                if counts[task.number][i]:
                    mean = sums[task.number][i] / counts[task.number][i]
                    values[f"loss/{task.name.lower()}/{name}"] = mean
        elapsed_s = time.perf_counter() - self.started_s
        values["gradient_norm"] = self.gradient_norm
        values["step_s"] = elapsed_s / self.num_steps
        values["samples_per_s"] = self.num_steps * self.global_batch / elapsed_s
        values["data_wait"] = self.waiting_s / elapsed_s
        values["skipped_steps"] = self.num_skipped
        self._start_window()
        return {name: value if math.isfinite(value) else None for name, value in values.items()}
