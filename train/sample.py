"""``python -m train.sample --checkpoint RUN --task v2a --data shards/ --num 4 --out out/``.

Draws clips of a data set, generates what the task generates from what it gives, decodes both
through the columns' codecs and writes mp4 files and a gallery page.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pipeline.codecs import Codec, build_codec
from pipeline.files import write_json
from pipeline.format import Column, FormatError, read_json
from pipeline.gallery import Entry, Take, media_path, write_gallery
from pipeline.settings import ConfigError
from train.checkpoint import TrainedModel, load_model_for_sampling
from train.data.classes import Subset
from train.data.config import DataConfig
from train.data.drawn import Drawn, draw
from train.data.view import View, open_view
from train.errors import ResumeError
from train.latents import LatentSpec
from train.objective import Task, sample, standardise, task_by_name, unstandardise
from train.objective.tasks import GENERATED, GIVEN

BATCH = 16


def main() -> None:
    """Parse the command line, sample, and turn expected errors into one line and exit 1."""
    try:
        page = run(parse(sys.argv[1:]))
    except (ConfigError, FormatError, ResumeError) as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        sys.exit(f"error:{where}: {error.strerror or error}")
    print(f"gallery: {page}")


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the command line.

    Raises:
        ConfigError: a number or the device can't be used.
    """
    parser = argparse.ArgumentParser(
        prog="python -m train.sample",
        description="Generate clips with sound from a checkpoint, as mp4 files and a gallery.",
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="run_dir, or a step_* in it")
    parser.add_argument("--task", required=True, help="t2av, v2a or a2v")
    parser.add_argument("--data", help="data set or URL (default: the one of the training)")
    parser.add_argument("--out", type=Path, required=True, help="folder for the result")
    parser.add_argument("--num", type=int, default=4, help="clips to draw (default 4)")
    parser.add_argument(
        "--subset",
        choices=("heldout", "train", "all"),
        default="heldout",
        help="draw from the clips that training never sees (default), its own, or all",
    )
    parser.add_argument("--steps", type=int, default=25, help="Euler steps (default 25)")
    parser.add_argument("--guidance", type=float, default=1.5, help="1 = none (default 1.5)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw and of the noise")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args(argv)
    for name, least in (("num", 1), ("steps", 1), ("guidance", 0)):
        value = getattr(arguments, name)
        if not least <= value < float("inf"):
            raise ConfigError(f"--{name} {value}: expected at least {least}")
    try:
        torch.empty(0, device=arguments.device)
    except (RuntimeError, AssertionError) as error:  # the latter where torch lacks CUDA
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"--device {arguments.device}: {reason}") from None
    return arguments


def run(arguments: argparse.Namespace) -> Path:
    """Sample and write everything; return the gallery's path.

    Raises:
        ConfigError: no such task, or no clip in the subset.
        ResumeError: no complete checkpoint.
        FormatError: the data set lacks the columns that the model was trained on.
    """
    task = task_by_name(arguments.task)
    trained = load_model_for_sampling(arguments.checkpoint)
    view = matching_view(trained, arguments.data or trained.root, arguments.subset)
    if view.num_clips < arguments.num:
        found = f"subset {arguments.subset!r} holds {view.num_clips} clips, fewer than --num"
        sys.stderr.write(f"{found} {arguments.num}: all are taken\n")
    clips = draw(view, arguments.num, arguments.seed)
    model = trained.build(arguments.device)
    opened = view.parts[0].opened
    codecs = {
        modality: build_codec(column.spec.codec, column.spec.preprocessing)
        for modality, column in opened.items()
        if modality != "text"
    }
    # Found out before anything is computed: the folder can't be written.
    (arguments.out / "media").mkdir(parents=True, exist_ok=True)
    earlier = listed_media(arguments.out)
    entries = []
    for batch in batches(clips):
        bucket = view.buckets[batch[0].bucket]
        specs = (
            replace(trained.video, shape=bucket.video.shape),
            replace(trained.audio, shape=bucket.audio.shape),
        )
        generated = generate(model, trained, specs, task, batch, view.null_text, arguments)
        for clip, video, audio in zip(batch, *generated, strict=True):
            entries.append(entry(clip, task, video, audio, codecs, opened))
    note = (
        f"{arguments.checkpoint}, step {trained.step}; {arguments.subset} clips of "
        f"{view.parts[0].root}; {arguments.steps} Euler steps, guidance "
        f"{arguments.guidance:g}, seed {arguments.seed}. Source: the stored latents, decoded."
    )
    page = write_gallery(arguments.out, f"{task.name} samples", note, entries)
    listing = describe(task, clips, trained, arguments)
    for name in earlier - media_of(listing):
        (arguments.out / name).unlink(missing_ok=True)
    write_json(arguments.out / "samples.json", listing)
    return page


