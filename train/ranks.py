"""This process among the ranks of a run: what they sum up, and what they agree upon.

Needs torch only; ``engine`` starts the process group. Every call here is collective.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from pipeline.format import FormatError
from pipeline.settings import ConfigError
from train.errors import ResumeError

Result = TypeVar("Result")

# What one line tells enough of. OSError: a full disk, a folder that may not be written.
USER_ERRORS = (ConfigError, FormatError, ResumeError, OSError)


class AgreedError(Exception):
    """An error that all ranks raise together, so that one of them can report it."""


class Verdict(IntEnum):
    """What is to be done next. The ranks do the greatest of what each of them wants."""

    GO = 0
    WAIT = 1
    STOP = 2
    NO_DATA = 3


@dataclass(frozen=True)
class Ranks:
    """One rank's view of the process group.

    Attributes:
        rank: number of this process, from 0.
        num_ranks: processes of the run.
        device: where this rank computes.
    """

    rank: int
    num_ranks: int
    device: torch.device

    def agree(self, mine: Verdict) -> Verdict:
        """Return the greatest of the ranks' verdicts."""
        tensor = torch.tensor(mine.value, dtype=torch.int64, device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return Verdict(int(tensor))

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Return the elementwise sum of float64 ``values`` over ranks, on the CPU."""
        total = values.clone()
        dist.all_reduce(total)
        return total.cpu()

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's ``value`` (small, picklable), in the order of ranks."""
        values: list[Any] = [None] * self.num_ranks
        dist.all_gather_object(values, value)
        return values

    def together(self, action: Callable[[], Result]) -> Result:
        """Run an action that makes no collective calls; fail on all ranks if it fails on one.

        Raises:
            AgreedError: with one message for all ranks.
        """
        outcome: list[Result] = []
        failure = None
        try:
            outcome.append(action())
        except USER_ERRORS as error:
            failure = str(error) or repr(error)
        failures = self.gather(failure)
        if any(failures):
            raise AgreedError(one_message(failures))
        return outcome[0]

    def on_first(self, action: Callable[[], None]) -> None:
        """Run an action on rank 0 alone, while all wait; fail on all ranks if it fails.

        Raises:
            AgreedError: with one message for all ranks.
        """
        self.together(action if self.rank == 0 else lambda: None)

    def first(self, action: Callable[[], Result]) -> Result:
        """Run an action on rank 0 alone, and return what it gives (small, picklable) on all.

        Raises:
            AgreedError: with one message for all ranks.
        """
        return self.gather(self.together(action if self.rank == 0 else lambda: None))[0]

    def check_agreement(self, plan: dict[str, Any]) -> None:
        """Check that all ranks are about to do the same.

        Raises:
            AgreedError: names what differs and the ranks that differ from most.
        """
        disagreement = find_disagreement(self.gather(plan))
        if disagreement:
            raise AgreedError(disagreement)


def one_message(failures: list[str | None]) -> str:
    """Return one text for what failed on the ranks; names them unless all failed alike."""
    texts = list(dict.fromkeys(text for text in failures if text))
    if len(texts) == 1 and all(failures):
        return texts[0]
    return "; ".join(f"rank {failures.index(text)}: {text}" for text in texts)


def find_disagreement(plans: list[dict[str, Any]]) -> str | None:
    """Return what differs between the plans of the ranks, or None."""
    for name in plans[0]:
        counts = Counter(str(plan[name]) for plan in plans)
        usual = counts.most_common(1)[0][0]
        odd = [
            f"rank {rank} has {plan[name]}"
            for rank, plan in enumerate(plans)
            if str(plan[name]) != usual
        ]
        if odd:
            return (
                f"the ranks differ in {name}: {', '.join(odd)}, the others {usual}; "
                "give all nodes the same program, settings and data set"
            )
    return None
