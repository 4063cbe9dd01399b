"""What the driver hands to a cell, and what it hears back."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from pipeline.config import CheckSettings
from pipeline.format import ColumnSpec
from pipeline.media import Clip, DecodeSettings
from pipeline.storage import MediaStore


@dataclass(frozen=True)
class Job:
    """What every shard of a run has in common.

    Attributes:
        root: the data set's folder or URL.
        facts: name of the folder of facts in it.
        run_id: names this run's attempts; no other run may have it.
        columns: by modality.
        batch: clips that a codec takes at once, by modality.
        media_root: folder or URL that clip uris are relative to.
        cache_dir, cache_bytes: of media that are not local, see ``pipeline.storage``.
        decode_timeout_s, fetch_timeout_s: of one clip, and of its file if that is not local.
        encode_timeout_s: an encoder that is silent for so long is lost.
        clips_per_decoder: a decoder process is replaced after this many.
        window_bytes: decoded frames and sound in flight in a cell, at most, but a clip at least.
    """

    root: str
    facts: str
    plan_id: str
    run_id: str
    columns: dict[str, ColumnSpec]
    batch: dict[str, int]
    media_root: str
    cache_dir: str | None
    cache_bytes: int
    decode: DecodeSettings
    checks: CheckSettings
    decode_timeout_s: float
    fetch_timeout_s: float
    encode_timeout_s: float
    clips_per_decoder: int
    window_bytes: int

    def media_store(self) -> MediaStore:
        """Open the media of the run's clips."""
        return MediaStore(self.media_root, self.cache_dir, self.cache_bytes)

    def clip_bytes(self, clip: Clip) -> int:
        """Return how many bytes the frames and the sound of a clip have, decoded, at most."""
        pixels = max(height * width for height, width in self.decode.sizes)
        per_second = 3 * pixels * self.decode.fps
        per_second += 4 * self.decode.sample_rate * self.decode.channels
        return int(per_second * clip.duration_s)


@dataclass(frozen=True)
class ShardTask:
    """One shard to encode: its rows, and the modalities that lack a commit.

    A task of captions has ``modalities == ("text",)`` and no clips. ``attempt`` counts how often
    the shard was given out in this run; with the run_id it names the files of the attempt.
    """

    shard: int
    modalities: tuple[str, ...]
    clips: list[Clip] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    attempt: int = 1

    @property
    def name(self) -> tuple[str, int]:
        """What tells the task from all others of the run."""
        return ("text" if self.modalities == ("text",) else "clips", self.shard)


@dataclass(frozen=True)
class FailedClip:
    """A clip without latents, or with those of one modality only, and why."""

    key: str
    status: str
    message: str


@dataclass(frozen=True)
class ShardUpdate:
    """News of a cell since its last update.

    Attributes:
        event: "started" (earlier news of this task don't count), "progress", "committed", or
            "alive" (nothing but a sign of life, of no task).
        cell: which one, such as "node-3/1"; the driver fills it in.
        task: ``ShardTask.name``.
        statuses: rows written since, by status ("ok" where every modality has its latent).
        failed: those of them that are not ok.
        media_s: seconds of media in these rows.
        decode_s: seconds that decoders spent on them, summed over decoders.
        encode_s: seconds that codecs spent.
        write_s: seconds that threads spent on tars, checksums, indexes and commits.
        write_wait_s: seconds for which the encoder waited for these.
        bytes_in_flight: of frames and sound in the cell now.
        committed: names of the columns this attempt committed; others were committed by others.
        seconds: of "committed": from the start to the commit.
        notes: for people, such as a batch halved for lack of memory.
    """

    event: str
    cell: str = ""
    task: tuple[str, int] | None = None
    statuses: Counter[str] = field(default_factory=Counter)
    failed: tuple[FailedClip, ...] = ()
    media_s: float = 0.0
    decode_s: float = 0.0
    encode_s: float = 0.0
    write_s: float = 0.0
    write_wait_s: float = 0.0
    bytes_in_flight: int = 0
    committed: tuple[str, ...] = ()
    seconds: float = 0.0
    notes: tuple[str, ...] = ()
