"""Settings of an encode run. Every field that decides bytes ends up in a column's fingerprint."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from pipeline.format import ColumnSpec
from pipeline.media import DecodeSettings
from pipeline.settings import STRICT

# Raise when pipeline.decode gives other frames or sound for the same settings.
DECODER_VERSION = 2

DAY_S = 86400.0
MIN_WINDOW_S = 0.1  # a film of two hours gives 72,000 clips
PixelCount = Annotated[int, Field(ge=16, le=4096)]
# Clips that a codec takes at once: fewer are filled up with copies, so that the latents of a clip
# don't depend on its neighbours.
Batch = Annotated[int, Field(ge=1, le=1024)]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DctSettings:
    """Built-in video codec: see ``pipeline.codecs.builtin.DctVideo``.

    Attributes:
        name: of the codec.
        frames: frames of a block.
        block: pixels of a block along each side.
        channels: coefficients kept of a block's three colour planes.
    """

    name: Literal["dct"] = "dct"
    frames: int = Field(default=1, ge=1, le=16)
    block: int = Field(default=8, ge=2, le=16)
    channels: int = Field(default=16, ge=1, le=4096)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LogmelSettings:
    """Built-in audio codec: see ``pipeline.codecs.builtin.LogmelAudio``.

    Attributes:
        name: of the codec.
        num_mels: mel bands.
        n_fft: samples of a window of the Fourier transform.
        hop: samples from one window to the next.
        fmin_hz: lower end of the bands.
        fmax_hz: upper end of the bands.
        patch: windows and bands of a patch that becomes one latent.
        channels: coefficients kept of a patch.
    """

    name: Literal["logmel"] = "logmel"
    num_mels: int = Field(default=64, ge=4, le=1024)
    n_fft: int = Field(default=1024, ge=64, le=65536)
    hop: int = Field(default=160, ge=16, le=65536)
    fmin_hz: float = Field(default=0.0, ge=0)
    fmax_hz: float = Field(default=8000.0, gt=0)
    patch: int = Field(default=4, ge=1, le=16)
    channels: int = Field(default=8, ge=1, le=256)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class HashSettings:
    """Built-in text codec: see ``pipeline.codecs.builtin.HashText``.

    Attributes:
        name: of the codec.
        width: values of a word's vector.
    """

    name: Literal["hash"] = "hash"
    width: int = Field(default=64, ge=1, le=65536)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class VideoSettings:
    """The frames that are encoded.

    Attributes:
        fps: frames per second.
        size: frames are ``size`` x ``size`` pixels.
        buckets: instead of ``size``, [height, width] of several sizes; every clip takes the one
            whose aspect ratio is nearest to its own.
        fit: "crop" scales the picture to fill its size and cuts the centre out; "pad" scales it
            to fit in and leaves black bars.
        decoder: "pyav" is faster at every size and sees damage (tools.bench_decode); "decord"
            decodes what it can be trusted with, for frames like those of other pipelines.
        batch: clips that the codec takes at once; the built-in one gains nothing by it.
    """

    fps: float = Field(default=8.0, gt=0, le=120)
    size: int = Field(default=256, ge=16, le=4096)
    buckets: tuple[tuple[PixelCount, PixelCount], ...] = ()
    fit: Literal["crop", "pad"] = "crop"
    decoder: Literal["pyav", "decord"] = "pyav"
    batch: Batch = 1
    codec: DctSettings = Field(default_factory=DctSettings)

    def __post_init__(self) -> None:
        for size in {side for sides in self.sizes for side in sides}:
            if size % self.codec.block:
                raise ValueError(f"size {size} is not a multiple of codec.block {self.codec.block}")

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """(height, width) of the frames to choose from."""
        return self.buckets or ((self.size, self.size),)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AudioSettings:
    """The PCM sound that is encoded.

    Attributes:
        sample_rate: samples per second.
        channels: 1 is the average of all; of surround sound, each of 2 is the average of its
            side's channels and the centre.
        batch: clips that the codec takes at once.
    """

    sample_rate: int = Field(default=16000, ge=4000, le=192000)
    channels: Literal[1, 2] = 1
    batch: Batch = 1
    codec: LogmelSettings = Field(default_factory=LogmelSettings)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TextSettings:
    """The captions that are encoded.

    Attributes:
        max_words: a longer caption is cut after so many.
        batch: captions that the codec takes at once.
    """

    max_words: int = Field(default=64, ge=1, le=65536)
    batch: Batch = 1
    codec: HashSettings = Field(default_factory=HashSettings)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ClipSettings:
    """Which span of a file is a clip.

    Attributes:
        seconds: of a file's start; a shorter file is a shorter clip.
    """

    seconds: float = Field(default=10.0, gt=0, le=DAY_S)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class WindowSettings:
    """Long files cut into several clips.

    Attributes:
        seconds: of a clip; 0: files are not cut.
        stride_seconds: from the start of one clip to that of the next; 0: as long as a clip.
    """

    seconds: float = Field(default=0.0, ge=0, le=DAY_S)
    stride_seconds: float = Field(default=0.0, ge=0, le=DAY_S)

    def __post_init__(self) -> None:
        if any(0 < value < MIN_WINDOW_S for value in (self.seconds, self.stride_seconds)):
            raise ValueError(f"seconds and stride_seconds of windows: {MIN_WINDOW_S:g} at least")
        if self.seconds and not self.stride_seconds:
            object.__setattr__(self, "stride_seconds", self.seconds)
        if self.stride_seconds and not self.seconds:
            raise ValueError("stride_seconds needs seconds: the length of a window")


Policy = Literal["flag", "drop"]
# Check -> the setting that is its threshold, in the order in which checks are applied.
THRESHOLDS = {
    "truncated": "min_decoded_share",
    "too_short": "min_seconds",
    "silent": "max_silent_share",
    "still": "min_motion",
    "low_fps": "min_fps",
}


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CheckSettings:
    """What becomes of doubtful clips: "flag" notes it in the facts, "drop" gives no latents.

    The defaults keep what papers that train on VGGSound keep: every clip that is there whole.
    Each policy has one threshold; the facts of ``pipeline.checks`` say how it is measured.

    Attributes:
        too_short: "flag" or "drop" clips below ``min_seconds``.
        min_seconds: of picture and sound together.
        truncated: "flag" or "drop" clips below ``min_decoded_share``.
        min_decoded_share: of the frames or samples expected.
        silent: "flag" or "drop" clips above ``max_silent_share``.
        max_silent_share: of time below -60 dBFS.
        still: "flag" or "drop" clips below ``min_motion``.
        min_motion: mean difference of frames 1 / fps apart (white is 1). At 8 fps, coded still
            images gave at most .0007, the 35 real test clips .003 to .16.
        low_fps: "flag" or "drop" clips below ``min_fps``.
        min_fps: frames a second in the file.
        duplicate: "flag" or "drop" clips with the same packets of picture and sound as a clip
            earlier in the plan.
    """

    too_short: Policy = "drop"
    min_seconds: float = Field(default=1.0, ge=0)
    truncated: Policy = "drop"
    min_decoded_share: float = Field(default=0.98, ge=0, le=1)
    silent: Policy = "flag"
    max_silent_share: float = Field(default=0.95, ge=0, le=1)
    still: Policy = "flag"
    min_motion: float = Field(default=0.001, ge=0, le=1)
    low_fps: Policy = "flag"
    min_fps: float = Field(default=8.0, ge=0)
    duplicate: Policy = "flag"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EncodeConfig:
    """Everything ``python -m pipeline.encode`` can be told.

    Attributes:
        media: csv and table only: folder or URL of the media, default that of the table.
        columns: which modalities to encode.
        shard_size: clips per shard, the unit of work and of commit.
        seed: of the plan's shuffle.
        caption_template: caption of clips that have a label only, such as "the sound of {label}".
        cells: encoders, each with its decoders beside it; 0 = one on this machine, with --address
            as many as the cluster holds.
        decoders: decoder processes of a cell, a CPU each; 0 = as many as its share of the CPUs
            allows. --calibrate advises a number.
        encoder_cpus: of the cluster, for one encoder.
        encoder_gpus: the same; .5 puts two encoders on a GPU.
        encode_timeout_s: an encoder that is silent for so long is ended, its shard given out again.
        decode_timeout_s: a clip that takes longer has its decoder killed.
        fetch_timeout_s: so has one whose file takes longer to come, if it is not a local file.
        clips_per_decoder: a decoder process is replaced after this many clips.
        cache_dir: where remote media and members of tars are kept for a while; default: in /tmp.
        cache_gb: size of that cache on every node, at most.
        window_mb: decoded frames and sound in flight in a cell, at most, but a clip at least.
        metrics_port: of the Ray that the run starts, for Prometheus; 0: none. With --address it is
            the cluster's to say.
        max_failed_share: the run fails (exit 1) when more clips than this have no latents.
    """

    media: str | None = None
    columns: tuple[Literal["video", "audio", "text"], ...] = Field(
        default=("video", "audio", "text"), min_length=1
    )
    shard_size: int = Field(default=512, ge=1, le=1_000_000)
    seed: int = 0
    caption_template: str = ""
    clip: ClipSettings = Field(default_factory=ClipSettings)
    windows: WindowSettings = Field(default_factory=WindowSettings)
    video: VideoSettings = Field(default_factory=VideoSettings)
    audio: AudioSettings = Field(default_factory=AudioSettings)
    text: TextSettings = Field(default_factory=TextSettings)
    checks: CheckSettings = Field(default_factory=CheckSettings)
    cells: int = Field(default=0, ge=0, le=4096)
    decoders: int = Field(default=0, ge=0, le=1024)
    encoder_cpus: int = Field(default=1, ge=1, le=1024)
    encoder_gpus: float = Field(default=0.0, ge=0, le=8)
    encode_timeout_s: float = Field(default=600.0, ge=10, le=DAY_S)
    decode_timeout_s: float = Field(default=60.0, gt=0, le=DAY_S)
    fetch_timeout_s: float = Field(default=600.0, gt=0, le=DAY_S)
    clips_per_decoder: int = Field(default=2000, ge=1)
    cache_dir: str | None = None
    cache_gb: float = Field(default=20.0, gt=0, le=1e6)
    window_mb: int = Field(default=512, ge=1, le=1_000_000)
    metrics_port: int = Field(default=0, ge=0, le=65535)
    max_failed_share: float = Field(default=0.5, ge=0, le=1)


def decode_settings(config: EncodeConfig) -> DecodeSettings:
    """Return what the decoders are told."""
    return DecodeSettings(
        fps=config.video.fps,
        sizes=config.video.sizes,
        fit=config.video.fit,
        decoder=config.video.decoder,
        sample_rate=config.audio.sample_rate,
        channels=config.audio.channels,
    )


def preprocessing(config: EncodeConfig, modality: str) -> dict[str, Any]:
    """Return what a modality goes through before its codec; part of the fingerprint.

    A batch counts: on GPUs its size decides the order of sums, and with it the last bits. Checks
    count where they decide what has latents, and for sound the picture's size and rate
    where stillness does, which is measured on the frames.
    """
    batch = getattr(config, modality).batch
    batched = {"batch": batch} if batch > 1 else {}
    if modality == "text":
        return {"max_words": config.text.max_words} | batched
    common = batched | {"checks": dropping(config.checks), "decoder_version": DECODER_VERSION}
    video, audio = config.video, config.audio
    picture = {"fps": video.fps, "sizes": list(video.sizes), "fit": video.fit}
    picture |= {"decoder": video.decoder}
    if modality == "video":
        return picture | common
    if config.checks.still == "drop":
        common |= {"picture": picture}
    return {"sample_rate": audio.sample_rate, "channels": audio.channels} | common


def dropping(checks: CheckSettings) -> dict[str, Any]:
    """Return the checks that take latents away, with their thresholds."""
    limits = {check: getattr(checks, name) for check, name in THRESHOLDS.items()}
    return {
        check: limit
        for check, limit in (limits | {"duplicate": True}).items()
        if getattr(checks, check) == "drop"
    }


def column_specs(config: EncodeConfig) -> dict[str, ColumnSpec]:
    """Return the wanted columns by modality."""
    from pipeline.codecs import column_spec  # imports torch, which the plan doesn't need

    return {
        modality: column_spec(
            modality, asdict(getattr(config, modality).codec), preprocessing(config, modality)
        )
        for modality in config.columns
    }
