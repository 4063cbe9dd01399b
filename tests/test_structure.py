"""The rules of the repository: who imports what, names, sizes, settings that load."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import settings
from pipeline.config import EncodeConfig
from train.config import load_train_config
from train.model import ModelConfig

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(
    path for name in ("pipeline", "train", "tools") for path in (ROOT / name).rglob("*.py")
)
# Which files may import a heavy dependency, wherever in the file.
IMPORTERS = {
    "ray": {
        *(f"pipeline/{name}.py" for name in ("cells", "cluster", "decoders", "telemetry")),
        *("tools/bench_encode.py", "tools/peers_encode.py", "tools/chaos.py"),
    },
    "deepspeed": {"train/engine.py"},
    "decord": {"pipeline/decord_picture.py", "tools/contenders.py"},
    "av": {
        *(f"pipeline/{name}.py" for name in ("demux", "picture", "sound", "mux")),
        *("tools/bench_decode.py", "tools/contenders.py"),
    },
    "torchaudio": {"pipeline/audio.py"},
    "fsspec": {"pipeline/storage.py"},
}
TRAIN_MAY_IMPORT = {"pipeline", "pipeline.files", "pipeline.format", "pipeline.settings"}
DATA_MAY_IMPORT = TRAIN_MAY_IMPORT | {
    *("pipeline.data_root", "pipeline.media_cache", "pipeline.plan_table", "pipeline.records"),
    *("pipeline.tables", "pipeline.wording"),
}
SAMPLE_MAY_IMPORT = TRAIN_MAY_IMPORT | {
    *("pipeline.codecs", "pipeline.data_root", "pipeline.gallery", "pipeline.plan_table"),
}
DEPENDENCIES = {
    *("av", "decord", "deepspeed", "fsspec", "google_crc32c", "s3fs", "numpy", "PIL", "pyarrow"),
    *(
        "pydantic",
        "yaml",
        "ray",
        "safetensors",
        "tensorboard",
        "torch",
        "torchaudio",
        "tqdm",
        "webdataset",
    ),
}


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def imported(path):
    """Return the modules a file imports, function-level imports too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}: relative import"
            found.add(str(node.module))
            if node.module in ("pipeline", "train", "tools"):
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_go_one_way(path):
    name, room = name_of(path), name_of(path).split("/")[0]
    for module in imported(path):
        package = module.split(".")[0]
        if package in IMPORTERS:
            assert name in IMPORTERS[package], f"{name} imports {module}"
        if room == "pipeline":
            assert package not in ("train", "tools", "tests"), f"{name} imports {module}"
        if room == "train" and package in ("pipeline", "tools", "tests"):
            allowed = TRAIN_MAY_IMPORT
            if name == "train/sample.py":
                allowed = SAMPLE_MAY_IMPORT
            elif name.startswith("train/data/"):
                allowed = DATA_MAY_IMPORT
            assert ".".join(module.split(".")[:2]) in allowed, f"{name} imports {module}"
        assert package != "tests", f"{name} imports {module}"


def test_the_contract_needs_numpy_and_the_standard_library_only():
    packages = {module.split(".")[0] for module in imported(ROOT / "pipeline" / "format.py")}
    assert packages - set(sys.stdlib_module_names) == {"numpy", "pipeline"}
    packages = {module.split(".")[0] for module in imported(ROOT / "pipeline" / "files.py")}
    assert packages <= set(sys.stdlib_module_names)


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_no_module_hides_another(path):
    # `deepspeed train/main.py` puts train/ first on the path: train/ray.py would hide ray.
    if path.stem in ("__init__", "__main__"):
        return
    taken = set(sys.stdlib_module_names) | DEPENDENCIES | {"pipeline", "train", "tools"}
    # `python -m` puts the current folder on the path, not that of the module: these hide nothing.
    commands = ("pipeline/gc.py", "train/data/inspect.py")
    assert path.stem not in taken or name_of(path) in commands
    assert path.stem not in ("utils", "helpers", "manager", "handler")


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_files_and_functions_stay_small(path):
    text = path.read_text()
    assert text.count("\n") <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < 80, node.name


def test_the_entry_point_stays_short():
    assert (ROOT / "train" / "main.py").read_text().count("\n") <= 80


def test_the_readme_stays_short():
    assert (ROOT / "README.md").read_text().count("\n") <= 200


SETTINGS = sorted(
    path
    for room in ("encode", "model", "train")
    for path in (ROOT / "configs" / room).glob("*.yaml")
)


@pytest.mark.parametrize("path", SETTINGS, ids=name_of)
def test_every_settings_file_loads(path):
    if path.parent.name == "train":
        load_train_config(path, [])  # puts the model's preset in first
    else:
        settings.load({"encode": EncodeConfig, "model": ModelConfig}[path.parent.name], path, [])


def test_top_level_is_fixed():
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    rooms = {name.split("/")[0] for name in tracked.stdout.splitlines() if "/" in name}
    assert rooms == {"pipeline", "train", "configs", "tools", "tests", ".ci"}
