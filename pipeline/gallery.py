"""A page to look at and listen to clips side by side: one HTML file with everything inside."""

from __future__ import annotations

import base64
import html
import io
import os
import wave
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pipeline.audio import mel_spectrogram, resample
from pipeline.mux import SAMPLE_RATES_HZ, write_mp4

FILMSTRIP_FRAMES = 8
FILMSTRIP_HEIGHT = 72
SPECTROGRAM_SIZE = (576, 96)
MEL_BANDS = 64
MEL_FFT = 1024
MEL_FLOOR_DB = -100.0
# Dark to bright through purple and orange: loudness must rise in every copy, printed ones too.
COLOURS = ((0, 0, 8), (60, 15, 110), (150, 45, 120), (235, 100, 75), (252, 250, 200))

HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.4 system-ui, sans-serif; margin: 24px; background: #fafafa; color: #222; }}
h1 {{ font-size: 20px; }} .note {{ color: #666; }}
article {{ background: #fff; border: 1px solid #ddd; border-radius: 8px; padding: 12px 16px;
  margin: 16px 0; }}
h2 {{ font-size: 16px; margin: 0 0 8px; }} h2 small {{ color: #888; font-weight: normal; }}
.takes {{ display: flex; flex-wrap: wrap; gap: 24px; }}
figure {{ margin: 0; width: 576px; max-width: 100%; }}
figcaption {{ font-weight: 600; margin-bottom: 4px; }}
figcaption small {{ color: #666; font-weight: normal; }}
video {{ width: 256px; display: block; background: #000; image-rendering: pixelated; }}
audio {{ width: 100%; display: block; }}
img {{ width: 100%; display: block; margin-top: 4px; }}
</style></head><body><h1>{title}</h1><p class="note">{note}</p>
"""
FOOT = "</body></html>\n"


@dataclass(frozen=True)
class Take:
    """One version of a clip: the source, or what was made from it.

    Attributes:
        name: short, for file names: "source", "v2a".
        title: what a person reads above it.
        frames: uint8 [T, H, W, 3], or None where there is no picture.
        sound: float32 [channels, N], or None where there is none.
        note: what a person reads beside the title.
    """

    name: str
    title: str
    frames: np.ndarray | None
    fps: float
    sound: np.ndarray | None
    sample_rate: int
    note: str = ""


@dataclass(frozen=True)
class Entry:
    """A clip and its takes, shown side by side."""

    key: str
    caption: str
    takes: tuple[Take, ...]
    note: str = ""


def write_gallery(folder: Path, title: str, note: str, entries: Iterable[Entry]) -> Path:
    """Write the takes' media and ``index.html``, which needs no other file.

    Args:
        folder: made if absent.
        entries: taken one by one, so that a generator keeps one clip in memory.

    Returns:
        Path of index.html, which appears when it is complete.
    """
    (folder / "media").mkdir(parents=True, exist_ok=True)
    path = folder / "index.html"
    temporary = folder / f".{path.name}.{os.getpid()}.tmp"
    try:
        with temporary.open("w", encoding="utf-8") as page:
            page.write(HEAD.format(title=html.escape(title), note=html.escape(note)))
            for entry in entries:
                page.write(_article(folder, entry) + "\n")
            page.write(FOOT)
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return path


def media_path(key: str, take: str, suffix: str = "mp4") -> str:
    """Return a take's file, relative to the gallery's folder."""
    return f"media/{key}.{take}.{suffix}"


def _article(folder: Path, entry: Entry) -> str:
    figures = "\n".join(_figure(folder, entry, take) for take in entry.takes)
    caption = html.escape(entry.caption) or "<i>no caption</i>"
    small = " · ".join(html.escape(text) for text in (entry.key, entry.note) if text)
    heading = f"<h2>{caption} <small>{small}</small></h2>"
    return f'<article>{heading}<div class="takes">{figures}</div></article>'


def _figure(folder: Path, entry: Entry, take: Take) -> str:
    caption = f"{html.escape(take.title)} <small>{html.escape(take.note)}</small>"
    parts = [f"<figcaption>{caption}</figcaption>", _player(folder, entry.key, take)]
    if take.frames is not None:
        parts.append(f'<img alt="filmstrip" src="{_picture_uri(filmstrip(take.frames))}">')
    if take.sound is not None:
        picture = spectrogram(take.sound, take.sample_rate)
        parts.append(f'<img alt="spectrogram" src="{_picture_uri(picture)}">')
    return f"<figure>{''.join(parts)}</figure>"


def _player(folder: Path, key: str, take: Take) -> str:
    """Write what can be seen or heard of a take; return the element that plays it."""
    if take.frames is not None:
        path = folder / media_path(key, take.name)
        sound, sample_rate = take.sound, take.sample_rate
        if sound is not None:
            sound, sample_rate = playable(sound, sample_rate)
        write_mp4(path, take.frames, take.fps, sound, sample_rate)
        return f'<video controls loop preload="auto" src="{_data_uri(path, "video/mp4")}"></video>'
    if take.sound is not None:
        path = folder / media_path(key, take.name, "wav")
        write_wav(path, take.sound, take.sample_rate)
        return f'<audio controls loop src="{_data_uri(path, "audio/wav")}"></audio>'
    return ""


def playable(sound: np.ndarray, sample_rate: int) -> tuple[np.ndarray, int]:
    """Return sound and its rate, resampled to the next higher rate that an mp4 can name."""
    higher = [rate for rate in SAMPLE_RATES_HZ if rate >= sample_rate]
    rate = min(higher, default=max(SAMPLE_RATES_HZ))
    return resample(np.ascontiguousarray(sound, dtype=np.float32), sample_rate, rate), rate


def write_wav(path: Path, sound: np.ndarray, sample_rate: int) -> None:
    """Write sound [channels, N] in [-1, 1] (values beyond are clipped) as 16 bit PCM."""
    samples = (np.clip(sound.T, -1, 1) * 32767).round().astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(samples.shape[1])
        file.setsampwidth(2)
        file.setframerate(sample_rate)
        file.writeframes(samples.tobytes())


def _data_uri(path: Path, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def _picture_uri(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def filmstrip(frames: np.ndarray) -> Image.Image:
    """Return evenly spaced frames in a row."""
    places = np.linspace(0, len(frames) - 1, FILMSTRIP_FRAMES).round().astype(int)
    width = round(FILMSTRIP_HEIGHT * frames.shape[2] / frames.shape[1])
    strip = Image.new("RGB", (width * FILMSTRIP_FRAMES, FILMSTRIP_HEIGHT))
    for column, place in enumerate(places):
        frame = Image.fromarray(frames[place]).resize((width, FILMSTRIP_HEIGHT))
        strip.paste(frame, (column * width, 0))
    return strip


def mel_decibels(sound: np.ndarray, sample_rate: int) -> np.ndarray:
    """Return the mel spectrogram of a sound's mono mix in dB, float32 [MEL_BANDS, frames of 10 ms].

    Bands up to half the sample rate; nothing is below ``MEL_FLOOR_DB``.
    """
    hop = max(1, sample_rate // 100)
    mel = mel_spectrogram(sample_rate, MEL_FFT, hop, MEL_BANDS, 0.0, sample_rate / 2)
    mono = torch.from_numpy(np.ascontiguousarray(sound, dtype=np.float32).mean(axis=0))
    if len(mono) < MEL_FFT:
        mono = torch.nn.functional.pad(mono, (0, MEL_FFT - len(mono)))
    return 20 * np.log10(np.maximum(mel(mono).numpy(), 10 ** (MEL_FLOOR_DB / 20)))


def spectrogram(sound: np.ndarray, sample_rate: int) -> Image.Image:
    """Return the log mel spectrogram, low frequencies at the bottom, 70 dB from dark to bright."""
    level = np.clip((mel_decibels(sound, sample_rate)[::-1] - (-80)) / 70, 0, 1)
    stops = np.linspace(0, 1, len(COLOURS))
    channels = [np.interp(level, stops, [colour[c] for colour in COLOURS]) for c in range(3)]
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8)).resize(SPECTROGRAM_SIZE)
