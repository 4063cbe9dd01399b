"""What is left to encode, and the parts of it that can be asked for."""

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import format as fmt
from pipeline.request import parse
from pipeline.settings import ConfigError
from pipeline.work import FAILED, Work, open_work, parse_shards, reopen, restrict


def plan_of(num_clips, num_captions, shard_size=4):
    return fmt.Plan(
        plan_id="0" * 8,
        seed=0,
        source={},
        clips=(fmt.PlanSegment(0, num_clips, shard_size),),
        captions=(fmt.PlanSegment(0, num_captions, shard_size),),
    )


def column_of(root, modality, committed):
    """Make a column with commit records only."""
    folder = root / f"{modality}@test"
    folder.mkdir()
    for shard, statuses in committed.items():
        stem, rows = fmt.shard_name(shard), sum(statuses.values())
        record = {
            "plan_id": "0" * 8,
            "column": folder.name,
            "shard": shard,
            "keys_hash": "",
            "tar": f"{stem}.tar",
            "index": f"{stem}.idx.npy",
            "rows": rows,
            "ok": statuses.get("ok", 0),
            "status_counts": statuses,
            **dict.fromkeys(("tar_bytes", "tar_crc32c", "index_crc32c"), 0),
            "channels": {"count": 0, "sum": [], "sum_of_squares": []},
        }
        (folder / f"{fmt.shard_name(shard)}.json").write_text(json.dumps(record))
    spec = fmt.ColumnSpec(modality, {"name": "test"}, {}, ("time", "channel"), 1.0, 0.0, True)
    return fmt.Column(folder, spec, "0" * 8)


def all_work(plan):
    clips = [Work(s, ("video", "audio"), int(r)) for s, r in enumerate(plan.shard_rows())]
    texts = [Work(s, ("text",), int(r)) for s, r in enumerate(plan.shard_rows(text=True))]
    return texts + clips


def test_work_is_the_plan_minus_the_commits(tmp_path):
    columns = {
        "video": column_of(tmp_path, "video", {0: {"ok": 4}, 1: {"ok": 4}}),
        "audio": column_of(tmp_path, "audio", {1: {"ok": 4}}),
        "text": column_of(tmp_path, "text", {0: {"ok": 4}}),
    }
    assert open_work(plan_of(9, 6), columns) == [
        Work(1, ("text",), 2),
        Work(0, ("audio",), 4),
        Work(2, ("video", "audio"), 1),
    ]


@given(st.lists(st.integers(0, 40), min_size=1, max_size=4), st.integers(1, 60), st.integers(1, 60))
def test_ranges_that_cover_the_plan_cover_its_captions_too(cuts, num_clips, num_captions):
    """However the shards are split by hand, every shard of both kinds is in exactly one part."""
    plan = plan_of(num_clips, num_captions)
    last = len(plan.shard_rows()) - 1
    edges = [-1, *sorted({cut for cut in cuts if cut < last}), last]
    parts = [
        restrict(all_work(plan), plan, parse_shards(f"{a + 1}-{b}"), None)
        for a, b in pairwise(edges)
    ]
    found = [item for part in parts for item in part]
    assert sorted(found, key=repr) == sorted(all_work(plan), key=repr)


@pytest.mark.parametrize(("limit", "shards"), [(1, 1), (4, 1), (5, 2), (100, 3)])
def test_limit_takes_whole_shards_until_they_hold_as_many_clips(limit, shards):
    plan = plan_of(9, 1)
    chosen = restrict(all_work(plan), plan, None, limit)
    assert sum(not item.is_text for item in chosen) == shards


def test_shards_that_the_plan_lacks_are_said():
    with pytest.raises(ConfigError, match=r"none of the plan's 3 \(0-2\)"):
        restrict([], plan_of(9, 1), parse_shards("3-7"), None)


@pytest.mark.parametrize("text", ["", "a", "3-1", "1,,2", "-1", "0-", "1 2"])
def test_ranges_that_are_none_are_said(text):
    with pytest.raises(ConfigError, match="expected ranges such as 0-15"):
        parse_shards(text)


def test_only_shards_with_failures_of_the_kind_are_encoded_again(tmp_path):
    commits = {0: {"ok": 4}, 1: {"ok": 3, "missing": 1}, 2: {"silent": 4}, 3: {"unreadable": 1}}
    columns, plan = {"video": column_of(tmp_path, "video", commits)}, plan_of(13, 1)

    def open_shards(retry):
        return [item.shard for item in open_work(plan, columns, retry)]

    assert open_shards(frozenset()) == []
    assert open_shards(frozenset({"missing"})) == [1]
    assert open_shards(FAILED) == [1, 3], "a verdict is no failure"
    assert columns["video"].committed_shards() == {0, 1, 2, 3}, "they keep their commits until"
    for item in open_work(plan, columns, FAILED):
        reopen(item, columns, frozenset({"missing"}))
        reopen(item, columns, frozenset({"missing"}))  # by another driver at the same time
    assert columns["video"].committed_shards() == {0, 2, 3}


WORDS = ["--src", "a", "--out", "b"]


@pytest.mark.parametrize(
    ("words", "statuses", "decoders"),
    [
        ([], frozenset(), 0),
        (["--retry-failed"], FAILED, 0),
        (["--retry-failed=missing,unreadable"], {"missing", "unreadable"}, 0),
        (["--retry-failed", "missing"], {"missing"}, 0),
        (["--retry-failed", "decoders=3"], FAILED, 3),
        (["decoders=3", "--retry-failed"], FAILED, 3),
    ],
)
def test_statuses_to_retry_are_not_mixed_up_with_settings(words, statuses, decoders):
    request, config = parse([*WORDS, *words])
    assert (request.retry_failed, config.decoders) == (statuses, decoders)


@pytest.mark.parametrize("status", ["ok", "silent", "mising"])
def test_statuses_that_are_no_failures_are_refused(status):
    with pytest.raises(ConfigError, match="no failure; expected some of missing, unreadable"):
        parse([*WORDS, f"--retry-failed={status}"])


@pytest.mark.parametrize("words", [["--limit", "0"], ["--limit", "-3"], ["--limit", "many"]])
def test_limits_that_are_none_are_refused(words, capsys):
    with pytest.raises(SystemExit):
        parse([*WORDS, *words])
    assert "no number above 0" in capsys.readouterr().err
