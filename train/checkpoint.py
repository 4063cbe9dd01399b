"""Checkpoints: what makes one complete, which one continues a run, what may have changed.

    run_dir/checkpoints/step_00000100/
        *.pt                         DeepSpeed's files (pickles: load only what you wrote)
        ema/rank_00000.safetensors   the averaged weights as the ranks keep them
        ema.safetensors              the same as whole parameters, float32: what sampling needs
        state.json                   what was trained, on what, how far
        COMPLETE                     names and sizes of all files, written last

A folder without COMPLETE, or with a file missing or cut short, is never read.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pipeline import settings
from pipeline.files import sync_folder, write_json
from pipeline.format import FormatError, read_json
from train.errors import ResumeError
from train.latents import LatentSpec
from train.model import DiT, ModelConfig
from train.objective.flow import FlowConfig
from train.ranks import Ranks

if TYPE_CHECKING:  # sampling reads checkpoints where DeepSpeed isn't wanted
    from train.ema import Ema
    from train.engine import Engine

STATE_VERSION = 2
MARKER = "COMPLETE"


# ---------------------------------------------------------------------------------------------
# Which checkpoints there are


def checkpoint_folder(run_dir: Path, step: int) -> Path:
    """Return the folder of the checkpoint with ``step`` optimiser steps done."""
    return run_dir / "checkpoints" / f"step_{step:08d}"


def is_complete(folder: Path) -> bool:
    """Return whether everything that COMPLETE lists is there in full."""
    try:
        files = json.loads((folder / MARKER).read_text())["files"]
        return all((folder / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def find_checkpoints(run_dir: Path) -> tuple[list[Path], list[Path]]:
    """Return the complete and the incomplete checkpoints of a run, oldest first."""
    found = (run_dir / "checkpoints").glob("step_*")
    folders = sorted(path for path in found if path.name.removeprefix("step_").isdigit())
    complete = [folder for folder in folders if is_complete(folder)]
    return complete, [folder for folder in folders if folder not in complete]


def latest_complete(run_dir: Path) -> Path | None:
    """Return the newest complete checkpoint of a run, or None."""
    complete, _ = find_checkpoints(run_dir)
    return complete[-1] if complete else None


# ---------------------------------------------------------------------------------------------
# Writing


def save_checkpoint(
    folder: Path, engine: Engine, ema: Ema, ranks: Ranks, state: dict[str, Any]
) -> None:
    """Write a checkpoint; collective. It counts from the moment that COMPLETE is there.

    Args:
        folder: an incomplete checkpoint in it is replaced.
        engine: weights and optimiser.
        ema: averaged weights.
        ranks: the ranks.
        state: goes to state.json.

    Raises:
        AgreedError: on all ranks, if one can't write or a rank's file has not arrived.
        OSError: on this rank alone, if DeepSpeed can't write.
    """
    weights: dict[str, torch.Tensor] = {}

    def begin() -> None:
        if folder.exists():
            shutil.rmtree(folder)
        (folder / "ema").mkdir(parents=True)

    def save_shard() -> None:
        with writing(folder):
            ema.save(ema_shard(folder, ranks.rank))

    def finish() -> None:
        with writing(folder):
            save_file(weights, folder / "ema.safetensors")
            write_json(folder / "state.json", {"version": STATE_VERSION, **state})
            mark_complete(folder, ranks.num_ranks, has_shards=engine.stage > 0)

    ranks.on_first(begin)
    with writing(folder):
        engine.save(folder)
    ranks.together(save_shard)
    with engine.master_weights(ema.shards):
        for name, weight in engine.full_parameters():
            if ranks.rank == 0:
                weights[name] = weight.cpu().contiguous()
    ranks.on_first(finish)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Raise OSError with the folder's name for all that torch and safetensors raise instead."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = str(error).partition("\n")[0]
        raise OSError(
            f"{folder} can't be written: {reason}; is there room? The same command continues "
            "from the newest complete checkpoint"
        ) from None


def ema_shard(folder: Path, rank: int) -> Path:
    """Return the path of one rank's averaged weights."""
    return folder / "ema" / f"rank_{rank:05d}.safetensors"


def mark_complete(folder: Path, num_ranks: int, has_shards: bool) -> None:
    """Check that every rank's files are there and put them on the disk, then write COMPLETE.

    Raises:
        ResumeError: files of a rank are missing.
    """
    counts = {"ema/*.safetensors": num_ranks, "*model_states.pt": 1}
    if has_shards:
        counts["*optim_states.pt"] = num_ranks
    for pattern, least in counts.items():
        found = len(list(folder.glob(pattern)))
        if found < least:
            raise ResumeError(
                f"{folder} holds {found} files {pattern}, expected {least}: not all ranks see "
                "the same folder; put run_dir on a file system that all nodes share"
            )
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    for place in (folder / "ema", folder, folder.parent):
        sync_folder(place)
    files = {str(path.relative_to(folder)): path.stat().st_size for path in paths}
    write_json(folder / MARKER, {"files": files})


