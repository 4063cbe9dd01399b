"""Settings of an encode run. Every field that decides bytes ends up in a column's fingerprint."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from pipeline.format import ColumnSpec
from pipeline.media import DecodeSettings
from pipeline.settings import STRICT


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DctSettings:
    """Built-in video codec: see ``pipeline.codecs.builtin.DctVideo``."""

    name: Literal["dct"] = "dct"
    frames: int = Field(default=1, ge=1, le=16)
    block: int = Field(default=8, ge=2, le=16)
    channels: int = Field(default=16, ge=1)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LogmelSettings:
    """Built-in audio codec: see ``pipeline.codecs.builtin.LogmelAudio``."""

    name: Literal["logmel"] = "logmel"
    num_mels: int = Field(default=64, ge=4)
    n_fft: int = Field(default=1024, ge=64)
    hop: int = Field(default=160, ge=16)
    fmin_hz: float = Field(default=0.0, ge=0)
    fmax_hz: float = Field(default=8000.0, gt=0)
    patch: int = Field(default=4, ge=1, le=16)
    channels: int = Field(default=8, ge=1)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class HashSettings:
    """Built-in text codec: see ``pipeline.codecs.builtin.HashText``."""

    name: Literal["hash"] = "hash"
    width: int = Field(default=64, ge=1)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class VideoSettings:
    """Picture: ``fps`` frames a second, short side resized to ``size`` and centre cropped."""

    fps: float = Field(default=8.0, gt=0, le=120)
    size: int = Field(default=256, ge=16, le=4096)
    codec: DctSettings = Field(default_factory=DctSettings)

    def __post_init__(self) -> None:
        if self.size % self.codec.block:
            raise ValueError(
                f"size {self.size} is not a multiple of codec.block {self.codec.block}"
            )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AudioSettings:
    """Sound: PCM at ``sample_rate`` Hz, averaged to one channel or kept as two."""

    sample_rate: int = Field(default=16000, ge=4000, le=192000)
    channels: Literal[1, 2] = 1
    codec: LogmelSettings = Field(default_factory=LogmelSettings)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TextSettings:
    """Captions: cut after ``max_words``."""

    max_words: int = Field(default=64, ge=1)
    codec: HashSettings = Field(default_factory=HashSettings)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ClipSettings:
    """Which span of a file is a clip: its first ``seconds``, and not less than ``min_seconds``."""

    seconds: float = Field(default=10.0, gt=0)
    min_seconds: float = Field(default=1.0, ge=0)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EncodeConfig:
    """Everything ``python -m pipeline.encode`` can be told.

    Attributes:
        media: VGGSound only: folder of the media, default the folder of the csv.
        columns: which modalities to encode.
        shard_size: clips per shard, the unit of work and of commit.
        seed: of the plan's shuffle.
        decoders: decoder processes beside the encoder; 0 = CPUs of the machine less one.
        decode_timeout_s: a clip that takes longer has its decoder killed.
        window_mb: decoded frames and sound in flight, at most (but two clips at least).
        max_failed_share: the run fails (exit 1) when more clips than this have no latents.
    """

    media: str | None = None
    columns: tuple[Literal["video", "audio", "text"], ...] = Field(
        default=("video", "audio", "text"), min_length=1
    )
    shard_size: int = Field(default=512, ge=1)
    seed: int = 0
    clip: ClipSettings = Field(default_factory=ClipSettings)
    video: VideoSettings = Field(default_factory=VideoSettings)
    audio: AudioSettings = Field(default_factory=AudioSettings)
    text: TextSettings = Field(default_factory=TextSettings)
    decoders: int = Field(default=0, ge=0)
    decode_timeout_s: float = Field(default=60.0, gt=0)
    window_mb: int = Field(default=512, ge=1)
    max_failed_share: float = Field(default=0.5, ge=0, le=1)


def decode_settings(config: EncodeConfig) -> DecodeSettings:
    """Return what the decoders are told."""
    return DecodeSettings(
        fps=config.video.fps,
        size=config.video.size,
        sample_rate=config.audio.sample_rate,
        channels=config.audio.channels,
        min_seconds=config.clip.min_seconds,
    )


def preprocessing(config: EncodeConfig, modality: str) -> dict[str, Any]:
    """Return what a modality goes through before its codec; part of the fingerprint.

    ``decoder`` counts versions of ``pipeline.decode``: raise it when its output changes.
    """
    if modality == "text":
        return {"max_words": config.text.max_words}
    common = {"min_seconds": config.clip.min_seconds, "decoder": 1}
    if modality == "video":
        return {"fps": config.video.fps, "size": config.video.size, "crop": "centre"} | common
    return {"sample_rate": config.audio.sample_rate, "channels": config.audio.channels} | common


def column_specs(config: EncodeConfig) -> dict[str, ColumnSpec]:
    """Return the wanted columns by modality."""
    from pipeline.codecs import column_spec  # imports torch, which the plan doesn't need

    return {
        modality: column_spec(
            modality, asdict(getattr(config, modality).codec), preprocessing(config, modality)
        )
        for modality in config.columns
    }
