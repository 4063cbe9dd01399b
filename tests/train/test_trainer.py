"""Real runs under the real launcher, two ranks on gloo. A run costs about 15 s."""

from __future__ import annotations

import os
import re
import shutil
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

from tests.pipeline.servers import s3_bucket
from tests.train.columns import Dataset
from tests.train.launch import launched, metrics, train
from train.checkpoint import load_model_for_sampling
from train.checkpoint_folders import newest_checkpoint
from train.ranks import find_disagreement, one_message

TIMES = ("step_s", "samples_per_s", "data_wait")
STEPS = 100  # a few seconds: enough to take a file away while they pass


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Clips of two sizes, 20 each: an epoch has two steps of either."""
    root = tmp_path_factory.mktemp("data") / "shards"
    return Dataset(root, wide=frozenset(range(0, 40, 2))).build()


def settings(dataset, run_dir, *more):
    """Many steps of a very small model; two micro-batches per rank and step."""
    return (
        f"data.root={dataset.root}",
        f"data.cache_dir={dataset.root.parent}",
        "data.seconds=2",
        "data.heldout_share=0",
        "data.window_shards=1",
        "data.retry_s=0.3",
        f"run_dir={run_dir}",
        "model.width=32",
        "model.depth=2",
        "model.heads=2",
        "model.video_patch=[2, 0, 3]",
        f"steps={STEPS}",
        "global_batch=8",
        "micro_batch=2",
        "zero_stage=2",
        "optim.lr=1e-2",
        "optim.warmup_steps=2",
        "optim.schedule=cosine",
        "ema_decay=0.7",
        "checkpoint.every_steps=50",
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
    folder = newest_checkpoint(run_dir)
    assert folder
    return folder


def numbers(run_dir):
    """What must not depend on interruptions, step by step."""
    return [{k: v for k, v in line.items() if k not in TIMES} for line in metrics(run_dir)]


def await_lines(process, run_dir, num_lines):
    """Wait until a run has reported so many steps."""
    path = run_dir / "metrics.jsonl"
    while not path.exists() or path.read_text().count("\n") < num_lines:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def assert_same_training(run_dir, straight):
    assert numbers(run_dir) == numbers(straight)
    first, second = (load_file(newest(path) / "ema.safetensors") for path in (run_dir, straight))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_run_writes_metrics_checkpoints_and_settings(straight):
    lines = metrics(straight)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["samples"] for line in lines] == list(range(8, 8 * STEPS + 1, 8))
    for line in lines:
        assert any(name.startswith("loss/") for name in line)
        assert line["gradient_norm"] > 0
        assert line["skipped_steps"] == 0
        assert 0 <= line["data_wait"] <= 1
    names = sorted(path.name for path in (straight / "checkpoints").glob("step_*"))
    assert names == ["step_00000050", "step_00000100"]
    assert (straight / "config.yaml").exists()
    assert list((straight / "tensorboard").iterdir())


def test_model_for_sampling_needs_only_the_checkpoint(dataset, straight):
    trained = load_model_for_sampling(straight)
    assert trained.step == STEPS
    assert trained.config.width == 32
    assert trained.columns["video"] == dataset.spec("video").directory
    assert trained.text_width == dataset.text_width
    model = trained.build()
    assert not model.training
    assert trained.weights.keys() == model.state_dict().keys()
    assert any(weight.abs().sum() > 0 for weight in model.outputs.parameters())
    assert {video[-1] for video, _ in trained.shapes} == {3, 6}
    older = load_model_for_sampling(straight / "checkpoints" / "step_00000050")
    assert older.step == 50


@pytest.mark.timeout(600)  # three runs
def test_a_run_that_lost_a_shard_and_was_stopped_is_bit_equal_to_a_straight_one(
    dataset, straight, tmp_path
):
    arguments = settings(dataset, tmp_path)
    tar = dataset.column_path("video") / "000003.tar"
    away = tar.with_suffix(".away")
    try:
        with launched(*arguments, num_ranks=2) as process:
            await_lines(process, tmp_path, 3)
            tar.rename(away)  # every epoch opens each shard anew
            _, errors = process.communicate(timeout=150)
        assert process.returncode == 1
        assert "Traceback" not in errors
        (message,) = (line for line in errors.splitlines() if line.startswith("train: "))
        assert str(tar) in message and "tried for data.retry_s=0.3" in message
        step = int(newest(tmp_path).name.removeprefix("step_"))
        assert 3 <= step == metrics(tmp_path)[-1]["step"] < STEPS
        assert f"Step {step} of {STEPS} is saved in {tmp_path}" in message
        assert re.search(r"waited for data [\d.]+% of the time", errors)
    finally:
        away.rename(tar)

    # What a kill during the next save leaves behind: some of the files, and metrics that the
    # checkpoint knows nothing of.
    killed = tmp_path / "checkpoints" / f"step_{step + 3:08d}"
    killed.mkdir()
    shutil.copy(next(newest(tmp_path).glob("*optim_states.pt")), killed)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(f'{{"step": {step + 1}, "loss/v2a/total": 1}}\n{{"step": {step + 2}, "lo')
    (tmp_path / "stop").touch()
    stopped = run(*arguments)
    assert f"ignoring {killed}" in stopped.stderr
    assert f"stopped at step {step + 1} of {STEPS}" in stopped.stderr
    assert not (tmp_path / "stop").exists()
    assert newest(tmp_path).name == f"step_{step + 1:08d}"

    resumed = run(*arguments)
    first = next(line for line in resumed.stderr.splitlines() if "continuing from" in line)
    assert f"step {step + 1} of {STEPS}: epoch {(step + 1) // 4}, clip" in first
    assert "next clip000" in first
    assert_same_training(tmp_path, straight)


def test_wrong_settings_are_told_once_even_where_the_rank_that_speaks_starts_late(
    tmp_path, monkeypatch
):
    late = "import os, time\nif os.environ.get('LOCAL_RANK') == '0': time.sleep(3)\n"
    (tmp_path / "sitecustomize.py").write_text(late)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    refused = train("optim.lr=fast", num_ranks=2)
    assert refused.returncode == 1
    assert refused.stderr.count("train: ") == refused.stderr.count("setting 'optim.lr'") == 1


def test_changed_model_is_refused_in_one_line_that_names_the_field(dataset, straight):
    refused = train(*settings(dataset, straight, "model.depth=3"), num_ranks=2)
    assert refused.returncode == 1
    assert refused.stderr.count("model.depth was 2, is now 3") == 1
    assert "Traceback" not in refused.stderr


@pytest.mark.slow
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
    layout = (f"zero_stage={stage}", f"precision={precision}", "steps=6")
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
        await_lines(process, tmp_path, 3)
        # To all processes, as Ctrl-C and Slurm do: `deepspeed` alone would die and pass nothing on.
        os.killpg(process.pid, signal.SIGTERM)
        _, errors = process.communicate(timeout=150)
    # The launcher's exit status after a signal is never 0: only the marker tells.
    assert "by SIGTERM" in errors
    step = int(newest(tmp_path).name.removeprefix("step_"))
    assert step == metrics(tmp_path)[-1]["step"] >= 3


@pytest.mark.slow
def test_a_run_whose_newest_checkpoint_is_damaged_says_so_and_removes_nothing(
    dataset, straight, tmp_path
):
    run_dir = tmp_path / "run"
    shutil.copytree(straight, run_dir)
    state = newest(run_dir) / "state.json"
    state.write_bytes(state.read_bytes().replace(b'"loader"', b'"Loader"'))
    before = sorted(run_dir.rglob("*"))
    refused = train(*settings(dataset, run_dir, "steps=101"), num_ranks=2)
    assert refused.returncode == 1
    (message,) = (line for line in refused.stderr.splitlines() if line.startswith("train: "))
    assert f"{state} has SHA-256" in message
    assert f"remove {state.parent} to go on from step_00000050" in message
    assert "Traceback" not in refused.stderr
    assert sorted(run_dir.rglob("*")) == before


@pytest.mark.slow
def test_a_run_that_waits_for_lost_data_can_be_stopped_and_is_saved(dataset, tmp_path):
    arguments = settings(dataset, tmp_path, "data.retry_s=3600", "steps=100000")
    tar = dataset.column_path("audio") / "000002.tar"
    away = tar.with_suffix(".away")
    try:
        with launched(*arguments, num_ranks=2) as process:
            await_lines(process, tmp_path, 3)
            tar.rename(away)
            while True:  # until the steps end
                num_lines = len(metrics(tmp_path))
                time.sleep(3)
                if len(metrics(tmp_path)) == num_lines:
                    break
            (tmp_path / "stop").touch()  # which one of the ranks sees
            _, errors = process.communicate(timeout=60)
    finally:
        away.rename(tar)
    assert process.returncode == 0, errors
    step = int(newest(tmp_path).name.removeprefix("step_"))
    assert step == metrics(tmp_path)[-1]["step"] >= 3
    assert f"stopped at step {step} of 100000 by the file {tmp_path / 'stop'}" in errors


@pytest.mark.slow
def test_training_from_an_object_store_is_bit_equal_to_training_from_a_folder(
    dataset, straight, tmp_path
):
    with s3_bucket(tmp_path, "data") as files:
        files.put(str(dataset.root), "data/shards", recursive=True)
        remote = ("data.root=s3://data/shards", f"data.cache_dir={tmp_path / 'cache'}")
        run(*settings(dataset, tmp_path / "run", *remote))
    assert_same_training(tmp_path / "run", straight)


@pytest.mark.slow
def test_a_rank_that_alone_meets_damage_ends_all_with_its_number_and_a_checkpoint(tmp_path):
    data = Dataset(tmp_path / "shards").build()
    tar = data.column_path("audio") / "000002.tar"
    whole = tar.read_bytes()
    place = whole.index(data.audio(20).tobytes())
    tar.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    ended = train(*settings(data, tmp_path / "run", "data.max_damaged=0"), num_ranks=2)
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    (message,) = (line for line in ended.stderr.splitlines() if line.startswith("train: "))
    assert re.search(rf"any more: rank [01]: .*{tar} .*crc32c", message)
    step = metrics(tmp_path / "run")[-1]["step"]
    assert f"Step {step} of" in message
    tar.write_bytes(whole)
    run(*settings(data, tmp_path / "run", f"steps={step + 2}"))
    assert metrics(tmp_path / "run")[-1]["step"] == step + 2


@pytest.mark.slow
def test_a_mixture_of_data_sets_resumes_bit_equal(tmp_path):
    roots = [Dataset(tmp_path / name, seed=seed).build().root for seed, name in enumerate("ab")]
    mix = f"data.mix=[{{root: {roots[0]}, weight: 2}}, {{root: {roots[1]}}}]"
    for name in ("straight", "resumed"):
        arguments = settings(Dataset(roots[0]), tmp_path / name, "steps=12", mix)
        arguments = [text for text in arguments if not text.startswith("data.root=")]
        if name == "resumed":
            (tmp_path / name).mkdir()
            (tmp_path / name / "stop").touch()
            run(*arguments)
        resumed = run(*arguments)
    assert re.search(r"step 1 of 12: epoch 0 of .*/[ab], clip [08] of 40", resumed.stderr)
    assert_same_training(tmp_path / "resumed", tmp_path / "straight")


@pytest.mark.slow
def test_another_global_batch_goes_on_at_the_same_sample(dataset, tmp_path):
    run(*settings(dataset, tmp_path, "steps=3"))
    changed = run(*settings(dataset, tmp_path, "steps=5", "global_batch=12", "micro_batch=3"))
    assert "global_batch was 8, is now 12: the samples go on where they were" in changed.stderr
    assert [line["samples"] for line in metrics(tmp_path)] == [8, 16, 24, 36, 48]


@pytest.mark.slow
def test_clips_that_lack_a_modality_are_trained_on_where_they_can_serve(tmp_path):
    missing = {"failed_audio": dict.fromkeys(range(0, 40, 3), "no_audio")}
    data = Dataset(tmp_path / "shards", **missing).build()
    run(*settings(data, tmp_path / "run", "steps=12", "data.missing=mask", "tasks.a2v=0"))
    lines = metrics(tmp_path / "run")
    assert any(line.get("unserved/v2a", 0) > 0 for line in lines)
    assert any("loss/t2av/audio" in line for line in lines)
    assert not any("unserved/t2av" in line for line in lines)


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
