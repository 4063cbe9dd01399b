from collections import Counter

import pytest

from pipeline.settings import ConfigError, build
from train.objective.tasks import TASKS, TaskWeights, task_by_name, task_of_step


def test_numbers_are_places_in_the_table():
    assert [task.number for task in TASKS] == list(range(len(TASKS)))
    assert [task.name for task in TASKS[:3]] == ["T2AV", "V2A", "A2V"]


def test_every_task_has_a_weight_in_the_settings():
    assert {task.name.lower() for task in TASKS} == set(TaskWeights.__dataclass_fields__)


def test_every_task_generates_something():
    assert all(task.video.generated or task.audio.generated for task in TASKS)


def test_histogram_follows_the_weights_within_3_sigma():
    weights, draws = TaskWeights(t2av=1, v2a=2, a2v=5), 4000
    counts = Counter(task_of_step(weights, 0, step).name for step in range(draws))
    for name, share in (("T2AV", 1 / 8), ("V2A", 2 / 8), ("A2V", 5 / 8)):
        assert abs(counts[name] - draws * share) < 3 * (draws * share * (1 - share)) ** 0.5


def test_sequence_depends_on_seed_and_step_only():
    sequence = [task_of_step(TaskWeights(), 3, step) for step in range(100)]
    # A rank that joins late, and asks in another order, finds the same tasks.
    assert [task_of_step(TaskWeights(), 3, step) for step in reversed(range(50, 100))] == sequence[
        :49:-1
    ]
    assert sequence != [task_of_step(TaskWeights(), 4, step) for step in range(100)]


def test_weight_0_is_never_drawn():
    weights = TaskWeights(t2av=0, v2a=1, a2v=0)
    assert {task_of_step(weights, 0, step).name for step in range(200)} == {"V2A"}


@pytest.mark.parametrize("values", [{"t2av": 0, "v2a": 0, "a2v": 0}, {"v2a": -1}, {"a2v": "inf"}])
def test_weights_that_name_no_law_are_refused(values):
    with pytest.raises(ConfigError):
        build(TaskWeights, values, "test")


def test_names_in_any_case_and_unknown_ones_list_the_known():
    assert task_by_name("v2a") is TASKS[1]
    with pytest.raises(ConfigError, match="'v2v'; known: T2AV, V2A, A2V"):
        task_by_name("v2v")
