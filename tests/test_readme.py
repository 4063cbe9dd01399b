"""Every command of the README runs, in the README's order, on a copy of the repository."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.train.launch import free_port

ROOT = Path(__file__).resolve().parents[1]
# What a test adds, because the README's own numbers take minutes: fewer steps, smaller frames.
FASTER = {
    "python -m pipeline.encode": "video.size=64 clip.seconds=3",
    "deepspeed train/main.py": "steps=3 global_batch=4 micro_batch=2 checkpoint.every_steps=2",
    "python -m train.sample": "--steps 2",
}


def readme_commands():
    """Return the command lines of the README's bash blocks, one string per block."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return [block.replace("\\\n", " ") for block in blocks]


def copy_of_repository(folder):
    """Copy what git tracks and what is new, not what is ignored."""
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in names.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def run(script, folder, timeout_s):
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=folder,
        env={**os.environ, "PATH": f"{ROOT / '.venv' / 'bin'}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, f"{script}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def faster(script):
    lines = []
    for line in script.splitlines():
        for command, extra in FASTER.items():
            if line.startswith(command):
                line = f"{line} {extra}".replace(
                    "deepspeed ", f"deepspeed --master_port {free_port()} "
                )
        lines.append(line)
    return "\n".join(lines)


@pytest.mark.timeout(600)
def test_the_tour_runs_as_written(shared_clips, tmp_path):
    folder = copy_of_repository(tmp_path)
    first, *tour = readme_commands()
    assert "make demo" in first
    assert len(tour) == 3
    for block in tour:
        script = block.replace("source .venv/bin/activate\n", "")
        script = script.replace("CLIPS", str(shared_clips / "vggsound"))
        run(faster(script), folder, 300)
    assert len(list((folder / "shards").glob("audio@*"))) == 2
    samples = json.loads((folder / "out" / "samples.json").read_text())
    assert len(samples["clips"]) == 4
    assert "<video" in (folder / "out" / "index.html").read_text()
    columns = {
        json.loads(path.read_text())["data"]["parts"][0]["columns"]["audio"]
        for path in (folder / "runs").glob("*/checkpoints/*/state.json")
    }
    assert len(columns) == 2, "the second run did not train on the second audio column"
    [loader] = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    named = loader.replace('root="shards/"', f'root="shards/", audio="{min(columns)}"')
    (folder / "loader.py").write_text(named)
    run("PYTHONPATH=. python loader.py", folder, 100)
    # The first run goes on by its own command, though there are two audio columns now.
    first_run = next(line for line in tour[0].splitlines() if line.startswith("deepspeed"))
    run(f"{faster(first_run)} steps=4", folder, 200)
    assert (folder / "runs" / "first" / "checkpoints" / "step_00000004").is_dir()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_make_demo_runs_at_a_small_size(tmp_path):
    folder = copy_of_repository(tmp_path)
    (folder / ".venv").symlink_to(ROOT / ".venv")
    # -o: the environment is not to be installed anew, from the copy.
    printed = run("make -o .venv/installed demo NUM_CLIPS=48 STEPS=4 SAMPLES=2", folder, 600)
    assert "chance" in printed
    assert (folder / "demo" / "v2a" / "index.html").is_file()
