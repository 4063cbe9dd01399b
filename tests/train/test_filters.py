"""Filters: as in Python where all is known, unknown as in SQL, and nothing else is read."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.format import FormatError
from pipeline.settings import ConfigError
from tests.train.columns import FACTS_NAME, Dataset
from train.data.census import NOT_USABLE
from train.data.config import DataConfig
from train.data.filters import PLAN_SCHEMA, parse_filter
from train.data.view import View, open_view

CLIPS: dict[str, list[Any]] = {
    "key": [f"k{row}" for row in range(6)],
    "uri": [f"{row}.mp4" for row in range(6)],
    "start_s": [0.0, 1.5, 3.0, 4.5, 6.0, 7.5],
    "duration_s": [10.0, 9.0, 8.0, 7.0, 6.0, 5.0],
    "caption": ["rain", "a dog", "a dog", "", "wind", "rain"],
    "label": ["rain", "dog", "dog", "none", "wind", "rain"],
    "split": ["train", "train", "test", "train", "test", "train"],
}
FACTS: dict[str, list[Any]] = {
    "motion": [0.5, None, 0.0, 0.02, 0.1, 0.3],
    "width": [320, 640, 640, 1280, 320, None],
    "height": [240, 480, 360, 720, 320, None],
    "decoder": ["decord", "pyav", None, "decord", "pyav", "pyav"],
}


class Facts:
    """The facts of one clip, as a filter names them."""

    def __init__(self, row: int) -> None:
        self.__dict__ = {name: values[row] for name, values in FACTS.items()}


def rows_of(text: str) -> list[int]:
    passes = parse_filter(text).passes(CLIPS, pa.table(FACTS))
    return np.flatnonzero(passes).tolist()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('facts.motion > 0.01 and split == "train"', [0, 3, 5]),
        ("facts.motion > 0.01 or label == 'dog'", [0, 1, 2, 3, 4, 5]),
        ("not facts.motion > 0.01", [2]),
        ("0.01 < facts.motion <= 0.3", [3, 4, 5]),
        ("label in ['dog', 'wind']", [1, 2, 4]),
        ("label not in ('dog', 'wind')", [0, 3, 5]),
        ("facts.decoder not in ['pyav']", [0, 3]),
        ("not facts.decoder in ['pyav']", [0, 3]),
        ("facts.width in [320, 640]", [0, 1, 2, 4]),
        ("facts.width / facts.height > 1.5", [2, 3]),
        ("facts.width / 3 == 320 / 3", [0, 4]),
        ("facts.motion is None", [1]),
        ("facts.motion is not None and facts.decoder is None", [2]),
        ("start_s + duration_s >= 12", [4, 5]),
        ("-start_s < -3.0", [3, 4, 5]),
        ("start_s > -1 * 2", [0, 1, 2, 3, 4, 5]),
        ("duration_s == 10", [0]),
        ("caption == ''", [3]),
        ("True", [0, 1, 2, 3, 4, 5]),
        ("  key != 'k0'  ", [1, 2, 3, 4, 5]),
    ],
)
def test_clips_that_pass(text: str, expected: list[int]) -> None:
    assert rows_of(text) == expected


NUMBERS = st.sampled_from(["start_s", "duration_s", "3.0", "-2", "7", "start_s - 1", "2 * start_s"])
TEXTS = st.sampled_from(["label", "split", "'dog'", "'train'", "caption"])
ORDERS = st.sampled_from(["<", "<=", ">", ">=", "==", "!="])
COMPARISONS = st.one_of(
    st.builds("{} {} {}".format, NUMBERS, ORDERS, NUMBERS),
    st.builds("{} {} {} {} {}".format, NUMBERS, ORDERS, NUMBERS, ORDERS, NUMBERS),
    st.builds("{} {} {}".format, TEXTS, ORDERS, TEXTS),
    st.builds("label {} ['dog', 'rain']".format, st.sampled_from(["in", "not in"])),
)
EXPRESSIONS = st.recursive(
    COMPARISONS,
    lambda inner: st.one_of(
        st.builds("({}) and ({})".format, inner, inner),
        st.builds("({}) or ({})".format, inner, inner),
        st.builds("not ({})".format, inner),
    ),
    max_leaves=6,
)


@given(text=EXPRESSIONS)
def test_filters_over_known_values_mean_what_python_means(text: str) -> None:
    clips = [{name: values[row] for name, values in CLIPS.items()} for row in range(6)]
    names = {"__builtins__": {}}
    expected = [row for row, clip in enumerate(clips) if eval(text, names, clip)]
    assert rows_of(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("colour == 'red'", r"character 1: unknown name 'colour'; known: key, uri, .*facts.NAME"),
        (
            "split == 'train' and facts.speed > 1",
            r"character 22: unknown name 'facts.speed'; known",
        ),
        ("split = 'train'", "character 7: invalid syntax"),
        ("", "data.filter ''"),
        ("split == 'train", "character 10"),
        ("open('/etc/passwd')", r"character 1: .*open.* is not allowed"),
        ("__import__('os').system('true')", "not allowed"),
        ("split.__class__ == 1", "not allowed"),
        ("facts.motion.__class__ == 1", "not allowed"),
        ("facts == 1", "unknown name 'facts'"),
        ("[x for x in label]", "not allowed"),
        ("(lambda: 1)()", "not allowed"),
        ("f'{split}' == 'a'", "not allowed"),
        ("2 ** 9 > start_s", "not allowed"),
        ("start_s // 2 > 1", "not allowed"),
        ("label in split", "'in' needs a list"),
        ("label in []", "'in' needs a list"),
        ("label in ['a', 1]", "mixes numbers and texts"),
        ("label in ['a', split]", "'split' is no number and no text"),
        ("label is 'a'", "compares with None only"),
        ("label == b'a'", "no number and no text"),
        ("label == 1", r"can't be computed"),
        ("start_s > 'a'", r"can't be computed"),
        ("start_s", r"can't be computed"),
        ("not label", r"can't be computed"),
        ("label and split", r"can't be computed"),
        ("facts.width / 0 > 1 or facts.width * 'a'", r"can't be computed"),
        ("(" * 3000 + "start_s" + ")" * 3000, "data.filter"),
        ("not " * 2000 + "True", "data.filter"),
        ("start_s > 1 \0", "data.filter"),
        ("a" * 20_000, "20000 characters"),
        (f"facts.width > {2**63}", "character 15: the number is outside"),
        (f"facts.width == {-(2**63) - 1}", "character 16: the number is outside"),
        (f"facts.width in [1, 0x{2**70:x}]", "character 20: the number is outside"),
        (f"facts.width + {2**63 - 1} > 0", r"can't be computed: overflow"),
        (f"facts.width * {2**60} > 0", r"can't be computed: overflow"),
        (f"-(facts.width - {2**63 - 1} - 322) > 0", r"can't be computed: overflow"),
        (f"facts.width in [{2**63 - 1}, 0.5]", "mixes"),
    ],
)
def test_what_a_filter_may_not_hold_is_named(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rows_of(text)


def test_whole_numbers_of_64_bits_are_numbers() -> None:
    largest = f"facts.width < {2**63 - 1} and facts.width > {-(2**63)} and -{2**63} < 0"
    assert rows_of(largest) == [0, 1, 2, 3, 4]
    assert rows_of(f"facts.width in [320, {2**63 - 1}, {-(2**63)}]") == [0, 4]


def test_long_filters_are_cut_in_messages() -> None:
    text = " or ".join(f"label == 'name {number}'" for number in range(300))
    assert len(text) > 6000
    for wrong in (f"{text} or colour == 'red'", f"colour == 'red' or {text}", f"{text} or label"):
        with pytest.raises(ConfigError) as caught:
            rows_of(wrong)
        assert len(str(caught.value)) < 500
        assert ("colour == 'red'" in str(caught.value)) == ("colour" in wrong)


def test_columns_of_another_type_are_named() -> None:
    clips = {**CLIPS, "label": [1, 2, 3, 4, 5, 6]}
    with pytest.raises(ConfigError, match=r"can't be computed: Expected bytes, got a 'int'"):
        parse_filter("label == 'a'").passes(clips, None)
    twice = pa.table([[1] * 6, [2] * 6], names=["width", "width"])
    with pytest.raises(ConfigError, match=r"can't be computed: .*width.* exists 2 times"):
        parse_filter("facts.width > 0").passes(CLIPS, twice)


@given(text=st.text(max_size=40))
def test_no_text_does_anything_but_filter_or_be_refused(text: str) -> None:
    try:
        rows_of(text)
    except ConfigError:
        return
    assert isinstance(ast.parse(text.strip(), mode="eval"), ast.Expression)


# -- in a view


def keys_of(view: View) -> list[str]:
    (part,) = view.parts
    return [
        part.shard_rows(shard).keys[row]
        for shard in range(len(part.counts))
        for row in np.flatnonzero(part.buckets_of(shard) != NOT_USABLE)
    ]


def filtered(dataset: Dataset, text: str, **config: Any) -> View:
    cache = str(dataset.root.parent)
    config = {"root": str(dataset.root), "cache_dir": cache, "filter": text} | config
    return open_view(DataConfig(**config), "all")


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    facts = {"motion": lambda clip: None if clip == 7 else clip / 40}
    labels = dict.fromkeys(range(0, 40, 2), "dog")
    return Dataset(tmp_path / "shards", facts=facts, labels=labels).build()


def test_view_holds_the_clips_that_pass(dataset: Dataset) -> None:
    view = filtered(dataset, "facts.motion < 0.25 and label == 'thing'")
    assert keys_of(view) == [dataset.key(clip) for clip in (1, 3, 5, 9)]
    tally = view.parts[0].census.head.tally
    assert (tally.planned, tally.filtered, tally.wanted, tally.complete) == (40, 36, 4, 4)


def test_filter_does_not_replace_the_split(dataset: Dataset) -> None:
    config = DataConfig(
        root=str(dataset.root), cache_dir=str(dataset.root.parent), filter="split == 'train'"
    )
    train, heldout = (set(keys_of(open_view(config, subset))) for subset in ("train", "heldout"))
    assert train and heldout and not train & heldout


def test_clips_that_are_filtered_out_are_not_missing(tmp_path: Path) -> None:
    failed = dict.fromkeys(range(10), "silent")
    built = Dataset(tmp_path / "shards", failed=failed, labels=dict.fromkeys(range(10), "x"))
    assert filtered(built.build(), "label != 'x'").num_clips == 30


def test_unknown_fact_is_named_with_those_there_are(dataset: Dataset) -> None:
    with pytest.raises(ConfigError, match=r"character 1: .*facts.loudness.*known: .*facts.motion"):
        filtered(dataset, "facts.loudness > 1")


def test_nothing_passing_is_an_error(dataset: Dataset) -> None:
    with pytest.raises(
        FormatError, match=r"no clips .*that pass data.filter 'start_s > 1': of its"
    ):
        filtered(dataset, "start_s > 1")


def test_facts_that_are_missing_are_named(dataset: Dataset) -> None:
    (dataset.root / FACTS_NAME / "000003.parquet").unlink()
    assert filtered(dataset, "label == 'dog'").num_clips == 20
    with pytest.raises(FormatError, match=r"000003.parquet can't be read .*data.filter asks for"):
        filtered(dataset, "facts.motion > 0")


def test_facts_of_another_shard_are_found(dataset: Dataset) -> None:
    folder = dataset.root / FACTS_NAME
    (folder / "000003.parquet").write_bytes((folder / "000002.parquet").read_bytes())
    with pytest.raises(FormatError, match="shard 3: the facts are not of the planned clips"):
        filtered(dataset, "facts.motion > 0")


def test_data_set_without_facts_can_not_be_filtered_by_them(tmp_path: Path) -> None:
    built = Dataset(tmp_path / "shards").build()
    with pytest.raises(FormatError, match="name no facts"):
        filtered(built, "facts.motion > 0")


def test_plan_columns_are_those_of_the_plan(dataset: Dataset) -> None:
    pq_names = set(pa.parquet.read_schema(dataset.root / "plan.parquet").names)
    assert set(PLAN_SCHEMA.names) == pq_names - {"shard", "row", "text_row"}
