"""The engine's private dealings with DeepSpeed: master weights, EMA, skipped steps."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pipeline import settings
from tests.train.launch import spawn
from train.config import TrainConfig
from train.ema import Ema
from train.engine import Engine, join_ranks
from train.schedule import ema_decay

NUM_STEPS = 5
DECAY = 0.7


def small_model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 13), nn.GELU(), nn.LayerNorm(13), nn.Linear(13, 3))


def build(stage: int, precision: str, ranks, accumulation: int = 2) -> Engine:
    values = {
        "zero_stage": stage,
        "precision": precision,
        "micro_batch": 2,
        "global_batch": 2 * ranks.num_ranks * accumulation,
        "optim": {"lr": 1e-2, "weight_decay": 0.1},
    }
    config = settings.build(TrainConfig, values, "test")
    return Engine(small_model(), config, ranks, accumulation)


def step(engine: Engine, number: int, ranks, precision: str, poison: bool = False):
    """One optimiser step of two micro-batches that depend on step and rank."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    for micro_batch in range(2):
        torch.manual_seed(100 * number + 10 * micro_batch + ranks.rank)
        x = torch.randn(2, 6).to(dtype)
        if poison and ranks.rank == 1:
            x = x * float("nan")
        engine.accumulate(engine.wrapped(x).float().square().mean())
    return engine.step(1e-2)


def full(engine: Engine) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in engine.full_parameters()}


def check_stages(cases: list[tuple[int, str]]) -> None:
    ranks = join_ranks()
    results = {}
    for stage, precision in cases:
        engine = build(stage, precision, ranks)
        ema = Ema(engine, DECAY)
        expected = full(engine)
        for number in range(NUM_STEPS):
            assert step(engine, number, ranks, precision).was_applied
            ema.update(engine, number)
            for name, weight in full(engine).items():
                expected[name].lerp_(weight, 1 - ema_decay(number, DECAY))

        weights = full(engine)
        with engine.master_weights(ema.shards):
            averaged = full(engine)
        for name, weight in full(engine).items():
            assert torch.equal(averaged[name], expected[name]), (stage, precision, name)
            assert torch.equal(weight, weights[name]), "the master weights were not put back"
            assert not torch.equal(weight, averaged[name])

        result = step(engine, NUM_STEPS, ranks, precision, poison=True)
        assert not result.was_applied, (stage, precision)
        for name, weight in full(engine).items():
            assert torch.equal(weight, weights[name]), "a skipped step changed weights"
        assert step(engine, NUM_STEPS + 1, ranks, precision).was_applied
        results[stage, precision] = weights

    for (stage, precision), weights in results.items():
        tolerance = 1e-6 if precision == "fp32" else 2e-2
        for name, weight in weights.items():
            torch.testing.assert_close(
                weight, results[0, "fp32"][name], rtol=0, atol=tolerance, msg=f"{stage} {precision}"
            )


@pytest.mark.timeout(240)
def test_sharded_ema_and_skipped_steps_equal_unsharded_at_every_stage():
    fp32 = [(stage, "fp32") for stage in range(4)]
    bf16 = [(stage, "bf16") for stage in range(1, 4)]
    spawn(check_stages, 2, fp32 + bf16)
