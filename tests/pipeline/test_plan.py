"""A plan is made once, the same by anyone, and never changed but by appending to it."""

import dataclasses
import os
import random

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import format as fmt
from pipeline import plan as plan_module
from pipeline.config import EncodeConfig, WindowSettings
from pipeline.data_root import open_root
from pipeline.draft import ClipsHash, draft_shards
from pipeline.media import Clip
from pipeline.plan import ensure_plan, extend_plan
from pipeline.plan_table import PlanTable
from pipeline.settings import ConfigError
from pipeline.sources import Listing, Source, clip_table, open_source

TABLES = ("captions.parquet", "plan.parquet")


def clips_named(num_clips=10, captions=3):
    return [
        Clip(f"clip{i:03d}", f"clip{i:03d}.mp4", 0.0, 10.0, f"caption {i % captions}", "thing")
        for i in range(num_clips)
    ]


def source_of(root, clips, state=None):
    """A source that holds the clips; its state tells of all of them, unless it is given."""
    return Source("folder", str(root), state or repr(clips), lambda: Listing(clip_table(clips)))


def planned(root, clips, **config):
    """Plan clips into a new folder; return the plan and its shards of clips."""
    plan = ensure_plan(root, source_of(root, clips), EncodeConfig(**config))
    return plan, shards_of(root)


def shards_of(root):
    plan = fmt.read_plan(root)
    table = PlanTable(root, plan)
    return [table.clips(shard) for shard in range(len(plan.shard_rows()))]


def captions_of(root):
    plan = fmt.read_plan(root)
    table = PlanTable(root, plan)
    return [c for shard in range(len(plan.shard_rows(text=True))) for c in table.captions(shard)]


def contents(root):
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in root.iterdir()}


def test_plan_does_not_depend_on_the_order_of_listing(tmp_path):
    clips = clips_named(40)
    turned = random.Random(1).sample(clips, 40)
    first, shards = planned(tmp_path / "a", clips)
    second, others = planned(tmp_path / "b", turned)
    assert first.plan_id == second.plan_id and shards == others
    assert sorted(shards[0], key=lambda clip: clip.key) == clips != shards[0]


def test_order_is_the_same_in_all_versions(tmp_path):
    """Else data sets could not be resumed after an update of numpy or Arrow."""
    plan, shards = planned(tmp_path, clips_named(8), seed=3, shard_size=5)
    assert plan.plan_id == "6733e30b"
    assert [[int(clip.key[4:]) for clip in clips] for clips in shards] == [
        [6, 1, 5, 2, 7],
        [4, 3, 0],
    ]


def test_plan_does_not_depend_on_where_the_source_is(tmp_path):
    ids = {planned(tmp_path / name, clips_named())[0].plan_id for name in "ab"}
    assert len(ids) == 1


def test_another_seed_is_another_order_and_another_plan(tmp_path):
    plans = [planned(tmp_path / str(seed), clips_named(40), seed=seed) for seed in range(-1, 3)]
    assert len({plan.plan_id for plan, _ in plans}) == 4
    assert len({tuple(clip.key for clip in shards[0]) for _, shards in plans}) == 4


@pytest.mark.parametrize(
    "fields",
    [
        {"key": "another"},
        {"uri": "another.mp4"},
        {"start_s": 1.0},
        {"duration_s": 9.0},
        {"caption": "another"},
        {"label": "another"},
        {"split": "test"},
        {"uri": "clip002.mp", "caption": "4caption 2"},
    ],
)
def test_plan_id_knows_every_field_of_every_clip(tmp_path, fields):
    clips = clips_named()
    changed = [*clips[:2], dataclasses.replace(clips[2], **fields), *clips[3:]]
    plans = [planned(tmp_path / str(n), c)[0] for n, c in enumerate((clips, changed))]
    assert plans[0].plan_id != plans[1].plan_id


@given(st.lists(st.text(max_size=6), min_size=1, max_size=40), st.integers(1, 50))
@settings(deadline=None, max_examples=50)
def test_hash_of_clips_does_not_depend_on_how_they_are_cut(captions, block_rows):
    clips = [Clip(f"c{i}", "ä" * i, 0, 1, caption) for i, caption in enumerate(captions)]
    (block,) = draft_shards(clip_table(clips), 0, 100).blocks()
    whole, cut = ClipsHash(), ClipsHash()
    whole.update(block)
    for start in range(0, len(clips), block_rows):
        cut.update(block.slice(start, block_rows))
    assert whole.hexdigest() == cut.hexdigest()


