import re
from dataclasses import replace
from itertools import pairwise

import pytest

from pipeline import settings
from pipeline.settings import ConfigError
from train.config import REPOSITORY, TrainConfig, load_train_config, parse
from train.model import ModelConfig


def test_no_arguments_and_the_launcher_s_own_give_the_defaults():
    assert parse([]) == parse(["--local_rank=3"]) == TrainConfig()


def test_overrides_beat_the_file_and_the_file_beats_the_defaults(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("steps: 7\noptim: {lr: 0.5, warmup_steps: 3}\n")
    config = parse(["--local_rank=0", "--config", str(file), "optim.lr=2e-4", "data.root=a/b"])
    assert (config.steps, config.optim.warmup_steps) == (7, 3)
    assert config.optim.lr == 2e-4
    assert config.data.root == "a/b"


def test_preset_is_found_from_any_folder_and_its_fields_can_be_overridden(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = parse(["model.preset=tiny", "model.depth=6"])
    assert config.model == replace(ModelConfig(), depth=6)
    assert parse(["model.preset=s"]).model.video_patch == (1, 4, 4)


def test_every_file_in_configs_loads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = sorted((REPOSITORY / "configs" / "train").glob("*.yaml"))
    assert files
    for file in files:
        load_train_config(file, [])
    for file in sorted((REPOSITORY / "configs" / "model").glob("*.yaml")):
        load_train_config(None, [f"model.preset={file.stem}"])


def test_dumped_settings_load_back(tmp_path):
    config = parse(["model.preset=tiny", "steps=9", "tasks.v2a=2"])
    file = tmp_path / "config.yaml"
    file.write_text(settings.dump(config))
    assert load_train_config(file, []) == config


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.learning_rate=1", "known here: lr, betas"),
        ("stepz=1", "steps"),
        ("optim.lr=fast", "optim.lr"),
        ("zero_stage=4", "zero_stage"),
        ("model.preset=huge", "tiny"),
        ("--frobnicate", "key=value"),
    ],
)
def test_wrong_settings_are_named(override, expected):
    with pytest.raises(ConfigError, match=expected):
        parse([override])


@pytest.mark.parametrize(
    "override",
    [
        *("data.seconds=1e308", "data.seconds=0", "data.seconds=.nan", "data.retry_s=1e300"),
        *("data.window_shards=10000000000000000000", "data.cache_gb=1e300", "data.cache_gb=.inf"),
        *("data.text_cache_mb=10000000000000000000", "data.read_threads=10000000"),
        *("data.prefetch_steps=10000000", "data.root=a\0b", "data.cache_dir=a\0b"),
        *("data.mix.0.weight=1e-300", "data.mix.0.weight=1e308", "data.mix.0.root=a\0b"),
    ],
)
def test_values_that_nothing_can_be_done_with_are_named(override):
    name, _, value = override.partition("=")
    if name.startswith("data.mix"):
        override = f'data.mix=[{{root: "b", {name[11:]}: "{value}"}}]'.replace("\0", "\\0")
    with pytest.raises(ConfigError, match=rf"setting '{name}': .*, got [^\n]*$"):
        parse([override])


def test_missing_settings_file_is_named():
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        parse(["--config", "nowhere.yaml"])


def test_help_lists_the_settings(capsys):
    with pytest.raises(SystemExit) as exit_info:
        parse(["--help"])
    assert exit_info.value.code == 0
    assert "every_steps" in capsys.readouterr().out


def test_accumulation_must_be_whole():
    config = TrainConfig(global_batch=24, micro_batch=3)
    assert config.accumulation(num_ranks=2) == 4
    with pytest.raises(ConfigError, match=r"24 .* 3 × 5 ranks"):
        config.accumulation(num_ranks=5)


def test_help_explains_every_setting():
    lines = settings.describe(TrainConfig()).splitlines()
    assert "  optim.lr=0.0001" in lines and "  data.window_shards=32" in lines
    for line, below in pairwise([*lines, ""]):
        if re.match(r"  \w", line):
            assert below.startswith(" " * 6), f"{line} says nothing"


def test_several_data_sets_are_given_as_a_list():
    config = parse(["data.mix=[{root: a, weight: 3}, {root: 's3://bucket/b', audio: logmel}]"])
    assert [(part.root, part.weight) for part in config.data.parts] == [
        ("a", 3),
        ("s3://bucket/b", 1),
    ]
    with pytest.raises(ConfigError, match=r"data.mix and data.root are both set"):
        parse(["data.root=c", "data.mix=[{root: a}]"])
    with pytest.raises(ConfigError, match=r"unknown setting 'data.mix.0.wait'"):
        parse(["data.mix=[{root: a, wait: 3}]"])
