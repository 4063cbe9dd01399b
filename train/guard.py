"""Stops a run whose gradients stay not finite: a few bad batches are survived, more are a fault."""

from __future__ import annotations

from train.engine import StepResult
from train.ranks import AgreedError

MOST_SKIPPED_IN_A_ROW = 10  # then the weights or the data are broken


class Guard:
    """Counts the steps in a row that were not applied, alike on all ranks."""

    def __init__(self) -> None:
        self.num_skipped = 0

    def check(self, result: StepResult, step: int) -> None:
        """Take in how optimiser step ``step``, from 1, went.

        Raises:
            AgreedError: too many in a row were skipped; the weights are as before the first.
        """
        self.num_skipped = 0 if result.was_applied else self.num_skipped + 1
        if self.num_skipped == MOST_SKIPPED_IN_A_ROW:
            raise AgreedError(
                f"gradients were not finite in {MOST_SKIPPED_IN_A_ROW} steps in a row, up to step "
                f"{step}; lower optim.lr, or look for the clips in question. The same command "
                "continues from the newest checkpoint"
            )
