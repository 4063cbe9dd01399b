"""What the driver hands to a cell, and what it hears back."""

from __future__ import annotations

from dataclasses import dataclass, field

from pipeline.config import CheckSettings
from pipeline.format import ColumnSpec
from pipeline.media import Clip, DecodeSettings
from pipeline.storage import MediaStore


@dataclass(frozen=True)
class Job:
    """What every shard of a run has in common.

    Attributes:
        root: the data set's folder.
        facts: name of the folder of facts in it.
        run_id: names this run's attempts; no other run may have it.
        columns: by modality.
        media_root: folder or URL that clip uris are relative to.
        cache_dir, cache_bytes: of media that are not local, see ``pipeline.storage``.
        decode_timeout_s, fetch_timeout_s: of one clip, and of its file if that is not local.
        clips_per_decoder: a decoder process is replaced after this many.
        window_clips: clips decoded or being decoded ahead of the encoder, at most.
    """

    root: str
    facts: str
    plan_id: str
    run_id: str
    columns: dict[str, ColumnSpec]
    media_root: str
    cache_dir: str | None
    cache_bytes: int
    decode: DecodeSettings
    checks: CheckSettings
    decode_timeout_s: float
    fetch_timeout_s: float
    clips_per_decoder: int
    window_clips: int

    def media_store(self) -> MediaStore:
        """Open the media of the run's clips."""
        return MediaStore(self.media_root, self.cache_dir, self.cache_bytes)


@dataclass(frozen=True)
class ShardTask:
    """One shard to encode: its rows, and the modalities that lack a commit.

    A task of captions has ``modalities == ("text",)`` and no clips.
    """

    shard: int
    modalities: tuple[str, ...]
    clips: list[Clip] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    attempt: int = 1


@dataclass(frozen=True)
class ShardUpdate:
    """News of a shard: started, alive, a clip done, or committed.

    Attributes:
        event: "started" (earlier news of this shard don't count), "alive", "clip" or "committed".
        key, status, message: of a clip done.
        committed: names of the columns this attempt committed.
    """

    event: str
    shard: int
    key: str = ""
    status: str = ""
    message: str = ""
    committed: tuple[str, ...] = ()
    seconds: float = 0.0
    encode_s: float = 0.0
