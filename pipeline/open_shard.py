"""One shard being written: its rows in plan order, a bad clip's as a tombstone, and its facts.

Where an earlier run left facts of a clip that was whole, they decide the verdict and stay as they
are; where it left its latents, too, and the shard was taken back for the sake of other clips, they
are copied. A clip that is looked at again and fails, though it did not before, stays as it was.
All columns are committed together, after the facts.
"""

from __future__ import annotations

import platform
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import format as fmt
from pipeline.batching import Encoded
from pipeline.captions import caption_key
from pipeline.checks import (
    BOTH,
    facts_row,
    is_settled,
    judge,
    read_facts,
    verdict_without_decoding,
    with_facts,
    write_facts,
)
from pipeline.codecs import all_finite, stored
from pipeline.jobs import FailedClip, Job, ShardTask, ShardUpdate
from pipeline.media import Clip, Decoded
from pipeline.old_rows import best_facts, never_worse, open_old_rows
from pipeline.pool import Item
from pipeline.records import record_path
from pipeline.shards import ShardWriter
from pipeline.storage import MediaStore


@dataclass(eq=False)
class Row:
    """A clip or a caption on its way into its shard.

    Attributes:
        item: what decoders are given; None where there is nothing to decode.
        decoded: what they found, or what is known without them; None before, and once judged.
        copied_bytes: of latents that were there before.
        lengths: frames and samples.
        waiting: modalities that wait for their codec.
        latents: by modality, as they are stored.
        problems: modality -> (status, message) where there is no latent.
    """

    shard: OpenShard
    number: int
    key: str
    clip: Clip | None = None
    item: Item | None = None
    decoded: Decoded | None = None
    caption: str = ""
    copied_bytes: int = 0
    lengths: dict[str, int] = field(default_factory=dict)
    waiting: set[str] = field(default_factory=set)
    latents: dict[str, np.ndarray] = field(default_factory=dict)
    problems: dict[str, tuple[str, str]] = field(default_factory=dict)
    media_s: float = 0.0
    decode_s: float = 0.0
    encode_s: float = 0.0

    @property
    def held_bytes(self) -> int:
        """Bytes that it may hold in memory from when it is decoded until it is written."""
        return self.copied_bytes + (self.item.num_bytes if self.item else 0)


