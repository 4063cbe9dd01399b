"""Fills the samples of a micro-batch: finds the clip, cuts the crop, reads the bytes.

A clip with a damaged payload is replaced by the next sound one of its global batch, so that every
rank, however many there are, gives the same.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence

import numpy as np

from pipeline.format import FormatError
from train.data.captions import Captions
from train.data.crops import audio_start
from train.data.lookahead import Lookahead
from train.data.micro_batch import Draft
from train.data.order import shards_of
from train.data.payload import DamagedPayload, Seen
from train.data.ready_shard import NOT_THERE, ReadyShard
from train.data.tar_bytes import PatientTar
from train.data.view import View
from train.rng import uniform

log = logging.getLogger(__name__)

Read = tuple[PatientTar, np.ndarray, int]  # of which tar, into what, from which byte on


class RowReader:
    """Reads the rows of a view; safe in threads.

    Args:
        view: the view.
        seed: seed of the run: keys crops.
        captions: of each data set.

    Attributes:
        num_substituted: samples so far for which another clip stood in.
    """

    def __init__(self, view: View, seed: int, captions: Sequence[Captions]) -> None:
        self._view, self._seed, self._captions = view, seed, captions
        self._video, self._audio = view.video, view.audio
        self._seen = [self._new_seen(int(part.first_rows[-1])) for part in view.parts]
        self._damaged: set[tuple[int, int]] = set()  # by data set and row
        self._told: set[str] = set()
        self._noting = threading.Lock()
        self.num_substituted = 0

    def fill(self, draft: Draft, begin: int, end: int, shards: Lookahead[ReadyShard]) -> None:
        """Fill the samples [begin, end) of a draft; its ``wait`` raises what is raised here."""
        error = None
        try:
            draft.open()
            part = draft.batch.part
            rows = draft.batch.rows[draft.first + begin : draft.first + end]
            reads: list[Read] = []
            for place, row, shard in zip(
                range(begin, end), rows.tolist(), self._shards_of(part, rows), strict=True
            ):
                num_before = len(reads)
                try:
                    self._read(draft, place, row, shards.get(part, shard), reads)
                except DamagedPayload as damage:
                    del reads[num_before:]
                    self._substitute(draft, place, row, shards, damage)
            draft.note_known(end - begin)
            # Reads come last and together: each pushes the program out of the CPU's cache, so that
            # in between them all the rest takes several times as long.
            for tar, out, offset in reads:
                tar.read_into(out, offset)
        except BaseException as raised:
            error = raised
        draft.note_read(end - begin, error)

    def _new_seen(self, num_rows: int) -> Seen | None:
        return None if self._view.config.verify_crc == "always" else Seen(num_rows)

    def _shards_of(self, part: int, rows: np.ndarray) -> list[int]:
        return shards_of(self._view.parts[part].first_rows, rows).tolist()

    def _substitute(
        self,
        draft: Draft,
        place: int,
        damaged: int,
        shards: Lookahead[ReadyShard],
        damage: DamagedPayload,
    ) -> None:
        """Fill a sample with the next sound row of the global batch, from its start after its end.

        Raises:
            FormatError: there is none, or there is too much damage.
        """
        part = draft.batch.part
        self._note((part, damaged), damage)
        others = np.roll(draft.batch.rows, -draft.first - place)[1:]
        for row, shard in zip(others.tolist(), self._shards_of(part, others), strict=True):
            reads: list[Read] = []
            draft.clear(place)
            try:
                self._read(draft, place, row, shards.get(part, shard), reads)
            except DamagedPayload as another:
                damage = another
                self._note((part, row), damage)
                continue
            for tar, out, offset in reads:
                tar.read_into(out, offset)
            with self._noting:
                self.num_substituted += 1
            return
        raise FormatError(
            f"all {len(draft.batch.rows)} clips of a batch are damaged; the last: {damage}. "
            f"{self._mending()}"
        )

    def _read(
        self, draft: Draft, place: int, row: int, shard: ReadyShard, reads: list[Read]
    ) -> None:
        """Fill one sample with a row; what is known to be sound is only noted in ``reads``."""
        part, in_shard = draft.batch.part, row - shard.first_row
        draft.keys[place], caption, num_starts, video, audio = shard.rows[in_shard]
        draft.captions[place] = self._captions[part].read(caption)
        video_first = audio_first = 0
        if num_starts > 1:
            sample = draft.batch.first_sample + draft.first + place
            video_first = int(uniform(self._seed, "crop", sample) * num_starts)
            audio_first = audio_start(self._video, self._audio, video_first)
            if audio != NOT_THERE:
                last = shard.audio_latents.item(in_shard) - self._audio.shape[0]
                audio_first = min(audio_first, last)
            draft.audio_start_s[place] = (
                audio_first / self._audio.rate_hz - video_first / self._video.rate_hz
            )
        seen = self._seen[part]
        is_sound = seen is not None and row in seen
        for name, first, offset in (("video", video_first, video), ("audio", audio_first, audio)):
            out, payloads = draft.rows_of[name][place], shard.payloads[name]
            start = first * draft.latent_bytes[name]
            if offset == NOT_THERE:
                draft.has[name][place] = False
                out[:] = 0
            elif is_sound:
                reads.append((payloads.tar, out, offset + start))
            else:
                payloads.read_checked(in_shard, start, out)
        if seen is not None and not is_sound:
            seen.add(row)

    def _note(self, clip: tuple[int, int], damage: DamagedPayload) -> None:
        """Count a damaged clip, and log what is damaged of it, once each.

        Raises:
            FormatError: there are too many.
        """
        with self._noting:
            self._damaged.add(clip)
            count, is_new = len(self._damaged), str(damage) not in self._told
            self._told.add(str(damage))
        if count > self._view.config.max_damaged:
            raise FormatError(
                f"{count} clips are damaged, more than data.max_damaged="
                f"{self._view.config.max_damaged}; the last: {damage}. {self._mending()}"
            )
        if is_new:
            log.warning("%s. Another clip stands in for it", damage)

    def _mending(self) -> str:
        roots = {str(part.root) for part in self._view.parts}
        commands = (f"python -m pipeline.verify {root} --full" for root in sorted(roots))
        return f"All that is damaged is named by {', '.join(commands)}"
