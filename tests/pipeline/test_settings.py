"""Settings are what the user wrote, or an error that says what to write."""

import re
from dataclasses import FrozenInstanceError, asdict

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field
from pydantic.dataclasses import dataclass

from pipeline.config import EncodeConfig, column_specs
from pipeline.settings import STRICT, ConfigError, attribute_texts, describe, dump, load


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Optimizer:
    learning_rate: float = Field(1e-4, gt=0)
    betas: tuple[float, float] = (0.9, 0.99)
    name: str | None = None


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Run:
    steps: int = 10
    optimizer: Optimizer = Optimizer()


def test_defaults_need_no_file():
    assert load(EncodeConfig, None, []) == EncodeConfig()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("shard_siez=3", "unknown setting 'shard_siez'; did you mean 'shard_size'?"),
        ("video.sise=3", "unknown setting 'video.sise'; did you mean 'video.size'?"),
        ("video.codec.chanels=3", "did you mean 'video.codec.channels'?"),
        ("video.codec.zzz=3", "known here: name, frames, block, channels"),
        ("zzz.size=3", "unknown setting 'zzz'; known here: "),
    ],
)
def test_unknown_key_names_the_nearest(override, message):
    with pytest.raises(ConfigError) as error:
        load(EncodeConfig, None, [override])
    assert message in str(error.value)


@pytest.mark.parametrize("text", ["12345678", "01234567", "1e5", "true", "a=b"])
def test_a_text_setting_keeps_what_was_typed(text):
    """A fingerprint may look like a number, and leading zeros count."""
    assert load(Run, None, [f"optimizer.name={text}"]).optimizer.name == text
    assert load(EncodeConfig, None, [f"media={text}"]).media == text


def test_null_unsets_a_text_setting():
    assert load(Run, None, ["optimizer.name=null"]).optimizer.name is None


def test_every_wrong_key_is_named_at_once():
    with pytest.raises(ConfigError) as error:
        load(EncodeConfig, None, ["seeds=3", "video.fps=fast", "shard_size=0"])
    assert all(name in str(error.value) for name in ("'seeds'", "'video.fps'", "'shard_size'"))


ODD = ["2023-99-99", "!!int a", "!!float x", "!!timestamp x", "!!bool x", "1" * 5000, "[" * 5000]


@pytest.mark.parametrize("value", [*ODD, ".inf", "-.inf", ".nan"], ids=lambda value: value[:14])
def test_what_is_no_usable_value_is_one_line(value, tmp_path):
    with pytest.raises(ConfigError) as error:
        load(Run, None, [f"steps={value}"])
    assert "'steps'" in str(error.value)
    assert len(str(error.value)) < 400
    path = tmp_path / "run.yaml"
    path.write_text(f"steps: {value}")
    with pytest.raises(ConfigError) as error:
        load(Run, path, [])
    assert str(path) in str(error.value)


@pytest.mark.parametrize("value", [".inf", ".nan"])
def test_numbers_are_finite(value):
    with pytest.raises(ConfigError, match="finite"):
        load(Run, None, [f"optimizer.learning_rate={value}"])


def test_overrides_win_over_the_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("steps: 3\noptimizer:\n  learning_rate: 1\n")
    run = load(Run, path, ["optimizer.learning_rate=2", "optimizer.learning_rate=3"])
    assert run == Run(steps=3, optimizer=Optimizer(learning_rate=3.0))


@pytest.mark.parametrize("text", ["3e-4", "3E-4", "0.0003", ".3e-3"])
def test_small_number_is_a_number_however_it_is_written(tmp_path, text):
    """PyYAML takes 3e-4 for a string."""
    path = tmp_path / "run.yaml"
    path.write_text(f"optimizer:\n  learning_rate: {text}\n")
    assert load(Run, path, []).optimizer.learning_rate == 3e-4
    assert load(Run, None, [f"optimizer.learning_rate={text}"]).optimizer.learning_rate == 3e-4


def test_overrides_are_read_as_yaml():
    config = load(EncodeConfig, None, ["columns=[audio, text]", "media=null", "video.fps=12"])
    assert config.columns == ("audio", "text") and config.media is None and config.video.fps == 12
    assert load(EncodeConfig, None, ["media=a=b"]).media == "a=b"


@pytest.mark.parametrize("text", ["shard_size", "=3", "", "seed.x=3"])
def test_argument_that_is_no_setting_is_refused(text):
    with pytest.raises(ConfigError):
        load(EncodeConfig, None, ["seed=1", text])


def test_value_out_of_range_says_name_and_value():
    with pytest.raises(ConfigError, match=r"'optimizer\.learning_rate'.*-1"):
        load(Run, None, ["optimizer.learning_rate=-1"])


@pytest.mark.parametrize("text", ["- 1\n- 2\n", "7\n", "just words\n"])
def test_file_that_is_no_mapping_is_refused(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="not a mapping"):
        load(Run, path, [])


@pytest.mark.parametrize("content", [b"a: [", b"a: b: c", b"\xff\xfe\x00", b"\x00", b"1: 2"])
def test_unreadable_file_is_refused_by_name(tmp_path, content):
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"run\.yaml"):
        load(Run, path, [])


def test_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml.*No such file"):
        load(Run, tmp_path / "nowhere.yaml", [])


def test_empty_file_means_defaults(tmp_path):
    (tmp_path / "run.yaml").write_text("# nothing\n")
    assert load(Run, tmp_path / "run.yaml", []) == Run()


