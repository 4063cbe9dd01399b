"""Facts become verdicts in one fixed order; what an earlier run found is not decided anew."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.checks import (
    FACTS_SCHEMA,
    clip_status,
    count_flags,
    facts_directory,
    facts_row,
    is_settled,
    judge,
    read_facts,
    verdict_without_decoding,
    with_facts,
    write_facts,
)
from pipeline.config import CheckSettings, EncodeConfig
from pipeline.media import Clip, Decoded
from pipeline.settings import load

GOOD = {
    "duration_s": 10.0,
    "fps": 25.0,
    "video_decoded_share": 1.0,
    "motion": 0.05,
    "audio_decoded_share": 1.0,
    "silent_share": 0.1,
}
# Check -> facts that fail it, and the modalities that it costs.
BAD = {
    "truncated": ({"audio_decoded_share": 0.9}, {"audio"}),
    "too_short": ({"duration_s": 0.4}, {"video", "audio"}),
    "silent": ({"silent_share": 0.99}, {"video", "audio"}),
    "still": ({"motion": 0.0002}, {"video", "audio"}),
    "low_fps": ({"fps": 5.0}, {"video", "audio"}),
}
DROP_ALL = CheckSettings(silent="drop", still="drop", low_fps="drop", duplicate="drop")
FLAG_ALL = CheckSettings(too_short="flag", truncated="flag")
FRAMES = np.zeros((4, 8, 8, 3), np.uint8)
SOUND = np.zeros((1, 100), np.float32)
FLAGGED = GOOD | {"flags": ["still"]}
CLIP = Clip("k", "k.mp4", 0.0, 10.0)


def decoded(**facts):
    return Decoded(FRAMES, SOUND, {}, GOOD | facts)


def test_good_clip_passes_every_check_unchanged():
    for checks in (DROP_ALL, FLAG_ALL):
        judged = judge(decoded(), checks)
        assert judged.problems == {} and judged.facts["flags"] == []
        assert judged.frames is FRAMES and judged.sound is SOUND


@pytest.mark.parametrize("check", BAD)
def test_policy_decides_between_flag_and_drop(check):
    facts, modalities = BAD[check]
    dropped = judge(decoded(**facts), DROP_ALL)
    assert {m: status for m, (status, _) in dropped.problems.items()} == dict.fromkeys(
        modalities, check
    )
    assert (dropped.frames is None) == ("video" in modalities)
    assert (dropped.sound is None) == ("audio" in modalities)
    assert dropped.facts["flags"] == []
    flagged = judge(decoded(**facts), FLAG_ALL)
    assert flagged.problems == {} and flagged.facts["flags"] == [check]


@pytest.mark.parametrize(
    ("facts", "found", "expected"),
    [
        ({"video_decoded_share": 0.42}, "42.0% of the frames", "98.0%"),
        ({"duration_s": 0.4}, "0.40 s", "at least 1 s"),
        ({"silent_share": 0.99}, "99.0% of the sound", "at most 95.0%"),
        ({"motion": 0.0002}, "0.0002", "at least 0.001"),
        ({"fps": 5.0}, "5 frames a second", "at least 8"),
    ],
)
def test_message_says_what_was_found_and_what_was_expected(facts, found, expected):
    message = clip_status(judge(decoded(**facts), DROP_ALL).problems)[1]
    assert found in message and expected in message


@given(st.sets(st.sampled_from(sorted(BAD))), st.sets(st.sampled_from(sorted(BAD))))
def test_first_of_the_dropped_counts_and_all_others_are_flags(failed, dropping):
    checks = CheckSettings(**{name: "drop" if name in dropping else "flag" for name in BAD})
    facts = {name: value for check in failed for name, value in BAD[check][0].items()}
    judged = judge(decoded(**facts), checks)
    dropped = [check for check in BAD if check in failed & dropping]
    of_video = [check for check in dropped if check != "truncated"]
    assert judged.facts["flags"] == sorted(failed - dropping)
    assert judged.problems.get("audio", ("ok",))[0] == (dropped or ["ok"])[0]
    assert judged.problems.get("video", ("ok",))[0] == (of_video or ["ok"])[0]


@given(st.sampled_from(sorted(BAD)), st.sampled_from(["no_video", "unreadable", "decode_crash"]))
def test_what_the_decoder_could_not_do_comes_before_every_check(check, status):
    problem = (status, "the decoder's words")
    judged = judge(replace(decoded(**BAD[check][0]), problems={"video": problem}), DROP_ALL)
    assert judged.problems["video"] == problem


def test_clip_that_nothing_is_known_of_fails_no_check():
    missing = Decoded(None, None, {"video": ("missing", "m"), "audio": ("missing", "m")}, {})
    judged = judge(missing, DROP_ALL)
    assert judged.problems == missing.problems and judged.facts["flags"] == []
    silent_film = judge(decoded(audio_decoded_share=None, silent_share=None), DROP_ALL)
    assert silent_film.problems == {}


def test_ten_seconds_may_end_some_milliseconds_early():
    checks = replace(DROP_ALL, min_seconds=10.0)
    assert judge(decoded(duration_s=9.98), checks).problems == {}
    assert judge(decoded(duration_s=9.7), checks).problems.keys() == {"video", "audio"}
    assert judge(decoded(fps=7.99), DROP_ALL).problems == {}


@given(
    st.fixed_dictionaries(
        {
            "duration_s": st.floats(0, 20),
            "fps": st.floats(1, 60),
            "video_decoded_share": st.sampled_from([None, 0.0, 0.5, 1.0]),
            "audio_decoded_share": st.sampled_from([None, 0.0, 0.5, 1.0]),
            "motion": st.sampled_from([0.0, 0.1]),
            "silent_share": st.sampled_from([0.0, 1.0]),
        }
    ),
    st.sampled_from([DROP_ALL, FLAG_ALL, CheckSettings(), CheckSettings(still="drop")]),
    st.sampled_from([{"video"}, {"audio"}, {"video", "audio"}]),
)
def test_verdict_is_the_same_when_one_modality_is_decoded_later(facts, checks, wanted):
    """The first run measures both; a later one decodes ``wanted`` and has the first's facts."""
    for modality in ("video", "audio"):
        if facts[f"{modality}_decoded_share"] is None:
            facts |= {"motion" if modality == "video" else "silent_share": None}
    problems = {
        modality: (f"no_{modality}", "the decoder's words")
        for modality in ("video", "audio")
        if not facts[f"{modality}_decoded_share"]
    }
    first = judge(Decoded(None, None, problems, facts), checks)
    stored = facts_row(0, CLIP, first)
    measured = {"motion": "video", "silent_share": "audio"}
    known = {n: v for n, v in facts.items() if measured.get(n, min(wanted)) in wanted}
    here = {m: problem for m, problem in problems.items() if m in wanted}
    if is_settled(stored):
        later = judge(with_facts(Decoded(None, None, here, known), stored), checks)
    else:  # then both are decoded and measured again
        later = judge(Decoded(None, None, problems, facts), checks)
    without_decoding = verdict_without_decoding(stored, checks)
    for modality in wanted:
        assert later.problems.get(modality) == first.problems.get(modality)
        if without_decoding:
            assert without_decoding.problems[modality] == first.problems[modality]
    assert later.facts["flags"] == first.facts["flags"]


