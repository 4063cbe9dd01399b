"""Encoded captions by their row: read once, checked, and kept in memory up to a limit."""

from __future__ import annotations

import threading
from functools import lru_cache

import numpy as np

from pipeline.files import is_local
from pipeline.records import repair
from train.data.part import CaptionRecord, Part
from train.data.payload import as_array, check_crc
from train.data.retry import Patience
from train.data.tar_bytes import LocalTar, PatientTar, RemoteTar, Tar, TarFacts

OPEN_TARS = 64  # of one data set's text column


class CaptionCache:
    """Captions of all data sets, those that were not used for long dropped first; safe in threads.

    Two dictionaries instead of a list by use: what is found takes no lock. Captions go into the
    young one, and those used again come back into it; once it holds half of the capacity, it
    becomes the old one, and the old one goes.

    Args:
        capacity_bytes: of all of them together; the largest that is read may be more.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity_bytes = capacity_bytes
        self._young: dict[tuple[int, int], np.ndarray] = {}
        self._old: dict[tuple[int, int], np.ndarray] = {}
        self._young_bytes = 0
        self._lock = threading.Lock()

    def get(self, name: tuple[int, int]) -> np.ndarray | None:
        """Return a caption by (number of the data set, row), or None where it is not kept."""
        if (caption := self._young.get(name)) is not None:
            return caption
        if (caption := self._old.get(name)) is not None:
            self.put(name, caption)
        return caption

    def put(self, name: tuple[int, int], caption: np.ndarray) -> None:
        """Keep a caption."""
        with self._lock:
            if name in self._young:  # two threads have read it at once
                return
            if self._young and self._young_bytes + caption.nbytes > self._capacity_bytes // 2:
                self._old, self._young, self._young_bytes = self._young, {}, 0
            self._young[name] = caption
            self._young_bytes += caption.nbytes

    @property
    def num_bytes(self) -> int:
        """Bytes of all captions that are kept; of one in both dictionaries once."""
        return sum(caption.nbytes for caption in (self._old | self._young).values())


class Captions:
    """The captions of one data set.

    Of a remote data set they are read one by one: captions that many clips share lie anywhere in
    the column, and whole tars would be copied for single rows.

    Args:
        part: the data set.
        number: of it, in ``cache``.
        cache: what keeps captions in memory.
        patience: how long to try again.
    """

    def __init__(self, part: Part, number: int, cache: CaptionCache, patience: Patience) -> None:
        self._part, self._number, self._cache, self._patience = part, number, cache, patience
        self._column = part.opened["text"]
        self._tar = lru_cache(OPEN_TARS)(self._patient_tar)

    def read(self, row: int) -> np.ndarray:
        """Return a caption, float16 [S, D].

        Raises:
            DamagedPayload: its crc32c is wrong.
            FormatError: its shard is damaged, or can't be read for long.
        """
        if (caption := self._cache.get((self._number, row))) is not None:
            return caption
        place = self._patience.call(self._column.path, lambda: self._part.caption_record(row))
        tar, record = self._tar(self._facts(place)), place.record
        data = np.empty(int(record["nbytes"]), np.uint8)
        tar.read_into(data, int(record["offset"]))
        check_crc(data, int(record["crc32c"]), tar.facts, f"row {place.row} (caption {row})")
        caption = as_array(data, record)
        self._cache.put((self._number, row), caption)
        return caption

    def close(self) -> None:
        """Close the tars."""
        self._tar.cache_clear()

    def _facts(self, place: CaptionRecord) -> TarFacts:
        mending = repair(self._column, place.shard)
        return TarFacts(self._column.path / place.tar, place.tar_bytes, place.tar_crc32c, mending)

    def _patient_tar(self, facts: TarFacts) -> PatientTar:
        return PatientTar(facts, _open_tar, self._patience)


def _open_tar(facts: TarFacts) -> Tar:
    return LocalTar(facts, facts.path) if is_local(facts.path) else RemoteTar(facts)
