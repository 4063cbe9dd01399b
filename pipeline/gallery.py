"""A page to look at and listen to clips side by side: one HTML file with everything inside."""

from __future__ import annotations

import base64
import html
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pipeline.audio import mel_spectrogram
from pipeline.mux import write_mp4

FILMSTRIP_FRAMES = 8
FILMSTRIP_HEIGHT = 72
SPECTROGRAM_SIZE = (576, 96)
# Dark to bright through purple and orange: loudness must rise in every copy, printed ones too.
COLOURS = ((0, 0, 8), (60, 15, 110), (150, 45, 120), (235, 100, 75), (252, 250, 200))

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.4 system-ui, sans-serif; margin: 24px; background: #fafafa; color: #222; }}
h1 {{ font-size: 20px; }} .note {{ color: #666; }}
article {{ background: #fff; border: 1px solid #ddd; border-radius: 8px; padding: 12px 16px;
  margin: 16px 0; }}
h2 {{ font-size: 16px; margin: 0 0 8px; }} h2 small {{ color: #888; font-weight: normal; }}
.takes {{ display: flex; flex-wrap: wrap; gap: 24px; }}
figure {{ margin: 0; width: 576px; max-width: 100%; }}
figcaption {{ font-weight: 600; margin-bottom: 4px; }}
video {{ width: 256px; display: block; background: #000; image-rendering: pixelated; }}
img {{ width: 100%; display: block; margin-top: 4px; }}
</style></head><body><h1>{title}</h1><p class="note">{note}</p>
{articles}
</body></html>
"""


@dataclass(frozen=True)
class Take:
    """One version of a clip: the source, or what was generated from it.

    Attributes:
        name: short, for file names: "source", "v2a".
        title: what a person reads above it.
        frames: uint8 [T, H, W, 3].
        sound: float32 [channels, N].
    """

    name: str
    title: str
    frames: np.ndarray
    fps: float
    sound: np.ndarray
    sample_rate: int


@dataclass(frozen=True)
class Entry:
    """A clip and its takes, shown side by side."""

    key: str
    caption: str
    takes: tuple[Take, ...]


def write_gallery(folder: Path, title: str, note: str, entries: list[Entry]) -> Path:
    """Write ``media/<key>.<take>.mp4`` and ``index.html``, which needs no other file.

    Returns:
        Path of index.html.
    """
    (folder / "media").mkdir(parents=True, exist_ok=True)
    articles = "\n".join(_article(folder, entry) for entry in entries)
    page = PAGE.format(title=html.escape(title), note=html.escape(note), articles=articles)
    path = folder / "index.html"
    path.write_text(page, encoding="utf-8")
    return path


def media_path(key: str, take: str) -> str:
    """Return a take's file, relative to the gallery's folder."""
    return f"media/{key}.{take}.mp4"


def _article(folder: Path, entry: Entry) -> str:
    figures = "\n".join(_figure(folder, entry, take) for take in entry.takes)
    caption = html.escape(entry.caption) or "<i>no caption</i>"
    heading = f"<h2>{caption} <small>{html.escape(entry.key)}</small></h2>"
    return f'<article>{heading}<div class="takes">{figures}</div></article>'


def _figure(folder: Path, entry: Entry, take: Take) -> str:
    path = folder / media_path(entry.key, take.name)
    write_mp4(path, take.frames, take.fps, take.sound, take.sample_rate)
    movie = base64.b64encode(path.read_bytes()).decode()
    return (
        f"<figure><figcaption>{html.escape(take.title)}</figcaption>"
        f'<video controls loop preload="auto" src="data:video/mp4;base64,{movie}"></video>'
        f'<img alt="filmstrip" src="{_data_uri(filmstrip(take.frames))}">'
        f'<img alt="spectrogram" src="{_data_uri(spectrogram(take.sound, take.sample_rate))}">'
        "</figure>"
    )


def _data_uri(picture: Image.Image) -> str:
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


def spectrogram(sound: np.ndarray, sample_rate: int) -> Image.Image:
    """Return the log mel spectrogram, low frequencies at the bottom, 70 dB from dark to bright."""
    mel = mel_spectrogram(sample_rate, 1024, max(1, sample_rate // 100), 64, 0.0, sample_rate / 2)
    mono = torch.from_numpy(np.ascontiguousarray(sound, dtype=np.float32).mean(axis=0))
    if len(mono) < 1024:
        mono = torch.nn.functional.pad(mono, (0, 1024 - len(mono)))
    decibels = 20 * np.log10(np.maximum(mel(mono).numpy()[::-1], 1e-5))
    level = np.clip((decibels - (-80)) / 70, 0, 1)
    stops = np.linspace(0, 1, len(COLOURS))
    channels = [np.interp(level, stops, [colour[c] for colour in COLOURS]) for c in range(3)]
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8)).resize(SPECTROGRAM_SIZE)
