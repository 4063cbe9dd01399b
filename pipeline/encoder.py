"""One shard from decoded clips to committed columns: plain code that Ray only moves.

Rows are written in plan order whatever the order they were decoded in, a bad clip becomes a
tombstone, and all wanted columns of the shard are committed together after its facts. Where an
earlier run left facts of a clip that was whole, they decide the verdict and stay as they are.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import format as fmt
from pipeline.captions import caption_key
from pipeline.checks import (
    clip_status,
    facts_row,
    is_settled,
    judge,
    read_facts,
    verdict_without_decoding,
    with_facts,
    write_facts,
)
from pipeline.codecs import Codec, build_codec
from pipeline.jobs import Job, ShardTask, ShardUpdate
from pipeline.media import Clip, Decoded
from pipeline.shards import ShardWriter, create_column

DecodeAll = Callable[[list[Clip], list[int], set[str]], Iterator[tuple[int, Decoded] | None]]


class ShardEncoder:
    """Encodes shards with the codecs of a job, which are built once."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._codecs: dict[str, Codec] = {
            modality: build_codec(spec.codec, spec.preprocessing)
            for modality, spec in job.columns.items()
        }
        self._media = job.media_store()

    def encode(self, task: ShardTask, decode_all: DecodeAll) -> Iterator[ShardUpdate]:
        """Write and commit the task's columns.

        Raises:
            NoRoomError: the disk is full; nothing of this shard is published.
        """
        started = time.monotonic()
        self._encode_s = 0.0
        with ExitStack() as stack:
            writers = {}
            for modality in task.modalities:
                spec = self._job.columns[modality]
                column = create_column(Path(self._job.root), spec, self._job.plan_id)
                writers[modality] = stack.enter_context(
                    ShardWriter(column, task.shard, f"{self._job.run_id}-{task.attempt}")
                )
            if task.modalities == ("text",):
                self._write_captions(task, writers["text"])
            else:
                yield from self._write_clips(task, writers, decode_all)
            seconds = time.monotonic() - started
            extra = {
                "run_id": self._job.run_id,
                "host": platform.node(),
                "seconds": round(seconds, 3),
                "encode_s": round(self._encode_s, 3),
                "numpy": np.__version__,
            }
            names = tuple(
                self._job.columns[modality].directory
                for modality, writer in writers.items()
                if writer.commit(extra)
            )
        yield ShardUpdate(
            "committed",
            task.shard,
            committed=names,
            seconds=seconds,
            encode_s=self._encode_s,
        )

    def _write_captions(self, task: ShardTask, writer: ShardWriter) -> None:
        dtype = self._job.columns["text"].dtype
        for caption in task.captions:
            latent = self._codecs["text"].encode([caption])[0].astype(dtype)
            writer.add(caption_key(caption), latent)

    def _write_clips(
        self, task: ShardTask, writers: dict[str, ShardWriter], decode_all: DecodeAll
    ) -> Iterator[ShardUpdate]:
        facts_folder = Path(self._job.root) / self._job.facts
        stored = read_facts(facts_folder, task.shard)
        known = [
            row if row and is_settled(row) else None for row in stored or [None] * len(task.clips)
        ]
        facts, early, next_row = [], dict[int, Decoded](), 0
        for found in self._decoded(task, known, set(writers), decode_all):
            if found is None:
                yield ShardUpdate("alive", task.shard)
                continue
            early[found[0]] = found[1]
            while next_row in early:
                decoded, clip = early.pop(next_row), task.clips[next_row]
                judged = judge(with_facts(decoded, known[next_row]), self._job.checks)
                facts.append(known[next_row] or facts_row(next_row, clip, judged))
                next_row += 1
                problems = self._write_row(clip, judged, writers)
                yield ShardUpdate("clip", task.shard, clip.key, *clip_status(problems))
        if facts != stored:
            write_facts(facts_folder, task.shard, facts)

    def _decoded(
        self,
        task: ShardTask,
        known: list[dict[str, Any] | None],
        wanted: set[str],
        decode_all: DecodeAll,
    ) -> Iterator[tuple[int, Decoded] | None]:
        """Decode the clips, but not those whose file is not there or whose facts say enough.

        Facts are measured on both modalities, whatever columns this run writes.
        """
        there = []
        if None in known:
            wanted = {"video", "audio"}
        for row, clip in enumerate(task.clips):
            facts = known[row]
            verdict = verdict_without_decoding(facts, self._job.checks) if facts else None
            if verdict:
                yield row, verdict
            elif self._media.is_missing(clip.uri):
                found = f"no file {clip.uri} in {self._job.media_root}"
                yield row, Decoded.failed("missing", f"{found}, expected the clip's media")
            else:
                there.append(row)
        yield from decode_all(task.clips, there, wanted)

    def _write_row(
        self, clip: Clip, decoded: Decoded, writers: dict[str, ShardWriter]
    ) -> dict[str, tuple[str, str]]:
        """Write one row of every column; return why columns have no latent, by modality.

        What a codec finds is no fact about the clip: another codec may do.
        """
        problems = {m: problem for m, problem in decoded.problems.items() if m in writers}
        media = {"video": decoded.frames, "audio": decoded.sound}
        for modality, writer in writers.items():
            latent = None
            if modality not in problems:
                latent, problem = self._encode_one(modality, media[modality])
                if problem:
                    problems[modality] = problem
            code = fmt.STATUS_CODE[problems[modality][0]] if modality in problems else fmt.OK
            writer.add(clip.key, latent, code)
        return problems

    def _encode_one(
        self, modality: str, item: Any
    ) -> tuple[np.ndarray | None, tuple[str, str] | None]:
        """Return the latent of frames or sound, or why there is none."""
        started, codec = time.perf_counter(), self._codecs[modality]
        latent = codec.encode([item])[0]
        if latent.shape[0] == 0:
            decode, is_video = self._job.decode, modality == "video"
            found = f"{len(item)} frames" if is_video else f"{item.shape[1]} samples"
            needed = (decode.fps if is_video else decode.sample_rate) / codec.rate_hz
            return None, ("too_short", f"{found}, expected {needed:g} for one latent at least")
        with np.errstate(over="ignore"):  # found below
            stored = np.ascontiguousarray(latent, dtype=self._job.columns[modality].dtype)
        self._encode_s += time.perf_counter() - started
        if not np.isfinite(stored).all():
            peak = float(np.abs(np.nan_to_num(latent, posinf=np.inf, neginf=-np.inf)).max())
            return None, (
                "nonfinite",
                f"a {modality} latent of {peak:.3g}, expected what {stored.dtype} can hold",
            )
        return stored, None
