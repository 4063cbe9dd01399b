"""What decoding costs: CPU seconds and memory per clip, ours against the decoders people know.

All contenders do the same work on the same clips: 8 frames a second of 256 x 256 and 16 kHz mono
sound, with one FFmpeg thread; ours measures its facts and judges them on top. Each has a process
of its own, so that its memory is its own; they take turns, so that other load on the machine hits
all alike. Compare the ratios: seconds change with the machine. Linux only: memory is read from
/proc.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from tools.contenders import CONTENDERS, OURS, SAMPLE_RATE_HZ, SIZE, Task

CLIPS = Path(__file__).resolve().parents[2] / "shared/clips/vggsound/video"
DEFAULT_SOURCE = CLIPS / "0B4dYTMsgHA_000130.mp4"  # 1280 x 720, 30 fps
# Like YouTube's, which the clips of VGGSound are cut from.
ENCODER, SOURCE_RATE_HZ = {"preset": "medium", "crf": "23", "g": "250"}, 44100
# Peers leave the encoder's priming in, or cut too much; ours must be exact.
MAX_PRIMING_S = 0.1
# Of 255, mean over a clip: contenders may choose neighbouring frames, but not show other pictures.
MAX_BRIGHTNESS_OFF = 4.0

INSTALL_TORCHCODEC = """\
torchcodec is no dependency of this project. Beside a CPU-only torch take 0.13.0, the last version
whose wheel on PyPI is not linked to CUDA, into a folder of its own; it loads the FFmpeg libraries
of the system (apt install ffmpeg):
  pip install --no-deps --target /tmp/torchcodec torchcodec==0.13.0
  python -m tools.bench_decode --peer-path /tmp/torchcodec"""


@dataclass
class Result:
    """One contender on one clip: CPU seconds per turn and their median, resident memory in MB."""

    contender: str
    version: str = ""
    problem: str = ""
    num_samples: int = 0
    brightness: float = 0.0
    idle_mb: float = 0.0
    peak_mb: float = 0.0
    turns_s: list[float] = field(default_factory=list)
    cpu_s: float = 0.0
    of_fastest_peer: float = 0.0


def prepare_clip(path: Path, source: Path, seconds: float) -> Task:
    """Make the clip ``<height>.mp4`` from a source unless it is there, and describe it."""
    # Here, not above: every contender's process imports this file.
    import av
    from av.video.reformatter import Colorspace

    if not path.exists():
        partial = path.with_name(f".{os.getpid()}.{path.name}")
        frame: Any
        with av.open(str(source)) as read, av.open(str(partial), "w") as write:
            shown = read.streams.video[0]
            video = write.add_stream("libx264", rate=shown.average_rate, options=ENCODER)
            video.height = int(path.stem)
            video.width = round(video.height * shown.width / shown.height / 2) * 2
            video.pix_fmt = "yuv420p"
            # Ours does not let decord decode high definition that is not tagged.
            video.codec_context.colorspace = Colorspace.ITU709
            audio = write.add_stream("aac", rate=SOURCE_RATE_HZ, layout="stereo")
            for frame in read.decode(video=0, audio=0):
                if frame.time < seconds:  # encode() scales and resamples
                    stream: Any = audio if isinstance(frame, av.AudioFrame) else video
                    write.mux(stream.encode(frame))
            write.mux(video.encode(None) + audio.encode(None))
        partial.rename(path)
    with av.open(str(path)) as container:
        video = container.streams.video[0]
        scale = SIZE / min(video.width, video.height)
        return Task(str(path), seconds, (round(video.width * scale), round(video.height * scale)))


def render_source(path: Path, seconds: float) -> Path:
    """Stand in for a real source: a bouncing world, which is easier to decode than footage."""
    from pipeline.mux import write_mp4
    from tools.bouncing import ClipSettings, draw_frames, draw_sound, draw_world

    settings = ClipSettings(seconds=seconds, size=360, fps=30, sample_rate=SOURCE_RATE_HZ)
    world = draw_world(np.random.default_rng(settings.seed), settings)
    frames, sound = draw_frames(world, settings), draw_sound(world, settings)
    write_mp4(path, frames, settings.fps, sound, settings.sample_rate)
    return path


def measure(task: Task, repeats: int, peer_path: str | None) -> list[Result]:
    """Let every contender decode the clip once, then in turn ``repeats`` times."""
    context = multiprocessing.get_context("spawn")  # a fork would share our memory
    results, lanes = [], []
    for contender in CONTENDERS:
        here, there = context.Pipe()
        arguments = (there, contender, task, peer_path)
        process = context.Process(target=_serve, args=arguments, daemon=True)
        process.start()
        there.close()
        try:
            results.append(Result(contender, **here.recv()))
        except EOFError:
            results.append(Result(contender, problem="its process died"))
        if not results[-1].problem:
            lanes.append((here, process, results[-1]))
    for _ in range(repeats):
        for here, _, result in lanes:
            here.send(True)
            result.turns_s.append(here.recv())
    for here, process, result in lanes:
        here.send(False)
        result.peak_mb = here.recv()
        process.join()
    compare([result for _, _, result in lanes])
    return results


def _serve(connection: Connection, name: str, task: Task, peer_path: str | None) -> None:
    """In a contender's process: decode once to show that it can, then once for every True."""
    if peer_path:
        sys.path.append(peer_path)
    try:
        version, decode = CONTENDERS[name]()
        idle_mb = _memory_mb("VmRSS")
        frames, sound = decode(task)
        check_work(frames, sound, task, 0.0 if name.startswith(OURS) else MAX_PRIMING_S)
    except Exception as error:  # whatever a peer raises where it does not work
        connection.send({"problem": f"{type(error).__name__}: {error}".splitlines()[0]})
        return
    found = {"version": version, "idle_mb": idle_mb, "num_samples": len(sound)}
    connection.send(found | {"brightness": float(frames.mean())})
    del frames, sound
    while connection.recv():
        before_s = _cpu_s(name)
        decode(task)
        connection.send(_cpu_s(name) - before_s)
    program_mb = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    connection.send(program_mb if name == "ffmpeg" else _memory_mb("VmHWM"))


