"""``python -m pipeline.encode … --calibrate``: how fast this machine decodes and encodes, and so
how many decoders an encoder needs. Measures a few clips without Ray; writes nothing.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from pipeline.child import ChildProcess
from pipeline.config import EncodeConfig, column_specs, decode_settings
from pipeline.draft import plan_order
from pipeline.media import Clip, ClipError
from pipeline.settings import ConfigError
from pipeline.sources import Source, clips_of
from pipeline.storage import MediaStore

NUM_CLIPS = 24
MIN_CLIPS = 4
# A list of which hardly any file is there is not searched to its end.
MAX_CLIPS_LOOKED_AT = 200_000
BLOCK_CLIPS = 256
# Of one clip, fetched, decoded and encoded in batches: only what hangs takes longer.
MAX_CLIP_S = 600.0


@dataclass(frozen=True)
class Calibration:
    """What was measured on a few clips, and what follows for a cell.

    Attributes:
        num_clips: measured.
        failed: clips that could not be decoded, by status.
        media_s: mean length of the clips.
        decode_clips_per_s: of one decoder, one thread, from files on this machine.
        decode_cv: standard deviation of the seconds per clip over their mean.
        encode_clips_per_s: of one encoder by modality, and "all" for picture and sound one after
            the other; text counts captions, each of which is encoded once in a data set.
        clip_bytes: frames and sound of a clip, mean.
        window_clips: how many of the largest fit in ``window_mb``.
        cpus: that this process may use.
        encoder_cpus, encoder_gpus: of one encoder, as set.
        decoders_needed: to keep one encoder busy.
        decoders: advised for one cell on this machine: no more than CPUs are left.
        bound: "decoding" or "encoding", what limits a cell with as many.
        clips_per_s: of that cell, at most.
    """

    num_clips: int
    failed: dict[str, int]
    media_s: float
    decode_clips_per_s: float
    decode_cv: float
    encode_clips_per_s: dict[str, float]
    clip_bytes: int
    window_clips: int
    cpus: int
    encoder_cpus: int
    encoder_gpus: float
    decoders_needed: int
    decoders: int
    bound: str
    clips_per_s: float


@dataclass(frozen=True)
class ClipFigures:
    """One clip measured: seconds to decode it, and to encode it by modality; its size decoded."""

    decode_s: float
    encode_s: dict[str, float]
    num_bytes: int
    media_s: float


def calibrate(source: Source, config: EncodeConfig, num_clips: int = NUM_CLIPS) -> Calibration:
    """Measure the first clips of the plan whose media are there.

    They are decoded and encoded in one child process with as many threads as a decoder and an
    encoder have in a cell; it is ended where a clip hangs it.

    Args:
        source: where the clips come from.
        config: as for a run.
        num_clips: to measure; fewer are enough where no more are there.

    Raises:
        ConfigError: no modality of clips is to be encoded; too few can be decoded.
    """
    if not {"video", "audio"} & set(config.columns):
        raise ConfigError(
            f"columns are {', '.join(config.columns)}, expected video or audio among them: "
            "captions need no decoders, there is nothing to calibrate"
        )
    measured: list[ClipFigures] = []
    failed: Counter[str] = Counter()
    last = "no clips there"
    prepare = partial(_measuring, source.root, config)
    with child_threads(config.encoder_cpus), ChildProcess(prepare, MAX_CLIP_S) as child:
        for clip in _first_clips(source, config):
            try:
                measured.append(child.call(clip))
            except ClipError as error:
                failed[error.status] += 1
                last = f"{clip.uri}: {error.message}"
            if len(measured) == num_clips or failed.total() >= 4 * num_clips:
                break
    if len(measured) < MIN_CLIPS:
        raise ConfigError(
            f"{len(measured)} clips of {source.root} could be measured ({_told(failed)}; {last}), "
            f"expected {MIN_CLIPS} at least; give --calibrate a source with more whole clips"
        )
    return _conclude(measured, failed, config)


def _first_clips(source: Source, config: EncodeConfig) -> Iterator[Clip]:
    """Yield the clips in the order of the plan, but those known to have no file."""
    listed = source.read().clips
    media = MediaStore(source.root, config.cache_dir, int(config.cache_gb * 1e9))
    order = plan_order(listed["key"], config.seed, 0)[:MAX_CLIPS_LOOKED_AT]
    for start in range(0, len(order), BLOCK_CLIPS):
        for clip in clips_of(listed.take(order[start : start + BLOCK_CLIPS])):
            if not media.is_missing(clip.uri):
                yield clip


@contextmanager
def child_threads(count: int) -> Iterator[None]:
    """Let child processes started in a block compute with so many threads, as Ray's actors do."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, str(count)))
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def _measuring(media_root: str, config: EncodeConfig) -> Callable[[Clip], ClipFigures]:
    """Return what measures a clip. Runs in the child: loads libraries and builds codecs."""
    import torch

    from pipeline.codecs import build_codec
    from pipeline.decode import decode_clip

    media = MediaStore(media_root, config.cache_dir, int(config.cache_gb * 1e9))
    settings, wanted = decode_settings(config), {"video", "audio"} & set(config.columns)
    specs = column_specs(config)
    codecs = {m: build_codec(spec.codec, spec.preprocessing) for m, spec in specs.items()}
    is_warm = False

    def measure(clip: Clip) -> ClipFigures:
        nonlocal is_warm
        with media.local(clip.uri) as path:
            for _ in range(1 if is_warm else 2):  # the first call loads libraries
                torch.set_num_threads(1)
                started = time.perf_counter()
                # As a cell does: facts are measured on both modalities.
                decoded = decode_clip(path, clip, settings, {"video", "audio"})
                decode_s = time.perf_counter() - started
                for modality in wanted & set(decoded.problems):
                    raise ClipError(*decoded.problems[modality])
                items = {"video": decoded.frames, "audio": decoded.sound, "text": clip.caption}
                torch.set_num_threads(config.encoder_cpus)
                encode_s = {
                    m: _encode_s(codec, items[m], getattr(config, m).batch, specs[m].dtype)
                    for m, codec in codecs.items()
                }
                is_warm = True
        sizes = [item.nbytes for item in (decoded.frames, decoded.sound) if item is not None]
        return ClipFigures(decode_s, encode_s, sum(sizes), decoded.facts["duration_s"])

    return measure


