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

    The clock starts with the meter, or with ``restart``: when the first batch is there, for until
    then the loader fills its queue, which is start-up and not the time of a step.

    Args:
        ranks: the ranks to sum over.
        global_batch: samples per step.
    """

    def __init__(self, ranks: Ranks, global_batch: int) -> None:
        self.ranks = ranks
        self.global_batch = global_batch
        self.num_skipped = 0  # since this process started, as the following two
        self._waited_s = torch.zeros(ranks.num_ranks, dtype=torch.float64)  # of each rank
        self._elapsed_s = 0.0
        self.restart()

    def restart(self) -> None:
        """Start a window of steps; forget what the one before has not told yet."""
        # Losses, then the samples they were summed over, then the samples that were not served.
        self.sums = torch.zeros(
            (len(TASKS), 2 * len(LOSSES) + 1), dtype=torch.float64, device=self.ranks.device
        )
        self.num_steps = 0
        self.waiting_s = 0.0
        self.gradient_norm = 0.0
        self.started_s = time.perf_counter()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time spent inside as waiting for data."""
        started_s = time.perf_counter()
        try:
            yield
        finally:
            self.waiting_s += time.perf_counter() - started_s

    def add_micro_batch(self, task: Task, loss: FlowLoss, num_samples: int) -> None:
        """Take in the losses of one micro-batch of this rank."""
        total = loss.total.detach() * num_samples  # the samples that are not served add nothing
        num_served = num_samples - loss.num_unserved
        last = torch.stack([num_served, loss.num_unserved])
        self.sums[task.number] += torch.cat([loss.sums, total[None], loss.counts, last])

    def add_step(self, result: StepResult) -> None:
        """Take in how an optimiser step went."""
        self.num_steps += 1
        self.num_skipped += not result.was_applied
        self.gradient_norm = result.gradient_norm

    def summary(self, num_substituted: int = 0) -> dict[str, float | None]:
        """Return the window's numbers by name and start the next one; collective.

        Names: ``loss/<task>/<video|audio|total>`` for the tasks that occurred, means over samples;
        ``unserved/<task>`` where samples had no part in the loss; ``gradient_norm`` of the last
        step; ``step_s``, ``samples_per_s``; ``data_wait``, the share of the time in which the rank
        that waited longest was blocked by the loader; ``skipped_steps`` so far, and
        ``substituted`` where payloads were. Numbers that are not finite are None.

        Args:
            num_substituted: damaged payloads of this rank that others took the place of, so far.
        """
        elapsed_s = time.perf_counter() - self.started_s
        # A place for each rank, so that one sum over the ranks gathers them too.
        places = torch.zeros(self.ranks.num_ranks + 1, dtype=torch.float64)
        places[self.ranks.rank], places[-1] = self.waiting_s, num_substituted
        totals = self.ranks.sum(torch.cat([self.sums.flatten(), places.to(self.sums.device)]))
        waited_s = totals[-len(places) : -1]
        self._waited_s += waited_s
        self._elapsed_s += elapsed_s

        values = loss_means(totals[: -len(places)].view(self.sums.shape))
        values["gradient_norm"] = self.gradient_norm
        values["step_s"] = elapsed_s / self.num_steps
        values["samples_per_s"] = self.num_steps * self.global_batch / elapsed_s
        values["data_wait"] = float(waited_s.max()) / elapsed_s
        values["skipped_steps"] = self.num_skipped
        if totals[-1]:
            values["substituted"] = int(totals[-1])
        self.restart()
        return {name: value if math.isfinite(value) else None for name, value in values.items()}

    @property
    def data_wait(self) -> float:
        """Share of the time of all windows so far in which one rank waited for data."""
        return float(self._waited_s.max()) / self._elapsed_s if self._elapsed_s else 0.0


def loss_means(totals: torch.Tensor) -> dict[str, float]:
    """Return the losses and the samples not served by name, from sums over all ranks."""
    values: dict[str, float] = {}
    for task, row in zip(TASKS, totals.tolist(), strict=True):
        sums, counts, num_unserved = row[: len(LOSSES)], row[len(LOSSES) : -1], row[-1]
        for name, total, count in zip(LOSSES, sums, counts, strict=True):
            if count:
                values[f"loss/{task.name.lower()}/{name}"] = total / count
        if num_unserved:
            values[f"unserved/{task.name.lower()}"] = num_unserved
    return values
