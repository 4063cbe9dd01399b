"""Ways to decode one clip: ours and the decoders people know, doing the same work.

H.264 and AAC to frames of 256 x 256 at 8 fps (short side scaled, inside the decoder where it can;
centre cut out) and 16 kHz mono sound, with one FFmpeg thread. Every function imports what it needs
and returns (version, how to decode): a process that calls one holds the libraries of no other.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

FPS, SIZE, SAMPLE_RATE_HZ = 8, 256, 16000
OURS = "ours"  # contenders of ours start so


@dataclass(frozen=True)
class Task:
    """One clip, and what every contender has to make of it; ``scaled`` is (width, height)."""

    path: str
    seconds: float
    scaled: tuple[int, int]

    @property
    def instants_s(self) -> np.ndarray:
        """Second of every frame, float64 [T]."""
        return np.arange(round(self.seconds * FPS)) / FPS


# Frames uint8 [T, SIZE, SIZE, 3] and mono sound float32 [N] of a clip.
Decode = Callable[[Task], tuple[np.ndarray, np.ndarray]]


def ours(decoder: str) -> tuple[str, Decode]:
    """``pipeline.decode`` with facts and checks, as a decoder process runs it."""
    from pipeline.checks import judge
    from pipeline.config import DECODER_VERSION, CheckSettings, EncodeConfig, decode_settings
    from pipeline.decode import decode_clip
    from pipeline.media import Clip

    settings = replace(decode_settings(EncodeConfig()), decoder=decoder)  # defaults are the task

    def decode(task: Task) -> tuple[np.ndarray, np.ndarray]:
        clip = Clip("bench", task.path, 0.0, task.seconds)
        found = decode_clip(Path(task.path), clip, settings, {"video", "audio"})
        judged = judge(found, CheckSettings())
        if judged.frames is None or judged.sound is None:
            raise ValueError(f"no frames or no sound: {judged.problems}")
        if judged.facts["decoder"] != decoder:
            raise ValueError(f"decoded by {judged.facts['decoder']}, expected {decoder}")
        return judged.frames, judged.sound[0]

    return f"decoder {DECODER_VERSION}", decode


def plain_decord() -> tuple[str, Decode]:
    """decord's readers of video and audio, frames chosen by its table of timestamps."""
    import decord

    def decode(task: Task) -> tuple[np.ndarray, np.ndarray]:
        width, height = task.scaled
        reader = decord.VideoReader(task.path, width=width, height=height, num_threads=1)
        starts_s = reader.get_frame_timestamp(range(len(reader)))[:, 0]
        chosen = np.searchsorted(starts_s, task.instants_s, side="right") - 1
        frames = _centre_cut(reader.get_batch(chosen.tolist()).asnumpy())
        sound = decord.AudioReader(task.path, sample_rate=SAMPLE_RATE_HZ, mono=True)
        return frames, sound[:].asnumpy()[0]

    return decord.__version__, decode


def plain_pyav() -> tuple[str, Decode]:
    """One pass over the packets: every frame decoded, the first at or after an instant scaled."""
    import av

    def decode(task: Task) -> tuple[np.ndarray, np.ndarray]:
        instants_s, frames, sound = [*task.instants_s, np.inf], [], []
        resampler = av.AudioResampler("fltp", "mono", SAMPLE_RATE_HZ)
        frame: Any
        with av.open(task.path) as container:
            container.streams.video[0].thread_count = 1
            for frame in container.decode(video=0, audio=0):
                if isinstance(frame, av.AudioFrame):
                    sound += [part.to_ndarray()[0] for part in resampler.resample(frame)]
                elif frame.time >= instants_s[len(frames)]:
                    frames.append(_centre_cut(frame.reformat(*task.scaled, "rgb24").to_ndarray()))
        sound += [part.to_ndarray()[0] for part in resampler.resample(None)]
        return np.stack(frames), np.concatenate(sound)

    return av.__version__, decode


def torchcodec() -> tuple[str, Decode]:
    """Its decoders of video and audio, exact seeking by default, scaled and cut inside."""
    import torchcodec  # pyright: ignore[reportMissingImports]
    from torchcodec import decoders, transforms  # pyright: ignore[reportMissingImports]

    def decode(task: Task) -> tuple[np.ndarray, np.ndarray]:
        shape = [transforms.Resize(task.scaled[::-1]), transforms.CenterCrop((SIZE, SIZE))]
        options: dict[str, Any] = {"dimension_order": "NHWC", "num_ffmpeg_threads": 1}
        video = decoders.VideoDecoder(task.path, transforms=shape, **options)
        frames = video.get_frames_played_at(task.instants_s.tolist()).data
        audio = decoders.AudioDecoder(task.path, sample_rate=SAMPLE_RATE_HZ, num_channels=1)
        return frames.numpy(), audio.get_all_samples().data[0].numpy()

    return torchcodec.__version__, decode


def ffmpeg_program() -> tuple[str, Decode]:
    """The command line program; it writes to memory where the system has such a folder."""
    said = subprocess.run(["ffmpeg", "-version"], capture_output=True, text=True, check=True)
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    folder = tempfile.TemporaryDirectory(dir=memory)

    def decode(task: Task) -> tuple[np.ndarray, np.ndarray]:
        frames, sound = Path(folder.name, "frames"), Path(folder.name, "sound")
        shape = f"fps={FPS},scale={task.scaled[0]}:{task.scaled[1]},crop={SIZE}:{SIZE}"
        command = ["ffmpeg", "-v", "error", "-y", "-threads", "1", "-i", task.path]
        command += ["-filter_threads", "1", "-map", "0:v", "-vf", shape, "-pix_fmt", "rgb24"]
        command += ["-frames:v", str(len(task.instants_s)), "-f", "rawvideo", str(frames)]
        command += ["-map", "0:a", "-ac", "1", "-ar", str(SAMPLE_RATE_HZ), "-f", "f32le"]
        subprocess.run([*command, str(sound)], check=True)
        # Mapped, not read: Linux counts the memory of the process that starts a program as the
        # program's own, so this one has to stay the smaller.
        pixels = np.memmap(frames, np.uint8, "r").reshape(-1, SIZE, SIZE, 3)
        return pixels, np.memmap(sound, np.float32, "r")

    return said.stdout.split()[2], decode


CONTENDERS: dict[str, Callable[[], tuple[str, Decode]]] = {
    OURS: partial(ours, "pyav"),
    "ours/decord": partial(ours, "decord"),
    "decord": plain_decord,
    "PyAV": plain_pyav,
    "torchcodec": torchcodec,
    "ffmpeg": ffmpeg_program,
}


def _centre_cut(frames: np.ndarray) -> np.ndarray:
    top, left = (frames.shape[-3] - SIZE) // 2, (frames.shape[-2] - SIZE) // 2
    return np.ascontiguousarray(frames[..., top : top + SIZE, left : left + SIZE, :])
