"""The main job on real clips: encode them, train on them with two ranks, stop and go on."""

import subprocess
import sys

import pytest

from tests.train.launch import metrics, train

SETTINGS = (
    "global_batch=4",
    "micro_batch=2",
    "zero_stage=2",
    "data.seconds=2",
    "optim.lr=1e-3",
    "optim.warmup_steps=2",
    "log.every_steps=1",
    "checkpoint.every_steps=100",
)
TIMINGS = {"step_s", "samples_per_s", "data_wait"}


@pytest.mark.timeout(600)
@pytest.mark.slow
def test_stopped_and_resumed_training_on_real_shards_has_equal_losses(shared_clips, tmp_path):
    shards = tmp_path / "shards"
    encode = ["pipeline.encode", "--src", str(shared_clips / "vggsound"), "--out", str(shards)]
    subprocess.run(
        [sys.executable, "-m", *encode, "video.size=64"], check=True, capture_output=True
    )
    data = f"data.root={shards}"

    def run(name, steps):
        done = train(data, *SETTINGS, f"run_dir={tmp_path / name}", f"steps={steps}", num_ranks=2)
        assert done.returncode == 0, done.stderr

    run("straight", 6)
    run("stopped", 3)
    run("stopped", 6)
    expected, found = (
        [
            {name: value for name, value in line.items() if name not in TIMINGS}
            for line in metrics(tmp_path / name)
        ]
        for name in ("straight", "stopped")
    )
    assert [line["step"] for line in expected] == [1, 2, 3, 4, 5, 6]
    assert found == expected
