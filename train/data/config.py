"""Settings of what is read, how clips are cut, and in which order they come."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from pipeline.settings import STRICT, ConfigError

Missing = Literal["error", "drop", "mask"]
PathText = Annotated[str, Field(pattern=r"^[^\x00]*$")]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PartConfig:
    """One data set of a mixture.

    Attributes:
        root: its folder, or a URL.
        weight: its share of the steps, relative to the others; a millionth to a million.
        video: column by codec, fingerprint or directory name; None is the only one there.
        audio: the same for audio.
        text: the same for text.
        filter: as ``DataConfig.filter``.
    """

    root: PathText
    weight: float = Field(default=1.0, ge=1e-6, le=1e6)
    video: str | None = None
    audio: str | None = None
    text: str | None = None
    filter: str | None = None


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DataConfig:
    """Which columns are read, which clips, and how they are cut, ordered and checked.

    Attributes:
        root: the data set's folder, or a URL (``s3://bucket/shards``).
        video: video column by codec, fingerprint or directory name; None is the only one there.
        audio: the same for audio.
        text: the same for text.
        filter: which clips, by facts and by columns of the plan, such as
            ``facts.motion > 0.01 and split == "train"``.
        mix: several data sets instead of ``root``, such as ``[{root: a, weight: 2}, {root: b}]``;
            each step takes its batch from one of them.
        seconds: length of a crop.
        missing: clips that are wanted but not whole in both modalities: more than 1 % are an
            error; they are dropped; or they are kept for what they can serve ("mask").
        heldout_share: share of the clips of split "train" that are held out, chosen by key.
        window_shards: shards whose clips are mixed with one another.
        tail: clips that do not fill a batch at the end of an epoch are dropped, others each time,
            or the batch is filled from the epoch's start ("wrap").
        verify_crc: check payloads the first time that a process reads them, or "always".
        max_damaged: payloads of a wrong checksum that a rank replaces by others before it stops.
        retry_s: seconds for which a file that can't be read is tried again.
        read_threads: threads that read.
        prefetch_steps: optimiser steps that are read ahead.
        text_cache_mb: captions kept in memory.
        cache_dir: folder of the node for copies of remote shards, and for tables of views, some 30
            bytes a clip, kept for 30 days; None: the machine's temporary folder. What is removed
            there is made again.
        cache_gb: of remote shards, for all ranks of a node together.
    """

    root: PathText = "shards"
    video: str | None = None
    audio: str | None = None
    text: str | None = None
    filter: str | None = None
    mix: tuple[PartConfig, ...] = ()
    seconds: float = Field(default=8.0, gt=0, le=86_400)
    missing: Missing = "error"
    heldout_share: float = Field(default=0.02, ge=0, lt=1)
    window_shards: int = Field(default=32, ge=1, le=1_000_000)
    tail: Literal["drop", "wrap"] = "drop"
    verify_crc: Literal["first", "always"] = "first"
    max_damaged: int = Field(default=16, ge=0)
    retry_s: float = Field(default=10.0, ge=0, le=86_400)
    read_threads: int = Field(default=2, ge=1, le=1024)
    prefetch_steps: int = Field(default=2, ge=1, le=1024)
    text_cache_mb: int = Field(default=256, ge=1, le=1_000_000_000)
    cache_dir: PathText | None = None
    cache_gb: float = Field(default=100.0, gt=0, le=1e9)

    def __post_init__(self) -> None:
        own = {"video": self.video, "audio": self.audio, "text": self.text, "filter": self.filter}
        named = [name for name, value in own.items() if value is not None]
        if self.root != "shards":
            named.insert(0, "root")
        if self.mix and named:
            raise ConfigError(
                f"data.mix and data.{named[0]} are both set; with data.mix, every data set has its "
                "own root, columns and filter: leave those of data out"
            )

    @property
    def parts(self) -> tuple[PartConfig, ...]:
        """The data sets: those of ``mix``, or the one of ``root``."""
        only = PartConfig(
            root=self.root,
            video=self.video,
            audio=self.audio,
            text=self.text,
            filter=self.filter,
        )
        return self.mix or (only,)
