"""How fast the stages of encoding are: decoders alone, codecs alone, and pairs of both.

These are the limits that a pipeline can reach. All run the code that the cells run.
"""

from __future__ import annotations

import multiprocessing
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.checks import judge
from pipeline.codecs import build_codec, stored
from pipeline.config import EncodeConfig, decode_settings
from pipeline.decode import decode_clip
from pipeline.format import ColumnSpec
from pipeline.media import Clip, ClipError, Decoded
from pipeline.sources import clips_of, open_source
from tools.side_by_side import Timing, run_side_by_side

# Decoded clips held for the codecs; they take turns, so that none stays in a cache.
NUM_HELD = 8
# Clips that a decoder of a pair may be ahead of its codecs, as many as fill the default window.
NUM_AHEAD = 32
PARTNER_TIMEOUT_S = 120.0
BOTH = {"video", "audio"}


@dataclass(frozen=True)
class StageJob:
    """What one process has to do: clips, and the settings of the columns."""

    paths: tuple[str, ...]
    config: EncodeConfig
    specs: dict[str, ColumnSpec]

    def split(self, parts: int) -> list[StageJob]:
        """Deal the clips out, one by one in turn."""
        return [replace(self, paths=self.paths[part::parts]) for part in range(parts)]


def decode_only(job: StageJob, num_decoders: int) -> Timing:
    """Decode all clips once with so many processes, and throw them away."""
    return run_side_by_side(_decoding, job.split(num_decoders))


def codecs_only(job: StageJob, num_encoders: int, num_clips: int) -> Timing:
    """Encode so many clips in each process, from a few decoded before and held in memory."""
    held = replace(job, paths=job.paths[:NUM_HELD])
    return run_side_by_side(_encoding, [(held, num_clips)] * num_encoders)


def pairs_only(job: StageJob, num_pairs: int) -> Timing:
    """Decode all clips in so many processes, and encode as many beside each; lanes are encoders.

    Codecs wait for their decoder, but what they encode are clips held in memory: a pipeline whose
    hand-over costs nothing, and which writes nothing. Both slow each other down, as they do in one.

    Raises:
        RuntimeError: a process died or waited for its partner in vain.
    """
    context, halves = multiprocessing.get_context("spawn"), []
    for part in job.split(num_pairs):
        decoded, room = context.Semaphore(0), context.Semaphore(NUM_AHEAD)
        halves += [(_encoding_half, part, decoded, room), (_decoding_half, part, decoded, room)]
    timing = run_side_by_side(_half, halves)
    return replace(timing, lanes=timing.lanes[::2])


def _half(argument: Any) -> Callable[[], Iterator[int]]:
    prepare, *given = argument
    return prepare(*given)


def _decoding_half(job: StageJob, decoded: Any, room: Any) -> Callable[[], Iterator[int]]:
    decode = _decoding(job)

    def work() -> Iterator[int]:
        _acquire(room)
        for clips in decode():
            decoded.release()
            yield clips
            _acquire(room)

    return work


def _encoding_half(job: StageJob, decoded: Any, room: Any) -> Callable[[], Iterator[int]]:
    held = replace(job, paths=job.paths[:NUM_HELD])
    encode, batch = _encoder(held)

    def work() -> Iterator[int]:
        for start in range(0, len(job.paths) // batch * batch, batch):
            for _ in range(batch):
                _acquire(decoded)
            encode(start)
            for _ in range(batch):
                room.release()
            yield batch
        room.release()  # the decoder asks once more, behind its last clip

    return work


def _acquire(semaphore: Any) -> None:
    if not semaphore.acquire(timeout=PARTNER_TIMEOUT_S):
        raise RuntimeError(f"nothing heard of the other half of a pair in {PARTNER_TIMEOUT_S:g} s")


def _decoder(job: StageJob) -> Callable[[str], Decoded]:
    import torch

    torch.set_num_threads(1)
    settings, seconds = decode_settings(job.config), job.config.clip.seconds

    def decode(path: str) -> Decoded:
        return decode_clip(Path(path), Clip("bench", path, 0.0, seconds), settings, BOTH)

    return decode


def _decoding(job: StageJob) -> Callable[[], Iterator[int]]:
    decode = _decoder(job)

    def work() -> Iterator[int]:
        for path in job.paths:
            decode(path)
            yield 1

    return work


def _encoding(argument: tuple[StageJob, int]) -> Callable[[], Iterator[int]]:
    job, num_clips = argument
    encode, batch = _encoder(job)

    def work() -> Iterator[int]:
        for start in range(0, num_clips, batch):
            encode(start)
            yield batch

    return work


def _encoder(job: StageJob) -> tuple[Callable[[int], None], int]:
    """Decode all clips; return what encodes some of them, from a number on, and how many."""
    decode = _decoder(job)
    held = [decode(path) for path in job.paths]
    clips = {"video": [d.frames for d in held], "audio": [d.sound for d in held]}
    specs = {m: spec for m, spec in job.specs.items() if m in clips}
    codecs = {m: build_codec(spec.codec, spec.preprocessing) for m, spec in specs.items()}
    batch = max(getattr(job.config, m).batch for m in codecs)

    def encode(start: int) -> None:
        rows = [row % len(held) for row in range(start, start + batch)]
        for modality, codec in codecs.items():
            size = getattr(job.config, modality).batch
            for first in range(0, batch, size):
                items = [clips[modality][row] for row in rows[first : first + size]]
                for latent in codec.encode(items):
                    stored(latent, specs[modality].dtype)

    return encode, batch


def whole_clips(folder: Path, config: EncodeConfig) -> list[Path]:
    """Return the media of a folder of which picture and sound can be encoded, by name.

    Raises:
        ConfigError: there are no media.
    """
    settings, found = decode_settings(config), []
    for clip in clips_of(open_source(str(folder), config).read().clips):
        path = folder / clip.uri
        try:
            decoded = decode_clip(path, clip, settings, BOTH)
        except ClipError:
            continue
        if not judge(decoded, config.checks).problems:
            found.append(path)
    return sorted(found)


def repeated(sources: Sequence[Path], folder: Path, count: int) -> tuple[str, ...]:
    """Fill a folder with so many clips: copies of the sources, then hard links to these."""
    folder.mkdir(parents=True)
    paths: list[Path] = []
    for number in range(count):
        source = sources[number % len(sources)]
        path = folder / f"clip-{number:06d}{source.suffix}"
        if number < len(sources):
            shutil.copyfile(source, path)
        else:
            path.hardlink_to(paths[number % len(sources)])
        paths.append(path)
    return tuple(map(str, paths))
