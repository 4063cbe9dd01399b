"""The table of tasks: what is given, what is generated, what is absent.

A task is numbers that enter the loss and the sampler as factors, never a branch: the model
runs the same graph for every row.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Annotated

from pydantic import Field
from pydantic import dataclasses as pydantic_dataclasses

from pipeline.settings import STRICT, ConfigError
from train.rng import uniform

Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class Role:
    """What a task does with one modality.

    Attributes:
        generated: 1 if it is noised, predicted and counted in the loss, else 0.
        rest_time: its diffusion time where it isn't generated: 0 is clean, 1 pure noise.
    """

    generated: float
    rest_time: float

    @property
    def given(self) -> float:
        """1 if the modality is a clean condition, else 0."""
        return (1 - self.generated) * (1 - self.rest_time)


GENERATED = Role(generated=1.0, rest_time=0.0)
GIVEN = Role(generated=0.0, rest_time=0.0)
ABSENT = Role(generated=0.0, rest_time=1.0)


@dataclass(frozen=True)
class Task:
    """One row: ``number`` goes to the task token and never changes; append, never reorder."""

    name: str
    number: int
    video: Role
    audio: Role


TASKS = (
    Task("T2AV", 0, video=GENERATED, audio=GENERATED),
    Task("V2A", 1, video=GIVEN, audio=GENERATED),
    Task("A2V", 2, video=GENERATED, audio=GIVEN),
)


@pydantic_dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class TaskWeights:
    """How often each task is trained, relative to the others.

    Attributes:
        t2av: text to video and audio.
        v2a: video, and text, to audio.
        a2v: audio, and text, to video.
    """

    t2av: Weight = 1.0
    v2a: Weight = 1.0
    a2v: Weight = 1.0

    def __post_init__(self) -> None:
        if self.t2av + self.v2a + self.a2v <= 0:
            raise ValueError("all task weights are 0; set at least one above 0")


def task_by_name(name: str) -> Task:
    """Return a task by its name, in any case.

    Raises:
        ConfigError: no such task; names the known ones.
    """
    for task in TASKS:
        if task.name == name.upper():
            return task
    known = ", ".join(task.name for task in TASKS)
    raise ConfigError(f"unknown task {name!r}; known: {known}")


def task_of_step(weights: TaskWeights, seed: int, step: int) -> Task:
    """Return the task of an optimiser step, the same on all ranks and after every resume."""
    edges = list(accumulate(getattr(weights, task.name.lower()) for task in TASKS))
    point = uniform(seed, "task", step) * edges[-1]  # below the last edge: uniform is below 1
    return next(task for task, edge in zip(TASKS, edges, strict=True) if point < edge)
