"""Settings of a training run: TrainConfig <- YAML file <- `key=value` on the command line.

Every section keeps its own dataclass beside the code that uses it; this module puts them
together and finds the presets wherever the program was started.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    TypeAdapter,
)
from pydantic.dataclasses import dataclass

from pipeline import settings
from pipeline.settings import STRICT, ConfigError
from train.data.config import DataConfig
from train.model import ModelConfig
from train.objective.flow import FlowConfig
from train.objective.tasks import TaskWeights
from train.schedule import Shape, learning_rate

# The checkout: av-latents is installed editable, so configs/ lies beside this package.
REPOSITORY = Path(__file__).resolve().parents[1]
PRESETS = REPOSITORY / "configs" / "model"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class OptimConfig:
    """AdamW and its learning rate.

    Attributes:
        lr: learning rate behind the warm-up.
        betas: AdamW's.
        weight_decay: on matrices only.
        warmup_steps: steps of linear warm-up.
        schedule: "constant", or "cosine" down to 0 at the last step.
        clip_norm: gradients are scaled down to this global 2-norm.
    """

    lr: PositiveFloat = 1e-4
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: NonNegativeFloat = 0.01
    warmup_steps: NonNegativeInt = 1000
    schedule: Shape = "constant"
    clip_norm: PositiveFloat = 1.0


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CheckpointConfig:
    """When to save: every so many steps, at the end, and when the run is asked to stop.

    Attributes:
        every_steps: optimiser steps between checkpoints.
        keep_last: complete checkpoints kept; older ones are removed.
    """

    every_steps: PositiveInt = 1000
    keep_last: PositiveInt = 3


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LogConfig:
    """Attributes: every_steps: optimiser steps that one line of metrics sums up."""

    every_steps: PositiveInt = 10


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrainConfig:
    """A training run.

    Attributes:
        run_dir: folder for metrics and checkpoints, seen by all nodes. The same command with the
            same folder continues the run.
        seed: keys every random draw; the initial weights too.
        steps: optimiser steps of the whole run.
        global_batch: samples per optimiser step, over all ranks. A run that continues with
            another one takes its next samples from where it was.
        micro_batch: samples per forward pass on one rank. Gradients are accumulated over
            global_batch / (micro_batch × ranks) passes, which must be whole.
        model: the transformer; ``model.preset=NAME`` starts from configs/model/NAME.yaml.
        data: the columns that are read and how they are cut.
        tasks: how often each task is drawn.
        flow: the training objective.
        optim: the optimiser.
        ema_decay: of the averaged weights that samples are made with.
        zero_stage: DeepSpeed settings configs/deepspeed/zeroN.json; 0 is for fp32 tests.
        precision: "auto" is bf16 on a GPU and fp32 on a CPU.
        checkpoint: when to save.
        log: when to report.
    """

    run_dir: str = "runs/default"
    seed: NonNegativeInt = 0
    steps: PositiveInt = 100_000
    global_batch: PositiveInt = 64
    micro_batch: PositiveInt = 8
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    tasks: TaskWeights = TaskWeights()
    flow: FlowConfig = FlowConfig()
    optim: OptimConfig = OptimConfig()
    ema_decay: float = Field(default=0.9999, ge=0, lt=1)
    zero_stage: Literal[0, 1, 2, 3] = 2
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()

    def accumulation(self, num_ranks: int) -> int:
        """Return the micro-batches per rank and optimiser step.

        Raises:
            ConfigError: the global batch is no multiple of ``micro_batch`` × ``num_ranks``.
        """
        per_pass = self.micro_batch * num_ranks
        if self.global_batch % per_pass:
            raise ConfigError(
                f"global_batch {self.global_batch} is not a multiple of micro_batch "
                f"{self.micro_batch} × {num_ranks} ranks = {per_pass}; change one of them"
            )
        return self.global_batch // per_pass

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of optimiser step ``step``, from 0."""
        return learning_rate(
            step,
            peak=self.optim.lr,
            warmup_steps=self.optim.warmup_steps,
            steps=self.steps,
            shape=self.optim.schedule,
        )


def load_train_config(path: Path | None, overrides: list[str]) -> TrainConfig:
    """Read settings, with ``model.preset`` replaced by what its file holds.

    Raises:
        ConfigError: unreadable file, unknown key or preset, wrong value.
    """
    values = settings.read_yaml(path) if path else {}
    for text in overrides:
        settings.set_dotted(TrainConfig, values, text)
    model = values.get("model")
    if isinstance(model, dict) and "preset" in model:
        own = {name: value for name, value in model.items() if name != "preset"}
        values["model"] = {**read_preset(model["preset"]), **own}
    return settings.build(TrainConfig, values, settings.origin(path, overrides))


def read_preset(name: str) -> dict[str, Any]:
    """Read configs/model/NAME.yaml.

    Raises:
        ConfigError: there is no such preset; the message lists those there are.
    """
    names = preset_names()
    if name not in names:
        raise ConfigError(f"model.preset {name!r} is unknown; there are {', '.join(names)}")
    return settings.read_yaml(PRESETS / f"{name}.yaml")


def preset_names() -> list[str]:
    """Return the names of the presets there are."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def parse(arguments: list[str]) -> TrainConfig:
    """Read the command line; ``--help`` prints all settings with their defaults and exits.

    Raises:
        ConfigError: a setting can't be used.
    """
    parser = argparse.ArgumentParser(
        prog="deepspeed train/main.py",
        usage="%(prog)s [--config FILE] [key=value ...]",
        description="Train on encoded shards. The same command again continues the run.",
        epilog=f"model.preset={'|'.join(preset_names())} sets the model's size (tiny).\n\n"
        f"settings and their defaults:\n\n{settings.describe(TrainConfig())}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, help="YAML file with differences from the defaults")
    # The launcher puts --local_rank=N in front; the ranks take it from the environment.
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    known, overrides = parser.parse_known_args(arguments)
    return load_train_config(known.config, overrides)


def as_dict(value: Any) -> Any:
    """Return a settings dataclass as plain JSON values."""
    return TypeAdapter(type(value)).dump_python(value, mode="json")