def prune(run_dir: Path, keep_last: int) -> None:
    """Remove all but the newest complete checkpoints, and what broke off before the newest."""
    complete, incomplete = find_checkpoints(run_dir)
    for folder in incomplete:
        if complete and folder < complete[-1]:
            shutil.rmtree(folder)
    for folder in complete[:-keep_last]:
        (folder / MARKER).unlink()  # first: a half-removed checkpoint must not look complete
        shutil.rmtree(folder)


# ---------------------------------------------------------------------------------------------
# Continuing


def read_state(folder: Path) -> dict[str, Any]:
    """Read a checkpoint's state.json.

    Raises:
        ResumeError: it is missing, damaged, or of another version of this program.
    """
    try:
        state = read_json(folder / "state.json")
    except FormatError as error:
        raise ResumeError(str(error)) from None
    if state.get("version") != STATE_VERSION:
        raise ResumeError(
            f"{folder} has version {state.get('version')}, this program reads {STATE_VERSION}; "
            "use the program that wrote it"
        )
    return state


def restore(folder: Path, engine: Engine, ema: Ema, ranks: Ranks) -> None:
    """Load weights, optimiser and averaged weights; collective.

    Raises:
        ResumeError: DeepSpeed can't read its files.
        AgreedError: on all ranks, if one can't read its averaged weights.
    """

    def load_shard() -> None:
        path = ema_shard(folder, ranks.rank)
        try:
            ema.load(path)
        except SafetensorError as error:
            raise ResumeError(
                f"{path} is damaged: {error}; remove {folder}, and the same command continues from "
                "the checkpoint before"
            ) from None

    engine.load(folder)
    ranks.together(load_shard)


# ---------------------------------------------------------------------------------------------
# Sampling


@dataclass(frozen=True)
class TrainedModel:
    """A trained model as its checkpoint describes it.

    Attributes:
        folder: the checkpoint.
        step: optimiser steps done.
        config: the transformer.
        video: what the model was trained on, with the statistics to unscale by.
        audio: the same for audio.
        text_width: width of the text vectors.
        num_tasks: number of task tokens.
        shapes: of video and audio crops, all that occurred.
        root: folder or URL of the data set, of the first of several, during training.
        columns: directory name of its column by modality.
        seconds: length of a crop.
        heldout_share: share of the training split that was held out.
        flow: the objective, whose time shifts sampling keeps.
        weights: the averaged weights, float32 on the CPU, by name in DiT's state dict.
    """

    folder: Path
    step: int
    config: ModelConfig
    video: LatentSpec
    audio: LatentSpec
    text_width: int
    num_tasks: int
    shapes: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    root: str
    columns: dict[str, str]
    seconds: float
    heldout_share: float
    flow: FlowConfig
    weights: dict[str, torch.Tensor]

    def build(self, device: torch.device | str = "cpu") -> DiT:
        """Return the model with the averaged weights, in evaluation mode."""
        model = DiT(self.config, self.video, self.audio, self.text_width, self.num_tasks)
        model.load_state_dict(self.weights)
        return model.to(device).eval()


def load_model_for_sampling(path: Path) -> TrainedModel:
    """Read the averaged weights of a checkpoint, or of the newest one of a run.

    Raises:
        ResumeError: ``path`` holds no complete checkpoint.
    """
    folder = path if is_complete(path) else latest_complete(path)
    if folder is None:
        raise ResumeError(
            f"{path} holds no complete checkpoint; name a run_dir or one of its checkpoints/step_*"
        )
    state = read_state(folder)
    data = state["data"]
    return TrainedModel(
        folder=folder,
        step=state["step"],
        config=settings.build(ModelConfig, state["run"]["model"], str(folder / "state.json")),
        video=read_spec(data["video"]),
        audio=read_spec(data["audio"]),
        text_width=data["text_width"],
        num_tasks=data["num_tasks"],
        shapes=tuple((tuple(video), tuple(audio)) for video, audio in data["shapes"]),
        root=data["parts"][0]["root"],
        columns=data["parts"][0]["columns"],
        seconds=data["seconds"],
        heldout_share=data["heldout_share"],
        flow=settings.build(
            FlowConfig, state["run"]["objective"]["flow"], str(folder / "state.json")
        ),
        weights=load_file(folder / "ema.safetensors"),
    )


def read_spec(value: dict[str, Any]) -> LatentSpec:
    """Return a LatentSpec from its JSON form."""
    lists = {name: tuple(item) for name, item in value.items() if isinstance(item, list)}
    return LatentSpec(**{**value, **lists})
