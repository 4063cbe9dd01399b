"""Ranks and the sharded optimiser: everything that touches DeepSpeed, and nothing else.

No other module imports deepspeed. Private names of DeepSpeed that are relied upon (tested by
tests/train/test_ema.py): ``single_partition_of_fp32_groups`` (ZeRO-1/2) and
``fp32_partitioned_groups_flat`` (ZeRO-3), the fp32 master weights that this rank owns.
"""

from __future__ import annotations

import json
import math
import os
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from pipeline.settings import ConfigError
from train.config import REPOSITORY, TrainConfig
from train.errors import ResumeError
from train.ranks import Ranks

if not torch.cuda.is_available():
    # Without this DeepSpeed probes for every vendor's accelerator and warns about each.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import deepspeed.ops
from deepspeed.utils import safe_get_full_fp32_param

# A rank that saves or opens a data set may keep the others waiting for minutes; DeepSpeed's
# default of 10 is short for a large checkpoint on a busy file system.
COLLECTIVE_TIMEOUT = timedelta(minutes=30)


def join_ranks() -> Ranks:
    """Join the process group that the launcher describes in the environment.

    Raises:
        ConfigError: the process was not started by a launcher.
    """
    if "RANK" not in os.environ:
        raise ConfigError("no launcher: start with `deepspeed train/main.py`, not with python")
    local_rank = int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        use_all_cores()
        # Its shared-memory all-reduce is compiled at start-up: 80 s on 2 cores, and a build that
        # is killed leaves a lock that later runs wait for without a word.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    try:
        deepspeed.init_distributed(
            dist_backend="nccl" if device.type == "cuda" else "gloo",
            timeout=COLLECTIVE_TIMEOUT,
            verbose=False,
        )
    except dist.DistNetworkError as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise ConfigError(
            f"the ranks can't meet at {address} ({str(error).splitlines()[0]}); where another run "
            "uses that port, start with `deepspeed --master_port 29501 train/main.py`"
        ) from None
    return Ranks(dist.get_rank(), dist.get_world_size(), device)