def test_failure_is_tried_again_but_a_decision_is_not():
    for problems in ({"video": ("missing", "m"), "audio": ("missing", "m")}, {}):
        stored = facts_row(0, CLIP, Decoded(None, None, problems, dict(GOOD)))
        assert verdict_without_decoding(stored, DROP_ALL) is None
        assert is_settled(stored) == (not problems)
    short = facts_row(0, CLIP, judge(decoded(duration_s=0.1), DROP_ALL))
    assert not is_settled(short) and verdict_without_decoding(short, DROP_ALL) is None
    still = judge(decoded(motion=0.0), DROP_ALL)
    verdict = verdict_without_decoding(facts_row(0, CLIP, still), DROP_ALL)
    assert verdict is not None and verdict.problems == still.problems


def test_file_that_was_replaced_since_its_facts_fails():
    stored = facts_row(0, CLIP, decoded(content_hash="aa"))
    assert with_facts(decoded(content_hash="aa"), stored).problems == {}
    for modality in ("video", "audio"):
        status, message = with_facts(decoded(content_hash="bb"), stored).problems[modality]
        assert status == "unreadable" and "found content bb, expected aa" in message


def test_facts_are_read_back_as_they_were_written(tmp_path):
    facts = GOOD | {"video_codec": "h264", "num_frames": 80, "content_hash": "ab" * 16}
    rows = [
        facts_row(0, CLIP, judge(Decoded(None, None, {}, facts | {"motion": 0.0}), FLAG_ALL)),
        facts_row(1, CLIP, Decoded(None, None, {"audio": ("no_audio", "none")}, {})),
        facts_row(2, CLIP, judge(decoded(motion=0.0, fps=1.0), DROP_ALL)),
        facts_row(3, CLIP, Decoded(FRAMES, None, {"audio": ("no_audio", "none")}, FLAGGED)),
        facts_row(4, CLIP, replace(Decoded.failed("missing", "none"), facts=FLAGGED)),
    ]
    assert list(rows[0]) == FACTS_SCHEMA.names
    write_facts(tmp_path / "facts", 3, rows)
    assert read_facts(tmp_path / "facts", 3) == rows
    assert read_facts(tmp_path / "facts", 4) is None
    assert rows[1]["status"] == "no_audio" and rows[2]["status"] == "still"
    assert [rows[3][f"{modality}_status"] for modality in ("video", "audio")] == ["ok", "no_audio"]
    assert count_flags(tmp_path / "facts", [3], {}) == Counter(still=2), "films without sound count"
    assert count_flags(tmp_path / "facts", [3], {3: {0}}) == Counter(still=1), "dropped ones do not"


@pytest.mark.parametrize(
    ("override", "same"),
    [
        ("audio.sample_rate=22050", True),
        ("audio.channels=2", True),
        ("audio.codec.channels=12", True),
        ("video.codec.channels=32", True),
        ("decoders=3", True),
        ("video.fps=4", False),
        ("video.size=128", False),
        ("video.fit=pad", False),
        ("video.decoder=decord", False),
        ("checks.min_motion=0.5", False),
        ("checks.silent=drop", False),
    ],
)
def test_facts_are_shared_by_all_that_measures_and_checks_the_same(override, same):
    before = facts_directory("plan", EncodeConfig())
    assert (facts_directory("plan", load(EncodeConfig, None, [override])) == before) == same
    assert facts_directory("other", EncodeConfig()) != before
