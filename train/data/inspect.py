"""``python -m train.data.inspect --data DIR``: what a training run would see of a data set.

Columns, clips that can be used and why others can't, shapes, steps per epoch, the first batches
and the statistics that latents are scaled by. No payload is read but the empty caption.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

from pipeline.format import FormatError
from pipeline.settings import ConfigError
from pipeline.wording import counted
from train.config import TrainConfig, load_train_config
from train.data.classes import MOST_MISSING, has_too_few, reasons_in_words
from train.data.part import Part
from train.data.stream import GlobalBatch, Stream
from train.data.view import View, open_view
from train.latents import LatentSpec
from train.new_model import tokens_by_bucket
from train.objective.tasks import TASKS

BATCHES_SHOWN = 3
KEYS_SHOWN = 3
CHANNELS_SHOWN, CHANNELS_PER_LINE = 32, 8  # more are summed up


def main() -> None:
    """Parse the command line and print; turn expected errors into one line and exit 1."""
    try:
        arguments, config = parse(sys.argv[1:])
        found = inspect(config, arguments.subset)
    except (ConfigError, FormatError) as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        where = f" {error.filename}:" if error.filename else ""
        sys.exit(f"error:{where} {error.strerror or error}")
    try:
        print(json.dumps(found, indent=2) if arguments.json else as_text(found), flush=True)
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, TrainConfig]:
    """Read the command line.

    Raises:
        ConfigError: a setting can't be used.
    """
    parser = argparse.ArgumentParser(
        prog="python -m train.data.inspect",
        usage="%(prog)s [--data DIR] [--config FILE] [options] [key=value ...]",
        description="Show what a training run would see of a data set, with the run's settings.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, help="YAML file of the training run")
    parser.add_argument("--data", metavar="DIR", help="folder or URL (data.root)")
    for name in ("video", "audio", "text"):
        parser.add_argument(f"--{name}", metavar="COLUMN", help=f"data.{name}, where several are")
    parser.add_argument("--global-batch", metavar="N", help="global_batch, for steps per epoch")
    parser.add_argument("--subset", choices=("train", "heldout", "all"), default="train")
    parser.add_argument("--json", action="store_true", help="print JSON for programs")
    arguments, overrides = parser.parse_known_args(argv)
    names = {
        "data.root": arguments.data,
        **{f"data.{name}": getattr(arguments, name) for name in ("video", "audio", "text")},
        "global_batch": arguments.global_batch,
    }
    given = [f"{name}={value}" for name, value in names.items() if value is not None]
    return arguments, load_train_config(arguments.config, [*overrides, *given])


# ---------------------------------------------------------------------------------------------
# What is there


def inspect(config: TrainConfig, subset: Any) -> dict[str, Any]:
    """Open the view of a run and describe it, as JSON values.

    Raises:
        FormatError, ConfigError: as ``open_view``; but too many clips that can't be used are
            described, not an error, and so is a model that doesn't fit the clips.
    """
    data = config.data
    if data.missing == "error":
        data = replace(data, missing="drop")
    view = open_view(data, subset, config.model.time_patches)
    stream = Stream(
        view.parts,
        [part.weight for part in view.parts],
        global_batch=config.global_batch,
        window_shards=data.window_shards,
        tail=data.tail,
        seed=config.seed,
    )
    batches = islice(stream.batches(stream.start()), BATCHES_SHOWN)
    parts = [
        {**describe_part(part), "steps_per_epoch": steps}
        for part, steps in zip(view.parts, stream.steps_per_epoch, strict=True)
    ]
    misfit, tokens = None, [None] * len(view.buckets)
    try:
        tokens = tokens_by_bucket(config.model, view)
    except ConfigError as error:
        misfit = str(error)
    tallies = [part.census.head.tally for part in view.parts]
    return {
        "subset": subset,
        "seconds": data.seconds,
        "missing": config.data.missing,
        "view_id": view.view_id,
        "parts": parts,
        "is_refused": config.data.missing == "error" and any(map(has_too_few, tallies)),
        "misfit": misfit,
        "tasks": clips_by_task(view),
        "buckets": [
            {
                "video": bucket.video.shape,
                "audio": bucket.audio.shape,
                "clips": bucket.num_clips,
                "tokens": count,
            }
            for bucket, count in zip(view.buckets, tokens, strict=True)
        ],
        "text_width": view.text_width,
        "global_batch": config.global_batch,
        "batches": [describe_batch(view, batch) for batch in batches],
        "statistics": {spec.modality: statistics(spec) for spec in (view.video, view.audio)},
    }


def describe_part(part: Part) -> dict[str, Any]:
    """Describe one data set of a view."""
    tally = part.census.head.tally
    return {
        "root": str(part.root),
        "plan_id": part.plan.plan_id,
        "weight": part.weight,
        "shards": len(part.first_rows) - 1,
        "columns": {name: column.path.name for name, column in part.opened.items()},
        "clips": {
            "planned": tally.planned,
            "heldout": tally.heldout,
            "outside": tally.outside,
            "filtered": tally.filtered,
            "wanted": tally.wanted,
            "complete": tally.complete,
            "video_only": tally.video_only,
            "audio_only": tally.audio_only,
        },
        "reasons": tally.reasons,
        "statuses": tally.statuses,
    }


def clips_by_task(view: View) -> dict[str, int]:
    """Return how many clips each task can be trained on."""
    tallies = [part.census.head.tally for part in view.parts]
    complete = sum(tally.complete for tally in tallies)
    halves = sum(tally.video_only + tally.audio_only for tally in tallies)
    if view.config.missing != "mask":
        halves = 0
    # A task that is given a modality needs both; one that generates both takes either.
    return {
        task.name: complete + (0 if task.video.given or task.audio.given else halves)
        for task in TASKS
    }


def describe_batch(view: View, batch: GlobalBatch) -> dict[str, Any]:
    """Name the first clips of a global batch."""
    keys = view.parts[batch.part].keys_of(batch.rows[:KEYS_SHOWN].tolist())
    return {"part": batch.part, "bucket": batch.bucket, "keys": keys}


def statistics(spec: LatentSpec) -> dict[str, Any]:
    """Return a modality's clock and the statistics of its channels."""
    return {
        "axes": spec.axes,
        "rate_hz": spec.rate_hz,
        "offset_s": spec.offset_s,
        "mean": spec.mean,
        "std": spec.std,
    }


