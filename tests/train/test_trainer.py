"""Real runs under the real launcher, two ranks on gloo. A run costs about 15 s."""

from __future__ import annotations

import os
import shutil
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

from tests.train.columns import Dataset
from tests.train.launch import launched, metrics, train
from train.checkpoint import latest_complete, load_model_for_sampling
from train.ranks import find_disagreement, one_message

TIMES = ("step_s", "samples_per_s", "data_wait")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return Dataset(tmp_path_factory.mktemp("data") / "shards").build()


def settings(dataset, run_dir, *more):
    """Six steps of a very small model; two micro-batches per rank and step."""
    return (
        f"data.root={dataset.root}",
        "data.seconds=2",
        f"run_dir={run_dir}",
        "model.width=32",
        "model.depth=2",
        "model.heads=2",
        "model.video_patch=[2, 0, 0]",
        "steps=6",
        "global_batch=8",
        "micro_batch=2",
        "zero_stage=2",
        "optim.lr=1e-2",
        "optim.warmup_steps=2",
        "optim.schedule=cosine",
        "ema_decay=0.7",
        "checkpoint.every_steps=4",
        "log.every_steps=1",
        *more,
    )


def run(*arguments, num_ranks=2):
    done = train(*arguments, num_ranks=num_ranks)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def straight(dataset, tmp_path_factory):
    """A run that nothing interrupts."""
    run_dir = tmp_path_factory.mktemp("straight")
    run(*settings(dataset, run_dir))
    return run_dir


def newest(run_dir):
    folder = latest_complete(run_dir)
    assert folder
    return folder


def numbers(run_dir):
    """What must not depend on interruptions, step by step."""
    return [{k: v for k, v in line.items() if k not in TIMES} for line in metrics(run_dir)]


def assert_same_training(run_dir, straight):
    assert numbers(run_dir) == numbers(straight)
    first, second = (load_file(newest(path) / "ema.safetensors") for path in (run_dir, straight))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_run_writes_metrics_checkpoints_and_settings(straight):
    lines = metrics(straight)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["samples"] for line in lines] == [8, 16, 24, 32, 40, 48]
    for line in lines:
        assert any(name.startswith("loss/") for name in line)
        assert line["gradient_norm"] > 0
        assert line["skipped_steps"] == 0
    names = sorted(path.name for path in (straight / "checkpoints").glob("step_*"))
    assert names == ["step_00000004", "step_00000006"]
    assert (straight / "config.yaml").exists()
    assert list((straight / "tensorboard").iterdir())


def test_model_for_sampling_needs_only_the_checkpoint(dataset, straight):
    trained = load_model_for_sampling(straight)
    assert trained.step == 6
    assert trained.config.width == 32
    assert trained.columns["video"] == dataset.spec("video").directory
    assert trained.text_width == dataset.text_width
    model = trained.build()
    assert not model.training
    assert trained.weights.keys() == model.state_dict().keys()
    assert any(weight.abs().sum() > 0 for weight in model.outputs.parameters())
    older = load_model_for_sampling(straight / "checkpoints" / "step_00000004")
    assert older.step == 4


def test_stopped_and_resumed_run_is_bit_equal_to_a_straight_one(dataset, straight, tmp_path):
    arguments = settings(dataset, tmp_path)
    (tmp_path / "stop").touch()
    stopped = run(*arguments)
    assert "stopped at step 1 of 6" in stopped.stderr
    assert not (tmp_path / "stop").exists()
    assert newest(tmp_path).name == "step_00000001"

    # What a kill during the next save leaves behind: some of the files, and metrics that the
    # checkpoint knows nothing of.
    killed = tmp_path / "checkpoints" / "step_00000004"
    killed.mkdir()
    shutil.copy(next(newest(tmp_path).glob("*optim_states.pt")), killed)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "loss/v2a/total": 1}\n{"step": 3, "lo')

    resumed = run(*arguments)
    assert f"ignoring {killed}" in resumed.stderr
    first = next(line for line in resumed.stderr.splitlines() if "continuing from" in line)
    assert "step 1 of 6: epoch 0, sample 8 of 32; next clip0" in first
    assert_same_training(tmp_path, straight)


def test_changed_model_is_refused_in_one_line_that_names_the_field(dataset, straight):
    refused = train(*settings(dataset, straight, "model.depth=3"), num_ranks=2)
    assert refused.returncode == 1
    assert refused.stderr.count("model.depth was 2, is now 3") == 1
    assert "Traceback" not in refused.stderr


def test_a_checkpoint_that_cannot_be_written_ends_all_ranks_in_one_line(dataset, tmp_path):
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    ended = train(*settings(dataset, tmp_path, "steps=1"), num_ranks=2)
    assert ended.returncode == 1
    assert ended.stderr.count("train: ") == 1
    assert f"{tmp_path}/checkpoints" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "precision"), [(0, "fp32"), (1, "fp32"), (3, "fp32"), (2, "bf16")]
)
def test_resume_is_bit_equal_in_other_layouts(dataset, tmp_path, stage, precision):
    layout = (f"zero_stage={stage}", f"precision={precision}")
    for name in ("straight", "resumed"):
        arguments = settings(dataset, tmp_path / name, *layout)
        if name == "resumed":
            (tmp_path / name).mkdir()
            (tmp_path / name / "stop").touch()
            run(*arguments)
        run(*arguments)
    assert_same_training(tmp_path / "resumed", tmp_path / "straight")


@pytest.mark.slow
def test_sigterm_to_the_process_group_leaves_a_complete_checkpoint(dataset, tmp_path):
    arguments = settings(dataset, tmp_path, "steps=100000", "checkpoint.every_steps=100000")
    with launched(*arguments, num_ranks=2) as process:
        while not (tmp_path / "metrics.jsonl").exists() or len(metrics(tmp_path)) < 3:
            assert process.poll() is None
            time.sleep(0.5)
        # To all processes, as Ctrl-C and Slurm do: `deepspeed` alone would die and pass nothing on.
        os.killpg(process.pid, signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    # The launcher's exit status after a signal is never 0: only the marker tells.
    assert "by SIGTERM" in errors
    step = int(newest(tmp_path).name.removeprefix("step_"))
    assert step == metrics(tmp_path)[-1]["step"] >= 3


@pytest.mark.slow
def test_gradients_that_stay_not_finite_end_the_run(dataset, tmp_path):
    broken = settings(dataset, tmp_path, "optim.lr=1e30", "optim.warmup_steps=0", "steps=50")
    ended = train(*broken, num_ranks=2)
    assert ended.returncode == 1
    assert ended.stderr.count("not finite in 10 steps in a row") == 1
    assert "Traceback" not in ended.stderr


def test_odd_rank_is_named():
    plans = [{"data": "a", "steps": (0, 6)}] * 3
    assert find_disagreement(plans) is None
    message = find_disagreement([*plans, {"data": "b", "steps": (0, 6)}])
    assert message
    assert "rank 3 has b, the others a" in message


def test_failure_of_all_ranks_is_told_once_and_of_one_rank_with_its_number():
    assert one_message(["no plan"] * 4) == "no plan"
    assert one_message([None, None, "no plan"]) == "rank 2: no plan"