def test_plan_id_knows_the_windows(tmp_path, shared_clips):
    films = str(shared_clips / "folders" / "dog")
    windows = (WindowSettings(), WindowSettings(seconds=4), WindowSettings(seconds=5))
    configs = [EncodeConfig(windows=window) for window in windows]
    plans = [
        ensure_plan(tmp_path / str(n), open_source(films, config), config)
        for n, config in enumerate(configs)
    ]
    assert len({plan.plan_id for plan in plans}) == 3
    assert (plans[0].source["kind"], plans[0].source["root"]) == ("folder", films)
    assert [plan.source["longest_s"] for plan in plans] == [10.0, 4.0, 5.0]


@pytest.mark.parametrize("key", ["a.b", "", "k" * 81, "a\n"])
def test_key_that_a_tar_cannot_hold_is_refused(tmp_path, key):
    with pytest.raises(fmt.FormatError, match=r"key .* must match"):
        planned(tmp_path, [*clips_named(), Clip(key, "x.mp4", 0.0, 1.0)])


@given(st.integers(1, 50), st.integers(1, 20), st.integers(0, 3), st.integers(1, 7))
@settings(max_examples=30, deadline=None)
def test_every_clip_is_read_back_from_its_row(tmp_path_factory, num_clips, shard_size, seed, texts):
    root, clips = tmp_path_factory.mktemp("plan"), clips_named(num_clips, texts)
    plan, shards = planned(root, clips, shard_size=shard_size, seed=seed)
    assert [len(shard) for shard in shards] == plan.shard_rows().tolist()
    assert sorted((c for shard in shards for c in shard), key=lambda clip: clip.key) == clips
    assert sum(plan.shard_rows(text=True)) == len(captions_of(root)) == min(texts, num_clips) + 1


@given(st.lists(st.text(max_size=8), min_size=1, max_size=30))
@settings(deadline=None, max_examples=50)
def test_captions_are_stored_once_with_the_empty_one_first(tmp_path_factory, captions):
    root = tmp_path_factory.mktemp("plan")
    clips = [Clip(f"c{i}", "", 0, 1, caption) for i, caption in enumerate(captions)]
    _, shards = planned(root, clips, shard_size=4)
    in_order = [clip.caption for shard in shards for clip in shard]
    assert captions_of(root) == list(dict.fromkeys(["", *in_order]))
    table = pq.read_table(root / "plan.parquet")
    texts = pq.read_table(root / "captions.parquet")["caption"].to_pylist()
    rows = zip(table["caption"].to_pylist(), table["text_row"].to_pylist(), strict=True)
    assert all(texts[text_row] == caption for caption, text_row in rows)


def test_same_plan_again_changes_nothing(tmp_path):
    plan, _ = planned(tmp_path, clips_named(), shard_size=4)
    before = contents(tmp_path)
    assert planned(tmp_path, clips_named(), shard_size=4)[0] == plan == fmt.read_plan(tmp_path)
    assert contents(tmp_path) == before


def test_source_in_the_state_that_was_planned_is_not_listed(tmp_path):
    def refuse():
        raise AssertionError("listed")

    config = EncodeConfig(shard_size=4)
    plan = ensure_plan(tmp_path, source_of(tmp_path, clips_named(), "then"), config)
    unread = Source("folder", str(tmp_path), "then", refuse)
    assert ensure_plan(tmp_path, unread, config) == extend_plan(tmp_path, unread, config) == plan
    with pytest.raises(AssertionError, match="listed"):
        ensure_plan(tmp_path, unread, EncodeConfig(shard_size=5))


def test_same_clips_in_another_state_are_the_same_plan_and_are_listed_once(tmp_path):
    config = EncodeConfig()
    plan = ensure_plan(tmp_path, source_of(tmp_path, clips_named(), "then"), config)
    again = ensure_plan(tmp_path, source_of(tmp_path, clips_named(), "now"), config)
    assert again == dataclasses.replace(plan, source=plan.source | {"state": "now"})
    assert fmt.read_plan(tmp_path) == again


@pytest.mark.parametrize(
    ("clips", "config", "message"),
    [
        ({}, {"seed": 3}, "seed 0 there, 3 now"),
        ({}, {"shard_size": 5}, "shard_size 4 there, 5 now"),
        ({"num_clips": 12}, {}, "num_clips 10 there, 12 now; 2 clips new (such as clip010)"),
        ({"num_clips": 8}, {}, "num_clips 10 there, 8 now; 2 clips gone (such as clip008)"),
        ({"captions": 2}, {}, "captions, labels, splits or lengths of clips differ"),
    ],
)
def test_another_plan_in_the_folder_says_how_it_differs(tmp_path, clips, config, message):
    out = tmp_path / "out"
    planned(out, clips_named(), shard_size=4)
    before = contents(out)
    with pytest.raises(ConfigError) as error:
        planned(out, clips_named(**clips), **{"shard_size": 4, **config})
    assert message in str(error.value) and str(out) in str(error.value)
    assert contents(out) == before


