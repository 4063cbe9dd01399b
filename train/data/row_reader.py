"""Fills the samples of a micro-batch: finds the clip, cuts the crop, reads the bytes.

A clip with a damaged payload is replaced by the next sound one of its global batch, so that every
rank, however many there are, gives the same.
"""

from __future__ import annotations

import logging
import threading

import numpy as np

from pipeline.format import FormatError
from train.data.captions import CaptionCache, Captions
from train.data.crops import audio_start
from train.data.lookahead import Lookahead
from train.data.micro_batch import Draft
from train.data.open_shard import OpenShard
from train.data.payload import DamagedPayload
from train.data.retry import Patience
from train.data.view import View
from train.rng import uniform

log = logging.getLogger(__name__)


class RowReader:
    """Reads the rows of a view; safe in threads.

    Args:
        view: the view.
        seed: seed of the run: keys crops.
        patience: how long to try again.

    Attributes:
        num_substituted: samples so far for which another clip stood in.
    """

    def __init__(self, view: View, seed: int, patience: Patience) -> None:
        self._view, self._seed = view, seed
        self._video, self._audio = view.video, view.audio
        cache = CaptionCache(view.config.text_cache_mb << 20)
        self._captions = [
            Captions(part, number, cache, patience) for number, part in enumerate(view.parts)
        ]
        self._damages: set[str] = set()
        self._noting = threading.Lock()
        self.num_substituted = 0

    def close(self) -> None:
        """Close the tars of captions."""
        for captions in self._captions:
            captions.close()

    def fill(self, draft: Draft, begin: int, end: int, shards: Lookahead[OpenShard]) -> None:
        """Fill the samples [begin, end) of a draft; its ``wait`` raises what is raised here."""
        error = None
        try:
            draft.open()
            batch = draft.batch
            rows = batch.rows[draft.first + begin : draft.first + end]
            first_rows = self._view.parts[batch.part].first_rows
            numbers = np.searchsorted(first_rows, rows, side="right") - 1
            for place, row, shard in zip(
                range(begin, end), rows.tolist(), numbers.tolist(), strict=True
            ):
                try:
                    self._read(draft, place, row, shards.get(batch.part, shard))
                except DamagedPayload as damage:
                    self._substitute(draft, place, shards, damage)
        except BaseException as raised:
            error = raised
        draft.note_read(end - begin, error)

    def _read(self, draft: Draft, place: int, row: int, shard: OpenShard) -> None:
        """Fill one sample with a row."""
        row -= shard.first_row
        caption = self._captions[draft.batch.part].read(shard.text_rows.item(row))
        has_audio = shard.has["audio"].item(row)
        video_first = audio_first = 0
        if (starts := shard.num_starts.item(row)) > 1:
            sample = draft.batch.first_sample + draft.first + place
            video_first = int(uniform(self._seed, "crop", sample) * starts)
            audio_first = audio_start(self._video, self._audio, video_first)
            if has_audio:
                last = shard.num_latents["audio"].item(row) - self._audio.shape[0]
                audio_first = min(audio_first, last)
        for name, first in (("video", video_first), ("audio", audio_first)):
            out = draft.rows_of[name][place]
            draft.has[name][place] = has = shard.has[name].item(row)
            if has:
                shard.payloads[name].read_span(row, first, draft.latent_bytes[name], out)
            else:
                out[:] = 0
        draft.keys[place], draft.captions[place] = shard.keys[row], caption
        draft.audio_start_s[place] = (
            audio_first / self._audio.rate_hz - video_first / self._video.rate_hz
        )

    def _substitute(
        self, draft: Draft, place: int, shards: Lookahead[OpenShard], damage: DamagedPayload
    ) -> None:
        """Fill a sample with the next sound row of the global batch, from its start after its end.

        Raises:
            FormatError: there is none, or there is too much damage.
        """
        batch, number = draft.batch, draft.first + place
        first_rows = self._view.parts[batch.part].first_rows
        self._note(damage)
        for row in np.roll(batch.rows, -number)[1:].tolist():
            shard = int(np.searchsorted(first_rows, row, side="right")) - 1
            try:
                self._read(draft, place, row, shards.get(batch.part, shard))
            except DamagedPayload as another:
                damage = another
                self._note(damage)
                continue
            with self._noting:
                self.num_substituted += 1
            return
        raise FormatError(
            f"all {len(batch.rows)} clips of a batch are damaged; the last: {damage}. "
            f"{self._mending()}"
        )

    def _note(self, damage: DamagedPayload) -> None:
        """Log a damaged payload once.

        Raises:
            FormatError: there are too many.
        """
        with self._noting:
            if str(damage) in self._damages:
                return
            self._damages.add(str(damage))
            count = len(self._damages)
        if count > self._view.config.max_damaged:
            raise FormatError(
                f"{count} payloads are damaged, more than data.max_damaged="
                f"{self._view.config.max_damaged}; the last: {damage}. {self._mending()}"
            )
        log.warning("%s. Another clip stands in for it", damage)

    def _mending(self) -> str:
        roots = ", ".join(str(part.root) for part in self._view.parts)
        return f"python -m pipeline.verify --full names all that are damaged in {roots}"