def matching_view(trained: TrainedModel, root: str, subset: Subset) -> View:
    """Open the columns that the model was trained on, in any data set that has them.

    Raises:
        FormatError: it has other columns, or clips of a size that the model has not met.
    """
    config = DataConfig(
        root=root,
        video=trained.columns["video"],
        audio=trained.columns["audio"],
        text=trained.columns["text"],
        seconds=trained.seconds,
        heldout_share=trained.heldout_share,
        missing="drop",
    )
    view = open_view(config, subset, trained.config.time_patches)
    for bucket in view.buckets:
        shapes = (bucket.video.shape, bucket.audio.shape)
        if shapes not in trained.shapes:
            met = " or ".join(f"{video} and {audio}" for video, audio in trained.shapes)
            raise FormatError(
                f"{root}: {bucket.num_clips} crops of video and audio are {shapes[0]} and "
                f"{shapes[1]}, the model of {trained.folder} was trained on {met}; use a data set "
                "of that size"
            )
    if view.text_width != trained.text_width:
        raise FormatError(
            f"{root}: text vectors are {view.text_width} wide, the model of {trained.folder} was "
            f"trained on {trained.text_width}; use a data set with the same text encoder"
        )
    return view


def batches(clips: list[Drawn]) -> Iterator[list[Drawn]]:
    """Yield clips of one shape, up to ``BATCH`` at a time."""
    for bucket in dict.fromkeys(clip.bucket for clip in clips):
        alike = [clip for clip in clips if clip.bucket == bucket]
        for first in range(0, len(alike), BATCH):
            yield alike[first : first + BATCH]


def generate(
    model: Any,
    trained: TrainedModel,
    specs: tuple[LatentSpec, LatentSpec],
    task: Task,
    clips: list[Drawn],
    null_text: torch.Tensor,
    arguments: argparse.Namespace,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the task on a batch of clips of one shape; return unscaled float32 latents on the CPU."""
    device = torch.device(arguments.device)
    stored = {m: torch.stack([getattr(clip, m) for clip in clips]) for m in ("video", "audio")}
    given = tuple(
        standardise(stored[spec.modality].to(device), spec) if role == GIVEN else None
        for spec, role in zip(specs, (task.video, task.audio), strict=True)
    )
    text = torch.nn.utils.rnn.pad_sequence([clip.text for clip in clips], batch_first=True)
    lengths = torch.tensor([len(clip.text) for clip in clips])
    mask = torch.arange(text.shape[1]) < lengths[:, None]
    latents = sample(
        model,
        task,
        (given[0], given[1]),
        text.to(device),
        mask.to(device),
        null_text.to(device),
        specs,
        trained.flow,
        arguments.steps,
        arguments.guidance,
        arguments.seed,
        [clip.key for clip in clips],
    )
    video, audio = (unstandardise(x, s).cpu() for x, s in zip(latents, specs, strict=True))
    # A given modality is returned as stored, without the rounding of scaling it back and forth.
    if task.video == GIVEN:
        video = stored["video"].float()
    if task.audio == GIVEN:
        audio = stored["audio"].float()
    return video, audio


def entry(
    clip: Drawn,
    task: Task,
    video: torch.Tensor,
    audio: torch.Tensor,
    codecs: dict[str, Codec],
    columns: dict[str, Column],
) -> Entry:
    """Decode the stored and the generated latents of a clip for the gallery."""
    fps = float(columns["video"].spec.preprocessing["fps"])
    sample_rate = int(columns["audio"].spec.preprocessing["sample_rate"])

    def take(name: str, title: str, video: torch.Tensor, audio: torch.Tensor) -> Take:
        frames = codecs["video"].decode([video.float().numpy()])[0]
        sound = codecs["audio"].decode([audio.float().numpy()])[0]
        return Take(name, title, frames, fps, sound, sample_rate)

    made = [name for name in ("video", "audio") if getattr(task, name) == GENERATED]
    title = f"{task.name}: generated {' and '.join(made)}"
    takes = (
        take("source", "source", clip.video, clip.audio),
        take(take_name(task), title, video, audio),
    )
    return Entry(clip.key, clip.caption, takes)


def take_name(task: Task) -> str:
    """Return the name of a generated take, as in its file's name."""
    return task.name.lower()


def describe(
    task: Task, clips: list[Drawn], trained: TrainedModel, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Return samples.json: what was drawn and where its files are."""
    return {
        "task": task.name.lower(),
        "checkpoint": str(trained.folder),
        "step": trained.step,
        "steps": arguments.steps,
        "guidance": arguments.guidance,
        "seed": arguments.seed,
        "subset": arguments.subset,
        "clips": [
            {
                "key": clip.key,
                "uri": clip.uri,
                "start_s": clip.start_s,
                "caption": clip.caption,
                "source": media_path(clip.key, "source"),
                "generated": media_path(clip.key, take_name(task)),
            }
            for clip in clips
        ],
    }


def media_of(listing: dict[str, Any]) -> set[str]:
    """Return the files that a samples.json lists, relative to its folder."""
    return {clip[name] for clip in listing["clips"] for name in ("source", "generated")}


def listed_media(out: Path) -> set[str]:
    """Return the media of an earlier gallery in the folder, as its samples.json lists them.

    Names that lead elsewhere than media/ are none of ours.
    """
    try:
        found = media_of(read_json(out / "samples.json"))
        return {name for name in found if re.fullmatch(r"media/[^/]+\.mp4", name)}
    except (FormatError, KeyError, TypeError):
        return set()  # nothing was sampled here, or not by this program


if __name__ == "__main__":
    main()
