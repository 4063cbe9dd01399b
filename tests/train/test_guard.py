import pytest

from train.engine import StepResult
from train.guard import MOST_SKIPPED_IN_A_ROW, Guard
from train.ranks import AgreedError

APPLIED, SKIPPED = StepResult(True, 1.0), StepResult(False, float("nan"))


def test_steps_skipped_in_a_row_end_the_run_and_others_do_not():
    guard = Guard()
    most = MOST_SKIPPED_IN_A_ROW - 1
    for step, result in enumerate([*[SKIPPED] * most, APPLIED, *[SKIPPED] * most], start=1):
        guard.check(result, step)
    with pytest.raises(AgreedError, match=r"10 steps in a row, up to step 20; lower optim.lr"):
        guard.check(SKIPPED, 20)