@given(
    st.integers(),
    st.floats(min_value=0, exclude_min=True, allow_nan=False, allow_infinity=False),
    st.tuples(*[st.floats(allow_nan=False, allow_infinity=False)] * 2),
    st.none() | st.text().map(str.strip),
)
def test_dump_is_read_back_the_same(tmp_path_factory, steps, rate, betas, name):
    run = Run(steps=steps, optimizer=Optimizer(learning_rate=rate, betas=betas, name=name))
    path = tmp_path_factory.getbasetemp() / "dumped.yaml"
    path.write_text(dump(run))
    assert load(Run, path, []) == run


def test_dumped_encode_settings_are_read_back_the_same(tmp_path):
    config = load(EncodeConfig, None, ["video.fps=7.5", "columns=[audio]", "media=/some/where"])
    (tmp_path / "config.yaml").write_text(dump(config))
    assert load(EncodeConfig, tmp_path / "config.yaml", []) == config
    assert yaml.safe_load(dump(config))["video"]["fps"] == 7.5


def test_settings_cannot_be_changed_later():
    with pytest.raises(FrozenInstanceError):
        EncodeConfig().seed = 3  # pyright: ignore[reportAttributeAccessIssue]


def leaves(values, prefix=""):
    for name, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


# Every codec, picture, sound and caption setting decides bytes; checks that drop clips decide
# which rows have any.
BYTES = [
    (name, value)
    for name, value in leaves(asdict(EncodeConfig()))
    if name.startswith(("video.", "audio.", "text.")) and not name.endswith(".name")
]
ALTERNATIVES = {
    "video.size": 264,
    "video.buckets": [[128, 192]],
    "video.fit": "pad",
    "video.decoder": "decord",
    "checks.silent": "drop",
    "checks.duplicate": "drop",
    "checks.truncated": "flag",
    "video.codec.block": 16,
    "audio.channels": 2,
    "audio.codec.num_mels": 128,
    "audio.codec.patch": 8,
    "audio.codec.fmax_hz": 7000.0,
}


DROPPING = [
    ("checks.min_seconds", 1.0),
    ("checks.min_decoded_share", -0.5),
    ("checks.truncated", "drop"),
    ("checks.silent", "flag"),
    ("checks.duplicate", "flag"),
]


@pytest.mark.parametrize(("name", "value"), [*BYTES, *DROPPING])
def test_every_setting_that_decides_bytes_changes_its_column_only(name, value):
    other = ALTERNATIVES[name] if name in ALTERNATIVES else value + 1
    before = column_specs(EncodeConfig())
    after = column_specs(load(EncodeConfig, None, [f"{name}={other}"]))
    changed = {m for m in before if before[m].directory != after[m].directory}
    expected = {"video", "audio"} if name.startswith("checks.") else {name.partition(".")[0]}
    assert changed == expected


@pytest.mark.parametrize("setting", ["fps=4", "size=128", "fit=pad", "decoder=decord"])
def test_picture_decides_about_sound_where_still_clips_are_dropped(setting):
    """How much the picture moves depends on how it is sampled and cut."""
    for policy, is_same in (("flag", True), ("drop", False)):
        override = f"checks.still={policy}"
        before = column_specs(load(EncodeConfig, None, [override]))["audio"]
        after = column_specs(load(EncodeConfig, None, [override, f"video.{setting}"]))["audio"]
        assert (before.directory == after.directory) == is_same


@pytest.mark.parametrize(
    "override",
    [
        "shard_size=7",
        "seed=7",
        "decoders=7",
        "decode_timeout_s=7",
        "fetch_timeout_s=7",
        "window_mb=7",
        "max_failed_share=0.7",
        "media=/x",
        "cache_dir=/x",
        "cache_gb=7",
        "clips_per_decoder=7",
        "checks.max_silent_share=0.5",
        "checks.min_fps=7",
    ],
)
def test_setting_that_decides_no_bytes_changes_no_column(override):
    before, after = EncodeConfig(), load(EncodeConfig, None, [override])
    assert column_specs(before) == column_specs(after)


def test_help_explains_every_setting():
    lines = describe(EncodeConfig()).splitlines()
    names = [number for number, line in enumerate(lines) if re.match(r"  \w", line)]
    assert "  video.codec.channels=16" in lines and "  checks.min_fps=8.0" in lines
    for number in names:
        assert lines[number + 1].startswith(" " * 6), f"{lines[number]} says nothing"


def test_an_explanation_may_take_several_lines_and_is_for_one_setting():
    class Both:
        """Two settings.

        Attributes:
            first: a text
                of two lines, with ``code``.
            second: another.

        Something else: that is no setting.
        """

    assert attribute_texts(Both) == {
        "first": "a text of two lines, with code.",
        "second": "another.",
    }


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Staged:
    optimizer: Optimizer = Optimizer()
    stages: tuple[Optimizer, ...] = ()


@pytest.mark.parametrize(
    ("override", "offered"),
    [
        ("learning_rate=1", "optimizer.learning_rate"),
        ("stages=[{}, {betsa: 1}]", "stages.1.betas"),
        ("optimizer.nam=a", "optimizer.name"),
    ],
)
def test_the_right_name_is_offered_in_its_place(override, offered):
    with pytest.raises(ConfigError, match=f"did you mean '{offered}'"):
        load(Staged, None, [override])