# ---------------------------------------------------------------------------------------------
# The same for people


def as_text(found: dict[str, Any]) -> str:
    """Return what ``inspect`` found as lines."""
    lines = []
    for number, part in enumerate(found["parts"]):
        share = f", weight {part['weight']:g}" if len(found["parts"]) > 1 else ""
        lines += [f"data set {number}: {part['root']}{share}", *part_lines(part, found)]
    if found["is_refused"]:
        lines.append(
            f"training refuses this: more than {MOST_MISSING:.0%} of the clips can't be used; "
            "encode them again, or set data.missing to drop or mask"
        )
    if found["misfit"]:
        lines.append(f"training refuses this: {found['misfit']}")
    tasks = ", ".join(f"{name} {count:,}" for name, count in found["tasks"].items())
    lines.append(f"clips by task        {tasks}")
    for number, bucket in enumerate(found["buckets"]):
        shapes = f"video {list(bucket['video'])}, audio {list(bucket['audio'])}"
        size = f" of {bucket['tokens']:,} tokens" if bucket["tokens"] else ""
        lines.append(f"bucket {number:<14}{shapes}: {counted(bucket['clips'], 'clip')}{size}")
    size = found["global_batch"]
    for number, part in enumerate(found["parts"]):
        which = f" of data set {number}" if len(found["parts"]) > 1 else ""
        steps = counted(part["steps_per_epoch"], "step")
        lines.append(f"an epoch             {steps} of {counted(size, 'clip')}{which}")
    for number, batch in enumerate(found["batches"]):
        which = f"data set {batch['part']}, " if len(found["parts"]) > 1 else ""
        keys = ", ".join(batch["keys"]) + ", …" * (size > len(batch["keys"]))
        lines.append(f"step {number:<16}{which}bucket {batch['bucket']}: {keys}")
    for name, statistic in found["statistics"].items():
        lines += statistic_lines(name, statistic)
    return "\n".join(lines)


def part_lines(part: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """Return the lines of one data set."""
    clips, columns = part["clips"], ", ".join(part["columns"].values())
    lines = [
        f"  columns            {columns}",
        f"  plan               {counted(clips['planned'], 'clip')} in "
        f"{counted(part['shards'], 'shard')}, plan {part['plan_id']}",
        f"  held out           {counted(clips['heldout'], 'clip')} of split train, by their keys",
        f"  subset {found['subset']:<12}{clips['wanted']:,}: without {clips['outside']:,} of other "
        f"subsets and {clips['filtered']:,} that data.filter leaves out",
        f"  whole              {clips['complete']:,} with {found['seconds']:g} s of both; video "
        f"alone {clips['video_only']:,}, audio alone {clips['audio_only']:,}",
    ]
    if part["reasons"]:
        why = reasons_in_words(part["reasons"], found["seconds"])
        lines.append(f"  not whole          {why}")
    return lines


def statistic_lines(name: str, found: dict[str, Any]) -> list[str]:
    """Return the statistics of a modality: of each channel where they are few, else their range."""
    lines = [
        f"{name}: {len(found['mean'])} channels, {found['rate_hz']:g} Hz, axes {found['axes']}"
    ]
    for what in ("mean", "std"):
        values = found[what]
        if len(values) <= CHANNELS_SHOWN:
            starts = range(0, len(values), CHANNELS_PER_LINE)
            rows = [values[start : start + CHANNELS_PER_LINE] for start in starts]
            texts = [" ".join(f"{value:9.4g}" for value in row) for row in rows]
        else:
            texts = [f"from {min(values):.4g} to {max(values):.4g}, {fmean(values):.4g} on average"]
        lines += [f"  {'' if row else what:<19}{text}" for row, text in enumerate(texts)]
    return lines


if __name__ == "__main__":
    main()
