"""What makes two runs the same: the settings that a checkpoint can't be continued without.

Everything else (learning rate, steps, logging, batch sizes) may change between two starts. Another
global batch takes its samples from where the stream was: no sample is repeated or left out, but
the steps behind are not those of a run that never changed.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from train.config import TrainConfig, as_dict
from train.data.config import DataConfig
from train.data.part import Part
from train.data.view import View
from train.errors import ResumeError
from train.objective.tasks import TASKS


def describe_run(config: TrainConfig, view: View) -> dict[str, Any]:
    """Return what must stay the same for a run to be continued, as JSON values."""
    return {
        "seed": config.seed,
        "model": as_dict(config.model),
        "objective": {"flow": as_dict(config.flow), "tasks": as_dict(config.tasks)},
        "view": describe_view(view),
    }


def describe_view(view: View) -> dict[str, Any]:
    """Return the name of a stream of samples, and what went into it, for messages: JSON values.

    Settings are named as the user does; data are told as they were found, by data set.
    """
    config = view.config
    settings: dict[str, Any] = {
        "data.seconds": config.seconds,
        "data.heldout_share": config.heldout_share,
        "data.window_shards": config.window_shards,
        "data.tail": config.tail,
        "data.missing=mask": config.missing == "mask",
    }
    data = {}
    for number, part in enumerate(view.parts):
        prefix = f"data.mix.{number}" if config.mix else "data"
        chosen = {"weight": part.weight, "filter": part.config.filter, **column_names(part)}
        settings |= {f"{prefix}.{name}": value for name, value in chosen.items()}
        data[prefix] = {
            "root": str(part.root),
            "plan": part.plan.plan_id,
            "usable clips": part.num_clips,
            "encoded shards": part.census.head.content[:8],
        }
    return {"view_id": view.view_id, "settings": settings, "data": data}


def describe_data(config: TrainConfig, view: View) -> dict[str, Any]:
    """Return what sampling has to know of the data, as JSON values."""
    return {
        "parts": [{"root": str(part.root), "columns": column_names(part)} for part in view.parts],
        "plan_id": view.plan_id,
        "seconds": config.data.seconds,
        "heldout_share": config.data.heldout_share,
        "video": asdict(view.video),
        "audio": asdict(view.audio),
        "shapes": [[bucket.video.shape, bucket.audio.shape] for bucket in view.buckets],
        "text_width": view.text_width,
        "num_tasks": len(TASKS),
    }


def column_names(part: Part) -> dict[str, str]:
    """Return the directory names of a data set's columns by modality."""
    return {modality: column.path.name for modality, column in part.opened.items()}


def with_columns(config: DataConfig, parts: Sequence[dict[str, str]]) -> DataConfig:
    """Return settings that name the columns of ``parts`` wherever they name none themselves.

    A column encoded since must not make "the only one" ambiguous.
    """

    def unnamed(settings: Any, columns: dict[str, str]) -> dict[str, str]:
        return {name: columns[name] for name in columns if getattr(settings, name) is None}

    if not config.mix:
        return replace(config, **unnamed(config, parts[0]))
    pairs = zip(config.mix, parts, strict=False)  # another number of data sets is refused later
    named = [replace(part, **unnamed(part, columns)) for part, columns in pairs]
    return replace(config, mix=(*named, *config.mix[len(named) :]))


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
    saved, before, now = state["run"], state["run"]["view"], run["view"]
    changed = differences({**saved, "view": None}, {**run, "view": None})
    if before["view_id"] != now["view_id"]:
        changed += differences(before["settings"], now["settings"])
    if changed:
        raise ResumeError(
            f"{folder} is of another run: {'; '.join(changed)}. "
            "Restore the settings to continue it, or set another run_dir to start afresh"
        )
    if before["view_id"] != now["view_id"]:
        changed = differences(before["data"], now["data"]) or differences(before, now)
        raise ResumeError(
            f"{folder} was trained on other data: {'; '.join(changed)}. The settings are the same, "
            "but the data set was planned, encoded further or encoded again since. Restore it as "
            "it was to continue the run, or set another run_dir to start afresh on it as it is"
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
