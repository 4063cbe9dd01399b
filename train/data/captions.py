"""Encoded captions by their row: read once, checked, and kept in memory up to a limit."""

from __future__ import annotations

import threading
from functools import lru_cache, partial
from weakref import WeakValueDictionary

import numpy as np

from pipeline.files import is_local
from pipeline.records import repair
from train.data.part import CaptionRecord, Part
from train.data.payload import as_array, check_crc
from train.data.retry import Patience
from train.data.shard_files import TarStore
from train.data.tar_bytes import PatientTar, RemoteTar, TarFacts

OPEN_TARS = 64  # of one data set's text column
# A remote tar is copied where that brings no more than so many times the bytes that are needed, or
# takes no longer than a few requests.
MOST_EXCESS, SMALL_TAR_BYTES = 16, 32 << 20
MOST_COPIES = 8  # for one shard of clips


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
    """The captions of one data set; safe in threads.

    Of a remote data set, tars that the coming clips need a good part of are copied whole, as those
    of clips are. A caption that is far from those of the clips around it, since it was first used
    long before, is read by itself.

    Args:
        part: the data set.
        number: of it, in ``cache``.
        cache: what keeps captions in memory.
        tars: opens tars.
        patience: how long to try again.
    """

    def __init__(
        self,
        part: Part,
        number: int,
        cache: CaptionCache,
        tars: TarStore,
        patience: Patience,
    ) -> None:
        self._part, self._number, self._cache = part, number, cache
        self._tars, self._patience = tars, patience
        self._column = part.opened["text"]
        open_tar = tars.open if is_local(self._column.path) else RemoteTar
        self._tar = lru_cache(OPEN_TARS)(partial(PatientTar, open_tar=open_tar, patience=patience))
        self._copies: WeakValueDictionary[TarFacts, PatientTar] = WeakValueDictionary()

    def read(self, row: int) -> np.ndarray:
        """Return a caption, float16 [S, D].

        Raises:
            DamagedPayload: its crc32c is wrong.
            FormatError: its shard is damaged, or can't be read for long.
        """
        if (caption := self._cache.get((self._number, row))) is not None:
            return caption
        place = self._place(row)
        facts, record = self._facts(place), place.record
        tar = self._copies.get(facts) or self._tar(facts)
        data = np.empty(int(record["nbytes"]), np.uint8)
        tar.read_into(data, int(record["offset"]))
        check_crc(data, int(record["crc32c"]), facts, f"row {place.row} (caption {row})")
        caption = as_array(data, record)
        self._cache.put((self._number, row), caption)
        return caption

    def needed(self, rows: np.ndarray) -> tuple[list[TarFacts], list[int]]:
        """Return what a remote data set's clips need ahead of reading.

        Args:
            rows: int64 [n], their captions.

        Returns:
            The tars to be copied whole, and the captions to be read one by one.

        Raises:
            FormatError: a shard is damaged, or can't be read for long.
        """
        sizes: dict[TarFacts, dict[int, int]] = {}
        for row in np.unique(rows).tolist():
            place = self._place(row)
            sizes.setdefault(self._facts(place), {})[row] = int(place.record["nbytes"])
        # Those first of which the largest part is needed.
        excess = {tar: tar.nbytes / sum(rows.values()) for tar, rows in sizes.items()}
        tars = [
            tar
            for tar in sorted(excess, key=lambda tar: excess[tar])[:MOST_COPIES]
            if excess[tar] <= MOST_EXCESS or tar.nbytes <= SMALL_TAR_BYTES
        ]
        return tars, [row for tar, of_tar in sizes.items() if tar not in tars for row in of_tar]

    def copy(self, facts: TarFacts) -> PatientTar:
        """Return a tar that was copied; captions are read from it for as long as it is held."""
        tar = self._copies.get(facts)
        if tar is None:
            tar = PatientTar(facts, self._tars.open, self._patience)
            tar.open()
            self._copies[facts] = tar
        return tar

    def close(self) -> None:
        """Close the tars."""
        self._tar.cache_clear()

    def _place(self, row: int) -> CaptionRecord:
        return self._patience.call(self._column.path, lambda: self._part.caption_record(row))

    def _facts(self, place: CaptionRecord) -> TarFacts:
        mending = repair(self._column, place.shard)
        return TarFacts(self._column.path / place.tar, place.tar_bytes, place.tar_crc32c, mending)