def _encode_s(codec: Any, item: Any, batch: int, dtype: str) -> float:
    """Return the seconds a codec takes for a clip, in a batch filled with copies of it."""
    from pipeline.codecs import stored

    started = time.perf_counter()
    latents = codec.encode([item] * batch)
    for latent in latents:
        stored(latent, dtype)
    return (time.perf_counter() - started) / batch


def _conclude(
    measured: list[ClipFigures], failed: Counter[str], config: EncodeConfig
) -> Calibration:
    decode_s = [clip.decode_s for clip in measured]
    mean_s = statistics.fmean(decode_s)
    encode_s = {m: statistics.fmean(c.encode_s[m] for c in measured) for m in config.columns}
    both_s = sum(seconds for modality, seconds in encode_s.items() if modality != "text")
    rates = {modality: 1 / seconds for modality, seconds in encode_s.items()}
    cpus = len(os.sched_getaffinity(0))
    needed = math.ceil(mean_s / both_s)
    decoders = min(needed, max(1, cpus - config.encoder_cpus))
    return Calibration(
        num_clips=len(measured),
        failed=dict(failed),
        media_s=statistics.fmean(clip.media_s for clip in measured),
        decode_clips_per_s=1 / mean_s,
        decode_cv=statistics.pstdev(decode_s) / mean_s,
        encode_clips_per_s=rates | {"all": 1 / both_s},
        clip_bytes=round(statistics.fmean(clip.num_bytes for clip in measured)),
        window_clips=int(config.window_mb * 1e6 // max(clip.num_bytes for clip in measured)),
        cpus=cpus,
        encoder_cpus=config.encoder_cpus,
        encoder_gpus=config.encoder_gpus,
        decoders_needed=needed,
        decoders=decoders,
        bound="decoding" if decoders < needed else "encoding",
        clips_per_s=min(decoders / mean_s, 1 / both_s),
    )


def calibration_text(found: Calibration) -> str:
    """Return what was measured and advised, in lines for people."""
    encoder = f"{found.encoder_cpus} CPU{'s' * (found.encoder_cpus > 1)}"
    encoder += f", {found.encoder_gpus:g} GPU" if found.encoder_gpus else ""
    lines = [
        f"{found.num_clips} clips of {found.media_s:.1f} s measured ({_told(found.failed)})",
        f"decoding   {found.decode_clips_per_s:8.2f} clips/s a decoder (1 CPU)",
    ]
    for modality, rate in found.encode_clips_per_s.items():
        unit = "captions/s" if modality == "text" else "clips/s"
        note = f" an encoder ({encoder})" if modality == "all" else ""
        lines.append(f"{modality:10} {rate:8.2f} {unit}{note}")
    lines.append(
        f"in flight  {found.clip_bytes / 1e6:8.2f} MB a clip; window_mb holds "
        f"{found.window_clips} of the largest"
    )
    if found.window_clips < 2 * found.decoders:
        needed_mb = math.ceil(2 * found.decoders * found.clip_bytes / 1e6)
        lines.append(f"           expected two a decoder: raise window_mb to {needed_mb} or more")
    lines.append(f"advised    decoders={found.decoders}")
    if found.decoders < found.decoders_needed:
        lines.append(
            f"           {found.decoders_needed} would keep an encoder busy, but this machine has "
            f"{found.cpus} CPUs for all its cells, {found.encoder_cpus} of them for an encoder"
        )
    lines.append(f"bound by   {found.bound}: at most {found.clips_per_s:.2f} clips/s a cell")
    return "\n".join(lines)


def _told(failed: dict[str, int]) -> str:
    if not failed:
        return "none failed"
    return "failed: " + ", ".join(f"{count} {status}" for status, count in sorted(failed.items()))