def test_folder_with_other_files_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match=r"thesis\.tex"):
        planned(tmp_path, clips_named())
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_out_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(ConfigError, match="--out"):
        planned(tmp_path / "out", clips_named())


@pytest.mark.parametrize(
    "left", [["plan.parquet", "captions.parquet"], [".plan.parquet.1.tmp"], [".plan.json.1.tmp"]]
)
def test_plan_stopped_half_way_is_made_again(tmp_path, left):
    """plan.json is written last, so what a killed run left is replaced."""
    for name in left:
        (tmp_path / name).write_bytes(os.urandom(40))
    _, shards = planned(tmp_path, clips_named(), shard_size=4)
    assert [len(clips) for clips in shards] == [4, 4, 2]


def planned_beside(out, monkeypatch, step, mine, **others):
    """Plan clips of one driver, and those of another right before a step of the first."""
    call = getattr(plan_module, step)

    def after_another(*arguments):
        monkeypatch.setattr(plan_module, step, call)
        told.append(attempted(out, **others))
        return call(*arguments)

    told = []
    monkeypatch.setattr(plan_module, step, after_another)
    return attempted(out, **mine), told[0]


def attempted(out, num_clips=10, **config):
    try:
        return planned(out, clips_named(num_clips), **config)[0].plan_id
    except ConfigError as error:
        return str(error)


@pytest.mark.parametrize("others", [{"seed": 7}, {"num_clips": 11}, {"shard_size": 3}])
@pytest.mark.parametrize("where", ["folder", "store"])
def test_of_drivers_that_plan_different_things_at_once_the_later_is_told(
    tmp_path, monkeypatch, others, where
):
    def new_root(name):
        return (
            tmp_path / name if where == "folder" else open_root(f"memory://{tmp_path.name}{name}")
        )

    expected, _ = planned(new_root("alone"), clips_named(10), shard_size=4)
    out, mine, others = new_root("a"), {"shard_size": 4}, {"shard_size": 4, **others}
    ended, other = planned_beside(out, monkeypatch, "_write_tables", mine, **others)
    assert ended == expected.plan_id and "another run is planning other clips" in other
    assert fmt.read_plan(out).plan_id == expected.plan_id
    assert contents_of(out) == contents_of(new_root("alone"))
    ended, other = planned_beside(new_root("b"), monkeypatch, "create_file", others, **mine)
    assert other == expected.plan_id and f"holds plan {expected.plan_id}" in ended
    assert contents_of(new_root("b")) == contents_of(new_root("alone"))


def contents_of(root):
    """Return the tables of a plan; plan.json also tells where its source is."""
    assert {path.name for path in root.iterdir()} == {"plan.json", *TABLES}
    return [(root / name).read_bytes() for name in TABLES]


def test_drivers_that_plan_the_same_at_once_agree(tmp_path, monkeypatch):
    mine = {"shard_size": 4}
    first, second = planned_beside(tmp_path / "out", monkeypatch, "_write_tables", mine, **mine)
    assert first == second == fmt.read_plan(tmp_path / "out").plan_id


def test_claim_of_a_killed_run_is_no_obstacle_to_the_same_run(tmp_path):
    claim = tmp_path / plan_module.CLAIM_NAME
    with (
        pytest.raises(SystemExit),
        plan_module._claimed(tmp_path, source_of(tmp_path, clips_named()), EncodeConfig()),
    ):
        left = claim.read_bytes()
        raise SystemExit
    assert not claim.exists()
    claim.write_bytes(left)
    with pytest.raises(ConfigError, match=r"remove .*planning\.tmp if it was killed"):
        planned(tmp_path, clips_named(), seed=5)
    planned(tmp_path, clips_named())
    assert not claim.exists()


def test_damaged_plan_is_not_replaced(tmp_path):
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(fmt.FormatError, match="not JSON"):
        planned(tmp_path, clips_named())
    assert (tmp_path / "plan.json").read_text() == "{"


# -- extended plans


