"""Data sets encoded in this process: plan, decoding, checks, codecs and commits, without Ray."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import format as fmt
from pipeline.captions import caption_key, copy_captions
from pipeline.checks import facts_directory, facts_row, judge, write_facts
from pipeline.codecs import build_codec
from pipeline.config import EncodeConfig, column_specs, decode_settings
from pipeline.decode import decode_clip
from pipeline.media import Clip, ClipError, Decoded
from pipeline.plan import ensure_plan
from pipeline.plan_table import PlanTable
from pipeline.shards import ShardWriter, create_column
from pipeline.sources import open_source
from tests.pipeline import films
from tests.pipeline.films import Picture, Sound

SETTINGS: dict[str, Any] = {
    "shard_size": 2,
    "clip": {"seconds": 2.0},
    "video": {"fps": 8.0, "size": 64},
    "audio": {"sample_rate": 16000},
}


def record_films(folder: Path, num: int) -> Path:
    """Record ``num`` films of 2.4 s of one label, and one without sound."""
    (folder / "thing").mkdir(parents=True)
    for number in range(num):
        picture = Picture(seconds=2.4, start_frames=40 * number)
        sound = Sound(seconds=2.4, start_s=number * 1.6)
        films.record(folder / "thing" / f"film{number}.mp4", picture, sound)
    films.record(folder / "thing" / "mute.mp4", Picture(seconds=2.4), None)
    return folder


@dataclass(frozen=True)
class Encoded:
    """A data set of real files.

    Attributes:
        root: of the data set, a folder or a URL's path.
        src: folder of the media.
        config: settings.
    """

    root: Path
    src: Path
    config: EncodeConfig

    @cached_property
    def plan(self) -> fmt.Plan:
        if (self.root / "plan.json").exists():  # also of media that have changed since
            return fmt.read_plan(self.root)
        return ensure_plan(self.root, open_source(str(self.src), self.config), self.config)

    @cached_property
    def columns(self) -> dict[str, fmt.Column]:
        specs = column_specs(self.config)
        return {m: create_column(self.root, s, self.plan.plan_id) for m, s in specs.items()}

    @property
    def facts(self) -> Path:
        return self.root / facts_directory(self.plan.plan_id, self.config)

    def build(self) -> Encoded:
        """Write plan, facts and columns."""
        table = PlanTable(self.root, self.plan)
        for shard in range(len(self.plan.shard_rows())):
            self.write_clips(shard, table.clips(shard))
        if "text" in self.columns:
            copy_captions(self.root, self.plan, self.columns["text"].path)
            for shard in range(len(self.plan.shard_rows(text=True))):
                with ShardWriter(self.columns["text"], shard, "a-1") as writer:
                    for caption in table.captions(shard):
                        writer.add(caption_key(caption), self.latent("text", caption))
                    assert writer.commit({"run_id": "a"})
        return self

    def write_clips(self, shard: int, clips: list[Clip], attempt: str = "a-1") -> None:
        """Encode and commit one shard of clips, as `pipeline.encoder` does."""
        decoded = [self.decode(clip) for clip in clips]
        facts = [facts_row(row, *pair) for row, pair in enumerate(zip(clips, decoded, strict=True))]
        write_facts(self.facts, shard, facts)
        for modality in {"video", "audio"} & set(self.columns):
            with ShardWriter(self.columns[modality], shard, attempt) as writer:
                for clip, found in zip(clips, decoded, strict=True):
                    media = found.frames if modality == "video" else found.sound
                    status, _ = found.problems.get(modality, ("ok", ""))
                    latent = None if media is None else self.latent(modality, media)
                    writer.add(clip.key, latent, fmt.STATUS_CODE[status])
                assert writer.commit({"run_id": "a", "facts": self.facts.name})

    def decode(self, clip: Clip) -> Decoded:
        """Decode and judge one clip."""
        try:
            settings = decode_settings(self.config)
            found = decode_clip(self.src / clip.uri, clip, settings, {"video", "audio"})
        except ClipError as error:
            found = Decoded.failed(error.status, error.message)
        return judge(found, self.config.checks)

    def latent(self, modality: str, media: Any) -> np.ndarray:
        """Encode one item to what is stored."""
        spec = self.columns[modality].spec
        latent = build_codec(spec.codec, spec.preprocessing).encode([media])[0]
        return np.ascontiguousarray(latent, dtype=spec.dtype)

    def clip(self, key: str) -> tuple[int, int, Clip]:
        """Return shard, row and plan entry of a clip."""
        table = PlanTable(self.root, self.plan)
        for shard in range(len(self.plan.shard_rows())):
            for row, clip in enumerate(table.clips(shard)):
                if clip.key == key:
                    return shard, row, clip
        raise KeyError(key)
