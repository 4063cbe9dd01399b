"""Classes of clips are what looking at one clip after the other would say."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.format import INDEX_DTYPE, STATUS_CODE, FormatError
from train.data.census import NOT_USABLE, ClipClass
from train.data.classes import Classifier, Selection, key_places
from train.data.filters import parse_filter

LENGTHS = {"video": 8, "audio": 50}
STATUSES = st.sampled_from(["ok", "ok", "ok", "silent", "decode_crash"])


@dataclass(frozen=True)
class Clip:
    video: str
    audio: str
    text: str
    video_length: int
    audio_length: int
    width: int
    split: str
    label: str


CLIPS = st.builds(
    Clip,
    *(STATUSES, STATUSES, STATUSES),
    *(st.sampled_from([7, 8, 9]), st.sampled_from([49, 50])),
    *(st.sampled_from([3, 6]), st.sampled_from(["train", "test"]), st.sampled_from(["a", "b"])),
)


def index_of(clips: list[Clip], name: str) -> np.ndarray:
    index = np.zeros(len(clips), INDEX_DTYPE)
    for record, clip in zip(index, clips, strict=True):
        status, length = getattr(clip, name), getattr(clip, f"{name}_length")
        record["status"] = STATUS_CODE[status]
        size = (length, 2, 3, clip.width) if name == "video" else (length, 4, 2, 0)
        record["shape"] = size if status == "ok" else 0
    return index


def is_heldout(key: str, share: float) -> bool:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64 < share


def expected_class(clip: Clip) -> ClipClass | None:
    has_video = clip.video == "ok" and clip.video_length >= 8 and clip.text == "ok"
    has_audio = clip.audio == "ok" and clip.audio_length >= 50 and clip.text == "ok"
    found = ClipClass((2, 3, clip.width) if has_video else None, (4, 2) if has_audio else None)
    return found if has_video or has_audio else None


@given(clips=st.lists(CLIPS, min_size=1, max_size=12), subset=st.sampled_from(["train", "heldout"]))
def test_classes_and_counts_are_those_of_single_clips(clips: list[Clip], subset: Any) -> None:
    keys = [f"k{row}" for row in range(len(clips))]
    text_status = np.array([STATUS_CODE[clip.text] for clip in clips], np.uint8)
    selection = Selection(subset, 0.3, LENGTHS, parse_filter("label == 'a'"))
    classifier = Classifier(Path("data"), selection, text_status)
    plan: dict[str, Any] = {"key": keys, "text_row": list(range(len(clips)))}
    plan |= {name: [getattr(clip, name) for clip in clips] for name in ("split", "label")}
    index = {name: index_of(clips, name) for name in ("video", "audio")}
    codes = classifier.codes_of(plan, index, None)

    numbers = {number: kind for kind, number in classifier.classes.items()}
    is_inside = [
        (clip.split == "train" and not is_heldout(key, 0.3)) == (subset == "train")
        for key, clip in zip(keys, clips, strict=True)
    ]
    wanted = [inside and clip.label == "a" for inside, clip in zip(is_inside, clips, strict=True)]
    kinds = [
        expected_class(clip) if is_wanted else None
        for clip, is_wanted in zip(clips, wanted, strict=True)
    ]
    assert [numbers.get(code) for code in codes.tolist()] == kinds
    assert set(numbers) == set(codes.tolist()) - {NOT_USABLE}

    tally, num_wanted = classifier.tally(), sum(wanted)
    assert (tally.planned, tally.outside) == (len(clips), is_inside.count(False))
    assert (tally.filtered, tally.wanted) == (sum(is_inside) - num_wanted, num_wanted)
    there = [kind for kind in kinds if kind]
    assert tally.complete == sum(kind.is_complete for kind in there)
    assert tally.video_only == sum(kind.audio is None for kind in there)
    assert tally.audio_only == sum(kind.video is None for kind in there)
    assert sum(tally.reasons.values()) == num_wanted - tally.complete
    for counts in tally.statuses.values():
        assert sum(counts.values()) == num_wanted


def test_reason_of_a_clip_is_its_first_status_that_is_not_ok() -> None:
    clips = [
        Clip("ok", "silent", "decode_crash", 8, 50, 3, "train", "a"),
        Clip("ok", "ok", "decode_crash", 7, 50, 3, "train", "a"),
        Clip("ok", "ok", "ok", 7, 50, 3, "train", "a"),
    ]
    classifier = Classifier(
        Path("data"), Selection("all", 0.0, LENGTHS, None), np.array([8, 8, 0], np.uint8)
    )
    plan = {"key": ["a", "b", "c"], "text_row": [0, 1, 2], "split": ["train"] * 3}
    index = {name: index_of(clips, name) for name in ("video", "audio")}
    classifier.codes_of(plan, index, None)
    assert classifier.tally().reasons == {"decode_crash": 1, "silent": 1, "short": 1}


def test_more_sizes_than_codes_are_refused() -> None:
    clips = [Clip("ok", "ok", "ok", 8, 50, width, "train", "a") for width in range(1, 257)]
    classifier = Classifier(
        Path("data"), Selection("all", 0.0, LENGTHS, None), np.zeros(1, np.uint8)
    )
    plan = {"key": [f"k{clip.width}" for clip in clips], "text_row": [0] * 256}
    plan["split"] = ["train"] * 256
    index = {name: index_of(clips, name) for name in ("video", "audio")}
    with pytest.raises(FormatError, match="more than 255 pairs of sizes"):
        classifier.codes_of(plan, index, None)


@given(keys=st.lists(st.text("abcXYZ019_-", min_size=1, max_size=80)))
def test_places_of_keys_follow_from_the_keys_alone(keys: list[str]) -> None:
    places = key_places(keys)
    assert places.shape == (len(keys),) and ((places >= 0) & (places <= 1)).all()
    for key, place in zip(keys, places.tolist(), strict=True):
        assert is_heldout(key, 0.02) == (place < 0.02)
        assert key_places([key]).tolist() == [place]
