"""Checkpoints: what is written, what a run continues from, what sampling needs.

    run_dir/checkpoints/step_00000100/
        *.pt                         DeepSpeed's files (pickles: load only what you wrote)
        ema/rank_00000.safetensors   the averaged weights as the ranks keep them
        ema.safetensors              the same as whole parameters, float32: what sampling needs
        state.json                   what was trained, on what, how far
        COMPLETE                     names and sizes of all files, written last

What COMPLETE does not vouch for is never read: see ``checkpoint_folders``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pipeline import settings
from pipeline.files import write_json
from pipeline.format import FormatError, read_json
from train.checkpoint_folders import (
    STATE_NAME,
    find_damage,
    mark_complete,
    newest_checkpoint,
    remove,
    was_completed,
)
from train.errors import ResumeError
from train.latents import LatentSpec
from train.model import DiT, ModelConfig
from train.objective.flow import FlowConfig
from train.ranks import Ranks

if TYPE_CHECKING:  # sampling reads checkpoints where DeepSpeed isn't wanted
    from train.ema import Ema
    from train.engine import Engine

STATE_VERSION = 3


# ---------------------------------------------------------------------------------------------
# Writing


def save_checkpoint(
    folder: Path, engine: Engine, ema: Ema, ranks: Ranks, state: dict[str, Any]
) -> None:
    """Write a checkpoint; collective. It counts from the moment that COMPLETE is there.

    Args:
        folder: one that broke off in it is replaced.
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
            remove(folder)
        (folder / "ema").mkdir(parents=True)

    def save_shard() -> None:
        with writing(folder):
            ema.save(ema_shard(folder, ranks.rank))

    def finish() -> None:
        with writing(folder):
            save_file(weights, folder / "ema.safetensors")
            write_json(folder / STATE_NAME, {"version": STATE_VERSION, **state})
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


# ---------------------------------------------------------------------------------------------
# Continuing


def read_state(folder: Path) -> dict[str, Any]:
    """Read a checkpoint's state.json.

    Raises:
        ResumeError: it is missing, damaged, or of another version of this program.
    """
    try:
        state = read_json(folder / STATE_NAME)
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
        ResumeError: ``path`` holds no complete checkpoint, or a damaged one that is newer.
    """
    folder = path if was_completed(path) else newest_checkpoint(path)
    if folder is None:
        raise ResumeError(
            f"{path} holds no complete checkpoint; name a run_dir or one of its checkpoints/step_*"
        )
    if damage := find_damage(folder):
        raise ResumeError(f"{damage}; the checkpoint is damaged: restore it, or name another")
    state = read_state(folder)
    data = state["data"]
    return TrainedModel(
        folder=folder,
        step=state["step"],
        config=settings.build(ModelConfig, state["run"]["model"], str(folder / STATE_NAME)),
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
            FlowConfig, state["run"]["objective"]["flow"], str(folder / STATE_NAME)
        ),
        weights=load_file(folder / "ema.safetensors"),
    )


def read_spec(value: dict[str, Any]) -> LatentSpec:
    """Return a LatentSpec from its JSON form."""
    lists = {name: tuple(item) for name, item in value.items() if isinstance(item, list)}
    return LatentSpec(**{**value, **lists})