class OpenShard:
    """The columns of a task, from their first row to their commit.

    Used by one thread, but for `write`, which another may call, and `commit`, which a third may
    when all is written.

    Args:
        job: of the run.
        root: its data set.
        columns: of the task's modalities.
        media: where the clips' files are.
        tickets: numbers for the pool's items.

    Attributes:
        started_s: when its first row was begun with, of the monotonic clock, or None.
    """

    def __init__(
        self,
        job: Job,
        task: ShardTask,
        root: Path,
        columns: dict[str, fmt.Column],
        media: MediaStore,
        tickets: Iterator[int],
    ) -> None:
        self.task = task
        self.started_s: float | None = None
        self._job, self._media, self._tickets = job, media, tickets
        self._facts_folder = root / job.facts
        self._columns = [columns[modality] for modality in task.modalities]
        is_text = task.modalities == ("text",)
        keys = [clip.key for clip in task.clips] or list(map(caption_key, task.captions))
        opened = {m: open_old_rows(columns[m], task.shard, keys) for m in task.modalities}
        self._old = {modality: old for modality, old in opened.items() if old}
        self._stored = None if is_text else read_facts(self._facts_folder, task.shard)
        self._known = [
            row if row and is_settled(row) else None
            for row in self._stored or [None] * len(task.clips)
        ]
        tables = [self._stored, *(old.facts for old in self._old.values())]
        self._before = best_facts(tables) or [None] * len(task.clips)
        self._facts: list[dict[str, Any]] = []
        self._judged: deque[Row] = deque()  # and not written
        self._num_left = len(task.captions if is_text else task.clips)
        self._decode_s = self._encode_s = self._write_s = 0.0
        self._news = self._no_news = ShardUpdate("progress", task=task.name)
        self._unread = self._caption_rows() if is_text else self._clip_rows()
        attempt = f"{job.run_id}-{task.attempt}"
        with ExitStack() as stack:
            self._writers = {
                modality: stack.enter_context(ShardWriter(columns[modality], task.shard, attempt))
                for modality in task.modalities
            }
            self._stack = stack.pop_all()

    @property
    def is_complete(self) -> bool:
        """Whether all rows are taken, and nothing but to write and commit them is left to do."""
        return self._num_left == 0

    def next_row(self) -> Row | None:
        """Return the next row in plan order, or None after the last."""
        return next(self._unread, None)

    def judge(self, row: Row) -> dict[str, Any]:
        """Judge the next row that was decoded; return what of it is to be encoded, by modality."""
        self._judged.append(row)
        if row.clip is None:
            media: dict[str, Any] = {"text": row.caption}
        else:
            judged = self._verdict(row)
            row.media_s = judged.facts.get("duration_s") or 0.0
            media = {"video": judged.frames, "audio": judged.sound}
            for modality, axis in (("video", 0), ("audio", 1)):
                if media[modality] is not None:
                    row.lengths[modality] = media[modality].shape[axis]
        row.decoded = None
        row.waiting = set(self._writers) - set(row.problems) - set(row.latents)
        return {modality: media[modality] for modality in self._writers if modality in row.waiting}

    def settle(self, row: Row, modality: str, encoded: Encoded) -> None:
        """Note what a codec made of a row.

        What it finds is no fact about the clip: another codec may do.
        """
        started, problem, latent = time.perf_counter(), encoded.problem, None
        if encoded.latent is not None:
            latent, problem = self._stored_latent(row, modality, encoded.latent)
        if problem is not None:
            row.problems[modality] = problem
        elif latent is not None:
            row.latents[modality] = latent
        row.encode_s += encoded.seconds + time.perf_counter() - started
        row.waiting.remove(modality)

    def take_complete(self) -> list[Row]:
        """Return the rows that are complete, in plan order, each once, and count them as done."""
        complete = []
        while self._judged and not self._judged[0].waiting:
            complete.append(self._judged.popleft())
            self._count(complete[-1])
            self._num_left -= 1
        return complete

    def note_wait(self, seconds: float) -> None:
        """Note that the encoder waited for rows to be written."""
        self._news = replace(self._news, write_wait_s=self._news.write_wait_s + seconds)

    def write(self, row: Row) -> None:
        """Write the next row, and drop its latents.

        Raises:
            NoRoomError: the disk is full; nothing of this shard is published.
        """
        started = time.perf_counter()
        for modality, writer in self._writers.items():
            code = fmt.OK
            if modality in row.problems:
                code = fmt.STATUS_CODE[row.problems[modality][0]]
            writer.add(row.key, row.latents.pop(modality, None), code)
        self._write_s += time.perf_counter() - started

    def commit(self) -> ShardUpdate:
        """Publish facts and columns, and tell so; none is named that another writer was first with.

        Raises:
            NoRoomError: the disk is full.
        """
        started = time.perf_counter()
        with self._stack:
            names = () if self._is_committed() else self._publish()
            for old in self._old.values():
                old.forget()
        news = self._take_news()
        write_s = self._write_s + time.perf_counter() - started
        return replace(
            news, event="committed", write_s=write_s, committed=names, seconds=self.seconds
        )

    def close(self) -> None:
        """Remove what is not published."""
        self._stack.close()

    @property
    def seconds(self) -> float:
        """Seconds since its first row was begun with."""
        return time.monotonic() - self.started_s if self.started_s is not None else 0.0

    def progress(self) -> ShardUpdate | None:
        """Return the news since the last call, if there are any."""
        return self._take_news() if self._news.statuses else None

    def _take_news(self) -> ShardUpdate:
        news, self._news = self._news, self._no_news
        return news

    def _is_committed(self) -> bool:
        """Whether others committed all of it: this one is given up for lost, or is not alone.

        Facts are of those that were first, too, for their columns were judged by them.
        """
        return all(record_path(c, self.task.shard).exists() for c in self._columns)

    def _publish(self) -> tuple[str, ...]:
        """Publish facts and columns; return the names of those committed."""
        extra = {
            "run_id": self._job.run_id,
            "host": platform.node(),
            "seconds": round(self.seconds, 3),
            "decode_s": round(self._decode_s, 3),
            "encode_s": round(self._encode_s, 3),
            "numpy": np.__version__,
        }
        if self.task.clips:
            extra["facts"] = self._job.facts
            if self._facts != self._stored:
                write_facts(self._facts_folder, self.task.shard, self._facts)
        return tuple(
            self._job.columns[modality].directory
            for modality, writer in self._writers.items()
            if writer.commit(extra)
        )

    def _verdict(self, row: Row) -> Decoded:
        """Judge a clip and note its facts, problems and those of its latents that are kept."""
        assert row.clip is not None and row.decoded is not None
        known, row.decode_s = self._known[row.number], row.decoded.seconds
        now = judge(with_facts(row.decoded, known), self._job.checks)
        verdict = now if known else never_worse(now, self._before[row.number], self._job.checks)
        self._facts.append(known or facts_row(row.number, row.clip, verdict))
        if not known:
            self._copy_latents(row, self._facts[-1])
        problems = verdict.problems
        if verdict is not now:  # nothing of the file as it is now goes with what is kept
            problems = dict.fromkeys(BOTH, next(iter(now.problems.values()))) | problems
        lacking = self._writers.keys() - row.latents.keys()
        row.problems = {m: why for m, why in problems.items() if m in lacking}
        return verdict

    def _clip_rows(self) -> Iterator[Row]:
        """Decoders get no clip whose file is not there, or of which enough is known and kept."""
        for number, clip in enumerate(self.task.clips):
            facts, row = self._known[number], Row(self, number, clip.key, clip)
            if facts:
                row.decoded = verdict_without_decoding(facts, self._job.checks)
                row.copied_bytes = self._copy_latents(row, facts)
                if row.latents.keys() == self._writers.keys():
                    row.decoded = Decoded(None, None)
            if row.decoded is None and self._media.is_missing(clip.uri):
                found = f"no file {clip.uri} in {self._job.media_root}"
                row.decoded = Decoded.failed("missing", f"{found}, expected the clip's media")
            if row.decoded is None:
                # Facts are measured on both modalities, whatever columns this run writes.
                wanted = self._writers.keys() - row.latents.keys() if facts else BOTH
                num_bytes = self._job.clip_bytes(clip)
                row.item = Item(next(self._tickets), clip, frozenset(wanted), num_bytes)
            yield row

    def _caption_rows(self) -> Iterator[Row]:
        for number, caption in enumerate(self.task.captions):
            row = Row(self, number, caption_key(caption), caption=caption)
            row.copied_bytes = self._copy_latents(row, {"text_status": "ok", "content_hash": None})
            yield row

    def _copy_latents(self, row: Row, facts: dict[str, Any]) -> int:
        """Copy what was encoded before and is fine by the facts; return its bytes."""
        for modality, old in self._old.items():
            if facts[f"{modality}_status"] == "ok":
                latent = old.read(row.number, facts["content_hash"])
                if latent is not None:
                    row.latents[modality] = latent
        return sum(latent.nbytes for latent in row.latents.values())

    def _stored_latent(
        self, row: Row, modality: str, latent: np.ndarray
    ) -> tuple[np.ndarray | None, tuple[str, str] | None]:
        """Return a latent as it is stored, or why it can't be."""
        spec = self._job.columns[modality]
        if latent.shape[0] == 0 and modality in row.lengths:
            decode, is_video = self._job.decode, modality == "video"
            found = f"{row.lengths[modality]} {'frames' if is_video else 'samples'}"
            needed = (decode.fps if is_video else decode.sample_rate) / spec.rate_hz
            return None, ("too_short", f"{found}, expected {needed:g} for one latent at least")
        kept = stored(latent, spec.dtype)
        if not all_finite(kept):
            peak = float(np.abs(np.nan_to_num(latent, posinf=np.inf, neginf=-np.inf)).max())
            return None, (
                "nonfinite",
                f"a {modality} latent of {peak:.3g}, expected what {kept.dtype} can hold",
            )
        return kept, None

    def _count(self, row: Row) -> None:
        problems = row.problems
        status, message = next((problems[m] for m in fmt.MODALITIES if m in problems), ("ok", ""))
        self._decode_s += row.decode_s
        self._encode_s += row.encode_s
        news = self._news
        self._news = replace(
            news,
            statuses=news.statuses + Counter([status]),
            failed=news.failed + (FailedClip(row.key, status, message),) * (status != "ok"),
            media_s=news.media_s + row.media_s * (len(problems) < len(self._writers)),
            decode_s=news.decode_s + row.decode_s,
            encode_s=news.encode_s + row.encode_s,
        )
