"""Encoding random clips again, to compare with what is stored: ``pipeline.verify --reencode``.

Sees what checksums can't: a codec or decoder that gives other latents than it gave when the
column was written, or media that are not those any more.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import format as fmt
from pipeline.batching import encode_filled
from pipeline.captions import caption_key
from pipeline.checks import read_facts
from pipeline.codecs import Codec, build_codec, stored
from pipeline.config import DECODER_VERSION
from pipeline.findings import Finding, Report
from pipeline.joint import ShardRows
from pipeline.media import Decoded
from pipeline.pick import pick_rows
from pipeline.plan_table import PlanTable
from pipeline.source_media import SourceMedia, decode_settings_of
from pipeline.sweep import progress_bar

# Statuses of a clip that say nothing about what was stored of it.
UNAVAILABLE = frozenset(("missing", "unreadable", "decode_timeout", "decode_crash"))


@dataclass
class Comparison:
    """What came of one column's clips.

    Attributes:
        column: its directory.
        checked: rows that were encoded again.
        equal: those of them that gave the same bytes.
        not_checked: why others were not -> how many.
        largest_difference: of any value, from what is stored.
    """

    column: str
    checked: int = 0
    equal: int = 0
    not_checked: Counter[str] = field(default_factory=Counter)
    largest_difference: float = 0.0

    def told(self) -> dict[str, Any]:
        """Return what programs are told."""
        return {**vars(self), "not_checked": dict(self.not_checked)}


def reencode_columns(
    root: Path, plan: fmt.Plan, columns: list[fmt.Column], num: int, seed: int, report: Report
) -> list[dict[str, Any]]:
    """Encode ``num`` random committed rows of every column again and compare them.

    Args:
        root: the data set.
        plan: its plan.
        columns: to check.
        num: rows of each.
        seed: of the choice.
        report: called with every difference.

    Returns:
        For each column its `Comparison`.

    Raises:
        FormatError: the plan's table is damaged, or a codec is not known to this version.
    """
    table, work = PlanTable(root, plan), []
    with SourceMedia(plan.source.get("root")) as media:
        for column in columns:
            again = EncodedAgain(root, column, table, media, report)
            planned = len(plan.shard_rows(text=column.spec.modality == "text"))
            shards = {shard for shard in column.committed_shards() if shard < planned}
            work.append((again, pick_rows(shards, again.ok_rows, num, seed)))
        with progress_bar(sum(len(places) for _, places in work), "row") as bar:
            for again, places in work:
                for shard, row in places:
                    again.row(shard, row)
                    bar.update()
    return [again.compared.told() for again, _ in work]


class EncodedAgain:
    """Encodes rows of one column again."""

    def __init__(
        self, root: Path, column: fmt.Column, table: PlanTable, media: SourceMedia, report: Report
    ) -> None:
        self._root, self._column, self._table = root, column, table
        self._media, self._report = media, report
        self.compared = Comparison(column.path.name)
        self._rows: dict[int, ShardRows] = {}
        self._codec = build_codec(column.spec.codec, column.spec.preprocessing)

    def ok_rows(self, shard: int) -> list[int]:
        """Return the rows of a shard that have a latent; none of a damaged one, see verify."""
        try:
            self._rows[shard] = ShardRows(self._column, shard)
        except fmt.FormatError:
            self.compared.not_checked["shard is damaged"] += 1
            return []
        return np.flatnonzero(self._rows[shard].index["status"] == fmt.OK).tolist()

    def row(self, shard: int, row: int) -> None:
        """Encode one row again, compare, and report a difference."""
        reason = other_version(self._column.spec, self._codec)
        if reason:
            self.compared.not_checked[reason] += 1
            return
        if self._column.spec.modality == "text":
            caption = self._table.captions(shard)[row]
            self._compare(shard, row, caption_key(caption), caption)
            return
        clip, modality = self._table.clips(shard)[row], self._column.spec.modality
        settings = decode_settings_of({modality: self._column.spec})
        decoded = self._media.decode(clip, settings, {modality})
        media = decoded.frames if modality == "video" else decoded.sound
        if media is not None:
            self._compare(shard, row, clip.key, media, decoded)
            return
        status, message = decoded.problems[modality]
        if status in UNAVAILABLE:
            self.compared.not_checked[status] += 1
        else:
            self._find(shard, row, clip.key, f"the source is {status} now: {message}", decoded)

    def _compare(
        self, shard: int, row: int, key: str, media: Any, decoded: Decoded | None = None
    ) -> None:
        try:
            there = self._rows[shard].array(row, key)
        except fmt.FormatError as error:
            self._report(Finding(str(error)))
            return
        batch = self._column.spec.preprocessing.get("batch", 1)
        latent = encode_filled(self._codec, [media], batch)[0]
        now = stored(latent, self._column.spec.dtype)
        self.compared.checked += 1
        if now.shape == there.shape and now.tobytes() == there.tobytes():
            self.compared.equal += 1
            return
        if now.shape != there.shape:
            found = f"shape {now.shape}, expected {there.shape}"
        else:
            difference = np.abs(now.astype(np.float64) - there)
            largest = float(difference.max())
            self.compared.largest_difference = max(self.compared.largest_difference, largest)
            found = (
                f"{np.count_nonzero(difference)} of {now.size} values differ, at most by "
                f"{largest:.3g} (stored up to {float(np.abs(there).max()):.3g})"
            )
        self._find(shard, row, key, f"encoded again: {found}", decoded)

    def _find(self, shard: int, row: int, key: str, text: str, decoded: Decoded | None) -> None:
        path = self._column.path / self._rows[shard].record.tar
        why = "written by other hardware or libraries, or the source was replaced"
        if decoded and self._is_replaced(shard, row, decoded):
            why = "the source was replaced since: its content is another"
        message = f"{path} row {row} ({key}): {text}; {why}"
        self._report(Finding(message, str(path), row, key))

    def _is_replaced(self, shard: int, row: int, decoded: Decoded) -> bool:
        """Return whether the facts tell another content of the source than it has now."""
        folder = self._rows[shard].record.facts
        facts = read_facts(self._root / folder, shard) if folder else None
        then, now = facts and facts[row]["content_hash"], decoded.facts.get("content_hash")
        return bool(then and now and then != now)


def other_version(spec: fmt.ColumnSpec, codec: Codec) -> str:
    """Return why this program would give other latents, or ""."""
    decoder = spec.preprocessing.get("decoder_version", DECODER_VERSION)
    if decoder != DECODER_VERSION:
        return f"written by decoder version {decoder}, this is {DECODER_VERSION}"
    return "" if codec.fingerprint() == spec.weights else "the codec's weights are others now"
