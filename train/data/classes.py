"""What each clip of a data set is good for in a view: its class, and why some have none."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from pipeline.format import OK, STATUSES, FormatError
from train.data.census import NOT_USABLE, ClipClass, Tally
from train.data.filters import ClipFilter

Subset = Literal["train", "heldout", "all"]

CLIP_MODALITIES = ("video", "audio")
SHORT = len(STATUSES)  # code of a clip that is shorter than the crop
STATUS_NAMES = (*STATUSES, "short")
MOST_MISSING = 0.01  # share of the wanted clips that may be unusable without being asked for


@dataclass(frozen=True)
class Selection:
    """Which clips of a data set a view wants, and how long.

    Attributes:
        subset: "train", "heldout" or "all".
        heldout_share: share of the clips of split "train" that are held out.
        lengths: latents in a crop, by modality.
        clip_filter: None takes all.
    """

    subset: Subset
    heldout_share: float
    lengths: Mapping[str, int]
    clip_filter: ClipFilter | None


class Classifier:
    """Gives clips their classes, numbered as they are met, and counts them.

    Args:
        root: the data set, for messages.
        selection: the clips that are wanted.
        text_status: uint8 [number of captions], codes of ``format.STATUSES``.

    Attributes:
        classes: the classes met so far, and their numbers.
    """

    def __init__(self, root: Path, selection: Selection, text_status: np.ndarray) -> None:
        self.classes: dict[ClipClass, int] = {}
        self._root, self._selection, self._text_status = root, selection, text_status
        names = (*CLIP_MODALITIES, "text", "reasons")
        self._statuses = {name: np.zeros(len(STATUS_NAMES), np.int64) for name in names}
        self._clips: Counter[str] = Counter()

    def codes_of(
        self,
        clips: Mapping[str, Sequence[Any]],
        index: Mapping[str, np.ndarray],
        facts: pa.Table | None,
    ) -> np.ndarray:
        """Return the number of each clip's class, or ``NOT_USABLE``: uint8 [R].

        Args:
            clips: a shard's rows of the plan: key, split, text_row, and columns of the filter.
            index: ``INDEX_DTYPE`` [R] of "video" and "audio".
            facts: facts of the filter, R rows.

        Raises:
            ConfigError: as ``ClipFilter.passes``.
            FormatError: there are too many classes.
        """
        wanted = self._wanted(clips, facts)
        status = {name: self._status(name, records) for name, records in index.items()}
        status["text"] = self._text_status[np.array(clips["text_row"], np.int64)]
        has = {name: (status[name] == OK) & (status["text"] == OK) for name in CLIP_MODALITIES}
        self._count(wanted, status, has)
        usable = wanted & (has["video"] | has["audio"])
        sizes = [np.where(has[name][:, None], index[name]["shape"][:, 1:], 0) for name in has]
        kinds, kind_of = distinct_rows(np.concatenate(sizes, axis=1)[usable])
        numbers = [self._number(ClipClass(size_of(kind[:3]), size_of(kind[3:]))) for kind in kinds]
        codes = np.full(len(wanted), NOT_USABLE, np.uint8)
        codes[usable] = np.array(numbers, np.uint8)[kind_of]
        return codes

    def tally(self) -> Tally:
        """Return all that was counted."""
        statuses = {name: by_name(counts) for name, counts in self._statuses.items()}
        return Tally(**self._clips, reasons=statuses.pop("reasons"), statuses=statuses)

    def _wanted(self, clips: Mapping[str, Sequence[Any]], facts: pa.Table | None) -> np.ndarray:
        is_train = np.array([split == "train" for split in clips["split"]])
        is_heldout = is_train & (key_places(clips["key"]) < self._selection.heldout_share)
        is_train &= ~is_heldout
        every = np.ones_like(is_train)
        inside = {"train": is_train, "heldout": ~is_train, "all": every}[self._selection.subset]
        clip_filter = self._selection.clip_filter
        passes = clip_filter.passes(clips, facts) if clip_filter else every
        counts = {"planned": every, "heldout": is_heldout, "outside": ~inside}
        counts |= {"filtered": inside & ~passes, "wanted": inside & passes}
        self._clips.update({name: int(rows.sum()) for name, rows in counts.items()})
        return inside & passes

    def _status(self, name: str, index: np.ndarray) -> np.ndarray:
        """Return status codes, of which ``SHORT`` is one, [R]."""
        is_short = index["shape"][:, 0] < self._selection.lengths[name]
        return np.where((index["status"] == OK) & is_short, SHORT, index["status"])

    def _count(
        self, wanted: np.ndarray, status: dict[str, np.ndarray], has: dict[str, np.ndarray]
    ) -> None:
        complete = has["video"] & has["audio"]
        # A clip counts under its first status that is not ok, and as short only behind all others.
        is_other = [(codes != OK) & (codes != SHORT) for codes in status.values()]
        reason = np.select(is_other, list(status.values()), SHORT)
        for name, codes in status.items():
            self._statuses[name] += np.bincount(codes[wanted], minlength=len(STATUS_NAMES))
        reasons = np.bincount(reason[wanted & ~complete], minlength=len(STATUS_NAMES))
        self._statuses["reasons"] += reasons
        counts = {"complete": complete, "video_only": has["video"] & ~has["audio"]}
        counts["audio_only"] = has["audio"] & ~has["video"]
        self._clips.update({name: int((wanted & rows).sum()) for name, rows in counts.items()})

    def _number(self, clip_class: ClipClass) -> int:
        number = self.classes.setdefault(clip_class, len(self.classes))
        if number >= NOT_USABLE:
            raise FormatError(
                f"{self._root}: its clips have more than {NOT_USABLE} pairs of sizes, such as "
                f"{clip_class}; encode with fewer sizes (video.sizes)"
            )
        return number


def has_too_few(tally: Tally) -> bool:
    """Return whether more clips are not whole than ``data.missing=error`` lets pass."""
    return tally.wanted - tally.complete > MOST_MISSING * tally.wanted


def reasons_in_words(reasons: Mapping[str, int], seconds: float) -> str:
    """Return why clips are not whole, with counts, such as "silent 2, shorter than 8 s 1"."""
    names = {"short": f"shorter than {seconds:g} s"}
    return ", ".join(f"{names.get(name, name)} {count:,}" for name, count in reasons.items())


def distinct_rows(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the distinct rows of a table, and which of them each row is."""
    if len(table) and (table == table[0]).all():  # nearly always, and sorting takes its time
        return table[:1], np.zeros(len(table), np.int64)
    rows, row_of = np.unique(table, axis=0, return_inverse=True)
    return rows, row_of.reshape(-1)


def size_of(sizes: np.ndarray) -> tuple[int, ...] | None:
    """Return sizes of an index record without its padding; None where there is nothing."""
    return tuple(size for size in sizes.tolist() if size) or None


def key_places(keys: Sequence[str]) -> np.ndarray:
    """Return where keys lie between 0 and 1, float64 [R]: those below a share are held out.

    Decided by the key alone, so that every view and every seed hold out the same.
    """
    digests = b"".join(hashlib.sha256(key.encode()).digest()[:8] for key in keys)
    return np.frombuffer(digests, ">u8") / 2**64


def by_name(counts: np.ndarray) -> dict[str, int]:
    """Return counts of status codes by name, only those that occur."""
    return {STATUS_NAMES[code]: int(counts[code]) for code in np.flatnonzero(counts)}
