"""The templates for clusters run what they say: their commands parse, their options exist."""

import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipeline.layout import store_bytes
from pipeline.request import parse
from tests.pipeline.encoded import record_films

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "cluster"
ENCODE = ["python", "-m", "pipeline.encode"]


def commands(text):
    """Return the commands that a text shows, as lists of words: indented, or after `$(`."""
    joined = re.sub(r"\\\n\s*", " ", text)
    return [shlex.split(line) for line in re.findall(r"^(?:    |#   )(\S.*)$", joined, re.M)]


def encode_arguments(words):
    """Return what follows ``python -m pipeline.encode`` in a command, or None."""
    for start in range(len(words)):
        if words[start : start + len(ENCODE)] == ENCODE:
            return words[start + len(ENCODE) :]
    return None


def ray_options(module, command):
    """Return the options of one of Ray's commands."""
    found = getattr(importlib.import_module(module), command)
    return {option for parameter in found.params for option in parameter.opts}


@pytest.fixture(scope="module")
def rayjob():
    return yaml.safe_load((FOLDER / "rayjob.yaml").read_text())


def test_the_ray_job_runs_a_command_that_is_understood(rayjob):
    words = shlex.split(rayjob["spec"]["entrypoint"])
    request, config = parse(encode_arguments(words))
    assert request.address == "auto" and request.out.startswith("s3://")
    workers = rayjob["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert {group["replicas"] for group in workers} == {2}
    (container,) = workers[0]["template"]["spec"]["containers"]
    limits = container["resources"]["limits"]
    cells = config.cells // 2  # of a node
    assert cells * config.encoder_gpus == float(limits["nvidia.com/gpu"])
    assert cells * (config.encoder_cpus + config.decoders) == int(limits["cpu"])
    shared_bytes = int(workers[0]["rayStartParams"]["object-store-memory"])
    assert shared_bytes >= store_bytes(cells, config)
    (memory,) = [v for v in workers[0]["template"]["spec"]["volumes"] if "emptyDir" in v]
    assert int(memory["emptyDir"]["sizeLimit"].removesuffix("Gi")) * 2**30 >= shared_bytes


def test_all_pods_have_the_media_the_credentials_and_the_image(rayjob):
    cluster = rayjob["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    pods = [group["template"]["spec"] for group in groups]
    containers = [pod["containers"][0] for pod in pods]
    assert len({container["image"] for container in containers}) == 1
    media = shlex.split(rayjob["spec"]["entrypoint"])
    assert media[media.index("--src") + 1].startswith("/media/")
    for pod, container in zip(pods, containers, strict=True):
        assert container["envFrom"] == [{"secretRef": {"name": "av-latents-s3"}}]
        assert "env" not in container, "no credential stands in the file"
        mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounted["media"] == "/media"
        assert mounted.keys() == {volume["name"] for volume in pod["volumes"]}


def test_ray_starts_nodes_with_options_that_exist(rayjob):
    options = ray_options("ray.scripts.scripts", "start")
    cluster = rayjob["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert {f"--{name}" for name in group["rayStartParams"]} <= options
    script = (FOLDER / "encode.slurm").read_text()
    started = re.sub(r"^.*\bsrun\b[^\n]*?(?=ray start)|^#.*$", "", script, flags=re.M)
    used = set(
        re.findall(
            r"--[a-z-]+", "".join(re.findall(r"(?:ray start|start_node) (?:.*\\\n)*.*", started))
        )
    )
    assert {"--head", "--block", "--num-gpus", "--port", "--address"} <= used <= options


def test_the_page_shows_commands_that_are_understood():
    shown = commands((FOLDER / "README.md").read_text())
    encodes = [arguments for words in shown if (arguments := encode_arguments(words))]
    assert len(encodes) == 2
    for arguments in encodes:
        parse(arguments)
    (submit,) = [words for words in shown if words[:3] == ["ray", "job", "submit"]]
    used = {word for word in submit[3 : submit.index("--")] if word.startswith("--")}
    assert used <= ray_options("ray.dashboard.modules.job.cli", "submit")
    (sbatch,) = [words for words in shown if words[0] == "sbatch"]
    parse(sbatch[sbatch.index("configs/cluster/encode.slurm") + 1 :])
    for words in shown:
        for path in words:
            if path.startswith("configs/"):
                assert (FOLDER.parents[1] / path).is_file()


def test_the_slurm_script_is_bash():
    subprocess.run(["bash", "-n", str(FOLDER / "encode.slurm")], check=True)


@pytest.mark.slow
def test_the_slurm_script_encodes_on_two_nodes(tmp_path):
    """Real Ray nodes, both on this machine: only Slurm's own programs are stand-ins."""
    src = record_films(tmp_path / "clips", 5)
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in {
        "srun": 'while [[ $1 == --* ]]; do shift; done\nexec "$@"',
        "scontrol": "printf 'node-1\\nnode-2\\n'",
    }.items():
        (programs / name).write_text(f"#!/bin/bash\n{text}\n")
        (programs / name).chmod(0o755)
    slurm = {"JOB_ID": str(os.getpid()), "JOB_NODELIST": "node-[1-2]", "NNODES": "2"}
    environment = {f"SLURM_{name}": value for name, value in slurm.items()}
    environment |= {"SLURM_CPUS_PER_TASK": "2", "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    settings = ["shard_size=2", "video.size=64", "clip.seconds=2"]
    ended = subprocess.run(
        ["bash", FOLDER / "encode.slurm", "--src", src, "--out", tmp_path / "out", *settings],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert "2 of 2 Ray nodes are there" in ended.stderr
    for column in (tmp_path / "out").glob("*@*-*"):
        assert list(column.glob("000000.*")), column
    assert len(list((tmp_path / "out").glob("video@*/0*.json"))) == 3