@given(st.integers(2, 20), st.integers(0, 20), st.integers(1, 6), st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_extension_appends_new_clips_and_captions_and_moves_none(
    tmp_path_factory, num_before, num_new, shard_size, texts
):
    root = tmp_path_factory.mktemp("plan")
    config = EncodeConfig(shard_size=shard_size)
    before, shards = planned(root, clips_named(num_before, texts), shard_size=shard_size)
    captions = captions_of(root)
    clips = clips_named(num_before + num_new, texts + 1)[1:]  # one has gone, captions differ
    plan = extend_plan(root, source_of(root, clips), config)
    extended = shards_of(root)
    assert plan == fmt.read_plan(root) and plan.plan_id == before.plan_id
    assert extended[: len(shards)] == shards and captions_of(root)[: len(captions)] == captions
    added = [clip for shard in extended[len(shards) :] for clip in shard]
    assert sorted(added, key=lambda clip: clip.key) == clips[num_before - 1 :]
    assert [len(shard) for shard in extended] == plan.shard_rows().tolist()
    texts_of = captions_of(root)
    assert len(set(texts_of)) == len(texts_of) == plan.shard_rows(text=True).sum()
    table = pq.read_table(root / "plan.parquet").to_pylist()
    assert all(texts_of[row["text_row"]] == row["caption"] for row in table)
    assert ensure_plan(root, source_of(root, clips), config) == plan
    assert ensure_plan(root, source_of(root, clips, "touched"), config).clips == plan.clips


def test_extension_of_nothing_is_a_plan_and_of_no_new_clip_adds_none(tmp_path):
    config = EncodeConfig(shard_size=4)
    plan = extend_plan(tmp_path, source_of(tmp_path, clips_named()), config)
    table = (tmp_path / "plan.parquet").read_bytes()
    fewer = extend_plan(tmp_path, source_of(tmp_path, clips_named(9)), config)
    assert (fewer.clips, fewer.captions, fewer.plan_id) == (plan.clips, plan.captions, plan.plan_id)
    assert (tmp_path / "plan.parquet").read_bytes() == table


def test_plan_can_be_extended_again_and_again(tmp_path):
    config = EncodeConfig(shard_size=4)
    for num_clips in (5, 9, 10, 30):
        extend_plan(tmp_path, source_of(tmp_path, clips_named(num_clips, num_clips)), config)
    assert fmt.read_plan(tmp_path).shard_rows().tolist() == [4, 1, 4, 1, 4, 4, 4, 4, 4]
    assert len({clip.key for shard in shards_of(tmp_path) for clip in shard}) == 30


def test_extension_stopped_before_its_last_file_leaves_the_old_plan_and_can_be_repeated(tmp_path):
    config, more = EncodeConfig(shard_size=4), source_of(tmp_path, clips_named(13, 5))
    before, shards = planned(tmp_path, clips_named(), shard_size=4)
    captions = captions_of(tmp_path)
    head = (tmp_path / "plan.json").read_bytes()
    extended = extend_plan(tmp_path, more, config)
    all_shards, files = shards_of(tmp_path), contents(tmp_path)
    (tmp_path / "plan.json").write_bytes(head)  # as if the machine had stopped here
    assert fmt.read_plan(tmp_path) == before
    assert shards_of(tmp_path) == shards and captions_of(tmp_path) == captions
    assert ensure_plan(tmp_path, source_of(tmp_path, clips_named()), config) == before
    assert extend_plan(tmp_path, more, config) == extended
    assert shards_of(tmp_path) == all_shards
    for name, (_, data) in contents(tmp_path).items():
        assert data == files[name][1], name


@pytest.mark.parametrize("config", [{"seed": 3}, {"shard_size": 5}])
def test_extension_with_other_settings_is_refused(tmp_path, config):
    planned(tmp_path, clips_named(), shard_size=4)
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match=r"there, \d now"):
        more = source_of(tmp_path, clips_named(12))
        extend_plan(tmp_path, more, EncodeConfig(**{"shard_size": 4, **config}))
    assert contents(tmp_path) == before


# -- big plans


def test_the_whole_vggsound_list_is_planned_and_resumed(shared_clips, tmp_path):
    config = EncodeConfig(media=str(tmp_path))
    rows = str(shared_clips / "vggsound_rows.csv")
    plan = ensure_plan(tmp_path / "out", open_source(rows, config), config)
    assert plan.num_clips == 190_983 and len(plan.shard_rows()) == 374
    table = PlanTable(tmp_path / "out", plan)
    clips = [clip for shard in (0, 200, 373) for clip in table.clips(shard)]
    assert {clip.split for clip in clips} == {"train", "test"}
    texts = captions_of(tmp_path / "out")
    assert len(texts) == 310 and {clip.caption for clip in clips} <= set(texts)
    before = contents(tmp_path / "out")
    source = dataclasses.replace(open_source(rows, config), read=lambda: pytest.fail("listed"))
    assert ensure_plan(tmp_path / "out", source, config) == plan
    assert contents(tmp_path / "out") == before