def leave_ranks() -> None:
    """Leave the process group, when all ranks have come so far; the last thing a rank does.

    None leaves earlier: the launcher would end the others in the middle of what they have to say.
    """
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def use_all_cores() -> None:
    """Share this machine's cores between its ranks, unless OMP_NUM_THREADS says otherwise."""
    if "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0))
        on_this_node = os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or "1"
        torch.set_num_threads(max(cores // int(on_this_node), 1))


def choose_precision(wanted: str, device: torch.device) -> Literal["fp32", "bf16"]:
    """Return the precision that "auto" stands for: bf16 on CUDA, fp32 on a CPU."""
    if wanted == "auto":
        return "bf16" if device.type == "cuda" else "fp32"
    return "fp32" if wanted == "fp32" else "bf16"


def deepspeed_settings(config: TrainConfig, device: torch.device, accumulation: int) -> dict:
    """Return DeepSpeed's settings: configs/deepspeed/zeroN.json and what the run decides.

    All that matters is written down, since defaults moved between releases of 2026.

    Raises:
        ConfigError: the JSON file is unreadable or sets what TrainConfig decides.
    """
    path = REPOSITORY / "configs" / "deepspeed" / f"zero{config.zero_stage}.json"
    try:
        chosen = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"DeepSpeed settings {path} can't be read: {error}") from None
    decided = {
        "train_micro_batch_size_per_gpu": config.micro_batch,
        "gradient_accumulation_steps": accumulation,
        # At stage 0 the engine clips, as DeepSpeed's own clipping fails without gradients.
        "gradient_clipping": config.optim.clip_norm if config.zero_stage else 0.0,
        "bf16": {
            "enabled": choose_precision(config.precision, device) == "bf16",
            "check_grad_overflow": True,
        },
        "checkpoint": {"tag_validation": "Fail"},
        "steps_per_print": 1_000_000_000,
    }
    both = sorted(decided.keys() & chosen.keys())
    if both:
        raise ConfigError(f"{path} sets {', '.join(both)}; set it in the training config instead")
    return {**decided, **chosen}


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Return AdamW; weight decay on matrices only, not on biases, norms and tokens."""
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    others = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": config.optim.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.optim.lr,
        betas=config.optim.betas,
        # One kernel per group; needs no compiler, unlike DeepSpeed's FusedAdam.
        fused=next(model.parameters()).is_cuda,
    )


@dataclass(frozen=True)
class StepResult:
    """How an optimiser step went.

    Attributes:
        was_applied: False where the gradients were not finite: all ranks kept their weights.
        gradient_norm: global 2-norm before clipping; infinite or NaN where not applied.
    """

    was_applied: bool
    gradient_norm: float


class Engine:
    """A model under ZeRO: forward, backward, step, master weights, DeepSpeed's checkpoints."""

    def __init__(
        self, model: nn.Module, config: TrainConfig, ranks: Ranks, accumulation: int
    ) -> None:
        """Shard ``model`` (same weights on all ranks, fp32) over the ranks.

        Raises:
            ConfigError: bf16 was asked for at stage 0.
        """
        self.stage = config.zero_stage
        self.clip_norm = config.optim.clip_norm
        settings = deepspeed_settings(config, ranks.device, accumulation)
        if self.stage == 0 and settings["bf16"]["enabled"]:
            raise ConfigError("zero_stage 0 keeps no fp32 weights for bf16; use zero_stage=1")
        self.model = model.to(ranks.device)
        self.wrapped: Any = deepspeed.initialize(
            model=self.model,
            optimizer=build_optimizer(self.model, config),  # pyright: ignore[reportArgumentType]
            config=settings,
            dist_init_required=False,
        )[0]
        self.optimizer = self.wrapped.optimizer

    def accumulate(self, loss: torch.Tensor) -> None:
        """Add the gradients of one micro-batch's mean loss, a scalar on the graph."""
        self.wrapped.backward(loss)
        if not self.wrapped.is_gradient_accumulation_boundary():
            self.wrapped.step()  # only counts the micro-batch

    def step(self, learning_rate: float) -> StepResult:
        """Update the weights with the mean of the accumulated gradients, clipped."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        if self.stage == 0:
            return self._step_unsharded()
        self.wrapped.step()
        norm = self.wrapped.get_global_grad_norm()
        return StepResult(self.wrapped.was_step_applied(), float(norm or 0.0))

    def _step_unsharded(self) -> StepResult:
        """Step at stage 0, where DeepSpeed neither measures gradients nor skips bad ones."""
        parameters = list(self.model.parameters())
        norm = float(nn.utils.clip_grad_norm_(parameters, self.clip_norm))
        is_finite = math.isfinite(norm)
        if not is_finite:
            for parameter in parameters:
                parameter.grad = None  # AdamW leaves such parameters alone
        self.wrapped.step()
        return StepResult(is_finite, norm)

    def master_shards(self) -> list[torch.Tensor]:
        """Return the fp32 master weights that this rank owns, flat and without gradient.

        At stage 0 every rank owns every parameter.
        """
        if self.stage == 0:
            shards = list(self.model.parameters())
        elif self.stage == 3:
            shards = self.optimizer.fp32_partitioned_groups_flat
        else:
            shards = self.optimizer.single_partition_of_fp32_groups
        return [shard.detach() for shard in shards]

    @contextmanager
    def master_weights(self, shards: Sequence[torch.Tensor]) -> Iterator[None]:
        """Put other values, such as the EMA, in the place of the master weights for a while."""
        masters = self.master_shards()
        saved = [master.clone() for master in masters]
        try:
            torch._foreach_copy_(masters, list(shards))
            yield
        finally:
            torch._foreach_copy_(masters, saved)

    def full_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Gather the fp32 master weights of one parameter after the other; collective.

        Yields:
            (name in the model's state dict, float32 tensor of the parameter's full shape).
        """
        for name, parameter in self.model.named_parameters():
            full = parameter.clone() if self.stage == 0 else safe_get_full_fp32_param(parameter)
            assert full is not None, name
            yield name, full.detach()

    def save(self, folder: Path) -> None:
        """Write weights and optimiser state below ``folder``; collective.

        DeepSpeed's own `latest` file is not written: it may appear before the other ranks'
        files do, so it proves nothing.
        """
        self.wrapped.save_checkpoint(str(folder.parent), tag=folder.name, save_latest=False)

    def load(self, folder: Path) -> None:
        """Restore what ``save`` wrote with the same number of ranks and stage; collective.

        Raises:
            ResumeError: DeepSpeed can't read it.
        """
        reason = "it found no weights"
        try:
            loaded, _ = self.wrapped.load_checkpoint(str(folder.parent), tag=folder.name)
        except (AssertionError, OSError, RuntimeError, pickle.UnpicklingError) as error:
            loaded, reason = None, str(error).partition("\n")[0] or repr(error)
        if loaded is None:
            raise ResumeError(
                f"DeepSpeed can't read {folder}: {reason}; remove it, and the same command "
                "continues from the checkpoint before"
            )
