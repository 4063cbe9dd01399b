"""Shards ready to be read from: their rows, checked, where crops may start, and their tars."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.files import is_local
from pipeline.records import repair
from train.data.cache_room import CacheRoom
from train.data.captions import Captions
from train.data.classes import CLIP_MODALITIES
from train.data.crops import num_starts
from train.data.lookahead import ShardPlace
from train.data.part import ShardRows
from train.data.payload import DamagedPayload, ShardPayloads
from train.data.retry import Patience
from train.data.shard_files import TarStore
from train.data.tar_bytes import PatientTar, RemoteTar, Tar, TarFacts
from train.data.view import View

NOT_THERE = -1  # in place of where an array begins

# What reading a clip needs; to pick it out of arrays takes several times as long: its key, row of
# its caption, latents of video that a crop may start at, where its video and audio begin in tars.
ReadyRow = tuple[str, int, int, int, int]


@dataclass(frozen=True, eq=False)
class ReadyShard:
    """A shard ready to be read from. R planned clips.

    Attributes:
        first_row: number of its first row in the data set.
        rows: of the R clips.
        audio_latents: int64 [R], how many each has.
        payloads: by modality.
        texts: tars of captions that are kept open with it.
    """

    first_row: int
    rows: Sequence[ReadyRow]
    audio_latents: np.ndarray
    payloads: dict[str, ShardPayloads]
    texts: list[PatientTar]


class ShardPreparer:
    """Gets the shards of a view ready; safe in threads.

    Args:
        view: the view.
        tars: opens tars.
        captions: of each data set.
        patience: how long to try again.
        num_ahead: shards of one data set that are open at once.
    """

    def __init__(
        self,
        view: View,
        tars: TarStore,
        captions: Sequence[Captions],
        patience: Patience,
        num_ahead: int,
    ) -> None:
        self._view, self._tars, self._patience = view, tars, patience
        self._captions = captions
        self._room = CacheRoom(view, tars.cache_bytes, num_ahead)
        columns = [part.opened[name] for part in view.parts for name in CLIP_MODALITIES]
        self._is_croppable = all(column.spec.croppable for column in columns)

    def prepare(self, place: ShardPlace) -> ReadyShard:
        """Get a shard ready: of a remote data set, tars are copied unless few rows are read.

        Raises:
            FormatError: the shard is damaged, or can't be read for long.
            ConfigError: the cache can't hold the copies of two windows.
            LoaderClosed: the loader was closed meanwhile.
        """
        part, shard = self._view.parts[place.part], place.shard
        rows = self._patience.call(f"{part.root} shard {shard}", lambda: part.shard_rows(shard))
        is_copied = not (is_local(part.root) or place.is_behind)
        open_tar = self._tars.open if is_copied or is_local(part.root) else RemoteTar
        payloads = {
            name: self._payloads(place.part, rows, name, open_tar) for name in CLIP_MODALITIES
        }
        texts = self._fetch(place.part, rows, payloads) if is_copied else []
        num_latents = {
            name: rows.index[name]["shape"][:, 0].astype(np.int64) for name in CLIP_MODALITIES
        }
        starts = np.ones(len(rows.keys), np.int64)
        if self._is_croppable:
            starts = num_starts(self._view.video, self._view.audio, num_latents, rows.has)
        video, audio = (
            np.where(rows.has[name], rows.index[name]["offset"].astype(np.int64), NOT_THERE)
            for name in CLIP_MODALITIES
        )
        numbers = (values.tolist() for values in (rows.text_rows, starts, video, audio))
        return ReadyShard(
            first_row=int(part.first_rows[shard]),
            rows=list(zip(rows.keys, *numbers, strict=True)),
            audio_latents=num_latents["audio"],
            payloads=payloads,
            texts=texts,
        )

    def _fetch(
        self, number: int, rows: ShardRows, payloads: Mapping[str, ShardPayloads]
    ) -> list[PatientTar]:
        """Copy the tars of a remote shard; return those of its captions."""
        captions = self._captions[number]
        is_used = rows.has["video"] | rows.has["audio"]
        tars, singles = captions.needed(rows.text_rows[is_used])
        self._room.check(number, rows, tars)
        for name, payload in payloads.items():
            if rows.has[name].any():
                payload.tar.open()
        for row in singles:
            with contextlib.suppress(DamagedPayload):  # found again, and told, when it is used
                captions.read(row)
        return [captions.copy(tar) for tar in tars]

    def _payloads(
        self, number: int, rows: ShardRows, name: str, open_tar: Callable[[TarFacts], Tar]
    ) -> ShardPayloads:
        part = self._view.parts[number]
        column = part.opened[name]
        facts = TarFacts(
            path=column.path / rows.tars[name],
            nbytes=rows.tar_bytes[name],
            crc32c=rows.tar_crc32c[name],
            repair=repair(column, rows.shard),
        )
        tar = PatientTar(facts, open_tar, self._patience)
        return ShardPayloads(tar, index=rows.index[name], keys=rows.keys, modality=name)
