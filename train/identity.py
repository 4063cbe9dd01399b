"""What makes two runs the same: the settings that a checkpoint can't be continued without.

Everything else (learning rate, steps, logging, micro-batch) may change between two starts.
"""

from __future__ import annotations

import platform
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from train.config import TrainConfig, as_dict
from train.data.view import View
from train.errors import ResumeError
from train.objective.tasks import TASKS


def describe_run(config: TrainConfig, view: View) -> dict[str, Any]:
    """Return what must stay the same for a run to be continued, as JSON values."""
    return {
        "seed": config.seed,
        "global_batch": config.global_batch,
        "model": as_dict(config.model),
        "objective": {"flow": as_dict(config.flow), "tasks": as_dict(config.tasks)},
        "view": {"view_id": view.view_id, "columns": view.columns},
    }


def describe_data(config: TrainConfig, view: View) -> dict[str, Any]:
    """Return what sampling has to know of the data set, as JSON values."""
    return {
        "root": str(Path(config.data.root).resolve()),
        "plan_id": view.plan_id,
        "columns": view.columns,
        "seconds": config.data.seconds,
        "heldout_share": config.data.heldout_share,
        "video": asdict(view.video),
        "audio": asdict(view.audio),
        "text_width": view.text_width,
        "num_tasks": len(TASKS),
    }


def program_versions() -> dict[str, str]:
    """Return the versions of what decides the numbers."""
    names = ("av-latents", "torch", "deepspeed", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def check_continues(
    folder: Path, state: dict[str, Any], run: dict[str, Any], layout: dict[str, Any]
) -> None:
    """Check that a checkpoint belongs to this run and fits these ranks.

    Args:
        folder: the checkpoint.
        state: its state.
        run: ``describe_run`` of now.
        layout: num_ranks, zero_stage and precision of now.

    Raises:
        ResumeError: names every field that differs, with both values.
    """
    changed = differences(state["run"], run)
    if changed:
        raise ResumeError(
            f"{folder} is of another run: {'; '.join(changed)}. "
            "Restore the settings to continue it, or set another run_dir to start afresh"
        )
    changed = differences(state["layout"], layout)
    if changed:
        raise ResumeError(
            f"{folder} was written by {state['layout']['num_ranks']} ranks at zero_stage "
            f"{state['layout']['zero_stage']} in {state['layout']['precision']}: "
            f"{'; '.join(changed)}. Continue it in the same way; converting is not possible yet"
        )


def differences(saved: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """Return one text per leaf that differs: its dotted name and both values."""
    found = []
    for name in sorted(saved.keys() | now.keys()):
        old, new = saved.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{prefix}{name}.")
        elif old != new:
            found.append(f"{prefix}{name} was {old!r}, is now {new!r}")
    return found