def check_work(frames: np.ndarray, sound: np.ndarray, task: Task, max_off_s: float) -> None:
    """Raise ValueError unless a contender made what the task says, sound to ``max_off_s``."""
    expected = (len(task.instants_s), SIZE, SIZE, 3)
    if frames.shape != expected or frames.dtype != np.uint8:
        raise ValueError(f"frames are {frames.dtype} {frames.shape}, expected uint8 {expected}")
    off_s = abs(len(sound) - round(task.seconds * SAMPLE_RATE_HZ)) / SAMPLE_RATE_HZ
    if sound.dtype != np.float32 or sound.ndim != 1 or off_s > max_off_s:
        raise ValueError(f"sound is {sound.dtype} {sound.shape}, expected {task.seconds:g} s")


def _cpu_s(name: str) -> float:
    if name != "ffmpeg":
        return time.process_time()
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _memory_mb(entry: str) -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{entry}:")[1].split()[0]) / 1024


def compare(results: list[Result]) -> None:
    """Fill in medians and ratios: each turn over the fastest peer's turn beside it in time."""
    middle = statistics.median(result.brightness for result in results)
    for result in results:
        result.cpu_s = statistics.median(result.turns_s)
        if abs(result.brightness - middle) > MAX_BRIGHTNESS_OFF:
            result.problem = f"its frames have mean {result.brightness:.1f}, others {middle:.1f}"
    peers = [each for each in results if not (each.contender.startswith(OURS) or each.problem)]
    fastest = min(peers, key=lambda peer: peer.cpu_s)
    for result in results:
        pairs = zip(result.turns_s, fastest.turns_s, strict=True)
        result.of_fastest_peer = statistics.median(turn / peer for turn, peer in pairs)


def print_table(height: int, results: list[Result]) -> None:
    """Print what one clip costs each contender."""
    title = f"{height}p"
    print(f"\n{title:12s}   CPU s  (min - max)      of fastest peer  peak MB  idle MB  samples")
    for result in results:
        if result.problem:
            print(f"{result.contender:12s}  not compared: {result.problem}")
            continue
        spread = f"({min(result.turns_s):.3f} - {max(result.turns_s):.3f})"
        print(
            f"{result.contender:12s}{result.cpu_s:8.3f}  {spread:17s}"
            f"{result.of_fastest_peer:17.2f}{result.peak_mb:9.0f}{result.idle_mb:9.0f}"
            f"{result.num_samples:9d}",
            flush=True,
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 1 where ours can't decode a clip."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench_decode",
        description=__doc__,
        epilog=INSTALL_TORCHCODEC,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--source", type=Path, help="film that the clips are made from")
    parser.add_argument("--clips", type=Path, help="folder of clips <height>.mp4, made if missing")
    parser.add_argument("--heights", default="256,360,720,1080", help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=10.0, help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=7, help="turns, default: %(default)s")
    parser.add_argument("--peer-path", help="folder that torchcodec was installed to")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    options = parser.parse_args(arguments)
    os.environ["OMP_NUM_THREADS"] = "1"
    source = options.source or (DEFAULT_SOURCE if DEFAULT_SOURCE.exists() else None)
    name = f"bench-decode-{source.stem if source else 'rendered'}-{options.seconds:g}s"
    folder = options.clips or Path(tempfile.gettempdir(), name)
    folder.mkdir(parents=True, exist_ok=True)
    source = source or render_source(folder / "rendered.mp4", options.seconds)
    results: dict[int, list[Result]] = {}
    for height in map(int, options.heights.split(",")):
        task = prepare_clip(folder / f"{height}.mp4", source, options.seconds)
        results[height] = measure(task, options.repeats, options.peer_path)
        if not options.json:
            print_table(height, results[height])
    measured = next(iter(results.values()))
    versions = {result.contender: result.version for result in measured if result.version}
    if options.json:
        rows = {height: [asdict(result) for result in found] for height, found in results.items()}
        print(json.dumps({"clips": str(folder), "versions": versions, "heights": rows}, indent=1))
    else:
        print(f"\nclips: {folder}; " + ", ".join(f"{name} {v}" for name, v in versions.items()))
    return int(any(found[0].problem for found in results.values()))


if __name__ == "__main__":
    sys.exit(main())
