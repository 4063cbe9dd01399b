"""What the model learns: tasks as data, rectified flow, sampling."""

from train.objective.flow import FlowConfig, FlowLoss, flow_loss, standardise, unstandardise
from train.objective.sampler import sample
from train.objective.tasks import TASKS, Task, TaskWeights, task_by_name, task_of_step

__all__ = [
    "TASKS",
    "FlowConfig",
    "FlowLoss",
    "Task",
    "TaskWeights",
    "flow_loss",
    "sample",
    "standardise",
    "task_by_name",
    "task_of_step",
    "unstandardise",
]
